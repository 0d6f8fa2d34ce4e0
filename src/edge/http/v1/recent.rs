//! What was scored of late, to each caller its own.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use http::{Request, Response, header};
use serde::Serialize;
use tonic::Status;

use super::seen::held;
use crate::edge::grpc::claim;
use crate::edge::http::response::Refused;
use crate::edge::http::{Edge, ModelOfPath};
use crate::edge::layers::admission::Overseer;
use crate::edge::layers::arrivals::Arrivals;
use crate::error::{ScoreError, quoted};
use crate::recent::{Asked, Summary, answer_bytes};
use crate::request_context::{Caller, Claim, Priority};

/// How many of the highest, of the lowest and of the groups there are where a call says nothing, and at most.
const SHOWN: usize = 6;
const MOST_SHOWN: usize = 24;
/// Bytes of JSON that are read in about the time that it takes to sum up an entry.
const ENTRY_BYTES: usize = 1 << 9;

/// The answer.
#[derive(Serialize)]
struct RecentAnswer {
    keep_seconds: u64,
    seconds: u64,
    /// Whether it is of all callers, and not of who asks alone.
    of_all_callers: bool,
    #[serde(flatten)]
    summary: Summary,
}

/// What a call asks for, behind its `?`.
#[derive(Debug, Default, PartialEq)]
struct Query {
    seconds: Option<u64>,
    most: Option<usize>,
    model: Option<String>,
    caller: Option<String>,
}

impl Query {
    fn read(query: &str) -> Result<Self, ScoreError> {
        let mut read = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "seconds" => once("seconds", &mut read.seconds, number("seconds", &value)?)?,
                "most" => once("most", &mut read.most, number("most", &value)?)?,
                "model" => once("model", &mut read.model, value.into_owned())?,
                "caller" => once("caller", &mut read.caller, value.into_owned())?,
                other => {
                    let other = quoted(other);
                    let reason = format!("has a part {other}; there are seconds, most, model and caller");
                    return Err(ScoreError::invalid("query", reason));
                }
            }
        }
        Ok(read)
    }
}

fn once<T>(name: &'static str, place: &mut Option<T>, value: T) -> Result<(), ScoreError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(ScoreError::invalid(name, "stands twice; send it once")),
    }
}

fn number<T: std::str::FromStr>(name: &'static str, text: &str) -> Result<T, ScoreError> {
    text.parse().map_err(|_| ScoreError::invalid(name, format!("is {}, no number", quoted(text))))
}

/// Whose scores are shown; `None`: those of all callers.
fn whose(asked: Option<String>, own: Caller, oversees: bool) -> Result<Option<Caller>, ScoreError> {
    match asked {
        None => Ok((!oversees).then_some(own)),
        Some(name) if oversees || *name == *own.0 => Ok(Some(Caller(name.into()))),
        Some(_) => Err(ScoreError::invalid(
            "caller",
            "is another; each caller sees its own, and who shows a token of admin.tokens_file those of all",
        )),
    }
}

/// `GET /v1/recent`.
pub(in crate::edge::http) async fn recent(
    State(edge): State<Edge>,
    request: Request<Body>,
) -> Result<Response<Body>, Refused> {
    let (parts, _) = request.into_parts();
    let engine = edge.handlers.engine()?;
    let none = || Status::not_found("nothing is kept of what was scored: recent.keep is 0");
    let recent = engine.recent().cloned().ok_or_else(none)?;
    let Query { seconds, most, model, caller } = Query::read(parts.uri.query().unwrap_or_default())?;
    let keep = recent.settings.keep.as_secs();
    let (seconds, most) = (seconds.unwrap_or(keep), most.unwrap_or(SHOWN));
    if !(1..=keep).contains(&seconds) {
        return Err(ScoreError::invalid("seconds", format!("must be 1 to {keep}")).into());
    }
    if most > MOST_SHOWN {
        return Err(ScoreError::invalid("most", format!("must be 0 to {MOST_SHOWN}")).into());
    }
    // A page that is looked at may wait for training.
    let claim = Claim { priority: Priority::Evaluation, ..claim(&parts.extensions) };
    let oversees = parts.extensions.get::<Overseer>().is_some();
    let whose = whose(caller, claim.caller.clone(), oversees)?;
    let age = Duration::from_secs(seconds);
    let entries = recent.entries(whose.as_ref(), age);
    let arrivals: Arrivals = parts.extensions.get().cloned().unwrap_or_default();
    let room = arrivals.beside(answer_bytes(&recent, entries.len(), most))?;
    let model = model.or_else(|| parts.extensions.get().map(|ModelOfPath(name)| name.clone()));
    let asked = Asked { age, most, model };
    let bytes = ENTRY_BYTES * entries.len();
    let work = move || {
        let summary = Summary::of(entries, Instant::now(), &asked);
        let answer = RecentAnswer { keep_seconds: keep, seconds, of_all_callers: whose.is_none(), summary };
        serde_json::to_vec(&answer)
            .map_err(|fault| ScoreError::Internal(format!("the answer is no JSON: {fault}")))
    };
    let body = engine.unpack(&claim, bytes, work).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], held(body, room)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_and_nothing_else() {
        let read = |text: &str| Query::read(text).map_err(|error| error.to_string());
        let whole = Query {
            seconds: Some(60),
            most: Some(3),
            model: Some("a b".into()),
            caller: Some("team/x@y".into()),
        };
        assert_eq!(read("seconds=60&most=3&model=a+b&caller=team%2Fx%40y"), Ok(whole));
        assert_eq!(read(""), Ok(Query::default()));
        for (text, words) in [
            ("seconds=x", "seconds: is \"x\", no number"),
            ("seconds=-1", "seconds: is \"-1\", no number"),
            ("most=1&most=2", "most: stands twice"),
            ("all", "query: has a part \"all\"; there are seconds, most, model and caller"),
        ] {
            assert!(read(text).unwrap_err().starts_with(words), "{text}: {:?}", read(text));
        }
    }

    #[test]
    fn a_caller_sees_its_own_and_an_overseer_all() {
        let own = || Caller("a".into());
        let of = |asked: Option<&str>, oversees| whose(asked.map(str::to_owned), own(), oversees);
        assert_eq!(of(None, false), Ok(Some(own())));
        assert_eq!(of(Some("a"), false), Ok(Some(own())));
        assert!(of(Some("b"), false).is_err() && of(Some(""), false).is_err());
        assert_eq!(of(None, true), Ok(None));
        assert_eq!(of(Some("b"), true), Ok(Some(Caller("b".into()))));
    }
}
