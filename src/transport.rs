//! The wire: connections, the TLS and the HTTP/2 on them, and how many and how idle they may be.
//!
//! In place of tonic's own accept loop, which can neither bound connections nor close idle ones nor take new
//! certificates.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::{counter, gauge};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tower::{Service, ServiceExt};

use crate::auth::Followed;
use crate::config::ServerSettings;
use crate::service::{OpenCall, Peer};
use crate::telemetry::{CONNECTIONS, CONNECTIONS_REFUSED};

/// HTTP/2 flow control: how far a caller may send ahead on one call, and on one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other end of a silent connection may take at most for a sign of life.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an idle connection may take to close in order, before it is cut.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a failure to accept: out of file descriptors, most likely, and trying at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections are like.
pub struct Wire {
    /// TLS, or plain text.
    pub tls: Option<Followed<ServerConfig>>,
    /// The limits.
    pub settings: ServerSettings,
}

/// Serves connections until `close` turns true, then lets each end once its calls have. Dropping the future cuts them.
pub async fn serve<S>(wire: Wire, listener: TcpListener, service: S, close: watch::Receiver<bool>)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let wire = Arc::new(wire);
    let places = Arc::new(Semaphore::new(wire.settings.max_connections));
    let mut connections = JoinSet::new();
    let mut closed = pin!(told(close.clone()));
    loop {
        tokio::select! {
            () = &mut closed => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                        counter!(CONNECTIONS_REFUSED).increment(1);
                        tracing::debug!(%peer, "refused: there are server.max_connections connections");
                        continue;
                    };
                    let connection =
                        Connection { wire: Arc::clone(&wire), peer, close: close.clone(), _place: Place::new(place) };
                    connections.spawn(connection.run(stream, service.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the gRPC port");
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

/// A connection's place among those that there may be, counted.
struct Place(#[allow(dead_code)] OwnedSemaphorePermit);

impl Place {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        gauge!(CONNECTIONS).increment(1.0);
        Self(permit)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        gauge!(CONNECTIONS).decrement(1.0);
    }
}

struct Connection {
    wire: Arc<Wire>,
    peer: SocketAddr,
    close: watch::Receiver<bool>,
    _place: Place,
}

impl Connection {
    async fn run<S>(self, stream: TcpStream, service: S)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        let peer = self.peer;
        // Answers are small and awaited.
        let _ = stream.set_nodelay(true);
        let Some(tls) = &self.wire.tls else { return self.serve(stream, service).await };
        let config = Arc::clone(&tls.borrow());
        let handshake = TlsAcceptor::from(config).accept(stream);
        match timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => self.serve(stream, service).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS"),
            Err(_) => tracing::debug!(%peer, "no TLS in time"),
        }
    }

    /// HTTP/2 until either end closes it, it is idle for too long, or the server stops.
    async fn serve<I, S>(self, io: I, service: S)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        let settings = &self.wire.settings;
        let calls = Arc::new(watch::Sender::new(0_u64));
        let peer = Peer(self.peer.ip());
        let answer = {
            let calls = Arc::clone(&calls);
            service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(peer);
                request.extensions_mut().insert(OpenCall::on(&calls));
                service.clone().oneshot(request.map(Body::new))
            })
        };
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(settings.max_streams)
            .keep_alive_interval(settings.keepalive)
            .keep_alive_timeout(
                settings.keepalive.map_or(KEEPALIVE_TIMEOUT, |every| every.min(KEEPALIVE_TIMEOUT)),
            );
        let mut connection = pin!(http2.serve_connection(TokioIo::new(io), answer));
        tokio::select! {
            ended = connection.as_mut() => return self.note(ended),
            () = idle(&calls, settings.idle_timeout) => {
                tracing::debug!(peer = %self.peer, "an idle connection is closed");
            }
            () = told(self.close.clone()) => {}
        }
        connection.as_mut().graceful_shutdown();
        // A call that came at the same moment is still answered. Only the silent are cut.
        tokio::select! {
            ended = connection.as_mut() => self.note(ended),
            () = idle(&calls, Some(CLOSE_TIMEOUT)) => {}
        }
    }

    fn note(&self, ended: hyper::Result<()>) {
        if let Err(error) = ended {
            tracing::debug!(peer = %self.peer, %error, "a connection ended");
        }
    }
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
