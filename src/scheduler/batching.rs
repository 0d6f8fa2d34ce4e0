//! The plan of a batch: whose turn it is, and what goes well with it.

use super::fair_queue::{Entry, Fair, Lane, Place};
use crate::config::BatchBudget;
use crate::request_context::Priority;

/// How many batches ahead the plan looks for samples of similar length.
const LOOKAHEAD: usize = 4;
/// How often an item may be passed over for items behind it that fit better.
const MOST_SKIPS: u32 = 3;
/// For each token of evaluation that waits, at most this many tokens of training go first: evaluation has at least a
/// tenth of the device.
pub(super) const TRAINING_PER_EVALUATION: usize = 9;

/// What an item is to a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// A batch is of one kind: of one model.
    pub kind: u64,
    /// Its size in tokens, which the budget bounds; what it costs its caller may be another number.
    pub tokens: usize,
}

/// A batch in the making.
struct Plan<T, F> {
    budget: BatchBudget,
    /// What an item is to a batch; `None` where this batch cannot have it. It is given the item's cost too.
    measure: F,
    items: Vec<T>,
    /// Of the first item, and so of all.
    kind: Option<u64>,
    tokens: usize,
    /// The length that the others should be near.
    seed: Option<usize>,
    full: bool,
}

impl<T, F: Fn(&T, usize) -> Option<Measure>> Plan<T, F> {
    /// Whether an item fits. One that is larger than the budget makes a batch of its own.
    fn fits(&self, tokens: usize) -> bool {
        !self.full
            && (self.items.is_empty()
                || self.tokens + tokens <= self.budget.tokens && self.items.len() < self.budget.items)
    }

    /// The size of an item of the batch's kind.
    fn tokens_of(&self, entry: &Entry<T>) -> Option<usize> {
        let measure = (self.measure)(&entry.item, entry.cost)?;
        self.kind.is_none_or(|kind| kind == measure.kind).then_some(measure.tokens)
    }
}

impl<T> Fair<T> {
    /// The item whose turn it is: the first of the next batch.
    pub fn head(&self) -> Option<&T> {
        let training = self.training.waiting.values().next();
        let evaluation = self.evaluation.waiting.values().next();
        let credit = self.owed / TRAINING_PER_EVALUATION;
        evaluation.filter(|entry| entry.cost <= credit).or(training).or(evaluation).map(|entry| &entry.item)
    }

    /// Takes the next batch: what is there now, in its turn, samples of similar length together.
    ///
    /// The item whose turn it is goes in any case. An item may be passed over a few times for others that are nearer
    /// to it in length; after that it goes before them. Empty if and only if nothing waits.
    pub fn take_batch(&mut self, budget: BatchBudget) -> Vec<T> {
        self.take_batch_of(budget, |_, cost| Some(Measure { kind: 0, tokens: cost }))
    }

    /// As [`Fair::take_batch`], of the items that `measure` has a size for, and of one kind: that of the item whose turn
    /// it is among them.
    pub fn take_batch_of(
        &mut self,
        budget: BatchBudget,
        measure: impl Fn(&T, usize) -> Option<Measure>,
    ) -> Vec<T> {
        let mut plan =
            Plan { budget, measure, items: Vec::new(), kind: None, tokens: 0, seed: None, full: false };
        let credit = self.owed / TRAINING_PER_EVALUATION;
        let eligible = |entry: &&Entry<T>| (plan.measure)(&entry.item, entry.cost).is_some();
        let head = self.evaluation.waiting.values().find(eligible).map(|entry| entry.cost);
        let mut evaluation = 0;
        if head.is_some_and(|cost| cost <= credit) {
            evaluation += self.lane(Priority::Evaluation).fill(&mut plan, credit);
        }
        let training = self.lane(Priority::Training).fill(&mut plan, usize::MAX);
        evaluation += self.lane(Priority::Evaluation).fill(&mut plan, usize::MAX);

        self.owed = if self.lane(Priority::Evaluation).waiting.is_empty() {
            0
        } else {
            (self.owed + training).saturating_sub(evaluation * TRAINING_PER_EVALUATION)
        };
        plan.items
    }
}

