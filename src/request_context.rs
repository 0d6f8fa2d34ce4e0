//! On whose behalf an item is worked on.

use std::sync::Arc;
use std::time::Instant;

/// Who asks: the subject of a token, else the peer's address. What one caller waits for is fair to all others.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caller(pub Arc<str>);

impl Default for Caller {
    fn default() -> Self {
        Self("anonymous".into())
    }
}

/// How urgent an item is, beside others that wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// A training run waits for it.
    #[default]
    Training,
    /// It is scored from what training leaves, and from a small share of its own.
    Evaluation,
}

impl Priority {
    /// All there are, the more urgent first.
    pub const ALL: [Self; 2] = [Self::Training, Self::Evaluation];

    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Evaluation => "evaluation",
        }
    }
}

/// Whose an item is, how urgent it is, and until when it is wanted.
#[derive(Debug, Clone, Default)]
pub struct Claim {
    /// Who asks.
    pub caller: Caller,
    /// How urgent it is.
    pub priority: Priority,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Whether the server made the item up, to explain another.
    pub made_up: bool,
}

impl Claim {
    /// Whether the caller has stopped waiting by `now`.
    pub fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}
