//! What a loader gives: all that a model is made of, or why there is none.

use std::io;
use std::time::Duration;

use super::Memory;
use crate::device::NoDevice;
use crate::model::checkpoint::CheckpointError;
use crate::model::profile::Output;
use crate::processor::Processor;

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name that its operator gave it, else that by which the checkpoint was asked for.
    pub name: String,
    /// `model_type` of its `config.json`.
    pub architecture: String,
    /// The hub's commit or the digest of its files.
    pub revision: String,
    /// The number format of the weights and of the forward.
    pub dtype: String,
    /// Where it runs, one name per worker.
    pub devices: Vec<String>,
    /// What it gives.
    pub output: Output,
    /// What its reward is read by: the name of the profile that ships, or the file that says it.
    pub profile: String,
    /// How many pictures an item has, the judged one among them.
    pub pictures: usize,
    /// The names of a score's components, where its profile has several passes.
    pub components: Vec<String>,
    /// Whether an item may ask questions of its own.
    pub takes_questions: bool,
    /// What its makers want its callers to know; before it, what the self-test found.
    pub notice: String,
}

/// What is known of a model beside what it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Terms {
    /// Whether its operator gave it its name.
    pub named: bool,
    /// The name by which the checkpoint was asked for.
    pub checkpoint: String,
    /// `sha256:` and the digest of what its reward is read by.
    pub profile_digest: String,
    /// The floating-point operations that a token of it costs, of a usual item; `None`: as many as one of the first model.
    pub token_flops: Option<f64>,
    /// The memory that it takes on each of its devices.
    pub memory: Vec<Memory>,
}

/// What a loader gives: all that a model is made of.
pub struct Loaded<S> {
    /// What is served.
    pub info: ModelInfo,
    /// What else is known of it.
    pub terms: Terms,
    /// The processor of the checkpoint.
    pub processor: Processor,
    /// What makes the model, for each of its devices.
    pub workers: Vec<MakeScorer<S>>,
}

/// Makes a model on the thread that will own it; again where that thread was lost.
pub type MakeScorer<S> = Box<dyn Fn() -> Result<S, LoadError> + Send + Sync>;

/// Why there is no model to serve.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint cannot be served.
    #[error("the checkpoint cannot be served: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// Several things are wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Several(Vec<LoadError>),
    /// A device is not there.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// Not even the smallest item keeps the limits.
    #[error(
        "nothing could ever be scored: the smallest picture with the shortest prompt breaks a limit: {0}"
    )]
    Limits(String),
    /// The model was loaded and could not score.
    #[error("the model was loaded, but its first forward failed: {0}")]
    Probe(String),
    /// Two models have one name.
    #[error("there are two models named {0:?}")]
    Twice(String),
    /// One of several models cannot be served.
    #[error("the model {0:?}: {1}")]
    Of(String, Box<LoadError>),
    /// A model is not what it was when it was first loaded.
    #[error("the model is not what it was: {0}")]
    Changed(String),
    /// The models do not fit a device.
    #[error("{0}")]
    Memory(String),
    /// All workers were lost, and none could be made anew.
    #[error("no worker has been up for {:.0} s", .0.as_secs_f64())]
    Lost(Duration),
    /// The system gave no thread.
    #[error("no thread: {0}")]
    Thread(#[from] io::Error),
}

impl LoadError {
    /// All that is wrong as one error.
    pub(super) fn all(mut errors: Vec<Self>) -> Option<Self> {
        if errors.len() > 1 { Some(Self::Several(errors)) } else { errors.pop() }
    }
}