/// An entry that is looked at: where it stands, and how often it was passed over.
struct Seen {
    place: Place,
    tokens: usize,
    cost: usize,
    skipped: u32,
}

impl<T> Lane<T> {
    /// Adds what fits of this lane, at most so much that it costs `limit`. Returns what it costs.
    fn fill<F>(&mut self, plan: &mut Plan<T, F>, limit: usize) -> usize
    where
        F: Fn(&T, usize) -> Option<Measure>,
    {
        let first =
            self.waiting.iter().find_map(|(&place, entry)| Some((place, entry, plan.tokens_of(entry)?)));
        let Some((head, first, size)) = first else { return 0 };
        if first.alone {
            return if plan.items.is_empty() { self.add(plan, head, true) } else { 0 };
        }
        if plan.kind.is_none() {
            plan.kind = (plan.measure)(&first.item, first.cost).map(|measure| measure.kind);
        }
        let window = self.window(plan);
        let seed = plan.seed.unwrap_or(size);
        let mut order: Vec<usize> = (0..window.len()).collect();
        // Stable: the oldest first among those that have waited long enough, and among equals.
        order.sort_by_key(|&index| match window.get(index) {
            Some(&Seen { tokens, skipped, .. }) if skipped < MOST_SKIPS => (1, tokens.abs_diff(seed)),
            _ => (0, 0),
        });
        let (mut cost, mut last) = (0, None);
        for index in order {
            let Some(seen) = window.get(index) else { continue };
            if cost + seen.cost <= limit && plan.fits(seen.tokens) {
                cost += self.add(plan, seen.place, false);
                last = last.max(Some(seen.place));
            }
        }
        if let Some(last) = last {
            self.advance(head);
            // Those of other kinds were not passed over: their turn comes by their place.
            let behind = self.waiting.range_mut(..last).map(|(_, entry)| entry);
            behind.filter(|entry| plan.tokens_of(entry).is_some()).for_each(|entry| entry.skipped += 1);
        }
        cost
    }

    /// The entries that are looked at, in their turn.
    fn window<F>(&self, plan: &Plan<T, F>) -> Vec<Seen>
    where
        F: Fn(&T, usize) -> Option<Measure>,
    {
        let mut tokens = 0;
        self.waiting
            .iter()
            .filter(|(_, entry)| !entry.alone)
            .filter_map(|(&place, entry)| {
                let (cost, skipped) = (entry.cost, entry.skipped);
                Some(Seen { place, tokens: plan.tokens_of(entry)?, cost, skipped })
            })
            .take(plan.budget.items.saturating_mul(LOOKAHEAD))
            .take_while(|seen| {
                let near = tokens < plan.budget.tokens.saturating_mul(LOOKAHEAD);
                tokens += seen.tokens;
                near
            })
            .collect()
    }

    /// Takes an entry into the batch. Gives its cost.
    fn add<F>(&mut self, plan: &mut Plan<T, F>, place: Place, alone: bool) -> usize
    where
        F: Fn(&T, usize) -> Option<Measure>,
    {
        let Some(entry) = self.take(place) else { return 0 };
        let size = plan.tokens_of(&entry).unwrap_or(entry.cost);
        plan.items.push(entry.item);
        plan.tokens += size;
        plan.seed.get_or_insert(size);
        plan.full |= alone;
        entry.cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request_context::Caller;

    const BUDGET: BatchBudget = BatchBudget { tokens: 1000, items: 8 };

    fn caller(name: &str) -> Caller {
        Caller(name.into())
    }

    fn training(queue: &mut Fair<usize>, name: &str, costs: impl IntoIterator<Item = usize>) {
        costs.into_iter().for_each(|cost| queue.push(&caller(name), Priority::Training, cost, cost));
    }

    #[test]
    fn the_head_is_what_a_batch_of_one_takes() {
        let mut queue = Fair::default();
        let mut number = 0_usize;
        let mut next = || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            number >> 33
        };
        for step in 0..10_000 {
            for _ in 0..next() % 3 {
                let priority = Priority::ALL[next() % 2];
                queue.push(&caller(&(next() % 4).to_string()), priority, next() % 1000, (step, next()));
            }
            let head = queue.head().copied();
            assert_eq!(head, queue.take_batch(BatchBudget { tokens: usize::MAX, items: 1 }).pop());
        }
    }

