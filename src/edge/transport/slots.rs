//! The places that connections have: how many there are, whose they are, and who gives way.
//!
//! A connection begins as a stranger's. It is known once a call on it was let in: one that showed a token, or a client's
//! certificate, or, where nobody is asked, any call but for health. Strangers have few places for each address once they
//! have had time to become known: a hundred callers that come at once are no flood. Where none is left, a new one takes that
//! of the oldest of whoever has most, so that a probe, or who is about to show a token, always gets in.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::counter;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::edge::layers::peer::Peer;
use crate::telemetry::{CONNECTIONS_DISPLACED, CONNECTIONS_REFUSED};

/// How long a stranger has to become known before it may have to give way to another of its address, where that has places.
const NEWCOMER: Duration = Duration::from_secs(5);

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// All together.
    pub all: usize,
    /// Those of one address.
    pub of_address: usize,
    /// Strangers' of one address, beside newcomers.
    pub of_stranger: usize,
}

/// The connections that there are.
#[derive(Debug)]
pub struct Slots {
    places: Places,
    /// The oldest first.
    taken: Mutex<Vec<Arc<Slot>>>,
}

/// A connection among all others.
#[derive(Debug)]
pub struct Slot {
    pub(super) peer: Peer,
    /// Cancelled when it gives way.
    pub(super) displaced: CancellationToken,
    since: Instant,
}

/// A place that is taken. Dropping it gives it back.
#[derive(Debug)]
pub struct Taken {
    slots: Arc<Slots>,
    slot: Arc<Slot>,
}

impl Taken {
    /// The connection that has it.
    pub(super) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Slot {
    fn is_stranger(&self) -> bool {
        !self.peer.is_known()
    }

    fn is_newcomer(&self) -> bool {
        self.since.elapsed() < NEWCOMER
    }

    /// Waits until it gives way as a stranger's, at once: what is known is let end in order.
    pub(super) async fn stranger_displaced(&self) {
        self.displaced.cancelled().await;
        if self.peer.is_known() {
            std::future::pending().await
        }
    }
}

impl Slots {
    /// So many places, all of them free.
    pub fn new(places: Places) -> Arc<Self> {
        Arc::new(Self { places, taken: Mutex::default() })
    }

    /// Takes a place for a connection from this address, which another may lose; `None` where none gives way.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Taken> {
        let peer = Peer::stranger(address);
        let mut taken = self.lock();
        if let Some(full) = self.full_for(&peer, &taken) {
            let Some(place) = displaced(full, &peer, &taken) else {
                counter!(CONNECTIONS_REFUSED).increment(1);
                return None;
            };
            taken.remove(place).displaced.cancel();
            counter!(CONNECTIONS_DISPLACED).increment(1);
        }
        let slot = Arc::new(Slot { peer, displaced: CancellationToken::new(), since: Instant::now() });
        taken.push(Arc::clone(&slot));
        Some(Taken { slots: Arc::clone(self), slot })
    }

    fn full_for(&self, peer: &Peer, taken: &[Arc<Slot>]) -> Option<Full> {
        let Places { all, of_address, of_stranger } = self.places;
        let own = taken.iter().filter(|slot| slot.peer.address() == peer.address());
        let mut strangers = own.clone().filter(|slot| slot.is_stranger()).peekable();
        // The oldest is the first.
        let may_give_way = strangers.peek().is_some_and(|oldest| !oldest.is_newcomer());
        if own.count() >= of_address || may_give_way && strangers.count() >= of_stranger {
            Some(Full::ForAddress)
        } else {
            (taken.len() >= all).then_some(Full::ForAll)
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Slot>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        // Who gave way has lost it already.
        if let Some(place) = taken.iter().position(|slot| Arc::ptr_eq(slot, &self.slot)) {
            taken.remove(place);
        }
    }
}

/// For whom there is no place left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    ForAddress,
    ForAll,
}

/// Which connection gives way: the oldest stranger of whoever has most of them. Where there is none, one without a call
/// does, of an address that has more of those than the new one's has connections.
fn displaced(full: Full, peer: &Peer, taken: &[Arc<Slot>]) -> Option<usize> {
    let own = |slot: &Slot| slot.peer.address() == peer.address();
    let silent = |slot: &Slot| slot.peer.calls().is_closed();
    match full {
        Full::ForAddress => taken.iter().position(|slot| own(slot) && slot.is_stranger()),
        Full::ForAll => oldest_of_most(taken, 0, Slot::is_stranger).or_else(|| {
            let own = taken.iter().filter(|slot| own(slot)).count();
            oldest_of_most(taken, own, silent)
        }),
    }
}

