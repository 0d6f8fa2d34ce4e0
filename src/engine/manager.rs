//! Models on their devices: one worker for each device, with all the models that are placed on it. They come and go while
//! the server serves.

mod recheck;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::candidate::{Candidate, Reference};
use super::models::{Model, Models, State};
use super::score_cache::Results;
use super::{LoadError, Loaded, Memory};
use crate::config::{ModelSettings, Settings};
use crate::model::Scorer;
use crate::scheduler::Queue;
use crate::scheduler::worker::{self, Make, Post};
use crate::{device, process};

/// One model or several.
pub trait IntoLoaded: Send {
    /// What scores.
    type Scorer;
    /// All of them, the default one first.
    fn into_list(self) -> Vec<Loaded<Self::Scorer>>;
}

impl<S> IntoLoaded for Loaded<S> {
    type Scorer = S;
    fn into_list(self) -> Vec<Self> {
        vec![self]
    }
}

impl<S> IntoLoaded for Vec<Loaded<S>> {
    type Scorer = S;
    fn into_list(self) -> Self {
        self
    }
}

/// What makes the models of a device, by their ids.
type Makers<S> = Vec<(u64, Make<S, LoadError>)>;

/// Loads a model that fits its devices beside others, of these names, that take so much.
type Load<S> =
    dyn Fn(&Settings, &ModelSettings, &[(String, Vec<Memory>)]) -> Result<Loaded<S>, LoadError> + Send + Sync;
/// Tells the revision of a model's files, as they are now.
type Revision = dyn Fn(&ModelSettings) -> Result<String, LoadError> + Send + Sync;

/// What loads more models while the server serves.
pub struct Loader<S> {
    /// How a model is loaded.
    pub load: Box<Load<S>>,
    /// How its files are looked at.
    pub revision: Box<Revision>,
}

/// Models come and go: each of these returns once that is done, and leaves what was there where it fails.
pub trait ModelControl: Send + Sync {
    /// One more model.
    ///
    /// # Errors
    /// There is one of its name, or it cannot be served.
    fn load(&self, wanted: &ModelSettings) -> Result<Arc<Model>, ModelControlError>;
    /// Another model under a name: it is up before the old one lets go.
    ///
    /// # Errors
    /// There is none of its name, or it cannot be served.
    fn replace(&self, wanted: &ModelSettings) -> Result<Arc<Model>, ModelControlError>;
    /// A model goes, once its calls are answered.
    ///
    /// # Errors
    /// There is none of the name, or it is the default one.
    fn unload(&self, name: &str) -> Result<(), ModelControlError>;
    /// A model gives its memory back, once its calls are answered.
    ///
    /// # Errors
    /// There is none of the name.
    fn sleep(&self, name: &str) -> Result<(), ModelControlError>;
    /// A model is loaded again.
    ///
    /// # Errors
    /// There is none of the name, it cannot be loaded, or it is not what it was.
    fn wake(&self, name: &str) -> Result<(), ModelControlError>;
    /// Each model that serves scores the items of its self-test again on each of its devices, between two batches. One that
    /// is not what it was is taken out of service. Returns once all have.
    fn test_again(&self);
    /// Takes models out of service that a worker could not make anew when it was lost, and tries to wake them. Returns
    /// whether there are some to be tried again.
    fn restore(&self) -> bool;
    /// The models.
    fn models(&self) -> &Models;
}

/// Why models do not come or go.
#[derive(Debug, thiserror::Error)]
pub enum ModelControlError {
    /// There is no model of the name.
    #[error("there is no model {0:?}")]
    NoSuch(String),
    /// There is one already.
    #[error("there is a model {0:?} already: replace it")]
    Exists(String),
    /// Those who name none would get another's scores.
    #[error("{0:?} is the default model, which those have who name none: replace it")]
    Default(String),
    /// This server loads nothing more.
    #[error("this server was started with models that cannot be loaded again")]
    Fixed,
    /// A checkpoint cannot be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A model's files are not what they were.
    #[error("{0}")]
    Changed(String),
}

