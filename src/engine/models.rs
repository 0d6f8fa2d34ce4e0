//! The models that are there, by name.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::mpsc;

use super::{LoadError, ModelInfo, Terms};
use crate::error::{ScoreError, quoted};
use crate::processor::Processor;
use crate::scheduler::Tag;

/// A model that is up: what a call holds of it for as long as it lasts.
pub struct Model {
    /// What is served.
    pub info: ModelInfo,
    /// What else is known of it.
    pub terms: Terms,
    /// How the queue and the workers know it.
    pub tag: Arc<Tag>,
    /// The names of a score's components, where the item asks no questions.
    pub(super) components: Arc<[String]>,
    pub(super) processor: Arc<Processor>,
    /// The cost of its cheapest item.
    pub(super) least_cost: usize,
    /// What a token costs, in those of the first model.
    pub(super) weight: f64,
    /// What a digest begins with: it stands for the model.
    pub(super) seed: blake3::Hasher,
    /// Tells who waits that no call has the model any more.
    pub(super) _alive: mpsc::Sender<Infallible>,
}

impl Model {
    /// What so many of its tokens cost.
    pub(super) fn cost(&self, tokens: usize) -> usize {
        (tokens as f64 * self.weight).ceil() as usize
    }
}

/// The models, the default one first.
#[derive(Default)]
pub struct Models(RwLock<Vec<Arc<Model>>>);

impl Models {
    /// Of these.
    pub(super) fn new(models: Vec<Arc<Model>>) -> Self {
        Self(RwLock::new(models))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Model>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those that a call names, in its order; the default one where it names none.
    ///
    /// # Errors
    /// There is no such model, or it is named twice.
    pub fn named(&self, names: &[String]) -> Result<Vec<Arc<Model>>, ScoreError> {
        let models = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if names.is_empty() {
            let first = models.first().map(|model| vec![Arc::clone(model)]);
            return first.ok_or(ScoreError::Unavailable("no model is loaded"));
        }
        // A list that is longer than all there are has one twice, or one that is not there.
        let mut found: Vec<Arc<Model>> = Vec::with_capacity(names.len().min(models.len()));
        for name in names {
            let Some(model) = models.iter().find(|model| model.info.name == *name) else {
                let there: Vec<&str> = models.iter().map(|model| model.info.name.as_str()).collect();
                let reason = format!("there is no model {}; there are {}", quoted(name), there.join(", "));
                return Err(ScoreError::invalid("models", reason));
            };
            if found.iter().any(|other| Arc::ptr_eq(other, model)) {
                return Err(ScoreError::invalid("models", format!("{} is named twice", quoted(name))));
            }
            found.push(Arc::clone(model));
        }
        Ok(found)
    }

    /// The model of a name, or the default one where it is empty.
    ///
    /// # Errors
    /// As [`Models::named`].
    pub fn one(&self, name: &str) -> Result<Arc<Model>, ScoreError> {
        let names = if name.is_empty() { Vec::new() } else { vec![name.to_owned()] };
        self.named(&names)?.pop().ok_or(ScoreError::Unavailable("no model is loaded"))
    }
}

/// Two models of one name cannot be told apart.
pub(super) fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), LoadError> {
    let mut seen = Vec::new();
    for name in names {
        if seen.contains(&name) {
            return Err(LoadError::Twice(name.to_owned()));
        }
        seen.push(name);
    }
    Ok(())
}
