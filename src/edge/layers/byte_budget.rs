//! The memory that messages take on their way in, over all calls: from a message's first byte until its last picture is
//! decoded.
//!
//! A message counts by the length that stands before it, so that what has begun to arrive can always end. A call whose
//! message does not fit is refused at once; a stream waits, for as long as a message may take to arrive.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::gauge;
use tokio::sync::Notify;

use crate::config::Limits;
use crate::error::ScoreError;
use crate::request_context::Caller;
use crate::telemetry::MESSAGE_BYTES;

/// What the messages of all callers hold together.
#[derive(Debug)]
pub struct ByteBudget {
    /// The most that they may hold.
    most: usize,
    /// The most that one of them may have.
    pub(super) largest: usize,
    held: Mutex<Held>,
    /// Wakes messages that wait for room.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Held {
    bytes: usize,
    /// Who holds nothing is not listed.
    by_caller: HashMap<Caller, usize>,
}

impl ByteBudget {
    /// Room for the messages of all callers, within these limits.
    pub fn new(limits: &Limits) -> Arc<Self> {
        let Limits { max_bytes_in_flight: most, max_message_bytes: largest, .. } = *limits;
        Arc::new(Self { most, largest, held: Mutex::default(), freed: Notify::new() })
    }

    /// Takes room, as the queue gives it: where `n` callers hold some, none may hold more than one part in `n + 1`, and
    /// who holds nothing but `had`, of the same message, may take whatever fits.
    fn take(&self, caller: &Caller, bytes: usize, had: usize) -> Result<(), ScoreError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut held = self.lock();
        let own = held.by_caller.get(caller).copied().unwrap_or_default();
        let holders = held.by_caller.len() + usize::from(own == 0);
        let within_share = own == had || own + bytes <= self.most / (holders + 1);
        if held.bytes + bytes > self.most || !within_share {
            return Err(ScoreError::TooManyBytes { limit: self.most });
        }
        held.bytes += bytes;
        *held.by_caller.entry(caller.clone()).or_default() += bytes;
        gauge!(MESSAGE_BYTES).increment(bytes as f64);
        Ok(())
    }

    fn give_back(&self, caller: &Caller, bytes: usize) {
        let mut held = self.lock();
        held.bytes -= bytes;
        if let Some(own) = held.by_caller.get_mut(caller) {
            *own -= bytes;
            if *own == 0 {
                held.by_caller.remove(caller);
            }
        }
        drop(held);
        gauge!(MESSAGE_BYTES).decrement(bytes as f64);
        self.freed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn of(most: usize) -> Arc<Self> {
        Arc::new(Self { most, largest: most, held: Mutex::default(), freed: Notify::new() })
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.lock().bytes
    }
}

/// The room of one message. Dropping it gives the room back.
#[derive(Debug)]
pub(in crate::edge) struct Hold {
    pub(super) budget: Arc<ByteBudget>,
    caller: Caller,
    bytes: AtomicUsize,
}

impl Hold {
    /// Room for a message of so many bytes of this caller.
    pub(super) fn new(budget: &Arc<ByteBudget>, caller: &Caller, bytes: usize) -> Result<Self, ScoreError> {
        budget.take(caller, bytes, 0)?;
        Ok(Self { budget: Arc::clone(budget), caller: caller.clone(), bytes: bytes.into() })
    }

    /// The same, once there is some.
    pub(super) async fn when_room(budget: Arc<ByteBudget>, caller: Caller, bytes: usize) -> Self {
        loop {
            // Listens before it looks, so that room made in between is not missed.
            let freed = budget.freed.notified();
            match Self::new(&budget, &caller, bytes) {
                Ok(hold) => return hold,
                Err(_) => freed.await,
            }
        }
    }

    /// More room of the same caller, which is given back by itself.
    pub(super) fn another(&self, bytes: usize) -> Result<Self, ScoreError> {
        Self::new(&self.budget, &self.caller, bytes)
    }

    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes what is missing to so many bytes.
    pub(super) fn grow(&self, bytes: usize) -> Result<(), ScoreError> {
        let more = bytes.saturating_sub(self.bytes());
        self.budget.take(&self.caller, more, self.bytes())?;
        self.bytes.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.budget.give_back(&self.caller, self.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(name: &str) -> Caller {
        Caller(name.into())
    }

    #[test]
    fn a_greedy_caller_leaves_room_and_the_largest_message_always_fits_an_empty_one() {
        let budget = ByteBudget::of(1200);
        let hold = |name, bytes| Hold::new(&budget, &caller(name), bytes);
        drop(hold("a", 1200).unwrap());
        let greedy: Vec<_> = std::iter::from_fn(|| hold("greedy", 100).ok()).collect();
        assert_eq!(greedy.len(), 6, "half of it while nobody else is there");
        let other: Vec<_> = std::iter::from_fn(|| hold("other", 100).ok()).collect();
        assert_eq!(other.len(), 4, "a third now that there are two");
        assert!(hold("third", 201).is_err());
        let third = hold("third", 200).unwrap();
        assert!(hold("third", 1).is_err() && hold("fourth", 1).is_err());
        drop((greedy, other, third));
        let held = budget.lock();
        assert_eq!((held.bytes, held.by_caller.len()), (0, 0));
    }
}
