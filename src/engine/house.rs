//! Models on their devices: one worker for each device, with all the models that are placed on it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use metrics::gauge;
use tokio::sync::{mpsc, watch};

use super::models::{Model, Models};
use super::{LoadError, Loaded, SelfTest, Terms};
use crate::config::Settings;
use crate::model::Scorer;
use crate::scheduler::worker::{self, Make, Post};
use crate::scheduler::{Queue, Tag};
use crate::telemetry::{CONSTANT_SCORES, ModelLabels};

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

/// Models that are up, and the workers that have them.
pub(super) struct Moved {
    pub models: Models,
    pub workers: Vec<JoinHandle<()>>,
    /// How many workers are up.
    pub up: watch::Receiver<usize>,
}

/// A model before it is on its devices.
struct Candidate<S> {
    loaded: Loaded<S>,
    test: SelfTest,
    tag: Arc<Tag>,
    /// What the self-test found.
    remark: Arc<OnceLock<String>>,
}

impl<S: Scorer + Send + 'static> Candidate<S> {
    fn new(loaded: Loaded<S>) -> Result<Self, LoadError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let test = SelfTest::new(&loaded.processor).map_err(|error| LoadError::Limits(error.to_string()))?;
        let (name, id) = (loaded.info.name.as_str(), NEXT.fetch_add(1, Ordering::Relaxed));
        let labels = if loaded.terms.named { ModelLabels::named(name) } else { ModelLabels::default() };
        let tag = Arc::new(Tag { id, name: name.into(), labels });
        Ok(Self { loaded, test, tag, remark: Arc::default() })
    }

    /// What makes it, tested, for each of its devices.
    fn makers(&mut self) -> Vec<(String, Make<S, LoadError>)> {
        let makers = std::mem::take(&mut self.loaded.workers).into_iter().zip(&self.loaded.info.devices);
        let maker = |(make, device): (super::MakeScorer<S>, &String)| {
            let (test, remark, tag) = (self.test.clone(), Arc::clone(&self.remark), Arc::clone(&self.tag));
            let make: Make<S, LoadError> = Arc::new(move || {
                let mut scorer = make()?;
                if let Some(found) = test.run(&mut scorer)? {
                    tracing::error!(model = &*tag.name, found, "the self-test at load");
                    remark.get_or_init(|| found);
                }
                Ok(scorer)
            });
            (device.clone(), make)
        };
        makers.map(maker).collect()
    }

    /// The model, once it is on its devices. `first_flops` is what a token of the first model costs.
    fn into_model(self, first_flops: Option<f64>) -> Model {
        let Loaded { mut info, terms, processor, .. } = self.loaded;
        let constant = self.remark.get().is_some();
        gauge!(CONSTANT_SCORES, self.tag.labels.alone()).set(if constant { 1.0 } else { 0.0 });
        if let Some(found) = self.remark.get() {
            info.notice = [found, info.notice.as_str()].join(" ").trim_end().to_owned();
        }
        let weight = match (terms.token_flops, first_flops) {
            (Some(own), Some(first)) if own > 0.0 && first > 0.0 => own / first,
            _ => 1.0,
        };
        let mut seed = blake3::Hasher::new();
        let Terms { profile_digest, .. } = &terms;
        for part in [&info.revision, profile_digest, &info.dtype, &info.devices.join(",")] {
            seed.update(part.as_bytes()).update(&[0]);
        }
        let (alive, _) = mpsc::channel(1);
        let mut model = Model {
            components: info.components.iter().cloned().collect(),
            tag: self.tag,
            least_cost: 0,
            processor: Arc::new(processor),
            info,
            terms,
            weight,
            seed,
            _alive: alive,
        };
        model.least_cost = model.cost(self.test.cheapest.tokens());
        model
    }
}

/// Places models on their devices, starts the workers, and waits until each has run once with all its models. Blocks.
///
/// # Errors
/// The first worker that did not come up, after the others were ended.
pub(super) fn move_in<S: Scorer + Send + 'static>(
    settings: &Settings,
    loaded: Vec<Loaded<S>>,
    queue: &Arc<Queue>,
) -> Result<Moved, LoadError> {
    super::models::distinct(loaded.iter().map(|loaded| loaded.info.name.as_str()))?;
    let first_flops = loaded.first().and_then(|loaded| loaded.terms.token_flops);
    let mut candidates = loaded.into_iter().map(Candidate::new).collect::<Result<Vec<_>, _>>()?;
    let mut crews: BTreeMap<String, Makers<S>> = BTreeMap::new();
    for candidate in &mut candidates {
        for (device, make) in candidate.makers() {
            crews.entry(device).or_default().push((candidate.tag.id, make));
        }
    }
    let (up_sender, up) = watch::channel(0);
    let (report, reports) = std::sync::mpsc::channel();
    let (mut workers, count) = (Vec::new(), crews.len());
    for (device, makers) in crews {
        let report = report.clone();
        // The receiver is gone only if another worker has failed already.
        let started = move |result| drop(report.send(result));
        let post = Post { device, queue: Arc::clone(queue), budget: settings.batch, up: up_sender.clone() };
        let models = worker::Models::new(queue, makers);
        workers.push(worker::spawn(post, models, started)?);
    }
    drop((report, up_sender));
    // A worker that ended without a report has dropped its sender, so this ends in any case.
    let came_up: Result<Vec<()>, LoadError> = reports.iter().take(count).collect();
    if let Err(error) = came_up.and_then(|came_up| {
        if came_up.len() == count { Ok(()) } else { Err(LoadError::Probe("a worker ended".into())) }
    }) {
        super::end(queue, workers);
        return Err(error);
    }
    let models = candidates.into_iter().map(|candidate| Arc::new(candidate.into_model(first_flops)));
    Ok(Moved { models: Models::new(models.collect()), workers, up })
}
