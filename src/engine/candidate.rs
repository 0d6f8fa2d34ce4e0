//! A model on its way: what a loader gave, until it is on its devices.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use metrics::gauge;

use super::models::Model;
use super::self_test::Proofs;
use super::{LoadError, Loaded, MakeScorer, SelfTest, Terms};
use crate::model::{Scorer, SelfTested};
use crate::scheduler::Tag;
use crate::scheduler::worker::Make;
use crate::telemetry::{CONSTANT_SCORES, ModelLabels};

/// A model before it is on its devices.
pub(super) struct Candidate<S> {
    loaded: Loaded<S>,
    pub tag: Arc<Tag>,
    /// What the self-test found.
    remark: Arc<OnceLock<String>>,
    reference: Reference,
}

/// What a model is held against for as long as it is there.
#[derive(Clone)]
pub(super) struct Reference {
    pub test: SelfTest,
    /// What it scored on each device.
    pub proofs: Arc<Proofs>,
}

impl<S: Scorer + Send + 'static> Candidate<S> {
    pub fn new(loaded: Loaded<S>) -> Result<Self, LoadError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let test = SelfTest::new(&loaded.processor).map_err(|error| LoadError::Limits(error.to_string()))?;
        let (name, id) = (loaded.info.name.as_str(), NEXT.fetch_add(1, Ordering::Relaxed));
        let labels = if loaded.terms.named { ModelLabels::named(name) } else { ModelLabels::default() };
        let tag = Arc::new(Tag { id, name: name.into(), labels });
        let reference = Reference { test, proofs: Arc::default() };
        Ok(Self { loaded, tag, remark: Arc::default(), reference })
    }

    /// What makes it, tested, for each of its devices.
    pub fn makers(&mut self) -> Vec<(String, Make<S, LoadError>)> {
        let makers = std::mem::take(&mut self.loaded.workers).into_iter().zip(&self.loaded.info.devices);
        let maker = |(make, device): (MakeScorer<S>, &String)| {
            let (remark, tag) = (Arc::clone(&self.remark), Arc::clone(&self.tag));
            let (Reference { test, proofs }, place) = (self.reference.clone(), device.clone());
            let make: Make<S, LoadError> = Arc::new(move || {
                let made = catch_unwind(AssertUnwindSafe(&*make));
                let mut scorer = made.unwrap_or_else(|_| Err(LoadError::Probe("it panicked".into())))?;
                let SelfTested { remark: found, scores } = test.run(&mut scorer)?;
                if let Some(found) = found {
                    tracing::error!(model = &*tag.name, found, "the self-test at load");
                    remark.get_or_init(|| found);
                }
                // What is made anew is what it was, to the last bit.
                proofs.hold(&place, scores, 0.0)?;
                Ok(scorer)
            });
            (device.clone(), make)
        };
        makers.map(maker).collect()
    }

    /// What it is held against.
    pub fn reference(&self) -> Reference {
        self.reference.clone()
    }

    /// The model, once it is on its devices. `first_flops` is what a token of the first model costs.
    pub fn into_model(self, first_flops: Option<f64>) -> Model {
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
        let mut model = Model {
            components: info.components.iter().cloned().collect(),
            tag: self.tag,
            least_cost: 0,
            processor: Arc::new(processor),
            info,
            terms,
            weight,
            seed,
        };
        model.least_cost = model.cost(self.reference.test.cheapest.tokens());
        model
    }
}
