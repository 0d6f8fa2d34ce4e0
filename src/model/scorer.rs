//! What the worker needs of a model, and no more: tests of the queue use a fake.

use super::{Sample, Score};

/// Scores samples on the device that it owns, in three steps, so that a batch is laid out and copied while the device
/// still computes the one before it.
pub trait Scorer {
    /// A batch that is on its way to the device.
    type Staged;
    /// A batch that the device computes.
    type Running;

    /// Lays out a batch and begins to copy it to the device, without waiting for what runs there.
    ///
    /// # Errors
    /// The batch does not fit the model or the device; no sample of it has a score.
    fn stage(&mut self, samples: &[&Sample]) -> Result<Self::Staged, ModelError>;

    /// Starts the forward pass. On a GPU the work is queued; on the CPU it is done when this returns.
    ///
    /// # Errors
    /// The forward pass failed as a whole; no sample of the batch has a score.
    fn launch(&mut self, batch: Self::Staged) -> Result<Self::Running, ModelError>;

    /// Waits for the scores: one per sample, in order. A score does not depend on the other samples.
    ///
    /// # Errors
    /// As [`Scorer::launch`].
    fn collect(&mut self, batch: Self::Running) -> Result<Vec<Score>, ModelError>;

    /// All three steps.
    ///
    /// # Errors
    /// As each of them.
    fn score(&mut self, samples: &[&Sample]) -> Result<Vec<Score>, ModelError> {
        let staged = self.stage(samples)?;
        let running = self.launch(staged)?;
        self.collect(running)
    }

    /// Scores these samples before any caller's: two pictures under one prompt, then the same two under another. A fake
    /// has nothing to show.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    fn self_test(&mut self, _samples: &[Sample; 4]) -> Result<SelfTested, ModelError> {
        Ok(SelfTested::default())
    }

    /// Asked after a failure: whether the device can compute nothing any more, so that only a new scorer can.
    fn is_lost(&mut self) -> bool {
        false
    }
}

/// What a self-test showed.
#[derive(Debug, Default)]
pub struct SelfTested {
    /// In words for people what callers must know of the scores: that they do not differ.
    pub remark: Option<String>,
    /// The scores.
    pub scores: Vec<Score>,
}

/// Why a forward pass failed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// libtorch refused an operation, or the device failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A sample does not fit the model.
    #[error("{0}")]
    Sample(String),
}
