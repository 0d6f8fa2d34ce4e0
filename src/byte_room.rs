//! Room for copies of what callers sent, in bytes. Who finds none does without: nobody waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// So many bytes for all.
#[derive(Debug)]
pub struct ByteRoom {
    most: usize,
    held: AtomicUsize,
}

/// A part of it, which goes back when this is dropped.
#[derive(Debug)]
pub struct Held {
    room: Arc<ByteRoom>,
    bytes: usize,
}

impl ByteRoom {
    /// Of so many bytes.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, held: AtomicUsize::new(0) })
    }

    /// A part of so many bytes, if there is one; what is larger than all of it has it alone.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        let more = |held: usize| {
            let sum = held.checked_add(bytes)?;
            (held == 0 || sum <= self.most).then_some(sum)
        };
        self.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        Some(Held { room: Arc::clone(self), bytes })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.held.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_goes_back() {
        let room = ByteRoom::new(10);
        let (six, four) = (room.hold(6).unwrap(), room.hold(4).unwrap());
        assert!(room.hold(1).is_none());
        drop(six);
        assert!(room.hold(7).is_none());
        let _six = room.hold(6).unwrap();
        drop(four);
        assert!(room.hold(5).is_none());
        drop(_six);
        let large = room.hold(50).unwrap();
        assert!(room.hold(1).is_none());
        drop(large);
        assert!(room.hold(10).is_some());
    }
}
