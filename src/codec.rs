//! How messages are read: only where they have no more fields than any message may have.

use std::marker::PhantomData;

use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf, Decoder};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// The most fields that a message may have, each element of a list being one: `limits.max_items_per_request` may be as
/// high, and no message has as many other fields. Two bytes make an item, which takes fifty times as much memory.
const MOST_FIELDS: usize = (1 << 16) + 16;

/// tonic's codec for protobuf messages, which are counted before they are decoded.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Counted<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Counted(ProstDecoder::default())
    }
}

/// A decoder that counts a message's fields first.
#[derive(Debug)]
pub struct Counted<U>(ProstDecoder<U>);

impl<U: Message + Default> Decoder for Counted<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The buffer is one piece.
        if has_too_many_fields(bytes::Buf::chunk(buffer)) {
            return Err(Status::internal(format!("it has more than {MOST_FIELDS} fields")));
        }
        self.0.decode(buffer)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// What else may be wrong with the message is for its decoder to say.
fn has_too_many_fields(mut message: &[u8]) -> bool {
    for _ in 0..MOST_FIELDS {
        let Ok((tag, wire_type)) = decode_key(&mut message) else { return false };
        if skip_field(wire_type, tag, &mut message, DecodeContext::default()).is_err() {
            return false;
        }
    }
    !message.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_as_far_as_they_can_be_read() {
        assert!(!has_too_many_fields(&[]));
        assert!(!has_too_many_fields(&[0x12, 0].repeat(MOST_FIELDS)));
        assert!(has_too_many_fields(&[0x12, 0].repeat(MOST_FIELDS + 1)));
        assert!(!has_too_many_fields(&[[0x12, 0].repeat(9), vec![0xff; 1 << 20]].concat()));
    }
}
