//! What one peer may hold of the server, through real sockets: connections, calls, headers, and memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use common::process::{Server, get};
use common::raw::{Raw, framed};
use common::*;
use flate2::write::GzEncoder;
use futures::{StreamExt, stream};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Code;

const TOKEN: &str = "holder-0123456789abcdef";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";

/// A server that asks for a token, and the folder where it stands.
async fn server(more: &[(&str, &str)]) -> (TestServer, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("holder:{TOKEN}\n")).unwrap();
    let flags = [("auth.tokens_file", file.to_str().unwrap())];
    let server = TestServer::loading(&[&flags[..], more].concat()).await;
    server.device.release();
    let raw = Raw::connect(server.address).await;
    soon(async { while score(&raw).await != Code::Ok {} }).await;
    (server, folder)
}

/// A token holder's call.
async fn score(raw: &Raw) -> Code {
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("authorization", authorization.as_str())];
    let body = stream::iter([Bytes::from(framed(&request([7]).encode_to_vec()))]);
    raw.pieces("Score", &headers, body).await.map_or(Code::Unknown, |answer| answer.status.code())
}

async fn health(raw: &Raw) -> Code {
    raw.pieces(CHECK, &[], stream::iter([Bytes::from(framed(&[]))]))
        .await
        .map_or(Code::Unknown, |answer| answer.status.code())
}

async fn connect(from: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
    socket.connect(to).await.unwrap()
}

