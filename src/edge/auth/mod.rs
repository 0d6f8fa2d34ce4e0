//! Who may call: bearer tokens from a file, certificates for TLS, and the rereading of both when they change.

mod own;
mod reload;
mod tls;
mod tokens;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::Settings;

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

/// What is wrong with the files that these settings name for tokens and TLS, by the setting's name.
pub fn file_faults(settings: &Settings) -> Vec<(&'static str, String)> {
    let mut faults = Vec::new();
    let mut note = |name, fault: FileFault| faults.push((name, format!("the file {}", fault.fault)));
    let tokens =
        [("auth.tokens_file", &settings.tokens_file), ("admin.tokens_file", &settings.admin.tokens_file)];
    for (name, path) in tokens {
        if let Some(path) = path
            && let Err(fault) =
                read(std::slice::from_ref(path)).and_then(|read| Tokens::parse(path, &read[0]))
        {
            note(name, fault);
        }
    }
    if let Some(tls) = &settings.tls
        && let Err(fault) = read(&tls.files()).and_then(|read| server_config(tls, &read))
    {
        let name = match &fault.path {
            path if *path == tls.key => "tls.key",
            path if Some(path) == tls.client_ca.as_ref() => "tls.client_ca",
            _ => "tls.certificate",
        };
        note(name, fault);
    }
    faults
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