/// Models on their devices, and what brings others.
pub struct ModelManager<S> {
    settings: Settings,
    models: Arc<Models>,
    queue: Arc<Queue>,
    results: Arc<Results>,
    up: watch::Sender<usize>,
    workers: Workers,
    rosters: Mutex<BTreeMap<String, Arc<worker::Models<S, LoadError>>>>,
    /// Those that a worker could not make anew.
    missing: Mutex<BTreeSet<u64>>,
    /// How each model is made, by its id.
    kept: Mutex<BTreeMap<u64, Kept<S>>>,
    /// What a token of the first model costs, which is the unit of all.
    first_flops: Option<f64>,
    loader: Option<Loader<S>>,
    /// One thing is done after the other.
    busy: Mutex<()>,
}

/// The workers' threads, also of those that came later.
pub(super) type Workers = Arc<Mutex<Vec<JoinHandle<()>>>>;

struct Kept<S> {
    settings: Option<ModelSettings>,
    makers: Vec<(String, Make<S, LoadError>)>,
    reference: Reference,
}

/// How often a thread looks that waits for calls to end.
const LOOKS: Duration = Duration::from_millis(2);
/// How long a worker may take for a batch before its model is taken as gone.
const BATCH: Duration = Duration::from_secs(60);

/// Waits until something holds, at most so long; whether it does.
fn holds_within(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(LOOKS);
    }
    true
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Scorer + Send + 'static> ModelManager<S> {
    /// The worker of a device, which is started where there is none.
    fn roster(&self, device: &str) -> Result<Arc<worker::Models<S, LoadError>>, LoadError> {
        let mut rosters = lock(&self.rosters);
        if let Some(roster) = rosters.get(device) {
            return Ok(Arc::clone(roster));
        }
        let roster = worker::Models::new(&self.queue, []);
        let post = Post {
            device: device.to_owned(),
            queue: Arc::clone(&self.queue),
            budget: self.settings.batch,
            up: self.up.clone(),
        };
        lock(&self.workers).push(worker::spawn(post, Arc::clone(&roster), |_| ())?);
        rosters.insert(device.to_owned(), Arc::clone(&roster));
        Ok(roster)
    }

    /// Makes a model on this thread and gives it to the workers of its devices, which serve others meanwhile.
    fn install(&self, id: u64, makers: &[(String, Make<S, LoadError>)]) -> Result<(), LoadError> {
        let install = || {
            for (device, make) in makers {
                let made = make()?;
                let roster = self.roster(device)?;
                roster.give(id, made, Arc::clone(make));
                let limit = self.settings.server.recovery_timeout;
                if !holds_within(limit, || roster.has().borrow().contains(&id)) {
                    return Err(LoadError::Lost(limit));
                }
            }
            Ok(())
        };
        let installed = install();
        if installed.is_err() {
            self.let_go(id);
        }
        installed
    }

    /// Has all workers let go of a model, and gives its memory back.
    fn let_go(&self, id: u64) {
        let rosters = lock(&self.rosters).clone();
        for roster in rosters.values() {
            roster.take(id);
        }
        let gone = || rosters.values().all(|roster| !roster.has().borrow().contains(&id));
        if !holds_within(BATCH, gone) {
            tracing::error!("a worker still has a model that it should have let go");
        }
        rosters.keys().for_each(|device| device::release(device));
        process::trim();
    }

    /// Waits until no call has a model any more that takes no new ones; `held` is how often we hold it ourselves. What is
    /// then left of it is refused.
    fn empty(&self, model: &Arc<Model>, held: usize) {
        let limit = self.settings.server.drain_timeout;
        if !holds_within(limit, || Arc::strong_count(model) <= held) {
            tracing::warn!(model = model.info.name, ?limit, "calls still have a model that goes");
        }
        self.queue.retire(model.tag.id);
    }

    /// Loads a model, and has its devices' workers take it.
    fn bring(&self, wanted: &ModelSettings) -> Result<Arc<Model>, ModelControlError> {
        let loader = self.loader.as_ref().ok_or(ModelControlError::Fixed)?;
        let there: Vec<(String, Vec<Memory>)> = self
            .models
            .all()
            .into_iter()
            .filter(|(_, state)| *state == State::Serving)
            .map(|(model, _)| (model.info.name.clone(), model.terms.memory.clone()))
            .collect();
        // What is kept for later use is free to the one that comes.
        lock(&self.rosters).keys().for_each(|device| device::release(device));
        let loaded = (loader.load)(&self.settings, wanted, &there)?;
        let mut candidate = Candidate::new(loaded)?;
        let (id, makers, reference) = (candidate.tag.id, candidate.makers(), candidate.reference());
        self.install(id, &makers)?;
        lock(&self.kept).insert(id, Kept { settings: Some(wanted.clone()), makers, reference });
        Ok(Arc::new(candidate.into_model(self.first_flops)))
    }

    fn find(&self, name: &str) -> Result<(Arc<Model>, State), ModelControlError> {
        let there = |error| if name.is_empty() { Err(error) } else { Ok(()) };
        there(ModelControlError::NoSuch(name.to_owned()))?;
        self.models.one(name).map_err(|_| ModelControlError::NoSuch(name.to_owned()))
    }

    /// A model that is nobody's any more goes.
    fn dismiss(&self, model: &Arc<Model>) {
        self.empty(model, 1);
        self.let_go(model.tag.id);
        lock(&self.kept).remove(&model.tag.id);
    }
}

