//! What is known already, or being computed: identical items cost one forward.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use metrics::counter;
use tokio::sync::watch;

use crate::error::ScoreError;
use crate::model::Score;
use crate::scheduler::Scored;
use crate::telemetry::{CACHE_HITS, CACHE_MISSES, ModelLabels};

/// The digest of all that a score depends on: model, conversation, picture.
pub(super) type Key = [u8; 32];
type Outcome = Result<Scored, ScoreError>;

/// Scores by the digest of what they depend on.
#[derive(Debug)]
pub(super) struct Results {
    /// How many scores are remembered; 0 for none.
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Scores alone: an error is never remembered.
    known: LruCache<Key, Score>,
    flights: HashMap<Key, watch::Receiver<Option<Outcome>>>,
    /// How often all was forgotten.
    forgotten: u64,
}

/// What is to be done for an item.
#[derive(Debug)]
pub(super) enum Lookup {
    /// Nothing: this is its score.
    Known(Score),
    /// To compute it, and to tell who asks for the same meanwhile.
    Lead(Lead),
    /// To wait for who computes it.
    Follow(Follow),
}

/// The right and the duty to compute an item. Dropped without an outcome, it passes to one of those who wait.
#[derive(Debug)]
pub(super) struct Lead {
    results: Arc<Results>,
    key: Key,
    /// How often all had been forgotten when it began.
    forgotten: u64,
    tell: watch::Sender<Option<Outcome>>,
}

/// The wait for another's outcome.
#[derive(Debug)]
pub(super) struct Follow {
    flight: watch::Receiver<Option<Outcome>>,
    labels: ModelLabels,
}

impl Results {
    /// Remembers so many scores.
    pub fn new(capacity: usize) -> Arc<Self> {
        let state = State { known: LruCache::unbounded(), flights: HashMap::new(), forgotten: 0 };
        Arc::new(Self { capacity, state: Mutex::new(state) })
    }

    /// Finds out who computes an item of a model.
    pub fn look_up(self: &Arc<Self>, key: Key, labels: &ModelLabels) -> Lookup {
        let mut state = self.lock();
        if let Some(score) = state.known.get(&key) {
            counter!(CACHE_HITS, labels.with([("from", "memory".to_owned())])).increment(1);
            return Lookup::Known(score.clone());
        }
        if let Some(flight) = state.flights.get(&key) {
            return Lookup::Follow(Follow { flight: flight.clone(), labels: labels.clone() });
        }
        counter!(CACHE_MISSES, labels.alone()).increment(1);
        let (tell, flight) = watch::channel(None);
        state.flights.insert(key, flight);
        Lookup::Lead(Lead { results: Arc::clone(self), key, forgotten: state.forgotten, tell })
    }

    /// Forgets all scores, also those that are being computed: who computed them is not trusted any more.
    pub fn forget(&self) {
        let mut state = self.lock();
        state.known.clear();
        state.forgotten += 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lead {
    /// Tells the outcome to who waits for it. One that concerns this caller alone, such as its deadline, is not
    /// told: another then computes the item.
    pub fn finish(self, outcome: &Outcome) {
        match outcome {
            Ok(scored) if self.results.capacity > 0 => {
                let mut state = self.results.lock();
                if state.forgotten == self.forgotten {
                    state.known.put(self.key, scored.score.clone());
                }
                if state.known.len() > self.results.capacity {
                    state.known.pop_lru();
                }
            }
            Ok(_) | Err(ScoreError::Invalid { .. } | ScoreError::Internal(_)) => {}
            Err(_) => return,
        }
        self.tell.send_replace(Some(outcome.clone()));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.results.lock().flights.remove(&self.key);
    }
}

impl Follow {
    /// The outcome, or `None` where who computed it gave up.
    pub async fn outcome(mut self) -> Option<Outcome> {
        let outcome = self.flight.wait_for(Option::is_some).await.ok()?.clone();
        counter!(CACHE_HITS, self.labels.with([("from", "flight".to_owned())])).increment(1);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn scored(mean: f32) -> Outcome {
        let score = Score { mean, ..Score::default() };
        Ok(Scored { score, queue: Duration::ZERO, inference: Duration::ZERO })
    }

    fn lead(results: &Arc<Results>, key: u8) -> Lead {
        match results.look_up([key; 32], &ModelLabels::default()) {
            Lookup::Lead(lead) => lead,
            other => panic!("{other:?}"),
        }
    }

    fn follow(results: &Arc<Results>, key: u8) -> Follow {
        match results.look_up([key; 32], &ModelLabels::default()) {
            Lookup::Follow(follow) => follow,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn one_computes_and_all_have_it() {
        let results = Results::new(1);
        let first = lead(&results, 1);
        let followers = [follow(&results, 1), follow(&results, 1)];
        first.finish(&scored(1.0));
        for follower in followers {
            assert_eq!(follower.outcome().await, Some(scored(1.0)));
        }
        assert!(matches!(
            results.look_up([1; 32], &ModelLabels::default()),
            Lookup::Known(Score { mean: 1.0, .. })
        ));
        lead(&results, 2).finish(&scored(2.0));
        drop(lead(&results, 1));
    }

    #[tokio::test]
    async fn errors_are_told_and_not_remembered() {
        let results = Results::new(8);
        let error = Err(ScoreError::Internal("broken".into()));
        let first = lead(&results, 1);
        let follower = follow(&results, 1);
        first.finish(&error);
        assert_eq!(follower.outcome().await, Some(error));
        drop(lead(&results, 1));
    }

    #[tokio::test]
    async fn who_gives_up_leaves_it_to_another() {
        let results = Results::new(8);
        for give_up in [drop::<Lead>, |lead: Lead| lead.finish(&Err(ScoreError::DeadlineExceeded))] {
            let first = lead(&results, 1);
            let follower = follow(&results, 1);
            give_up(first);
            assert_eq!(follower.outcome().await, None);
        }
        drop(lead(&results, 1));
    }

    #[test]
    fn what_is_forgotten_does_not_come_back() {
        let results = Results::new(8);
        lead(&results, 1).finish(&scored(1.0));
        let late = lead(&results, 2);
        results.forget();
        late.finish(&scored(2.0));
        drop(lead(&results, 1));
        lead(&results, 2).finish(&scored(3.0));
        let known = results.look_up([2; 32], &ModelLabels::default());
        assert!(matches!(known, Lookup::Known(Score { mean: 3.0, .. })));
    }

    #[test]
    fn nothing_is_remembered_where_nothing_shall_be() {
        let results = Results::new(0);
        lead(&results, 1).finish(&scored(1.0));
        drop(lead(&results, 1));
    }
}
