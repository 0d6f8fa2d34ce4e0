//! Who may call, how much at once, how slowly, and how often in vain.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderMap, Request, Response, header};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Span;

use super::arrivals::Arrivals;
use super::byte_budget::ByteBudget;
use super::message_body::MessageBody;
use super::method::Method;
use super::peer::Peer;
use super::refusals::Refusals;
use super::{Answering, CallService};
use crate::config::Limits;
use crate::edge::auth::{Followed, Tokens};
use crate::edge::grpc::status::of_call;
use crate::error::ScoreError;
use crate::request_context::Caller;

/// What whoever shows no token is told.
const NO_TOKEN: &str = "this server asks for a token: send the metadata `authorization: Bearer TOKEN`";

/// The layer that lets a caller in or turns it away, and puts its [`Caller`] into the extensions of its requests.
#[derive(Clone)]
pub struct Gate(Arc<Rules>);

struct Rules {
    tokens: Option<Followed<Tokens>>,
    /// Those of who administers the server.
    overseers: Option<Followed<Tokens>>,
    max_calls: usize,
    max_stranger_calls: usize,
    message_timeout: Duration,
    budget: Arc<ByteBudget>,
    refusals: Refusals,
    /// How many calls of strangers were turned away since they had too many.
    turned_away: AtomicU64,
    /// How many calls each caller has open, those that cost scoring and others. Callers without any are left out.
    open: Mutex<HashMap<(Caller, bool), usize>>,
}

/// Stands in the extensions of a request whose caller may know of all others.
#[derive(Debug, Clone, Copy)]
pub struct Overseer;

/// The place of an open call among those of its caller. Stands in the extensions of the response.
#[derive(Clone)]
pub struct Place {
    _held: Arc<Held>,
}

struct Held {
    rules: Arc<Rules>,
    whose: (Caller, bool),
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut open = self.rules.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut entry) = open.entry(self.whose.clone()) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

impl Gate {
    /// A gate at which, where there are `tokens`, callers must show one, and where each has to keep the limits on its
    /// calls and messages. Who shows one of the `overseers` may call the methods that are overseen, and is an [`Overseer`];
    /// so is, where no tokens are asked for, who calls from this machine.
    pub fn new(
        tokens: Option<Followed<Tokens>>,
        overseers: Option<Followed<Tokens>>,
        limits: &Limits,
    ) -> Self {
        Self(Arc::new(Rules {
            tokens,
            overseers,
            max_calls: limits.max_calls_per_caller,
            max_stranger_calls: limits.max_stranger_calls,
            message_timeout: limits.message_timeout,
            budget: ByteBudget::new(limits),
            refusals: Refusals::new(limits.max_refusals_per_second),
            turned_away: AtomicU64::default(),
            open: Mutex::default(),
        }))
    }

    /// What a stranger is told that shows nothing and has as many calls open as it may. Its connection is not read until
    /// the turn of one more such refusal.
    pub(super) fn turn_away<B>(&self, request: &Request<B>) -> Option<Status> {
        let rules = &self.0;
        let peer = request.extensions().get::<Peer>()?;
        if peer.is_known() || peer.calls().receiver_count() <= rules.max_stranger_calls {
            return None;
        }
        let error = if !Method::of(request.uri().path()).token {
            ScoreError::TooManyCalls { limit: rules.max_stranger_calls }
        } else if rules.tokens.is_some() && !request.headers().contains_key(header::AUTHORIZATION) {
            ScoreError::Unauthenticated(NO_TOKEN)
        } else {
            return None;
        };
        // Who fills a connection would fill the log.
        let count = rules.turned_away.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::info!(
                address = %peer.address(),
                count,
                "strangers have too many calls open; more are refused, and the next line comes at twice the count"
            );
        }
        rules.refusals.pause(&by_address(peer), true, peer);
        Some(of_call(&error))
    }

    /// Whether who calls may know of all others, by a token or by the address.
    fn overseer<B>(&self, request: &Request<B>) -> Option<Caller> {
        let rules = &self.0;
        let by_its_token = rules.overseers.as_ref().and_then(|tokens| {
            let tokens = Arc::clone(&tokens.borrow());
            by_token(&tokens, request.headers()).ok()
        });
        by_its_token.or_else(|| {
            let peer = request.extensions().get::<Peer>()?;
            (rules.tokens.is_none() && peer.address().is_loopback()).then(|| by_address(peer))
        })
    }

    /// Who calls, with its place; or why it may not, and whom that is said to. A stranger's call takes none, and its
    /// connection has few.
    fn admit<B>(
        &self,
        request: &Request<B>,
        overseer: Option<&Caller>,
    ) -> Result<(Caller, Option<Place>), (ScoreError, Caller)> {
        let method = Method::of(request.uri().path());
        let rules = &self.0;
        let peer = request.extensions().get::<Peer>();
        let address = peer.map_or_else(Caller::default, by_address);
        let caller = match &rules.tokens {
            Some(tokens) if method.token => {
                let tokens = Arc::clone(&tokens.borrow());
                let known = by_token(&tokens, request.headers());
                known.or_else(|error| overseer.cloned().ok_or((error, address)))?
            }
            _ => address,
        };
        if let Some(peer) = peer {
            if method.token {
                peer.know();
            } else if !peer.is_known() {
                // Who has too many was turned away.
                return Ok((caller, None));
            }
        }
        let whose = (caller.clone(), method.scoring);
        let mut open = rules.open.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = open.entry(whose.clone()).or_default();
        if *calls >= rules.max_calls {
            return Err((ScoreError::TooManyCalls { limit: rules.max_calls }, caller));
        }
        *calls += 1;
        let held = Held { rules: Arc::clone(rules), whose };
        Ok((caller, Some(Place { _held: Arc::new(held) })))
    }
}

