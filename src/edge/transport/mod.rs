//! The wire: connections, the TLS and the HTTP on them, and how many and how idle they may be.
//!
//! In place of tonic's own accept loop, which can neither bound connections nor close idle ones nor take new
//! certificates.

mod io;
mod metrics_port;
mod read_on;
mod slots;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Request, header};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use metrics::gauge;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tower::ServiceExt;

use crate::config::{Limits, ServerSettings, Settings};
use crate::edge::auth::Followed;
use crate::edge::layers::CallService;
use crate::edge::layers::peer::OpenCall;
use crate::telemetry::CONNECTIONS;

use self::io::{Lingering, Returning, StrangersRate, in_turns};
use self::read_on::ReadOn;
use self::slots::{Places, Slots, Taken};

pub use metrics_port::serve_metrics;

/// HTTP/2 flow control: how far a caller may send ahead on one call, and on one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// The largest frame that a caller may send. Each is held whole before anything counts its bytes.
const FRAME: u32 = 1 << 16;
/// The most that is read of an HTTP/1.1 connection before it is looked at.
const HTTP1_BUFFER: usize = 1 << 16;
/// What a connection of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a connection may take to say its first word, and a TLS handshake to end.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other end of a silent connection may take at most for a sign of life.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an idle connection may take to close in order, before it is cut.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a failure to accept: out of file descriptors, most likely, and trying at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the connections of all ports are like.
pub struct Wire {
    tls: Option<Followed<ServerConfig>>,
    settings: ServerSettings,
    max_message_bytes: usize,
    max_stranger_calls: usize,
    strangers_rate: Arc<StrangersRate>,
    slots: Arc<Slots>,
}

impl Wire {
    /// Connections with TLS, or in plain text, within the limits of the settings.
    pub fn new(tls: Option<Followed<ServerConfig>>, settings: &Settings) -> Arc<Self> {
        let Limits { max_message_bytes, max_stranger_calls, .. } = settings.limits;
        let settings = settings.server.clone();
        let slots = Slots::new(Places {
            all: settings.max_connections,
            of_address: settings.max_connections_per_address,
            of_stranger: settings.max_stranger_connections,
        });
        let strangers_rate = Arc::default();
        Arc::new(Self { tls, settings, max_message_bytes, max_stranger_calls, strangers_rate, slots })
    }
}

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1, as trainers' own reward clients do.
    Http1,
    /// HTTP/2, as gRPC does.
    Http2,
}

impl Protocol {
    /// Its name in the TLS handshake.
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }
}

