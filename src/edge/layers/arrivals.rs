//! Messages that have arrived, each with its room in the [`ByteBudget`].
//!
//! They are put together here and not by tonic, whose buffers keep the memory of a stream's last one for as long as the
//! stream is open: it gets an empty message for each, and the handler the real one.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use flate2::read::GzDecoder;
use http_body::SizeHint;
use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};

use super::byte_budget::{ByteBudget, Hold};
use crate::edge::proto;
use crate::edge::proto::image::Source;
use crate::error::ScoreError;
use crate::request_context::Caller;

/// The most fields that a message may have, each element of a list being one: `limits.max_items_per_request` may be as
/// high, and no message has as many other fields. Two bytes make an item, which takes fifty times as much memory.
const MOST_FIELDS: usize = (1 << 16) + 16;

/// A call's messages that have arrived, in their order. Stands in the extensions of a request.
#[derive(Debug, Clone, Default)]
pub struct Arrivals(Arc<Mutex<VecDeque<Arrival>>>);

/// A message with its room.
#[derive(Debug)]
struct Arrival {
    hold: Hold,
    content: Content,
}

/// A message as it arrived.
#[derive(Debug)]
pub(super) enum Content {
    /// The handler has it already.
    Given,
    Plain(Bytes),
    Gzip(Bytes),
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arrival>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds room for a body that is one message before it arrives: one that does not say how long it is may have all
    /// that a message may have.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn announce(
        &self,
        budget: &Arc<ByteBudget>,
        caller: &Caller,
        size: SizeHint,
    ) -> Result<(), ScoreError> {
        let bytes = size.exact().map_or(budget.largest, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        // One that is too large is refused before it is read.
        if bytes <= budget.largest {
            self.push(Hold::new(budget, caller, bytes)?, Content::Given);
        }
        Ok(())
    }

    /// One more message.
    pub(super) fn push(&self, hold: Hold, content: Content) {
        self.lock().push_back(Arrival { hold, content });
    }

    /// Room beside the call's next message: for an answer that is as large as one.
    ///
    /// # Errors
    /// There is none.
    pub(in crate::edge) fn beside(&self, bytes: usize) -> Result<Option<Hold>, ScoreError> {
        let arrivals = self.lock();
        arrivals.front().map(|Arrival { hold, .. }| hold.another(bytes)).transpose()
    }

    /// The call's next message, in the place of what tonic gave for it. It counts for as long as one of its pictures is
    /// there.
    ///
    /// # Errors
    /// It cannot be read, or there is no room for what it is once it is unpacked.
    pub fn receive<M: Pictures + Default>(&self, given: M) -> Result<M, ScoreError> {
        let Some(Arrival { hold, content }) = self.lock().pop_front() else { return Ok(given) };
        let mut message = match content {
            Content::Given => given,
            Content::Plain(bytes) => decode(bytes)?,
            Content::Gzip(bytes) => decode(unpack(&bytes, &hold)?)?,
        };
        // Of HTTP's message nobody knew before.
        hold.grow(message.encoded_len())?;
        let hold = Arc::new(hold);
        message.pictures(|bytes| {
            let bytes = std::mem::take(bytes);
            Bytes::from_owner(Kept { bytes, _hold: Arc::clone(&hold) })
        });
        Ok(message)
    }
}

pub(super) fn unreadable(reason: impl std::fmt::Display) -> ScoreError {
    ScoreError::invalid("message", format!("cannot be read: {reason}"))
}

fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, ScoreError> {
    if has_too_many_fields(&bytes) {
        return Err(unreadable("it has too many fields"));
    }
    M::decode(bytes).map_err(unreadable)
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

/// Unpacks a message, and takes room as it grows.
fn unpack(packed: &[u8], hold: &Hold) -> Result<Bytes, ScoreError> {
    const STEP: u64 = 1 << 16;
    let largest = hold.budget.largest;
    let (mut packed, mut message) = (GzDecoder::new(packed), Vec::new());
    loop {
        let read = packed.by_ref().take(STEP).read_to_end(&mut message).map_err(unreadable)?;
        if message.len() > largest {
            return Err(unreadable(format!("it has more than {largest} bytes once it is unpacked")));
        }
        if read == 0 {
            message.shrink_to_fit();
            return Ok(message.into());
        }
        hold.grow(message.len())?;
    }
}

/// Bytes of a picture, which stand in the memory of their message, with the room of it.
struct Kept {
    bytes: Bytes,
    _hold: Arc<Hold>,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A message with pictures in it.
pub trait Pictures: Message {
    /// Puts other bytes in the place of each picture's.
    fn pictures(&mut self, other: impl FnMut(&mut Bytes) -> Bytes);
}

impl Pictures for proto::ScoreRequest {
    fn pictures(&mut self, mut other: impl FnMut(&mut Bytes) -> Bytes) {
        self.items.iter_mut().filter_map(bytes_of).for_each(|bytes| *bytes = other(bytes));
    }
}

impl Pictures for proto::GetModelRequest {
    fn pictures(&mut self, _: impl FnMut(&mut Bytes) -> Bytes) {}
}

impl Pictures for proto::ListModelsRequest {
    fn pictures(&mut self, _: impl FnMut(&mut Bytes) -> Bytes) {}
}

impl Pictures for proto::ScoreStreamRequest {
    fn pictures(&mut self, mut other: impl FnMut(&mut Bytes) -> Bytes) {
        self.item.iter_mut().filter_map(bytes_of).for_each(|bytes| *bytes = other(bytes));
    }
}

fn bytes_of(item: &mut proto::ScoreItem) -> Option<&mut Bytes> {
    Some(match item.image.as_mut()?.source.as_mut()? {
        Source::Encoded(bytes) => bytes,
        Source::Raw(raw) => &mut raw.rgb8,
    })
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
