//! Where a call comes from.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;

use futures::task::AtomicWaker;
use tokio::sync::watch;
use tokio::time::Instant;

/// The other end of a connection, which is a stranger until a call on it is let in. Stands in the extensions of every
/// request.
#[derive(Debug, Clone)]
pub struct Peer(Arc<Standing>);

#[derive(Debug)]
struct Standing {
    address: IpAddr,
    known: AtomicBool,
    /// Counts the calls that began on the connection; its receivers are those that are open.
    calls: watch::Sender<u64>,
    /// Until when a stranger is not read.
    pause: Mutex<Option<Instant>>,
    /// Bytes that its calls have taken.
    taken: AtomicU64,
    /// Whether it may still be read in this turn of its task.
    turn: AtomicBool,
    /// Who reads the connection, where it waits until fewer calls are open.
    reader: AtomicWaker,
}

/// A call that is open on a connection, which the connection sees while this lives. Stands in the extensions of a
/// request.
#[derive(Debug, Clone)]
pub struct OpenCall {
    /// `None` once it has ended.
    open: Option<watch::Receiver<u64>>,
    peer: Peer,
}

impl OpenCall {
    /// One more call of this peer.
    pub fn of(peer: &Peer) -> Self {
        let calls = peer.calls();
        calls.send_modify(|begun| *begun += 1);
        Self { open: Some(calls.subscribe()), peer: peer.clone() }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        // Whoever is woken counts what is open.
        self.open = None;
        self.peer.0.reader.wake();
    }
}

impl Peer {
    /// A new connection's. Of an IPv6 address only the network counts: whoever has one has all of its addresses.
    pub fn stranger(address: IpAddr) -> Self {
        let address = match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = u128::from(address) & !u128::from(u64::MAX);
                IpAddr::V6(Ipv6Addr::from(if address.is_loopback() { 1 } else { network }))
            }
            address => address,
        };
        Self(Arc::new(Standing {
            address,
            known: AtomicBool::new(false),
            calls: watch::Sender::default(),
            pause: Mutex::default(),
            taken: AtomicU64::default(),
            turn: AtomicBool::default(),
            reader: AtomicWaker::new(),
        }))
    }

    /// Its address.
    pub fn address(&self) -> IpAddr {
        self.0.address
    }

    /// Counts the calls that began on its connection. Its receivers are those that are open.
    pub fn calls(&self) -> &watch::Sender<u64> {
        &self.0.calls
    }

    /// Whether it has shown who it is.
    pub fn is_known(&self) -> bool {
        self.0.known.load(Ordering::Relaxed)
    }

    /// It has.
    pub fn know(&self) {
        self.0.known.store(true, Ordering::Relaxed);
        self.0.reader.wake();
    }

    /// Whether it is a stranger that has more than so many calls open. Who asks is woken once that may have changed.
    pub fn is_crowded(&self, most: usize, context: &Context<'_>) -> bool {
        let crowded = || !self.is_known() && self.calls().receiver_count() > most;
        crowded() && {
            self.0.reader.register(context.waker());
            crowded()
        }
    }

    /// Whether it may still be read in this turn of its task.
    pub fn has_turn(&self) -> bool {
        self.0.turn.load(Ordering::Relaxed)
    }

    /// A turn begins, or what may be read in it was.
    pub fn set_turn(&self, turn: bool) {
        self.0.turn.store(turn, Ordering::Relaxed);
    }

    /// Notes that a call has taken so many bytes.
    pub fn take(&self, bytes: u64) {
        self.0.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that its calls have taken.
    pub fn taken(&self) -> u64 {
        self.0.taken.load(Ordering::Relaxed)
    }

    /// Reads nothing more of a stranger until then.
    pub fn pause(&self, until: Instant) {
        let mut pause = self.0.pause.lock().unwrap_or_else(PoisonError::into_inner);
        *pause = (*pause).max(Some(until));
    }

    /// Until when nothing is read.
    pub fn paused(&self) -> Option<Instant> {
        if self.is_known() {
            return None;
        }
        *self.0.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn an_address_is_that_of_whoever_has_it() {
        for (address, counts) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("::1", "::1"),
        ] {
            let peer = Peer::stranger(address.parse().unwrap());
            assert_eq!(peer.address().to_string(), counts);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_with_too_many_calls_waits_until_one_has_ended_or_it_is_known() {
        let peer = Peer::stranger([192, 0, 2, 7].into());
        let room = || {
            let room =
                poll_fn(|context| if peer.is_crowded(2, context) { Poll::Pending } else { Poll::Ready(()) });
            timeout(Duration::from_secs(1), room)
        };
        let mut calls: Vec<_> = (0..3).map(|_| OpenCall::of(&peer)).collect();
        assert!(room().await.is_err());
        let (woken, ()) = tokio::join!(room(), async { drop(calls.pop()) });
        assert!(woken.is_ok());
        calls.push(OpenCall::of(&peer));
        let (woken, ()) = tokio::join!(room(), async { peer.know() });
        assert!(woken.is_ok());
    }

    #[test]
    fn who_is_known_is_read_at_once() {
        let peer = Peer::stranger([192, 0, 2, 7].into());
        peer.pause(Instant::now());
        assert!(peer.paused().is_some());
        peer.know();
        assert!(peer.paused().is_none());
    }
}
