//! The models of a worker, which come and go while it works, and what it is asked to do with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use crate::model::ModelError;
use crate::scheduler::Queue;

/// Makes a model on the thread that will own it; again where that thread was lost.
pub type Make<S, E> = Arc<dyn Fn() -> Result<S, E> + Send + Sync>;

/// The models that a worker shall have, and those that it has: what its thread and who gives it models share.
pub struct Models<S, E> {
    queue: Arc<Queue>,
    wanted: Mutex<BTreeMap<u64, Wanted<S, E>>>,
    /// Whether `wanted` is not yet what the worker has.
    changed: AtomicBool,
    has: watch::Sender<BTreeSet<u64>>,
    /// What the worker is asked to do beside its batches; nobody to ask where it is not up.
    errands: Mutex<Option<Vec<Errand<S>>>>,
}

/// Something to do with a model where its device has nothing else to do, or between two batches once it is due.
struct Errand<S> {
    model: u64,
    due: Instant,
    run: Run<S>,
}

/// What is done with a model. An error is a forward that failed.
pub type Run<S> = Box<dyn FnOnce(&mut S) -> Result<(), ModelError> + Send>;

/// A model that a worker shall have.
struct Wanted<S, E> {
    make: Make<S, E>,
    /// It is made already, and the worker has not fetched it.
    made: Option<S>,
}

impl<S, E> Models<S, E> {
    /// Of a worker that drains `queue` and shall have these at its start.
    pub fn new(queue: &Arc<Queue>, models: impl IntoIterator<Item = (u64, Make<S, E>)>) -> Arc<Self> {
        let wanted = models.into_iter().map(|(id, make)| (id, Wanted { make, made: None })).collect();
        Arc::new(Self {
            queue: Arc::clone(queue),
            wanted: Mutex::new(wanted),
            changed: AtomicBool::new(false),
            has: watch::Sender::default(),
            errands: Mutex::default(),
        })
    }

    /// Gives the worker a model that is made; `make` makes it anew where the worker is lost.
    pub fn give(&self, id: u64, model: S, make: Make<S, E>) {
        self.change(|wanted| drop(wanted.insert(id, Wanted { make, made: Some(model) })));
    }

    /// Has the worker let go of a model, once it computes nothing with it.
    pub fn take(&self, id: u64) {
        self.change(|wanted| drop(wanted.remove(&id)));
    }

    /// Asks the worker to do something with a model that it has, in the place of what it was asked before. What it does not
    /// come to, since it is lost or lets go of the model, is dropped.
    pub fn ask(&self, model: u64, due: Instant, run: Run<S>) {
        if let Some(errands) = &mut *self.errands() {
            errands.retain(|errand| errand.model != model);
            errands.push(Errand { model, due, run });
        }
        self.queue.wake();
    }

    /// What is to be done that is due by then; by no time: all of it.
    pub(super) fn take_errands(&self, by: Option<Instant>) -> Vec<(u64, Run<S>)> {
        let due = |errand: &mut Errand<S>| by.is_none_or(|by| errand.due <= by);
        let mut errands = self.errands();
        let taken = errands.iter_mut().flat_map(|errands| errands.extract_if(.., due));
        taken.map(|errand| (errand.model, errand.run)).collect()
    }

    fn errands(&self) -> MutexGuard<'_, Option<Vec<Errand<S>>>> {
        self.errands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something is to be done that is due by then; by no time: at all.
    pub(super) fn has_errands(&self, by: Option<Instant>) -> bool {
        let is_due = |errand: &Errand<S>| by.is_none_or(|by| errand.due <= by);
        self.errands().as_ref().is_some_and(|errands| errands.iter().any(is_due))
    }

    /// Whether the worker is up, and has not this model.
    pub fn lacks(&self, id: u64) -> bool {
        self.errands().is_some() && !self.has.borrow().contains(&id)
    }

    /// The models that the worker has, now and from now on; none while it is lost.
    pub fn has(&self) -> watch::Receiver<BTreeSet<u64>> {
        self.has.subscribe()
    }

    /// Whether it has not yet what it shall have.
    pub(super) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::SeqCst)
    }

    /// The worker is lost, with all that it had.
    pub(super) fn lost(&self) {
        self.has.send_replace(BTreeSet::new());
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<u64, Wanted<S, E>>)) {
        change(&mut self.lock());
        self.changed.store(true, Ordering::SeqCst);
        self.queue.wake();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Wanted<S, E>>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that shall be there, made on this thread where nobody has yet. Where they are made anew, one that cannot be keeps
    /// no other from it: whoever wants it sees that it is missing.
    pub(super) fn make_all(&self, anew: bool) -> Result<BTreeMap<u64, S>, E>
    where
        E: Display,
    {
        self.changed.store(false, Ordering::SeqCst);
        let wanted: Vec<_> =
            self.lock().iter_mut().map(|(&id, w)| (id, Arc::clone(&w.make), w.made.take())).collect();
        let (mut scorers, mut missing) = (BTreeMap::new(), None);
        // Without the lock: making one takes its time.
        for (id, make, made) in wanted {
            match made.map_or_else(|| make(), Ok) {
                Ok(scorer) => drop(scorers.insert(id, scorer)),
                Err(error) if anew => missing = Some(error),
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = missing {
            if scorers.is_empty() {
                return Err(error);
            }
            tracing::error!(%error, "a model could not be made anew; the others serve on");
        }
        self.has.send_replace(scorers.keys().copied().collect());
        Ok(scorers)
    }

    /// Lets go of what shall not be there any more, and fetches what is new.
    pub(super) fn settle(&self, scorers: &mut BTreeMap<u64, S>) {
        if !self.changed.swap(false, Ordering::SeqCst) {
            return;
        }
        let mut wanted = self.lock();
        scorers.retain(|id, _| wanted.contains_key(id));
        scorers.extend(wanted.iter_mut().filter_map(|(&id, wanted)| Some((id, wanted.made.take()?))));
        drop(wanted);
        self.has.send_replace(scorers.keys().copied().collect());
    }
}

/// Runs errands for as long as it lives, however it ends.
pub(super) struct Runner<'a, S, E>(&'a Models<S, E>);

impl<'a, S, E> Runner<'a, S, E> {
    pub fn new(models: &'a Models<S, E>) -> Self {
        *models.errands() = Some(Vec::new());
        Self(models)
    }
}

impl<S, E> Drop for Runner<'_, S, E> {
    fn drop(&mut self) {
        *self.0.errands() = None;
    }
}