    #[test]
    fn a_greedy_caller_takes_turns_with_the_others() {
        let mut queue = Fair::default();
        training(&mut queue, "greedy", [101; 500]);
        training(&mut queue, "modest", [102; 20]);
        training(&mut queue, "late riser", [103; 20]);
        let mut taken = Vec::new();
        while taken.iter().filter(|&&cost| cost != 101).count() < 40 {
            taken.extend(queue.take_batch(BUDGET));
        }
        let greedy = taken.iter().filter(|&&cost| cost == 101).count();
        // Three callers in equal parts, and the plan's freedom of a few batches.
        assert!((20..=20 + LOOKAHEAD * 8).contains(&greedy), "{greedy} of the greedy caller's came first");
        // Who comes now waits for no more than a turn of each.
        training(&mut queue, "newcomer", [104]);
        let ahead = std::iter::from_fn(|| Some(queue.take_batch(BUDGET)))
            .position(|batch| batch.contains(&104))
            .unwrap();
        assert!(ahead <= MOST_SKIPS as usize + 1, "{ahead} batches went first");
    }

    #[test]
    fn turns_are_shared_by_tokens_and_not_by_items() {
        let mut queue = Fair::default();
        training(&mut queue, "large", [500; 100]);
        training(&mut queue, "small", [50; 1000]);
        let mut tokens = [0, 0];
        for _ in 0..40 {
            for cost in queue.take_batch(BatchBudget { tokens: 1000, items: 64 }) {
                tokens[usize::from(cost == 50)] += cost;
            }
        }
        let share = tokens[0] as f64 / (tokens[0] + tokens[1]) as f64;
        assert!((0.4..=0.6).contains(&share), "{tokens:?}");
    }

    #[test]
    fn a_caller_that_cancels_is_not_charged() {
        let mut queue = Fair::default();
        training(&mut queue, "other", [101; 50]);
        training(&mut queue, "repentant", [102; 500]);
        assert_eq!(queue.extract(|&cost| cost == 102).len(), 500);
        training(&mut queue, "repentant", [103]);
        let batches: Vec<_> = (0..=MOST_SKIPS + 1).map(|_| queue.take_batch(BUDGET)).collect();
        assert!(batches.concat().contains(&103), "{batches:?}");
    }

    #[test]
    fn training_goes_first_and_evaluation_is_not_starved() {
        let mut queue = Fair::default();
        for _ in 0..100 {
            queue.push(&caller("e"), Priority::Evaluation, 100, 1);
        }
        training(&mut queue, "t", [100; 2000]);
        assert!(!queue.take_batch(BUDGET).contains(&1), "evaluation went first");
        let taken: Vec<usize> = (0..100).flat_map(|_| queue.take_batch(BUDGET)).collect();
        let share = taken.iter().filter(|&&item| item == 1).count() as f64 / taken.len() as f64;
        assert!((0.08..=0.12).contains(&share), "evaluation had {share} of it");
        // What comes for training goes before all evaluation that waits.
        while queue.take_batch(BUDGET).contains(&100) {}
        training(&mut queue, "t", [100; 3]);
        assert_eq!(queue.take_batch(BUDGET).iter().filter(|&&item| item == 100).count(), 3);
    }

