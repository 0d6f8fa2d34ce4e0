//! Who may call: bearer tokens from a file, certificates for TLS, and the rereading of both when they change.

mod own;
mod reload;
mod tls;
mod tokens;

use std::fmt;
use std::path::{Path, PathBuf};

pub use reload::{Followed, follow, read};
pub use tls::{ClientTls, client_config, server_config};
pub use tokens::{Tokens, client_token, one_token};

/// A file that cannot be used, and why. What stands in it is never quoted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct FileFault {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it, and what would be right.
    pub fault: String,
}

impl FileFault {
    fn new(path: &Path, fault: impl fmt::Display) -> Self {
        Self { path: path.to_owned(), fault: fault.to_string() }
    }
}

/// A text that must never be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for those who must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
