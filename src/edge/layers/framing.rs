//! gRPC's framing: messages behind a byte of flags and four of length.

use bytes::{Buf, Bytes};

/// Where a body is in its framing.
#[derive(Debug, Default)]
pub struct Framing {
    prefix: [u8; 5],
    /// Bytes of the prefix that are there.
    have: usize,
    /// Bytes of the message that are not there.
    missing: usize,
}

/// What stands before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    pub flags: u8,
    pub length: usize,
}

impl Framing {
    /// Takes the prefix of the next message off `data`, or what is there of it. The message before it was all taken.
    pub fn prefix(&mut self, data: &mut Bytes) -> Option<Prefix> {
        let place = self.prefix.get_mut(self.have..).unwrap_or_default();
        let there = place.len().min(data.len());
        data.copy_to_slice(place.split_at_mut(there).0);
        self.have += there;
        if self.have < self.prefix.len() {
            return None;
        }
        let [flags, length @ ..] = self.prefix;
        (self.have, self.missing) = (0, u32::from_be_bytes(length) as usize);
        Some(Prefix { flags, length: self.missing })
    }

    /// Takes off `data` what is there of the message that has begun.
    pub fn part(&mut self, data: &mut Bytes) -> Bytes {
        let part = data.split_to(self.missing.min(data.len()));
        self.missing -= part.len();
        part
    }

    /// Goes past all of `data`. Gives whether a message ended in it.
    pub fn skip(&mut self, mut data: Bytes) -> bool {
        let mut ended = false;
        while !data.is_empty() {
            if self.missing == 0 {
                self.prefix(&mut data);
            }
            self.part(&mut data);
            ended |= !self.within_message();
        }
        ended
    }

    /// Whether a message has begun, or its prefix, and is not all there.
    pub fn within_message(&self) -> bool {
        self.have > 0 || self.missing > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framing_is_followed_however_it_is_cut() {
        let body = [&[0, 0, 0, 0, 3, 1, 2, 3][..], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 1, 9]].concat();
        let boundaries = [0, 8, 13, 19];
        for size in 1..=body.len() {
            let (mut framing, mut at) = (Framing::default(), 0);
            for piece in body.chunks(size) {
                let ended = framing.skip(Bytes::copy_from_slice(piece));
                let within = at + 1..=at + piece.len();
                assert_eq!(
                    ended,
                    boundaries.iter().any(|end| within.contains(end)),
                    "{at} in pieces of {size}"
                );
                at += piece.len();
                assert_eq!(framing.within_message(), !boundaries.contains(&at), "{at} in pieces of {size}");
            }
            let (mut framing, mut prefixes, mut parts) = (Framing::default(), Vec::new(), Vec::new());
            for piece in body.chunks(size) {
                let mut piece = Bytes::copy_from_slice(piece);
                while !piece.is_empty() {
                    parts.extend_from_slice(&framing.part(&mut piece));
                    prefixes.extend(framing.prefix(&mut piece));
                }
            }
            let prefix = |flags, length| Prefix { flags, length };
            assert_eq!(prefixes, [prefix(0, 3), prefix(1, 0), prefix(0, 1)], "in pieces of {size}");
            assert_eq!(parts, [1, 2, 3, 9], "in pieces of {size}");
        }
    }
}