/// Serves a port's connections until `close` turns true, then lets each end once its calls have. Dropping the future
/// cuts them.
pub async fn serve(
    wire: Arc<Wire>,
    protocol: Protocol,
    listener: TcpListener,
    service: impl CallService,
    close: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut closed = pin!(told(close.clone()));
    loop {
        tokio::select! {
            () = &mut closed => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let Some(taken) = wire.slots.take(address.ip()) else {
                        tracing::debug!(%address, "refused: there are as many connections as there may be");
                        continue;
                    };
                    let slot = Arc::clone(taken.slot());
                    let (wire, close) = (Arc::clone(&wire), close.clone());
                    let connection = Connection { wire, protocol, address, close, taken, _open: Open::new() };
                    let served = connection.run(stream, service.clone());
                    connections.spawn(async move {
                        tokio::select! {
                            () = served => {}
                            () = slot.stranger_displaced() => tracing::debug!(%address, "a stranger gives way"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, ?protocol, "no connection can be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Waits until the server stops.
async fn told(mut close: watch::Receiver<bool>) {
    let _ = close.wait_for(|&close| close).await;
}

/// A connection that is open, counted.
struct Open;

impl Open {
    fn new() -> Self {
        gauge!(CONNECTIONS).increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!(CONNECTIONS).decrement(1.0);
    }
}

struct Connection {
    wire: Arc<Wire>,
    protocol: Protocol,
    address: SocketAddr,
    close: watch::Receiver<bool>,
    taken: Taken,
    _open: Open,
}

impl Connection {
    async fn run(self, stream: TcpStream, service: impl CallService) {
        let peer = self.address;
        // Answers are small and awaited.
        let _ = stream.set_nodelay(true);
        if !timeout(HANDSHAKE_TIMEOUT, stream.peek(&mut [0])).await.is_ok_and(|first| first.is_ok()) {
            tracing::debug!(%peer, "a connection without a word is closed");
            return;
        }
        let Some(tls) = &self.wire.tls else { return self.serve(stream, service).await };
        // What is in it is shared: to copy it costs nothing.
        let mut config = ServerConfig::clone(&tls.borrow());
        config.alpn_protocols = vec![self.protocol.alpn().to_vec()];
        let handshake = TlsAcceptor::from(Arc::new(config)).accept(stream);
        match timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => {
                // No handshake ends well without a certificate where one is asked for.
                if self.wire.settings.asks_for_certificates {
                    self.taken.slot().peer.know();
                }
                self.serve(stream, service).await;
            }
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS"),
            Err(_) => tracing::debug!(%peer, "no TLS in time"),
        }
    }

    async fn serve<I>(self, mut io: I, service: impl CallService)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut first = Bytes::new();
        if self.protocol == Protocol::Http2 {
            tokio::select! {
                begun = timeout(HANDSHAKE_TIMEOUT, preface(&mut io)) => match begun {
                    Ok(Ok(begun)) => first = begun,
                    _ => return tracing::debug!(peer = %self.address, "a connection that does not begin is closed"),
                },
                () = told(self.close.clone()) => return,
            }
        }
        let peer = self.taken.slot().peer.clone();
        let (most, crowd) = (self.wire.max_message_bytes, self.wire.max_stranger_calls);
        let io = Returning::new(io, first, peer.clone(), crowd, Arc::clone(&self.wire.strangers_rate));
        let answer = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(OpenCall::of(&peer));
            request.extensions_mut().insert(peer.clone());
            let waits = request.headers().contains_key(header::EXPECT);
            let peer = peer.clone();
            service.clone().oneshot(request.map(|body| Body::new(ReadOn::new(body, most, peer, waits))))
        });
        match self.protocol {
            Protocol::Http1 => {
                let io = TokioIo::new(Lingering::new(io));
                self.drive(http1(&self.wire.settings).serve_connection(io, answer)).await;
            }
            Protocol::Http2 => {
                self.drive(http2(&self.wire.settings).serve_connection(TokioIo::new(io), answer)).await;
            }
        }
    }

    /// Serves until either end closes it, it is idle for too long, another needs its place, or the server stops.
    async fn drive(&self, connection: impl GracefulConnection<Error = hyper::Error>) {
        let slot = self.taken.slot();
        let calls = slot.peer.calls();
        let mut connection = pin!(connection);
        tokio::select! {
            ended = in_turns(&slot.peer, connection.as_mut()) => return self.note(ended),
            () = idle(calls, self.wire.settings.idle_timeout) => {
                tracing::debug!(peer = %self.address, "an idle connection is closed");
            }
            () = slot.displaced.cancelled() => {
                tracing::debug!(peer = %self.address, "an idle connection gives way");
            }
            () = told(self.close.clone()) => {}
        }
        connection.as_mut().graceful_shutdown();
        // A call that came at the same moment is still answered. Only the silent are cut.
        tokio::select! {
            ended = in_turns(&slot.peer, connection.as_mut()) => self.note(ended),
            () = idle(calls, Some(CLOSE_TIMEOUT)) => {}
        }
    }

    fn note(&self, ended: hyper::Result<()>) {
        if let Err(error) = ended {
            tracing::debug!(peer = %self.address, %error, "a connection ended");
        }
    }
}

/// Reads how a connection of HTTP/2 begins, or as much of it as shows that it is none: before that nothing is made for it,
/// and nothing written.
async fn preface(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Bytes> {
    let mut first = BytesMut::with_capacity(PREFACE.len());
    while first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
        let missing = (PREFACE.len() - first.len()) as u64;
        if (&mut *io).take(missing).read_buf(&mut first).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(first.freeze())
}

/// HTTP/1.1 as the settings have it.
fn http1(settings: &ServerSettings) -> http1::Builder {
    let mut http1 = http1::Builder::new();
    // One that is slow about its headers is idle.
    http1.header_read_timeout(None).max_buf_size(HTTP1_BUFFER.max(settings.max_header_bytes as usize));
    http1
}

/// HTTP/2 as the settings have it.
fn http2(settings: &ServerSettings) -> http2::Builder<TokioExecutor> {
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(settings.max_streams)
        .max_header_list_size(settings.max_header_bytes)
        // A client may cancel all of its calls at once, and a busy server read of each that it began and that it ended.
        .max_pending_accept_reset_streams(settings.max_streams as usize)
        // Frames of calls that were reset are no reason to end those of others. Who does not read the resets is not
        // read itself.
        .max_local_error_reset_streams(None)
        .keep_alive_interval(settings.keepalive)
        .keep_alive_timeout(
            settings.keepalive.map_or(KEEPALIVE_TIMEOUT, |every| every.min(KEEPALIVE_TIMEOUT)),
        );
    http2
}

/// Waits until there was no call for this long, or a little longer. The sender's value counts calls that began, its
/// receivers are those that are open.
async fn idle(calls: &watch::Sender<u64>, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    loop {
        calls.closed().await;
        let before = *calls.borrow();
        sleep(limit).await;
        if calls.is_closed() && *calls.borrow() == before {
            return;
        }
    }
}
