//! Why an item or a call got no score: one list for the whole path of a request.

use std::fmt::{self, Display, Write};
use std::sync::Arc;
use std::time::Duration;

/// The most bytes of a text that goes out. What callers sent may stand in it, and is as long as they like.
pub const MOST_TEXT: usize = 512;
/// Stands where a text was cut.
const ELLIPSIS: char = '…';
/// The most bytes of what a caller sent that a text quotes.
const MOST_QUOTED: usize = 100;

/// Why an item or a call got no score.
///
/// Every variant is one gRPC status; the table stands in `edge::grpc::status`.
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
    /// A model takes no calls now.
    #[error("the model {model:?} {why}")]
    NotServing {
        /// The model.
        model: String,
        /// Why.
        why: Arc<str>,
    },
    /// A fault of the server's own.
    #[error("{0}")]
    Internal(String),
}

impl ScoreError {
    /// An [`ScoreError::Invalid`] of this field.
    pub fn invalid(field: &'static str, reason: impl Display) -> Self {
        Self::Invalid { field, reason: brief(reason) }
    }
}

/// A text as it goes out: of more than [`MOST_TEXT`] bytes the beginning. The rest is never written anywhere.
pub fn brief(text: impl Display) -> String {
    cut(text, MOST_TEXT)
}

/// What a caller sent, as a text quotes it: its beginning, in quotation marks.
pub fn quoted(text: &str) -> String {
    let mut quotation = cut(format_args!("{text:?}"), MOST_QUOTED);
    if quotation.ends_with(ELLIPSIS) {
        quotation.push('"');
    }
    quotation
}

/// The beginning of a text, in at most so many bytes. Where it ends early, an ellipsis says so.
pub fn cut(text: impl Display, most: usize) -> String {
    let mut beginning = Beginning { text: String::new(), most };
    // An error is how it says that it is full.
    let _ = write!(beginning, "{text}");
    beginning.text
}

struct Beginning {
    text: String,
    most: usize,
}

impl Write for Beginning {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        if self.text.len() + more.len() <= self.most {
            self.text.push_str(more);
            return Ok(());
        }
        let fits =
            |text: &str, most: usize| (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
        let most = self.most.saturating_sub(ELLIPSIS.len_utf8());
        let room = most.saturating_sub(self.text.len());
        self.text.push_str(&more[..fits(more, room).unwrap_or_default()]);
        self.text.truncate(fits(&self.text, most).unwrap_or_default());
        self.text.push(ELLIPSIS);
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters_and_ends_there() {
        assert_eq!(cut("", 8), "");
        assert_eq!(cut("12345678", 8), "12345678");
        assert_eq!(cut("123456789", 8), "12345…");
        assert_eq!(cut(format_args!("{}{}", "1234567", "89"), 8), "12345…");
        assert_eq!(cut("1234äöü", 8), "1234…");
        assert_eq!(cut("🦀🦀🦀", 8), "🦀…");
        assert_eq!(quoted("a\n\"b\""), r#""a\n\"b\"""#);
        let long = quoted(&"\x7f".repeat(1 << 20));
        assert!(
            long.starts_with("\"\\u{7f}") && long.ends_with("…\"") && long.len() <= MOST_QUOTED + 1,
            "{long}"
        );
    }

    /// Fails where it is asked for more than a text's beginning.
    #[test]
    fn what_is_cut_off_is_never_written() {
        struct Endless;
        impl Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                (0..).try_for_each(|_| f.write_str("text "))
            }
        }
        assert!(brief(Endless).len() <= MOST_TEXT);
        let ScoreError::Invalid { reason, .. } = ScoreError::invalid("prompt", Endless) else { panic!() };
        assert!(reason.len() <= MOST_TEXT && reason.ends_with('…'));
    }
}