impl<S: Scorer + Send + 'static> ModelControl for ModelManager<S> {
    fn load(&self, wanted: &ModelSettings) -> Result<Arc<Model>, ModelControlError> {
        let _alone = lock(&self.busy);
        let name = wanted.name.as_deref().unwrap_or_default();
        if self.find(name).is_ok() {
            return Err(ModelControlError::Exists(name.to_owned()));
        }
        let model = self.bring(wanted)?;
        tracing::info!(model = name, revision = model.info.revision, "a model was loaded");
        self.models.put(Arc::clone(&model));
        Ok(model)
    }

    fn replace(&self, wanted: &ModelSettings) -> Result<Arc<Model>, ModelControlError> {
        let _alone = lock(&self.busy);
        let name = wanted.name.as_deref().unwrap_or_default();
        let (old, _) = self.find(name)?;
        let model = self.bring(wanted)?;
        tracing::info!(
            model = name,
            revision = model.info.revision,
            was = old.info.revision,
            "a model was replaced"
        );
        self.models.put(Arc::clone(&model));
        self.dismiss(&old);
        Ok(model)
    }

    fn unload(&self, name: &str) -> Result<(), ModelControlError> {
        let _alone = lock(&self.busy);
        let (model, _) = self.find(name)?;
        if self.models.one("").is_ok_and(|(default, _)| Arc::ptr_eq(&default, &model)) {
            return Err(ModelControlError::Default(name.to_owned()));
        }
        self.models.remove(name);
        self.dismiss(&model);
        tracing::info!(model = name, "a model was unloaded");
        Ok(())
    }

    fn sleep(&self, name: &str) -> Result<(), ModelControlError> {
        let _alone = lock(&self.busy);
        let (model, state) = self.find(name)?;
        if state == State::Asleep {
            return Ok(());
        }
        self.models.set(name, State::Asleep);
        self.empty(&model, 2);
        self.let_go(model.tag.id);
        tracing::info!(model = name, "a model sleeps");
        Ok(())
    }

    fn wake(&self, name: &str) -> Result<(), ModelControlError> {
        let _alone = lock(&self.busy);
        let (model, state) = self.find(name)?;
        if state == State::Serving {
            return Ok(());
        }
        self.models.set(name, State::Waking);
        let woken = self.wake_as_it_was(&model);
        let state = match &woken {
            Ok(()) => State::Serving,
            Err(error @ (ModelControlError::Changed(_) | ModelControlError::Load(LoadError::Changed(_)))) => {
                State::Failed(error.to_string().into())
            }
            Err(_) => state,
        };
        self.models.set(name, state);
        match &woken {
            Ok(()) => tracing::info!(model = name, "a model is awake"),
            Err(error) => tracing::error!(model = name, %error, "a model could not be woken"),
        }
        woken
    }

    fn test_again(&self) {
        self.check_all();
    }

    fn restore(&self) -> bool {
        self.restore_missing()
    }

    fn models(&self) -> &Models {
        &self.models
    }
}

impl<S: Scorer + Send + 'static> ModelManager<S> {
    /// Loads a sleeping model again: the same files, and the same scores of its self-test.
    fn wake_as_it_was(&self, model: &Arc<Model>) -> Result<(), ModelControlError> {
        let id = model.tag.id;
        let (settings, makers) = {
            let kept = lock(&self.kept);
            let kept = kept.get(&id).ok_or_else(|| ModelControlError::NoSuch(model.info.name.clone()))?;
            (kept.settings.clone(), kept.makers.clone())
        };
        if let (Some(settings), Some(loader)) = (&settings, &self.loader) {
            let (now, was) = ((loader.revision)(settings)?, &model.info.revision);
            if now != *was {
                let name = &model.info.name;
                return Err(ModelControlError::Changed(format!(
                    "the files of {name:?} are {now}, and were {was}"
                )));
            }
        }
        self.install(id, &makers)?;
        // Not before: what came for it meanwhile would wait for ever where it could not be woken.
        self.queue.admit_model(id);
        Ok(())
    }
}