/// Those of these connections that the server has not closed.
async fn left(connections: &mut [TcpStream]) -> usize {
    let mut left = 0;
    for connection in connections {
        // HTTP/2 has its settings to tell.
        let closed = async {
            let mut bytes = [0; 256];
            while !matches!(connection.read(&mut bytes).await, Ok(0) | Err(_)) {}
        };
        left += usize::from(timeout(Duration::from_millis(20), closed).await.is_err());
    }
    left
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_connections_give_way_to_a_probe_and_to_who_shows_a_token() {
    let flags = [("server.max_connections", "20"), ("server.max_stranger_connections", "8")];
    let (server, _tokens) = server(&flags).await;
    let holder = Raw::connect(server.address).await;
    assert_eq!(score(&holder).await, Code::Ok);
    let mut flood = Vec::new();
    for n in 0..200 {
        let mut connection = connect(&format!("127.0.0.{}", 2 + n % 5), server.address).await;
        connection.write_all(b"P").await.unwrap();
        flood.push(connection);
    }
    // From the very address of a flood, and from another.
    for from in ["127.0.0.2", "127.0.0.9", "127.0.0.1"] {
        assert_eq!(health(&Raw::connect_from(from, server.address).await).await, Code::Ok, "{from}");
        let newcomer = Raw::connect_from(from, server.address).await;
        assert_eq!(score(&newcomer).await, Code::Ok, "{from}");
    }
    assert_eq!(score(&holder).await, Code::Ok);
    let left = left(&mut flood).await;
    assert!((1..20).contains(&left), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_one_address_that_come_at_once_are_all_answered() {
    let server = TestServer::start(&[("server.max_stranger_connections", "8")]).await;
    // All are there before the first has said a word.
    let mut callers = Vec::new();
    for _ in 0..100 {
        callers.push(connect("127.0.0.2", server.http).await);
    }
    for caller in &mut callers {
        caller.write_all(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    }
    for mut caller in callers {
        let mut answer = Vec::new();
        soon(caller.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&answer));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_costs_nothing_before_it_has_begun() {
    let server = TestServer::start(&[]).await;
    let mut slow = connect("127.0.0.2", server.address).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let (mut answer, quiet) = ([0; 9], Duration::from_millis(200));
    for byte in &preface[..23] {
        slow.write_all(&[*byte]).await.unwrap();
    }
    assert!(timeout(quiet, slow.read(&mut answer)).await.is_err(), "something is written to it");
    // The last byte, and settings with nothing in them.
    slow.write_all(&[&preface[23..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat()).await.unwrap();
    soon(slow.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer[3], 4, "the first frame is not settings: {answer:?}");
    // What begins otherwise is told at once that it is not understood.
    let mut other = connect("127.0.0.2", server.address).await;
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = soon(other.read_to_end(&mut rest)).await;
    // And none that has not begun keeps the server from its end.
    let mut silent = connect("127.0.0.2", server.address).await;
    silent.write_all(b"P").await.unwrap();
    tokio::time::sleep(quiet).await;
    let start = std::time::Instant::now();
    drop(slow);
    server.shut_down().end().await;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_has_few_calls_and_who_is_known_has_more() {
    let (server, _tokens) = server(&[("limits.max_stranger_calls", "3")]).await;
    let raw = std::sync::Arc::new(Raw::connect(server.address).await);
    let watch = || {
        let raw = std::sync::Arc::clone(&raw);
        tokio::spawn(async move { raw.pieces(WATCH, &[], stream::iter([Bytes::from(framed(&[]))])).await })
    };
    let mut watches = vec![watch(), watch(), watch()];
    let refused = soon(async {
        loop {
            match timeout(Duration::from_millis(300), watch()).await {
                Ok(answer) => return answer.unwrap().unwrap(),
                // Those before it may still be on their way.
                Err(_) => continue,
            }
        }
    })
    .await;
    assert_eq!(refused.status.code(), Code::ResourceExhausted, "{}", refused.status);
    assert_eq!(score(&raw).await, Code::Ok, "who shows a token is no stranger");
    assert_eq!(health(&raw).await, Code::Ok, "and its connection is none");
    watches.push(watch());
    assert!(timeout(Duration::from_millis(300), &mut watches[3]).await.is_err());
}

/// Begins so many health watches on one connection and waits for none.
fn crowd(raw: &std::sync::Arc<Raw>, count: usize) -> JoinSet<()> {
    let mut calls = JoinSet::new();
    for _ in 0..count {
        let raw = std::sync::Arc::clone(raw);
        calls.spawn(async move {
            let _ = raw.pieces(WATCH, &[], stream::iter([Bytes::from(framed(&[]))])).await;
        });
    }
    calls
}

/// Those of strangers that were refused since they were too many.
const CROWDED: &str = "spatialscore_calls_refused_total{reason=\"calls\"}";

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_a_token_is_served_beside_crowds_that_are_refused() {
    let (server, _tokens) = server(&[("limits.max_refusals_per_second", "50")]).await;
    let holder = Raw::connect(server.address).await;
    let refused = growth();
    let mut crowds = Vec::new();
    for from in ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"] {
        let raw = std::sync::Arc::new(Raw::connect_from(from, server.address).await);
        crowds.push((crowd(&raw, 1000), raw));
    }
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert_eq!(score(&holder).await, Code::Ok);
    }
    let refused = refused(CROWDED);
    // Strangers have a hundred a second together, and each of them what it brought before it was told to wait.
    let most = 100.0 * (start.elapsed().as_secs_f64() + 1.0) + 400.0;
    assert!((100.0..most).contains(&refused), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_calls_fills_no_log() {
    let server = Server::serving();
    let raw = std::sync::Arc::new(Raw::connect(server.address.parse().unwrap()).await);
    let calls = crowd(&raw, 1000);
    let refused = || {
        let page = get(server.metrics_address(), "/metrics");
        let count = page.lines().find_map(|line| line.strip_prefix(CROWDED)?.trim().parse::<u32>().ok());
        count.unwrap_or_default()
    };
    until(|| refused() >= 500).await;
    drop(calls);
    server.signal("TERM");
    let (code, lines) = server.end();
    assert_eq!(code, Some(0));
    let said = lines.lines().filter(|line| line.contains("strangers have too many calls open")).count();
    assert!((1..=10).contains(&said), "{said} lines: {lines}");
    assert!(lines.lines().count() < 60, "{lines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_have_a_limit() {
    let (server, _tokens) = server(&[]).await;
    let raw = Raw::connect(server.address).await;
    let long = "x".repeat(9000);
    let answer = raw.pieces(CHECK, &[("x", &long)], stream::iter([Bytes::from(framed(&[]))])).await;
    assert!(answer.is_err() || answer.unwrap().status.code() != Code::Ok);
    let names: Vec<&'static str> = (0..400).map(|n| &*Box::leak(format!("a{n}").into_boxed_str())).collect();
    let many: Vec<_> = names.iter().map(|&name| (name, "")).collect();
    let answer = raw.pieces(CHECK, &many, stream::iter([Bytes::from(framed(&[]))])).await;
    assert!(answer.is_err() || answer.unwrap().status.code() != Code::Ok);
    assert_eq!(score(&raw).await, Code::Ok, "on the same connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_say_nothing_more_hold_nothing() {
    let flags = [("limits.max_bytes_in_flight", "400000"), ("limits.max_message_bytes", "131072")];
    let server = TestServer::start(&flags).await;
    let mut idle = Vec::new();
    for n in 0..20_u8 {
        let mut message = stream_item("x", n);
        message.item.as_mut().unwrap().image = Some(image_of(200, 200, n));
        let message = message.encode_to_vec();
        let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&message).unwrap();
        let mut packed = framed(&packed.finish().unwrap());
        packed[0] = 1;
        let (headers, bytes): (&[_], _) =
            if n % 2 == 0 { (&[], framed(&message)) } else { (&[("grpc-encoding", "gzip")], packed) };
        let raw = Raw::connect_from(&format!("127.0.0.{}", n + 2), server.address).await;
        let open = stream::iter([Bytes::from(bytes)]).chain(stream::pending());
        let headers = headers.to_vec();
        idle.push(tokio::spawn(async move { raw.pieces("ScoreStream", &headers, open).await }));
        server.device.reached(n).await;
    }
    until(|| metric("spatialscore_messages_in_flight_bytes") == 0.0).await;
    let mut large = request([77]);
    large.items[0].image = Some(image_of(200, 200, 77));
    for from in ["127.0.0.2", "127.0.0.40"] {
        let response = server.client_from(from).await.score(large.clone()).await.unwrap();
        assert_eq!(outcomes(&response.into_inner()), [Ok(77.0)], "{from}");
    }
    assert!(idle.iter().all(|stream| !stream.is_finished()), "the streams are still open");
}

#[test]
fn scrapers_that_hang_on_keep_nobody_from_the_metrics() {
    let server = Server::serving();
    let address = server.metrics_address().to_owned();
    let hold = |_| {
        let mut connection = std::net::TcpStream::connect(&address).unwrap();
        connection.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
        connection
    };
    let held: Vec<_> = (0..300).map(hold).collect();
    assert!(get(&address, "/metrics").contains("spatialscore_serving 1"));
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.process.id())).unwrap().count();
    assert!(open < 150, "{open} files are open");
    drop(held);
}

/// What the program says and ends with where it may open so many files.
fn with_files(limit: u32) -> (i32, String) {
    let script = format!("ulimit -n {limit} && exec \"$0\" \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_spatialscore"), "serve", "--checkpoint=/nowhere"])
        .args(["--listen=127.0.0.1:0", "--metrics-listen=", "--log-format=json"])
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn connections_are_no_more_than_the_files_that_may_be_open() {
    let (code, said) = with_files(600);
    assert!(code == 1 && said.contains("no checkpoint"), "{code}: {said}");
    for figure in ["server.max_connections is lowered", "\"asked\":1024", "\"taken\":344", "\"limit\":600"] {
        assert!(said.contains(figure), "{figure} is not in {said}");
    }
    let (code, said) = with_files(14);
    assert!(code == 1 && said.contains("the process may open 14 files"), "{code}: {said}");
    assert!(!with_files(4096).1.contains("lowered"));
}
