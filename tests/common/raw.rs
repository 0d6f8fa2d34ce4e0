//! A client that sends whatever bytes a test likes, down to gRPC's framing.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, Request};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::{Code, Status};

/// What a call ended with.
#[derive(Debug)]
pub struct Answer {
    pub status: Status,
    /// The answer's body, framing included.
    pub body: Bytes,
    pub headers: HeaderMap,
}

impl Answer {
    /// The one message of the answer.
    pub fn message<M: Message + Default>(&self) -> M {
        M::decode(self.body.slice(5..)).unwrap()
    }
}

/// A connection over which HTTP/2 is spoken by the book, and nothing above it.
pub struct Raw {
    address: SocketAddr,
    sender: SendRequest<Body>,
    /// Ends with the connection.
    pub connection: JoinHandle<hyper::Result<()>>,
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::connect_from("127.0.0.1", address).await
    }

    /// From an address such as 127.0.0.2, which is another caller to the server.
    pub async fn connect_from(from: &str, address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
        let stream = socket.connect(address).await.unwrap();
        let mut http2 = Builder::new(TokioExecutor::new());
        let http2 = http2.timer(TokioTimer::new());
        let (sender, connection) = http2.handshake(TokioIo::new(stream)).await.unwrap();
        Self { address, sender, connection: tokio::spawn(connection) }
    }

    /// Calls a method of the service, or one by its whole path, with these pieces for a body.
    pub async fn pieces(
        &self,
        method: &str,
        headers: &[(&'static str, &str)],
        pieces: impl Stream<Item = Bytes> + Send + 'static,
    ) -> hyper::Result<Answer> {
        let service = if method.starts_with('/') { "" } else { "/spatialscore.v1.SpatialScoreService/" };
        let uri = format!("http://{}{service}{method}", self.address);
        let mut request =
            Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        let frames = Box::pin(pieces.map(|piece| Ok::<_, Status>(Frame::data(piece))));
        let request = request.body(Body::new(StreamBody::new(frames))).unwrap();
        let mut sender = self.sender.clone();
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let headers = response.headers().clone();
        let body = response.into_body().collect().await?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        let status = Status::from_header_map(&headers).or_else(|| Status::from_header_map(&trailers));
        let status = status.unwrap_or_else(|| Status::new(Code::Unknown, "no status"));
        Ok(Answer { status, body: body.to_bytes(), headers })
    }

    /// The same with a body of one piece.
    pub async fn call(&self, method: &str, body: impl Into<Bytes>) -> Answer {
        self.pieces(method, &[], stream::iter([body.into()])).await.unwrap()
    }
}

/// A message behind the five bytes that gRPC puts before it.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), message].concat()
}
