//! How many refusals a caller may have at once: a refusal costs little, and a caller without patience asks for many.
//!
//! One more than it may have is held back until its turn, and no other call of its connection is. A stranger's is said at
//! once: there the connection is not read until then, which keeps nothing.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::peer::Peer;
use crate::request_context::Caller;

/// How long a refusal is held back at most. What is open then is bounded by the calls that may be.
const MOST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a stranger is not read at most: its next call may be one that shows a token.
pub(crate) const MOST_PAUSE: Duration = Duration::from_secs(2);
/// The refusals that a caller may have at once, as the time in which it may have them one after the other.
const BURST: Duration = Duration::from_secs(1);

/// The turns of refused callers.
#[derive(Debug)]
pub struct Refusals {
    /// The time that a refusal takes of its caller's.
    each: Duration,
    turns: Mutex<Turns>,
}

#[derive(Debug, Default)]
struct Turns {
    /// When the next refusal of a caller is due. Who was not refused of late is left out.
    of: HashMap<Caller, Instant>,
    /// The same for all together that have not said who they are, who have twice as many.
    strangers: Option<Instant>,
}

impl Refusals {
    /// So many a second for each caller.
    pub fn new(per_second: u32) -> Self {
        Self { each: Duration::from_secs(1) / per_second, turns: Mutex::default() }
    }

    /// Waits for the turn of one more refusal of this caller. A `stranger` waits for its turn among all others too.
    pub async fn turn(&self, caller: &Caller, stranger: bool, peer: Option<&Peer>) {
        match peer {
            Some(peer) if !peer.is_known() => self.pause(caller, stranger, peer),
            _ => sleep_until(self.due(caller, stranger, Instant::now())).await,
        }
    }

    /// One more refusal of this caller on a stranger's connection, which is not read until its turn.
    pub fn pause(&self, caller: &Caller, stranger: bool, peer: &Peer) {
        let now = Instant::now();
        let due = self.due(caller, stranger, now);
        if due > now {
            peer.pause(due.min(now + MOST_PAUSE));
        }
    }

    fn due(&self, caller: &Caller, stranger: bool, now: Instant) -> Instant {
        let next = |before: Option<Instant>, each| {
            let due = before.map_or(now, |before| before.max(now)) + each;
            due.min(now + BURST + MOST_PATIENCE)
        };
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Before it grows.
        if turns.of.len() == turns.of.capacity() {
            turns.of.retain(|_, due| *due > now);
        }
        let mut due = next(turns.of.get(caller).copied(), self.each);
        turns.of.insert(caller.clone(), due);
        if stranger {
            let among = next(turns.strangers, self.each / 2);
            turns.strangers = Some(among);
            due = due.max(among);
        }
        due.checked_sub(BURST).unwrap_or(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When each of so many refusals at once is said, in milliseconds.
    async fn said(refusals: &Refusals, callers: usize, each: usize, stranger: bool) -> Vec<u128> {
        let start = Instant::now();
        let turns = (0..callers * each).map(|n| async move {
            let name = (n % callers).to_string();
            refusals.turn(&Caller(name.as_str().into()), stranger, None).await;
            start.elapsed().as_millis()
        });
        futures::future::join_all(turns).await
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_come_at_a_rate_and_a_burst_at_once() {
        let refusals = Refusals::new(10);
        let times = said(&refusals, 1, 30, false).await;
        assert!(times[..10].iter().all(|&at| at == 0), "{times:?}");
        assert!((1999..=2001).contains(&times[29]), "{times:?}");
        // Another is not held back by that, and after a pause neither is the first.
        assert_eq!(said(&refusals, 3, 10, false).await.into_iter().max(), Some(1000), "{times:?}");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(said(&refusals, 3, 10, false).await, [0; 30]);
        let most = said(&refusals, 1, 1000, false).await.into_iter().max().unwrap();
        assert!((4999..=5001).contains(&most), "{most}");
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_share_what_they_may_have() {
        let refusals = Refusals::new(10);
        let times = said(&refusals, 5, 8, true).await;
        assert_eq!(times.iter().filter(|&&at| at == 0).count(), 20, "{times:?}");
        assert!((999..=1001).contains(&times[39]), "{times:?}");
        // Who is known is none of them.
        assert_eq!(said(&refusals, 1, 1, false).await, [0]);
    }

    #[test]
    fn who_was_refused_long_ago_is_forgotten() {
        let (refusals, now) = (Refusals::new(1000), Instant::now());
        for n in 0..5000_u32 {
            let caller = Caller(n.to_string().as_str().into());
            refusals.due(&caller, false, now + Duration::from_millis(10) * n);
        }
        assert!(refusals.turns.lock().unwrap().of.capacity() < 1000);
    }
}