/// Who is known by no more than the address.
fn by_address(peer: &Peer) -> Caller {
    Caller(Arc::from(peer.address().to_string()))
}

fn by_token(tokens: &Tokens, headers: &HeaderMap) -> Result<Caller, ScoreError> {
    let value = headers.get(header::AUTHORIZATION).ok_or(ScoreError::Unauthenticated(NO_TOKEN))?;
    let behind = |scheme: &str| {
        let (named, rest) = value.as_bytes().split_at_checked(scheme.len())?;
        named.eq_ignore_ascii_case(scheme.as_bytes()).then(|| rest.trim_ascii())
    };
    let caller = match (behind("bearer "), behind("basic ")) {
        (Some(token), _) => tokens.caller(token),
        (None, Some(credentials)) => by_credentials(tokens, credentials),
        (None, None) => return Err(ScoreError::Unauthenticated(NO_TOKEN)),
    };
    caller.ok_or(ScoreError::Unauthenticated("this token is not known here"))
}

/// Who shows a subject and its token as an HTTP client does that has them from a URL: trainers' own clients have no other
/// place for a token.
fn by_credentials(tokens: &Tokens, credentials: &[u8]) -> Option<Caller> {
    let credentials = BASE64.decode(credentials).ok()?;
    let mut parts = credentials.splitn(2, |&byte| byte == b':');
    let (subject, token) = (parts.next()?, parts.next()?);
    tokens.caller(token).filter(|caller| caller.0.as_bytes() == subject)
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

/// A service behind a [`Gate`].
#[derive(Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S: CallService> Service<Request<Body>> for Gated<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let rules = Arc::clone(&self.gate.0);
        let peer = request.extensions().get::<Peer>().cloned();
        let refuse = |error: &ScoreError, rules: Arc<Rules>, caller: Caller| -> Self::Future {
            let refusal = of_call(error).into_http();
            let stranger = matches!(error, ScoreError::Unauthenticated(_));
            let peer = peer.clone();
            Box::pin(async move {
                rules.refusals.turn(&caller, stranger, peer.as_ref()).await;
                Ok(refusal)
            })
        };
        let method = Method::of(request.uri().path());
        let overseer = method.overseen.then(|| self.gate.overseer(&request)).flatten();
        let (caller, place) = match self.gate.admit(&request, overseer.as_ref()) {
            Ok(admitted) => admitted,
            Err((error, caller)) => return refuse(&error, rules, caller),
        };
        Span::current().record("caller", &*caller.0);
        // Nobody behind this needs the token.
        request.headers_mut().remove(header::AUTHORIZATION);
        if overseer.is_some() {
            request.extensions_mut().insert(Overseer);
        }
        let arrivals = Arrivals::default();
        if method.counted && method.http {
            let size = http_body::Body::size_hint(request.body());
            if let Err(error) = arrivals.announce(&rules.budget, &caller, size) {
                return refuse(&error, rules, caller);
            }
        }
        let gzip = request.headers().get("grpc-encoding").is_some_and(|encoding| encoding == "gzip");
        request = request.map(|body| {
            let body = MessageBody::new(body, method.streaming, rules.message_timeout);
            Body::new(if method.scoring && !method.http {
                body.counted(Arc::clone(&rules.budget), caller.clone(), arrivals.clone(), gzip)
            } else {
                body
            })
        });
        request.extensions_mut().insert(arrivals);
        request.extensions_mut().insert(caller.clone());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            if Status::from_header_map(response.headers()).is_some() {
                // Nothing but words is left of the call.
                drop(place);
                rules.refusals.turn(&caller, false, peer.as_ref()).await;
            } else if let Some(place) = place {
                response.extensions_mut().insert(place);
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn tokens(text: &str) -> Option<Followed<Tokens>> {
        let tokens = Tokens::parse(std::path::Path::new("tokens"), text.as_bytes()).unwrap();
        Some(watch::Sender::new(Arc::new(tokens)).subscribe())
    }

    /// Whom of all callers is told, by whether tokens are asked for, by the address, and by the token that is shown.
    #[test]
    fn who_administers_oversees_and_without_tokens_this_machine_does() {
        let limits = Limits::clone(&crate::config::Settings::load(&Default::default()).unwrap().limits);
        let oversees = |asked: bool, address: &str, token: Option<&str>| {
            let callers = asked.then(|| tokens(&format!("a:{TOKEN}a")).unwrap());
            let gate = Gate::new(callers, tokens(&format!("chief:{TOKEN}c")), &limits);
            let mut request = Request::new(());
            request.extensions_mut().insert(Peer::stranger(address.parse().unwrap()));
            if let Some(token) = token {
                let value = format!("Bearer {TOKEN}{token}").parse().unwrap();
                request.headers_mut().insert(header::AUTHORIZATION, value);
            }
            gate.overseer(&request).map(|caller| caller.0.to_string())
        };
        for address in ["127.0.0.1", "10.0.0.1", "::1"] {
            assert_eq!(oversees(true, address, Some("c")).as_deref(), Some("chief"));
            assert_eq!(oversees(false, address, Some("c")).as_deref(), Some("chief"));
            for token in [None, Some("a"), Some("x")] {
                assert_eq!(oversees(true, address, token), None, "{address} {token:?}");
            }
        }
        for (address, all) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.1", false),
            ("0.0.0.0", false),
            ("fe80::1", false),
        ] {
            assert_eq!(oversees(false, address, None).is_some(), all, "{address}");
        }
    }
}
