//! Where a call comes from.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
        let (known, calls, pause) = (AtomicBool::new(false), watch::Sender::default(), Mutex::default());
        Self(Arc::new(Standing { address, known, calls, pause }))
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

    #[test]
    fn who_is_known_is_read_at_once() {
        let peer = Peer::stranger([192, 0, 2, 7].into());
        peer.pause(Instant::now());
        assert!(peer.paused().is_some());
        peer.know();
        assert!(peer.paused().is_none());
    }
}
