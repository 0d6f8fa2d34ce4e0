//! What is wrong with settings.

use std::fmt::{self, Display};

/// Everything that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}", self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct InvalidSettings(pub Vec<Fault>);

/// One thing that is wrong with the settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The setting, or the source that could not be read.
    pub name: String,
    /// The value and where it was given.
    pub given: Option<(String, String)>,
    /// What would be right.
    pub problem: String,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.given {
            Some((value, origin)) => write!(f, "{} = {value:?} ({origin}): {}", self.name, self.problem),
            None => write!(f, "{}: {}", self.name, self.problem),
        }
    }
}
