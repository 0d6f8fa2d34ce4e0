//! The order in which things that wait take their turn: fair by caller, training before evaluation.

use std::collections::{BTreeMap, HashMap};

use crate::request_context::{Caller, Priority};

/// Where an entry stands in its lane: its virtual start, then its arrival.
pub(super) type Place = (u64, u64);

/// Things that wait for their turn.
///
/// Callers share what is scored by tokens (start-time fair queueing): an entry's place is the tokens that its caller
/// has asked for before it, counted from where the lane stands now. So a caller with a thousand items takes turns
/// with a caller with one, and nobody's turn depends on how many others came first.
#[derive(Debug)]
pub struct Fair<T> {
    pub(super) training: Lane<T>,
    pub(super) evaluation: Lane<T>,
    /// Training tokens that went before evaluation while it waited, less what it has had for them.
    pub(super) owed: usize,
}

/// The entries of one priority.
#[derive(Debug)]
pub(super) struct Lane<T> {
    pub waiting: BTreeMap<Place, Entry<T>>,
    /// Where each caller's next entry may start, if that is ahead of the clock.
    ends: HashMap<Caller, u64>,
    /// The start of the entry whose turn it last was; above 0, which is before all turns.
    clock: u64,
    arrivals: u64,
}

/// One thing that waits.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub item: T,
    pub caller: Caller,
    /// What its caller pays for its turn: in tokens, at least 1.
    pub cost: usize,
    /// How often others behind it went first.
    pub skipped: u32,
    /// Whether it must not share a batch.
    pub alone: bool,
}

impl<T> Default for Fair<T> {
    fn default() -> Self {
        Self { training: Lane::default(), evaluation: Lane::default(), owed: 0 }
    }
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), ends: HashMap::new(), clock: 1, arrivals: 0 }
    }
}

impl<T> Fair<T> {
    /// Puts an item in line.
    pub fn push(&mut self, caller: &Caller, priority: Priority, cost: usize, item: T) {
        self.lane(priority).push(caller.clone(), cost.max(1), item);
    }

    /// Puts an item before all others of its priority, to be taken alone.
    pub fn push_first(&mut self, caller: &Caller, priority: Priority, cost: usize, item: T) {
        let lane = self.lane(priority);
        let entry = Entry { item, caller: caller.clone(), cost: cost.max(1), skipped: 0, alone: true };
        let arrival = lane.arrival();
        lane.waiting.insert((0, arrival), entry);
    }

    /// Takes out every item that `leaves`.
    pub fn extract(&mut self, mut leaves: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut left = Vec::new();
        for lane in [&mut self.training, &mut self.evaluation] {
            let gone: Vec<Place> = lane
                .waiting
                .iter()
                .filter(|(_, entry)| leaves(&entry.item))
                .map(|(&place, _)| place)
                .collect();
            for place in gone {
                if let Some(entry) = lane.take(place) {
                    // It never had its turn, so its caller is not charged for it.
                    if let Some(end) = lane.ends.get_mut(&entry.caller) {
                        *end = end.saturating_sub(entry.cost as u64);
                    }
                    left.push(entry.item);
                }
            }
        }
        left
    }

    /// Whether there is an item that `counts`.
    pub fn any(&self, counts: impl Fn(&T) -> bool) -> bool {
        let lanes = [&self.training, &self.evaluation];
        lanes.into_iter().flat_map(|lane| lane.waiting.values()).any(|entry| counts(&entry.item))
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.training.waiting.is_empty() && self.evaluation.waiting.is_empty()
    }

    pub(super) fn lane(&mut self, priority: Priority) -> &mut Lane<T> {
        match priority {
            Priority::Training => &mut self.training,
            Priority::Evaluation => &mut self.evaluation,
        }
    }
}

impl<T> Lane<T> {
    fn push(&mut self, caller: Caller, cost: usize, item: T) {
        let arrival = self.arrival();
        let end = self.ends.entry(caller.clone()).or_default();
        let start = self.clock.max(*end);
        *end = start + cost as u64;
        self.waiting.insert((start, arrival), Entry { item, caller, cost, skipped: 0, alone: false });
    }

    fn arrival(&mut self) -> u64 {
        self.arrivals += 1;
        self.arrivals
    }

    /// The lane's turn has come to this place.
    pub fn advance(&mut self, (start, _): Place) {
        self.clock = self.clock.max(start);
        // Who is not ahead of the clock starts where everybody does.
        let clock = self.clock;
        self.ends.retain(|_, end| *end > clock);
    }

    /// Takes an entry out.
    pub fn take(&mut self, place: Place) -> Option<Entry<T>> {
        let entry = self.waiting.remove(&place);
        if self.waiting.is_empty() {
            self.ends.clear();
        }
        entry
    }
}
