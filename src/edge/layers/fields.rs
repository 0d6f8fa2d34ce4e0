//! Messages are read only where they have no more fields than any message may have.

use prost::encoding::{DecodeContext, decode_key, skip_field};

/// The most fields that a message may have, each element of a list being one: `limits.max_items_per_request` may be as
/// high, and no message has as many other fields. Two bytes make an item, which takes fifty times as much memory.
const MOST_FIELDS: usize = (1 << 16) + 16;

/// What else may be wrong with the message is for its decoder to say.
pub fn has_too_many_fields(mut message: &[u8]) -> bool {
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
