//! Who holds how much of the queue's room, and who may have more.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use metrics::gauge;

use super::batching::TRAINING_PER_EVALUATION;
use super::throughput::{Comeback, Drain};
use crate::config::Capacity;
use crate::request_context::{Caller, Claim, Priority};
use crate::telemetry::{QUEUE_ITEMS, QUEUE_TOKENS};

/// The places that are taken.
#[derive(Debug, Default)]
pub(super) struct Room {
    held: Held,
    /// The same by caller and priority; who holds nothing is not listed. A caller's evaluation and its training are two
    /// here, so that neither keeps the other out.
    accounts: HashMap<Account, Holder>,
    /// The same by priority.
    by_priority: [Held; 2],
    /// For callers that hold nothing.
    comeback: Comeback,
}

/// Places that are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Held {
    pub tokens: usize,
    pub items: usize,
}

/// Whose places they are. A caller's evaluation and its training are two.
pub(super) type Account = (Caller, Priority);

#[derive(Debug, Default)]
struct Holder {
    held: Held,
    comeback: Comeback,
}

impl Held {
    pub fn plus(self, other: Self) -> Self {
        Self { tokens: self.tokens + other.tokens, items: self.items + other.items }
    }

    pub fn minus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_sub(other.tokens),
            items: self.items.saturating_sub(other.items),
        }
    }

    /// What of it is above the capacity.
    pub fn over(self, capacity: Capacity) -> Self {
        self.minus(Self { tokens: capacity.tokens, items: capacity.items })
    }

    /// Its tokens, and those of its items where these are of the mean size of what is in `all`.
    fn in_tokens(self, all: Self) -> usize {
        self.tokens.max(self.items * all.tokens.div_ceil(all.items.max(1)))
    }
}

impl Room {
    /// Whether nobody holds anything.
    pub fn is_empty(&self) -> bool {
        self.held.items == 0
    }

    /// Takes places that there are, as [`Room::excess`] has found.
    pub fn take(&mut self, claim: &Claim, wanted: Held) {
        self.held = self.held.plus(wanted);
        let account = self.accounts.entry(account_of(claim)).or_default();
        account.held = account.held.plus(wanted);
        let lane = &mut self.by_priority[claim.priority as usize];
        *lane = lane.plus(wanted);
        self.publish(claim.priority);
    }

    /// Gives back one place.
    pub fn give_back(&mut self, caller: &Caller, priority: Priority, tokens: usize) {
        let given = Held { tokens, items: 1 };
        self.held = self.held.minus(given);
        if let Entry::Occupied(mut entry) = self.accounts.entry((caller.clone(), priority)) {
            let held = &mut entry.get_mut().held;
            *held = held.minus(given);
            if held.items == 0 {
                entry.remove();
            }
        }
        let lane = &mut self.by_priority[priority as usize];
        *lane = lane.minus(given);
        self.publish(priority);
    }

    fn publish(&self, priority: Priority) {
        let Held { tokens, items } = self.by_priority[priority as usize];
        gauge!(QUEUE_ITEMS, "priority" => priority.name()).set(items as f64);
        gauge!(QUEUE_TOKENS, "priority" => priority.name()).set(tokens as f64);
    }

    /// What must drain before there is room for `wanted`, in tokens; `None` where there is room.
    ///
    /// With `n` callers that hold places, none may hold more than one part in `n + 1`: there is always a part free
    /// for one who comes anew. Who holds nothing may take whatever fits.
    pub fn excess(&self, capacity: Capacity, claim: &Claim, wanted: Held) -> Option<usize> {
        let excess = self.held.plus(wanted).over(capacity);
        let own = self.own_excess(capacity, claim, wanted);
        // What is its own drains at its share of the whole rate.
        let holders = self.accounts.len() + usize::from(!self.holds(claim));
        (excess != Held::default() || own != Held::default())
            .then(|| excess.in_tokens(self.held).max(own.in_tokens(self.held) * holders))
    }

    /// What of it is above the caller's own share.
    pub fn own_excess(&self, capacity: Capacity, claim: &Claim, wanted: Held) -> Held {
        let Some(account) = self.accounts.get(&account_of(claim)) else { return Held::default() };
        let parts = self.accounts.len() + 1;
        let share = Capacity { tokens: capacity.tokens / parts, items: capacity.items / parts };
        account.held.plus(wanted).over(share)
    }

    /// Whether the caller holds anything.
    pub fn holds(&self, claim: &Claim) -> bool {
        self.accounts.contains_key(&account_of(claim))
    }

    /// How long until a call that is refused should come back: once `excess` has drained, and not together with others
    /// that were refused.
    pub fn promise(&mut self, claim: &Claim, excess: usize, wanted: Held, drain: &Drain) -> Duration {
        let account = self.accounts.get_mut(&account_of(claim));
        let comeback = account.map_or(&mut self.comeback, |account| &mut account.comeback);
        comeback.promise(drain, excess, wanted.tokens, self.held.tokens.max(excess), Instant::now())
    }

    /// Whether a call that wants so much should be answered before its deadline; or how long that should take, and when
    /// it should come back.
    pub fn expect_in_time(
        &mut self,
        claim: &Claim,
        wanted: Held,
        drain: &Drain,
    ) -> Result<(), (Duration, Duration)> {
        let Some(deadline) = claim.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        let late = drain.too_many(self.before(claim, wanted), left);
        let Some((excess, expected)) = late else { return Ok(()) };
        Err((expected, self.promise(claim, excess, wanted, drain)))
    }

    /// The tokens that should go before the last of a call's own: of others in its lane no more than they have, and no
    /// more than take turns with it; of training, before evaluation, no more than its part.
    fn before(&self, claim: &Claim, wanted: Held) -> usize {
        let own = self.accounts.get(&account_of(claim)).map(|account| account.held.tokens);
        let holders = self.accounts.len() + usize::from(own.is_none());
        let turns = (own.unwrap_or_default() + wanted.tokens) * holders - wanted.tokens;
        let [training, evaluation] = self.by_priority.map(|held| held.tokens);
        match claim.priority {
            Priority::Training => training.min(turns),
            Priority::Evaluation => {
                let lane = evaluation.min(turns);
                lane + training.min((lane + wanted.tokens) * TRAINING_PER_EVALUATION)
            }
        }
    }

    #[cfg(test)]
    pub fn forget_promises(&mut self) {
        self.comeback = Comeback::default();
    }
}

/// Whose places a claim's are.
pub(super) fn account_of(claim: &Claim) -> Account {
    (claim.caller.clone(), claim.priority)
}
