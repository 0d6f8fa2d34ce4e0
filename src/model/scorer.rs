//! What the worker needs of a model, and no more: tests of the queue use a fake.

use super::{Sample, Score};

/// Scores samples on the device that it owns.
pub trait Scorer {
    /// One score per sample, in order. A score does not depend on the other samples.
    ///
    /// # Errors
    /// The forward pass failed as a whole; no sample of the batch has a score.
    fn score(&mut self, samples: &[&Sample]) -> Result<Vec<Score>, ModelError>;
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