/// Models that are up, and the workers that have them.
pub(super) struct Placed<S> {
    pub manager: ModelManager<S>,
    pub models: Arc<Models>,
    pub workers: Workers,
    /// How many workers are up.
    pub up: watch::Receiver<usize>,
}

/// Places models on their devices, starts the workers, and waits until each has run once with all its models. Blocks.
///
/// # Errors
/// The first worker that did not come up, after the others were ended.
pub(super) fn place<S: Scorer + Send + 'static>(
    settings: &Settings,
    loaded: Vec<Loaded<S>>,
    queue: &Arc<Queue>,
    results: &Arc<Results>,
    loader: Option<Loader<S>>,
) -> Result<Placed<S>, LoadError> {
    super::models::distinct(loaded.iter().map(|loaded| loaded.info.name.as_str()))?;
    let first_flops = loaded.first().and_then(|loaded| loaded.terms.token_flops);
    let mut candidates = loaded.into_iter().map(Candidate::new).collect::<Result<Vec<_>, _>>()?;
    let mut kept = BTreeMap::new();
    let mut of_device: BTreeMap<String, Makers<S>> = BTreeMap::new();
    for (index, candidate) in candidates.iter_mut().enumerate() {
        let (id, makers) = (candidate.tag.id, candidate.makers());
        for (device, make) in &makers {
            of_device.entry(device.clone()).or_default().push((id, Arc::clone(make)));
        }
        // A test's own models have no settings.
        let settings = loader.as_ref().and_then(|_| settings.models.get(index)).cloned();
        kept.insert(id, Kept { settings, makers, reference: candidate.reference() });
    }
    let (up, up_now) = watch::channel(0);
    let (workers, rosters) = start_workers(settings, queue, &up, of_device)?;
    let models = candidates.into_iter().map(|candidate| Arc::new(candidate.into_model(first_flops)));
    let models = Arc::new(Models::new(models.collect()));
    let workers = Arc::new(Mutex::new(workers));
    let manager = ModelManager {
        settings: settings.clone(),
        models: Arc::clone(&models),
        queue: Arc::clone(queue),
        results: Arc::clone(results),
        up,
        workers: Arc::clone(&workers),
        rosters: Mutex::new(rosters),
        missing: Mutex::default(),
        kept: Mutex::new(kept),
        first_flops,
        loader,
        busy: Mutex::new(()),
    };
    Ok(Placed { manager, models, workers, up: up_now })
}

/// The workers of these devices, and what each shall have, once every one has come up.
type Working<S> = (Vec<JoinHandle<()>>, BTreeMap<String, Arc<worker::Models<S, LoadError>>>);

/// Starts a worker for each device.
fn start_workers<S: Scorer + Send + 'static>(
    settings: &Settings,
    queue: &Arc<Queue>,
    up: &watch::Sender<usize>,
    of_device: BTreeMap<String, Makers<S>>,
) -> Result<Working<S>, LoadError> {
    let (report, reports) = std::sync::mpsc::channel();
    let (mut workers, mut rosters, count) = (Vec::new(), BTreeMap::new(), of_device.len());
    for (device, makers) in of_device {
        let report = report.clone();
        // The receiver is gone only if another worker has failed already.
        let started = move |result| drop(report.send(result));
        let post =
            Post { device: device.clone(), queue: Arc::clone(queue), budget: settings.batch, up: up.clone() };
        let roster = worker::Models::new(queue, makers);
        workers.push(worker::spawn(post, Arc::clone(&roster), started)?);
        rosters.insert(device, roster);
    }
    drop(report);
    // A worker that ended without a report has dropped its sender, so this ends in any case.
    let came_up: Result<Vec<()>, LoadError> = reports.iter().take(count).collect();
    if let Err(error) = came_up.and_then(|came_up| {
        if came_up.len() == count { Ok(()) } else { Err(LoadError::Probe("a worker ended".into())) }
    }) {
        super::lifeline::end(queue, workers);
        return Err(error);
    }
    Ok((workers, rosters))
}
