//! Calls over HTTP/1.1, each through a connection of its own.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::ext::ReasonPhrase;
use hyper_util::rt::TokioIo;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::process::Server;
use super::{PROMPT, soon};

/// What a server said.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub reason: String,
    pub headers: HeaderMap,
    pub body: Value,
    pub text: String,
}

impl Answer {
    pub fn rewards(&self) -> Vec<f64> {
        assert_eq!(self.status, 200, "{self:?}");
        let rewards = self.body["rewards"].as_array().unwrap_or_else(|| panic!("{self:?}"));
        rewards.iter().map(|reward| reward.as_f64().unwrap()).collect()
    }

    /// UniRL's scores, each of which must stand alone.
    pub fn scores(&self) -> Vec<Option<f64>> {
        assert_eq!(self.status, 200, "{self:?}");
        let results = self.body["results"].as_array().unwrap();
        results.iter().map(|result| result.get("spatialscore")?["spatialscore"].as_f64()).collect()
    }
}

/// Sends a request on a connection of its own. Fails where the server hangs up without an answer.
pub async fn try_send<B>(address: SocketAddr, request: Request<B>) -> Result<Answer, hyper::Error>
where
    B: http_body::Body<Data = Bytes, Error = std::io::Error> + Send + 'static,
{
    let answer = try_lines(address, request).await?;
    assert!(!answer.body.is_null() || answer.text == "null", "no JSON: {:?}", answer.text);
    Ok(answer)
}

/// The same, of an answer that may be no JSON: then it has no body.
pub async fn try_lines<B>(address: SocketAddr, request: Request<B>) -> Result<Answer, hyper::Error>
where
    B: http_body::Body<Data = Bytes, Error = std::io::Error> + Send + 'static,
{
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut sender, connection) = http1::handshake(io).await?;
    let _connection = AbortOnDrop(tokio::spawn(connection));
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let text = String::from_utf8(body.collect().await?.to_bytes().to_vec()).unwrap();
    Ok(Answer {
        status: parts.status.as_u16(),
        reason: parts.extensions.get().map_or_else(String::new, |reason: &ReasonPhrase| {
            String::from_utf8(reason.as_bytes().to_vec()).unwrap()
        }),
        headers: parts.headers,
        body: serde_json::from_str(&text).unwrap_or_default(),
        text,
    })
}

/// The connection of a call that is given up goes with it.
pub struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub fn post_request(
    path: &str,
    body: Bytes,
) -> Request<impl http_body::Body<Data = Bytes, Error = std::io::Error> + use<>> {
    let body = Full::new(body).map_err(|never| match never {});
    Request::builder().method(Method::POST).uri(path).header("host", "a").body(body).unwrap()
}

pub async fn post_bytes(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Answer {
    soon(try_send(address, post_request(path, body.into()))).await.unwrap()
}

pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    post_bytes(address, path, body.to_string()).await
}

pub async fn look(address: SocketAddr, path: &str) -> Answer {
    look_with(address, path, None).await
}

/// The same with a token.
pub async fn look_with(address: SocketAddr, path: &str, token: Option<&str>) -> Answer {
    let body = Full::from("").map_err(|never| match never {});
    let mut request = Request::builder().uri(path).header("host", "a");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    soon(try_send(address, request.body(body).unwrap())).await.unwrap()
}

/// Holds values against the description of our own form.
pub struct Description(Value);

impl Description {
    pub async fn of(address: SocketAddr) -> Self {
        let answer = look(address, "/v1/openapi.json").await;
        assert_eq!(answer.status, 200);
        Self(answer.body)
    }

    /// What is wrong with a value that should be one of these.
    fn faults(&self, name: &str, value: &Value) -> Vec<String> {
        let reference = format!("#/components/schemas/{name}");
        let schema = json!({"$ref": reference, "components": self.0["components"]});
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        validator.iter_errors(value).map(|fault| format!("{}: {fault}", fault.instance_path())).collect()
    }

    #[track_caller]
    pub fn holds(&self, name: &str, value: &Value) {
        assert_eq!(self.faults(name, value), [""; 0], "{name}: {value:#}");
    }
}

/// The program, with an HTTP port.
pub fn process(arguments: &[&str]) -> (Server, SocketAddr) {
    let arguments = [arguments, &["--http=127.0.0.1:0"]].concat();
    let server = tokio::task::block_in_place(|| Server::serving_with(&arguments));
    let http = server.http.as_ref().unwrap().strip_prefix("http://").unwrap().parse().unwrap();
    (server, http)
}

/// A body that no well-made client would send, and whether it can only be refused.
pub struct Bad {
    pub what: String,
    pub body: Vec<u8>,
    pub hopeless: bool,
}

impl Bad {
    pub fn new(what: impl Into<String>, body: impl Into<Vec<u8>>, hopeless: bool) -> Self {
        Self { what: what.into(), body: body.into(), hopeless }
    }

    /// Refused, with a reason; or, where it may be in order after all, answered as any other.
    pub fn check(&self, path: &str, answer: &Answer) {
        let said = format!("{path}, {}: {answer:?}", self.what);
        match answer.status {
            // To Flow-Factory's client a refusal is a 200.
            200 if path == "/compute" && answer.body["error"].is_string() => {}
            200 => assert!(!self.hopeless, "{said}"),
            400 => assert!(answer.body["detail"].is_string(), "{said}"),
            _ => panic!("{said}"),
        }
    }
}

/// What can be done to a body in order.
pub fn spoilt(sound: &Value, fields: &[&str], random: &mut StdRng) -> Vec<Bad> {
    let text = sound.to_string().into_bytes();
    let cuts = (0..text.len()).map(|at| Bad::new(format!("cut at {at}"), &text[..at], true));
    let mut bad: Vec<_> = cuts.collect();
    for _ in 0..200 {
        let (mut turned, bit) = (text.clone(), random.random_range(0..text.len() * 8));
        turned[bit / 8] ^= 1 << (bit % 8);
        bad.push(Bad::new(format!("bit {bit} turned"), turned, false));
    }
    for bytes in [&b"\xff"[..], b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\\ud800", b"\\x00"] {
        let at = text.windows(PROMPT.len()).position(|window| window == PROMPT.as_bytes()).unwrap();
        let body = [&text[..at], bytes, &text[at..]].concat();
        bad.push(Bad::new(format!("{bytes:?} in a prompt"), body, true));
    }
    for open in ["[", "{\"requests\":", "{\"prompt\":[", "{\"x\":"] {
        bad.push(Bad::new(format!("100000 times {open}"), open.repeat(100_000), true));
    }
    for &field in fields {
        let is = std::mem::discriminant(sound.pointer(field).unwrap());
        for value in [json!(null), json!(true), json!(-1), json!(u64::MAX), json!("?"), json!([]), json!({})]
        {
            let what = format!("{field} is {value}");
            let hopeless = std::mem::discriminant(&value) != is;
            let mut body = sound.clone();
            *body.pointer_mut(field).unwrap() = value;
            bad.push(Bad::new(what, body.to_string(), hopeless));
        }
        // Numbers that there are none of, and nests that nobody has the stack for.
        let mut body = sound.clone();
        *body.pointer_mut(field).unwrap() = json!("HERE");
        for value in
            ["1e999", "-1e999", &"9".repeat(100_000), &format!("1e{}", u64::MAX), &"[".repeat(100_000)]
        {
            let body = body.to_string().replace("\"HERE\"", value);
            bad.push(Bad::new(format!("{field} is {:.10}", value), body, true));
        }
    }
    bad
}