fn oldest_of_most(taken: &[Arc<Slot>], least: usize, may: impl Fn(&Slot) -> bool) -> Option<usize> {
    let mut counts: HashMap<IpAddr, (usize, usize)> = HashMap::new();
    for (place, slot) in taken.iter().enumerate().filter(|(_, slot)| may(slot)) {
        counts.entry(slot.peer.address()).or_insert((0, place)).0 += 1;
    }
    let most = counts.into_values().max_by_key(|&(count, place)| (count, std::cmp::Reverse(place)));
    most.filter(|&(count, _)| count > least).map(|(_, place)| place)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn slots(all: usize, of_address: usize, of_stranger: usize) -> Arc<Slots> {
        Slots::new(Places { all, of_address, of_stranger })
    }

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// Places for so many connections of an address.
    fn take(slots: &Arc<Slots>, last: u8, count: usize) -> Vec<Taken> {
        std::iter::from_fn(|| slots.take(address(last))).take(count).collect()
    }

    /// How many of an address still have theirs.
    fn left(slots: &Slots, last: u8) -> usize {
        slots.lock().iter().filter(|slot| slot.peer.address() == address(last)).count()
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_have_few_places_and_the_new_one_takes_the_oldest() {
        let slots = slots(100, 50, 4);
        let mut mine = take(&slots, 1, 4);
        mine[0].slot.peer.know();
        advance(NEWCOMER).await;
        mine.extend(take(&slots, 1, 3));
        let ours = slots.lock().iter().map(Arc::as_ptr).collect::<Vec<_>>();
        let kept: Vec<_> = [0, 3, 4, 5, 6].map(|n| Arc::as_ptr(&mine[n].slot)).to_vec();
        assert_eq!(ours, kept, "the known one, and the four youngest");
        drop(mine);
        assert!(slots.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_at_once_with_many_has_time_to_become_known() {
        let slots = slots(100, 50, 4);
        let crowd = take(&slots, 1, 50);
        assert_eq!(left(&slots, 1), 50, "as many as an address may have");
        drop(take(&slots, 1, 1));
        assert_eq!(left(&slots, 1), 49, "one more takes the place of the oldest at once");
        crowd[..45].iter().for_each(|taken| taken.slot.peer.know());
        advance(NEWCOMER).await;
        drop(take(&slots, 1, 1));
        assert_eq!(left(&slots, 1), 48, "five strangers are one too many");
        drop(take(&slots, 1, 1));
        assert_eq!(left(&slots, 1), 47);
        drop(take(&slots, 1, 1));
        assert_eq!(left(&slots, 1), 47, "three leave room for one");
        drop(crowd);
    }

    #[test]
    fn who_shows_a_token_gets_in_however_many_strangers_there_are() {
        let slots = slots(10, 6, 6);
        let (flood, more) = (take(&slots, 1, 50), take(&slots, 3, 50));
        assert_eq!((left(&slots, 1), left(&slots, 3)), (4, 6));
        let mut trainer: Vec<Taken> = Vec::new();
        for _ in 0..6 {
            trainer.extend(take(&slots, 2, 1));
            trainer.last().unwrap().slot.peer.know();
        }
        assert_eq!(left(&slots, 2), 6);
        assert_eq!(left(&slots, 1).abs_diff(left(&slots, 3)), 0, "whoever has most gives way");
        assert!(
            slots.take(address(2)).is_none(),
            "an address has its share, and none of these is a stranger's"
        );
        drop((flood, more));
    }

    #[test]
    fn where_all_are_known_those_without_a_call_make_room_for_newcomers() {
        let slots = slots(8, 8, 8);
        let mut taken: Vec<Taken> = Vec::new();
        for _ in 0..8 {
            taken.push(slots.take(address(1)).unwrap());
            taken.last().unwrap().slot.peer.know();
        }
        let mut calls: Vec<_> = taken.iter().map(|taken| taken.slot.peer.calls().subscribe()).collect();
        assert!(slots.take(address(2)).is_none());
        drop(calls.drain(..2));
        let newcomer = take(&slots, 2, 1);
        newcomer[0].slot.peer.know();
        assert_eq!((left(&slots, 1), left(&slots, 2)), (7, 1));
        assert!(slots.take(address(2)).is_none(), "it has as many as the other has without a call");
    }
}
