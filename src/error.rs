//! Why an item or a call got no score: one list for the whole path of a request.

use std::time::Duration;

/// Why an item or a call got no score.
///
/// Every variant is one gRPC status; the table stands in `service::status`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScoreError {
    /// The caller sent something that can never be scored.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of the item or of the request, as a path: `image.encoded`, `prompt`.
        field: &'static str,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// The queue holds as much as it may.
    #[error("the queue is full; try again in {:.1} s", retry_after.as_secs_f64())]
    QueueFull {
        /// The time after which there should be room.
        retry_after: Duration,
    },
    /// By the time the queue would have come to the call, its deadline would be over.
    #[error(
        "the queue would answer in about {:.1} s, after the call's deadline; try again in {:.1} s",
        expected.as_secs_f64(),
        retry_after.as_secs_f64()
    )]
    ExpectedLate {
        /// The time in which there should be an answer.
        expected: Duration,
        /// The time after which there should be one within the time that the call had.
        retry_after: Duration,
    },
    /// The caller did not say who it is, or not in a way that can be believed.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The caller has as many calls open as it may.
    #[error("this caller has {limit} calls open, as many as it may have: try again when one has ended")]
    TooManyCalls {
        /// How many it may have.
        limit: usize,
    },
    /// The messages on their way in hold as much memory as they may, or this caller's do.
    #[error(
        "the messages under way hold as much of {limit} bytes as they may, or this caller's do: try again"
    )]
    TooManyBytes {
        /// How much those of all callers may hold together.
        limit: usize,
    },
    /// A message was begun and did not arrive in time.
    #[error("the message did not arrive whole within {} s", .0.as_secs())]
    SlowMessage(Duration),
    /// The caller's deadline passed before the item reached a device.
    #[error("the deadline passed before the item could be scored")]
    DeadlineExceeded,
    /// The caller went away.
    #[error("the caller cancelled the request")]
    Cancelled,
    /// The server cannot score now; another may.
    #[error("{0}")]
    Unavailable(&'static str),
    /// A fault of the server's own.
    #[error("{0}")]
    Internal(String),
}

impl ScoreError {
    /// An [`ScoreError::Invalid`] of this field.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}
