//! A checkpoint: its files, its tensors, and what can be wrong with them.

mod adapter_config;
mod files;
mod folder;
mod hub;
mod lora;
pub mod python_json;
mod shards;
mod tensors;
mod weights;

pub use files::CheckpointFiles;
pub(super) use files::NAMED;
pub use folder::BUILT_IN_NAME;
pub use tensors::{Fault, Inventory, Problem};
pub use weights::Weights;

/// The command that makes a checkpoint of what trainers pickle: `training/`.
const CONVERTER: &str = "spatialscore-convert";

/// Why a checkpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The name is neither built in, nor a directory, nor a hub id.
    #[error(
        "no checkpoint {0:?}: it is neither {BUILT_IN_NAME:?} (built in), nor a directory, nor a hub id (owner/model)"
    )]
    NotFound(String),
    /// The hub could not give it.
    #[error("{id}@{revision} from the hub: {reason}")]
    Hub {
        /// The repository.
        id: String,
        /// The branch, tag or commit.
        revision: String,
        /// What the hub or its cache said.
        reason: String,
    },
    /// A file that every checkpoint has is not there.
    #[error("{0} is missing")]
    MissingFile(String),
    /// There are weights, and only as pickles.
    #[error("{}", files::pickled(.0))]
    Pickles(Vec<String>),
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// The file's name.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file says something that this server cannot serve.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file's name.
        file: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Tensors that are missing, unexpected, misshapen or not finite: all of them.
    #[error("{} of its tensors cannot be served:{}", .0.len(), list(.0))]
    Tensors(Vec<Fault>),
}

/// The first faults, a line each.
fn list(faults: &[Fault]) -> String {
    const SHOWN: usize = 20;
    let mut text: String = faults.iter().take(SHOWN).map(|f| format!("\n  {f}")).collect();
    if faults.len() > SHOWN {
        text += &format!("\n  and {} more", faults.len() - SHOWN);
    }
    text
}

impl CheckpointError {
    /// A [`CheckpointError::Io`] of this file.
    pub fn io(file: &str, source: std::io::Error) -> Self {
        Self::Io { file: file.to_owned(), source }
    }

    /// A file that could not be opened: missing, or unreadable.
    pub fn open(file: &str, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::MissingFile(file.to_owned()),
            _ => Self::io(file, source),
        }
    }

    /// A [`CheckpointError::Invalid`] of this file.
    pub fn invalid(file: &str, reason: impl Into<String>) -> Self {
        Self::Invalid { file: file.to_owned(), reason: reason.into() }
    }
}