    /// Two models, of which one costs four times as much for a token: a batch is of one, neither starves, and callers
    /// share what it costs.
    #[test]
    fn a_batch_is_of_one_model_and_none_starves() {
        let mut queue = Fair::default();
        for _ in 0..400 {
            queue.push(&caller("a"), Priority::Training, 100, "small");
            queue.push(&caller("b"), Priority::Training, 400, "large");
        }
        let kind = |item: &&str| u64::from(*item == "large");
        let measure = |item: &&str, _| Some(Measure { kind: kind(item), tokens: 100 });
        let (mut taken, mut longest, mut run) = ([0, 0], 0, (0, 0));
        for _ in 0..50 {
            let batch = queue.take_batch_of(BUDGET, measure);
            assert!(batch.len() == 8 && batch.iter().all(|item| *item == batch[0]), "{batch:?}");
            let kind = kind(&batch[0]);
            taken[kind as usize] += batch.len();
            run = if run.0 == kind { (kind, run.1 + 1) } else { (kind, 1) };
            longest = longest.max(run.1);
        }
        // Half of the cost each: four small ones for each large one.
        let share = taken[0] as f64 / taken[1] as f64;
        assert!((3.0..=5.0).contains(&share) && longest <= 5, "{taken:?}, {longest} in a row");
        // A worker that has one of the models takes that, whatever is before it.
        let small = |item: &&str, _| (kind(item) == 0).then_some(Measure { kind: 0, tokens: 100 });
        while let Some(first) = queue.take_batch_of(BUDGET, small).first() {
            assert_eq!(*first, "small");
        }
        assert!(!queue.is_empty());
    }

    #[test]
    fn evaluation_alone_has_it_all() {
        let mut queue = Fair::default();
        (0..8).for_each(|item| queue.push(&caller("e"), Priority::Evaluation, 100, item));
        assert_eq!(queue.take_batch(BUDGET), (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn similar_lengths_go_together_and_nobody_waits_for_ever() {
        let mut queue = Fair::default();
        let mixed = (0..).map(|index| if index % 2 == 0 { 100 } else { 400 });
        training(&mut queue, "a", mixed.clone().take(24));
        assert_eq!(queue.take_batch(BUDGET), [100; 8]);
        // What keeps coming fills up the large ones better: the one behind them has its turn before it is the oldest.
        let mut queue = Fair::default();
        training(&mut queue, "a", [900, 800, 700, 600, 90]);
        let taken = (0..6).map(|_| {
            training(&mut queue, "a", [100; 8]);
            queue.take_batch(BUDGET).contains(&90)
        });
        assert_eq!(taken.collect::<Vec<_>>().iter().position(|&taken| taken), Some(MOST_SKIPS as usize));
    }

    #[test]
    fn a_batch_keeps_its_budget_and_a_giant_goes_alone() {
        let mut queue = Fair::default();
        training(&mut queue, "a", [5000, 300, 300, 300, 300]);
        training(&mut queue, "a", [1; 20]);
        let batches: Vec<_> =
            std::iter::from_fn(|| Some(queue.take_batch(BUDGET)).filter(|b| !b.is_empty())).collect();
        assert_eq!(batches[0], [5000]);
        assert_eq!(batches.concat().len(), 25);
        for batch in &batches[1..] {
            assert!(batch.iter().sum::<usize>() <= 1000 && batch.len() <= 8, "{batch:?}");
        }
        assert!(queue.take_batch(BUDGET).is_empty());
    }

    #[test]
    fn what_comes_back_goes_first_and_alone() {
        let mut queue = Fair::default();
        training(&mut queue, "a", [100; 4]);
        queue.push_first(&caller("a"), Priority::Training, 7, 7);
        queue.push_first(&caller("b"), Priority::Training, 8, 8);
        let batches: Vec<_> = (0..3).map(|_| queue.take_batch(BUDGET)).collect();
        assert_eq!(batches, [vec![7], vec![8], vec![100; 4]]);
    }
}
