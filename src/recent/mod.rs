//! What was scored in the last minutes: in memory, bounded in time and bytes, and never on a disk. Off by default.
//!
//! The engine hands in what is answered, and the edge shows what `summary` makes of it. Each caller has its share of the
//! room: who scores much loses its own oldest first, and not another's.

mod sketch;
mod summary;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use metrics::gauge;

pub use sketch::Sketch;
pub use summary::{Asked, Summary, answer_bytes};

use crate::config::RecentSettings;
use crate::error::brief;
use crate::request_context::{Caller, Priority};
use crate::telemetry::{ModelLabels, RECENT_FLAT_GROUPS, RECENT_GROUPS, RECENT_SPREAD};

/// What an entry counts for beside its prompt and its small picture: more than it takes.
const ENTRY_BYTES: usize = 1 << 10;
/// How often what is old goes, and the metrics are made anew.
const REFRESH: Duration = Duration::from_secs(5);

/// The sketch of a picture, once it is made: who prepares the picture makes it, for all who sent the same.
pub type SketchCell = Arc<OnceLock<Sketch>>;

/// An item that a model has scored.
pub struct Entry {
    /// When it was answered.
    pub at: Instant,
    /// Whose it was.
    pub caller: Caller,
    /// How urgent it was.
    pub priority: Priority,
    /// What judged it: the name,
    pub model: Arc<str>,
    /// and the revision.
    pub revision: Arc<str>,
    /// The digest of its prompt and questions: what a group has in common.
    pub texts: blake3::Hash,
    /// The beginning of its prompt, where prompts are kept.
    pub prompt: Option<Arc<str>>,
    /// The digest of the judged picture.
    pub picture: blake3::Hash,
    /// What is known of that picture.
    pub sketch: SketchCell,
    /// The score.
    pub mean: f32,
    /// Its standard deviation.
    pub stddev: Option<f32>,
}

/// All that is kept.
pub struct Recent {
    /// For how long, how much, and whether with what callers sent.
    pub settings: RecentSettings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    callers: HashMap<Caller, Kept>,
    /// Whose room is how large, the smallest first.
    sizes: BTreeSet<(usize, Arc<str>)>,
    bytes: usize,
    sketches: HashMap<blake3::Hash, Weak<OnceLock<Sketch>>>,
    /// The models that there was something of.
    labels: HashMap<Arc<str>, ModelLabels>,
}

/// What is kept of one caller, the oldest first.
#[derive(Default)]
struct Kept {
    entries: VecDeque<(Arc<Entry>, usize)>,
    bytes: usize,
}

impl Kept {
    fn push(&mut self, entry: Arc<Entry>, bytes: usize) {
        self.entries.push_back((entry, bytes));
        self.bytes += bytes;
    }

    fn pop(&mut self) {
        if let Some((_, bytes)) = self.entries.pop_front() {
            self.bytes -= bytes;
        }
    }

    fn is_older(&self, than: Instant) -> bool {
        self.entries.front().is_some_and(|(entry, _)| entry.at < than)
    }
}

impl State {
    /// Changes what is kept of a caller.
    fn change(&mut self, caller: &Caller, change: impl FnOnce(&mut Kept)) {
        let kept = self.callers.entry(caller.clone()).or_default();
        let before = kept.bytes;
        change(kept);
        let after = kept.bytes;
        self.sizes.remove(&(before, Arc::clone(&caller.0)));
        self.bytes = self.bytes - before + after;
        if kept.entries.is_empty() {
            self.callers.remove(caller);
        } else {
            self.sizes.insert((after, Arc::clone(&caller.0)));
        }
    }

    fn add(&mut self, entry: Entry, bytes: usize, most: usize) {
        let caller = entry.caller.clone();
        self.change(&caller, |kept| kept.push(Arc::new(entry), bytes));
        while self.bytes > most
            && let Some((_, largest)) = self.sizes.last().cloned()
        {
            self.change(&Caller(largest), Kept::pop);
        }
    }

