//! Who waits for places in the queue, in the order in which they came.

use std::collections::{HashSet, VecDeque};

use tokio::sync::oneshot;

use super::queue::Permit;
use super::quota::{Account, Held, Room, account_of};
use crate::config::Capacity;
use crate::error::ScoreError;
use crate::request_context::Claim;

type Granted = Result<Vec<Permit>, ScoreError>;

/// One who waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub claim: Claim,
    /// The costs of its items, which get their places together.
    pub costs: Vec<usize>,
    granted: oneshot::Sender<Granted>,
}

impl Waiter {
    /// One who waits, and where it hears of its places.
    pub fn new(claim: &Claim, costs: &[usize]) -> (Self, oneshot::Receiver<Granted>) {
        let (granted, receiver) = oneshot::channel();
        (Self { claim: claim.clone(), costs: costs.to_vec(), granted }, receiver)
    }

    /// The places that it waits for.
    pub fn wanted(&self) -> Held {
        Held { tokens: self.costs.iter().sum(), items: self.costs.len() }
    }

    /// Ends its wait. The places of one who has left are given back.
    pub fn answer(self, granted: Granted) {
        let _ = self.granted.send(granted);
    }

    fn has_left(&self) -> bool {
        self.granted.is_closed()
    }
}

/// All who wait.
#[derive(Debug, Default)]
pub(super) struct Line(VecDeque<Waiter>);

impl Line {
    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One more, behind all others.
    pub fn push(&mut self, waiter: Waiter) {
        self.0.push_back(waiter);
    }

    /// All of them, in their order. Those who have left are left out.
    pub fn into_waiters(self) -> impl Iterator<Item = Waiter> {
        self.0.into_iter().filter(|waiter| !waiter.has_left())
    }

    /// The tokens that are waited for before one who comes now; `None` where it need not wait behind anyone.
    pub fn ahead_of(&self, claim: &Claim, room: &Room, capacity: Capacity) -> Option<usize> {
        let (mut ahead, mut tokens) = (Ahead::default(), 0);
        for waiter in self.0.iter().filter(|waiter| !waiter.has_left()) {
            tokens += waiter.wanted().tokens;
            ahead.add(waiter, room, capacity);
        }
        (!ahead.lets_pass(claim, room)).then_some(tokens)
    }
}

/// Those before one in the line, as far as it must not pass them.
///
/// Nobody passes its own. One whose share is used up waits for places of its own, and keeps nobody else back. One for whom
/// the queue has no room keeps back all behind it that hold places, or small ones would for good take what it waits for;
/// who holds nothing still takes whatever fits.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    accounts: HashSet<Account>,
    keeps_holders_back: bool,
}

impl Ahead {
    /// Whether a claim passes them.
    pub fn lets_pass(&self, claim: &Claim, room: &Room) -> bool {
        !(self.accounts.contains(&account_of(claim)) || self.keeps_holders_back && room.holds(claim))
    }

    /// One more.
    pub fn add(&mut self, waiter: &Waiter, room: &Room, capacity: Capacity) {
        self.keeps_holders_back |=
            room.own_excess(capacity, &waiter.claim, waiter.wanted()) == Held::default();
        self.accounts.insert(account_of(&waiter.claim));
    }
}
