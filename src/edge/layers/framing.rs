//! gRPC's framing: messages behind a byte of flags and four of length.

/// Where a body is in its framing.
#[derive(Debug, Default)]
pub struct Framing {
    prefix: [u8; 5],
    /// Bytes of the prefix that are there.
    have: usize,
    /// Bytes of the message that are not there.
    missing: usize,
}

impl Framing {
    /// Goes on with `data` up to the end of the next message's prefix: how far that is, and the message's length, in
    /// bytes; `None` where no prefix ends in it, and all of it is past.
    pub fn next(&mut self, data: &[u8]) -> Option<(usize, usize)> {
        let mut at = self.missing.min(data.len());
        self.missing -= at;
        while self.missing == 0 {
            let byte = *data.get(at)?;
            at += 1;
            if let Some(place) = self.prefix.get_mut(self.have) {
                *place = byte;
            }
            self.have += 1;
            if self.have == self.prefix.len() {
                let [_, length @ ..] = self.prefix;
                (self.have, self.missing) = (0, u32::from_be_bytes(length) as usize);
                return Some((at, self.missing));
            }
        }
        None
    }

    /// Goes on with all of `data`.
    pub fn advance(&mut self, mut data: &[u8]) {
        while let Some((end, _)) = self.next(data) {
            data = data.split_at(end).1;
        }
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
                framing.advance(piece);
                at += piece.len();
                assert_eq!(framing.within_message(), !boundaries.contains(&at), "{at} in pieces of {size}");
            }
            let (mut framing, mut at, mut begun) = (Framing::default(), 0, Vec::new());
            for mut piece in body.chunks(size) {
                while let Some((end, length)) = framing.next(piece) {
                    (at, piece) = (at + end, &piece[end..]);
                    begun.push((at, length));
                }
                at += piece.len();
            }
            assert_eq!(begun, [(5, 3), (13, 0), (18, 1)], "in pieces of {size}");
        }
    }
}