    /// Forgets what is older.
    fn forget(&mut self, than: Instant) {
        let old = self.callers.iter().filter(|(_, kept)| kept.is_older(than));
        for caller in old.map(|(caller, _)| caller.clone()).collect::<Vec<_>>() {
            self.change(&caller, |kept| {
                while kept.is_older(than) {
                    kept.pop();
                }
                kept.entries.shrink_to(2 * kept.entries.len());
            });
        }
        self.sketches.retain(|_, sketch| sketch.strong_count() > 0);
    }

    fn entries(&self, caller: Option<&Caller>, since: Option<Instant>) -> Vec<Arc<Entry>> {
        let kept: Vec<&Kept> = match caller {
            Some(caller) => self.callers.get(caller).into_iter().collect(),
            None => self.callers.values().collect(),
        };
        let entries = kept.into_iter().flat_map(|kept| &kept.entries).map(|(entry, _)| entry);
        entries.filter(|entry| since.is_none_or(|since| entry.at >= since)).cloned().collect()
    }
}

impl Recent {
    /// Nothing yet.
    pub fn new(settings: &RecentSettings) -> Arc<Self> {
        Arc::new(Self { settings: settings.clone(), state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the sketch of the picture of this digest goes.
    pub fn sketch(&self, picture: blake3::Hash) -> SketchCell {
        let mut state = self.lock();
        let sketch = state.sketches.entry(picture).or_default();
        sketch.upgrade().unwrap_or_else(|| {
            let cell = SketchCell::default();
            *sketch = Arc::downgrade(&cell);
            cell
        })
    }

    /// As much of a prompt as is kept.
    pub fn prompt(&self, prompt: &str) -> Option<Arc<str>> {
        self.settings.prompts.then(|| brief(prompt).into())
    }

    /// Keeps an item that a model of these labels has scored.
    pub fn record(&self, entry: Entry, labels: &ModelLabels) {
        let thumbnail = if self.settings.thumbnails { sketch::MOST_THUMBNAIL } else { 0 };
        let bytes = ENTRY_BYTES + entry.prompt.as_ref().map_or(0, |prompt| prompt.len()) + thumbnail;
        let mut state = self.lock();
        if !state.labels.contains_key(&entry.model) {
            state.labels.insert(Arc::clone(&entry.model), labels.clone());
        }
        state.add(entry, bytes, self.settings.max_bytes);
    }

    /// What is kept of a caller, or of all of them, and is no older than this.
    pub fn entries(&self, caller: Option<&Caller>, age: Duration) -> Vec<Arc<Entry>> {
        self.lock().entries(caller, Instant::now().checked_sub(age))
    }

    /// Forgets what is old and says in the metrics what training has of the rest, again and again.
    pub async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(REFRESH).await;
            let this = Arc::clone(&self);
            if tokio::task::spawn_blocking(move || this.refresh()).await.is_err() {
                tracing::error!("what was scored of late could not be counted");
            }
        }
    }

    fn refresh(&self) {
        let mut state = self.lock();
        if let Some(oldest) = Instant::now().checked_sub(self.settings.keep) {
            state.forget(oldest);
        }
        let (entries, labels) = (state.entries(None, None), state.labels.clone());
        drop(state);
        let found = summary::spreads(&entries);
        for (model, labels) in labels {
            let spread = found.get(&model).copied().unwrap_or_default();
            gauge!(RECENT_SPREAD, labels.alone()).set(spread.stddev);
            gauge!(RECENT_GROUPS, labels.alone()).set(spread.groups as f64);
            gauge!(RECENT_FLAT_GROUPS, labels.alone()).set(spread.flat as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a caller, answered at this time.
    pub(super) fn entry(caller: &str, at: Instant, prompt: &str, picture: u32, mean: f32) -> Entry {
        Entry {
            at,
            caller: Caller(caller.into()),
            priority: Priority::Training,
            model: "a".into(),
            revision: "1".into(),
            texts: blake3::hash(prompt.as_bytes()),
            prompt: Some(prompt.into()),
            picture: blake3::hash(&picture.to_le_bytes()),
            sketch: SketchCell::default(),
            mean,
            stddev: None,
        }
    }

    fn of(state: &State, caller: &str) -> Vec<f32> {
        state.entries(Some(&Caller(caller.into())), None).iter().map(|entry| entry.mean).collect()
    }

    /// That the parts are the whole.
    fn check(state: &State, most: usize) {
        let kept = state.callers.iter().map(|(caller, kept)| (kept.bytes, Arc::clone(&caller.0)));
        assert_eq!(kept.collect::<BTreeSet<_>>(), state.sizes);
        assert_eq!(state.sizes.iter().map(|(bytes, _)| bytes).sum::<usize>(), state.bytes);
        assert!(state.bytes <= most, "{} of {most}", state.bytes);
        for kept in state.callers.values() {
            assert_eq!(kept.entries.iter().map(|(_, bytes)| bytes).sum::<usize>(), kept.bytes);
        }
    }

    #[test]
    fn who_has_most_makes_room_and_others_keep_theirs() {
        let (mut state, now) = (State::default(), Instant::now());
        for n in 0..3 {
            state.add(entry("small", now, "p", n, n as f32), 10, 100);
            check(&state, 100);
        }
        for n in 0..1000 {
            state.add(entry("large", now, "p", n, n as f32), 10, 100);
            check(&state, 100);
        }
        assert_eq!(of(&state, "small"), [0.0, 1.0, 2.0]);
        assert_eq!(of(&state, "large"), [993.0, 994.0, 995.0, 996.0, 997.0, 998.0, 999.0]);
        // Two of the same size take from each other.
        for n in 0..1000 {
            state.add(entry("small", now, "p", n, n as f32), 10, 100);
            check(&state, 100);
        }
        assert_eq!((of(&state, "small").len(), of(&state, "large").len()), (5, 5));
        // What is larger than all of the room is not kept.
        state.add(entry("huge", now, "p", 0, 0.0), 101, 100);
        check(&state, 100);
        assert_eq!(of(&state, "huge"), [0.0; 0]);
        assert_eq!(of(&state, "small").len(), 5);
    }

    #[test]
    fn what_is_old_goes_and_nothing_is_left_of_who_sent_it() {
        let (mut state, start) = (State::default(), Instant::now());
        let second = |n: u32| start + Duration::from_secs(n.into());
        for n in 0..10 {
            state.add(entry("a", second(n), "p", n, n as f32), 10, 1000);
        }
        state.add(entry("b", second(3), "p", 0, 0.0), 10, 1000);
        state.forget(second(4));
        check(&state, 1000);
        assert_eq!(of(&state, "a"), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert!(!state.callers.contains_key(&Caller("b".into())));
        assert_eq!(state.entries(None, Some(second(8))).len(), 2);
        state.forget(second(100));
        assert_eq!((state.callers.len(), state.bytes, state.sizes.len()), (0, 0, 0));
    }

    #[test]
    fn the_same_picture_has_one_sketch_for_as_long_as_somebody_needs_it() {
        let settings =
            RecentSettings { keep: REFRESH, max_bytes: 1 << 20, prompts: false, thumbnails: false };
        let recent = Recent::new(&settings);
        let (one, other) = (blake3::hash(b"1"), blake3::hash(b"2"));
        let first = recent.sketch(one);
        assert!(Arc::ptr_eq(&first, &recent.sketch(one)) && !Arc::ptr_eq(&first, &recent.sketch(other)));
        recent.refresh();
        assert_eq!(recent.lock().sketches.len(), 1);
        drop(first);
        recent.refresh();
        assert_eq!(recent.lock().sketches.len(), 0);
        assert_eq!(recent.prompt("a"), None);
    }
}
