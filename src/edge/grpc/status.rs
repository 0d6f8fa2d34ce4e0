//! The one table of errors: what a [`ScoreError`] is on the wire, in the metrics and in the log.

use std::error::Error;
use std::io;
use std::iter::successors;
use std::time::Duration;

use metrics::counter;
use prost::Message;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tracing::Level;

use crate::error::{MOST_TEXT, ScoreError, brief};
use crate::telemetry::CALLS_REFUSED;

/// When a caller with too many calls or bytes may look again whether some have ended: only it could know better.
const CALL_ENDS: Duration = Duration::from_secs(1);

/// The gRPC code of an error.
pub fn code(error: &ScoreError) -> Code {
    match error {
        ScoreError::Invalid { .. } => Code::InvalidArgument,
        ScoreError::Unauthenticated(_) => Code::Unauthenticated,
        ScoreError::QueueFull { .. }
        | ScoreError::ExpectedLate { .. }
        | ScoreError::TooManyCalls { .. }
        | ScoreError::TooManyBytes { .. } => Code::ResourceExhausted,
        ScoreError::DeadlineExceeded | ScoreError::SlowMessage(_) => Code::DeadlineExceeded,
        ScoreError::Cancelled => Code::Cancelled,
        ScoreError::Unavailable(_) | ScoreError::NotServing { .. } => Code::Unavailable,
        ScoreError::Internal(_) => Code::Internal,
    }
}

/// Whether an item's error is one of the whole call: its neighbours could only fail the same way, and the caller
/// should try the whole request again.
pub fn concerns_call(error: &ScoreError) -> bool {
    match error {
        ScoreError::Invalid { .. } | ScoreError::Internal(_) => false,
        ScoreError::QueueFull { .. }
        | ScoreError::ExpectedLate { .. }
        | ScoreError::TooManyCalls { .. }
        | ScoreError::TooManyBytes { .. }
        | ScoreError::Unauthenticated(_)
        | ScoreError::DeadlineExceeded
        | ScoreError::SlowMessage(_)
        | ScoreError::Cancelled
        | ScoreError::NotServing { .. }
        | ScoreError::Unavailable(_) => true,
    }
}

/// A code as metrics and logs name it.
pub fn label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// How grave a code is for the operator. What callers do wrong is theirs to read, and its message may quote them,
/// so that it never stands above debug.
pub fn level(code: Code) -> Level {
    match code {
        Code::Internal | Code::Unknown | Code::DataLoss => Level::ERROR,
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Unauthenticated => {
            Level::INFO
        }
        _ => Level::DEBUG,
    }
}

/// The status of an error. `place` is the path to the message that has the error's field: `items[3].`, or nothing
/// where the field is the request's own.
pub fn status(error: &ScoreError, place: &str) -> Status {
    let mut details = ErrorDetails::new();
    let mut message = brief(error);
    match error {
        ScoreError::Invalid { field, reason } => {
            details.add_bad_request_violation(format!("{place}{field}"), reason);
            message = brief(format_args!("{place}{error}"));
        }
        ScoreError::QueueFull { retry_after } | ScoreError::ExpectedLate { retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
        }
        ScoreError::TooManyCalls { .. } | ScoreError::TooManyBytes { .. } => {
            details.set_retry_info(Some(CALL_ENDS));
        }
        _ => {}
    }
    Status::with_error_details(code(error), message, details)
}

/// The status of a call that fails as a whole; one that is refused for want of room is counted.
pub fn of_call(error: &ScoreError) -> Status {
    let full = match error {
        ScoreError::QueueFull { .. } => Some("queue"),
        ScoreError::ExpectedLate { .. } => Some("deadline"),
        ScoreError::TooManyBytes { .. } => Some("bytes"),
        ScoreError::TooManyCalls { .. } => Some("calls"),
        _ => None,
    };
    if let Some(reason) = full {
        counter!(CALLS_REFUSED, "reason" => reason).increment(1);
    }
    status(error, "")
}

/// The same status as an item carries it.
pub fn item_status(error: &ScoreError, place: &str) -> tonic_types::Status {
    let status = status(error, place);
    // `with_error_details` has put the whole message there; a failure to read it back loses the details alone.
    let details = tonic_types::Status::decode(status.details()).map(|status| status.details);
    tonic_types::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: details.unwrap_or_default(),
    }
}

/// What became of a body that its sender did not bring to its end: a call that is given up, or framing that nobody can
/// read. A status of our own layers stays as it is.
pub fn of_sender(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    let unread = successors(status.source(), |&cause| cause.source())
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData));
    of_call(&if unread {
        ScoreError::invalid("body", "its chunks are not framed as HTTP has it")
    } else {
        ScoreError::Cancelled
    })
}

/// A refusal by tonic itself, in the words of our contract: there a message that is over the limit or no message at
/// all is an invalid argument, and `RESOURCE_EXHAUSTED` and `INTERNAL` are never what the caller sent.
///
/// tonic refuses a request before any handler sees it, and such a status has no details, which ours always have.
pub fn of_transport(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    let reason = brief(status.message());
    match status.code() {
        Code::OutOfRange | Code::ResourceExhausted | Code::Internal => {
            let mut details = ErrorDetails::new();
            details.add_bad_request_violation("message", &reason);
            let message = brief(format_args!("the message cannot be read: {reason}"));
            Status::with_error_details(Code::InvalidArgument, message, details)
        }
        code if status.message().len() > MOST_TEXT => Status::new(code, reason),
        _ => status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_names_the_item() {
        let status = status(&ScoreError::invalid("image.encoded", "is empty"), "items[3].");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "items[3].image.encoded: is empty");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "items[3].image.encoded");
        assert_eq!(violations[0].description, "is empty");
    }

    #[test]
    fn an_item_carries_the_details_too() {
        let status = item_status(&ScoreError::invalid("prompt", "is empty"), "item.");
        assert_eq!(status.code, 3);
        assert!(status.details[0].type_url.ends_with("google.rpc.BadRequest"));
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let wait = Duration::from_millis(1500);
        let status = status(&ScoreError::QueueFull { retry_after: wait }, "");
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(wait));
        assert_eq!(of_transport(status).code(), Code::ResourceExhausted);
    }

    #[test]
    fn what_cannot_be_read_is_the_callers_and_what_fails_is_ours() {
        for unread in [Status::internal("no"), Status::out_of_range("no"), Status::resource_exhausted("no")] {
            let said = of_transport(unread);
            assert_eq!(said.code(), Code::InvalidArgument);
            assert_eq!(said.get_details_bad_request().unwrap().field_violations[0].field, "message");
        }
        let ours = status(&ScoreError::Internal("a fault".into()), "");
        assert_eq!(of_transport(ours).code(), Code::Internal);
        assert_eq!(of_transport(Status::unimplemented("")).code(), Code::Unimplemented);
    }
}
