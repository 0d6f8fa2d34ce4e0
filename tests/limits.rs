//! The limits that a caller meets, each through a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::Write;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::large::jpeg;
use common::process::{Server, get};
use common::raw::{Raw, framed};
use common::*;
use flate2::write::GzEncoder;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt, stream};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use prost::Message;
use spatialscore::edge::proto;
use spatialscore::edge::proto::image::Source;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tonic::codec::CompressionEncoding;
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_types::StatusExt;

/// The fields of items' errors.
async fn refusals(server: &TestServer, images: Vec<proto::Image>) -> Vec<String> {
    let mut request = request([7]);
    request.items.extend(images.into_iter().map(item));
    let response = server.client().await.score(request).await.unwrap().into_inner();
    let mut outcomes = outcomes(&response).into_iter();
    assert_eq!(outcomes.next(), Some(Ok(7.0)));
    let refusal = |outcome: Result<f32, (Code, String)>| {
        let (code, message) = outcome.unwrap_err();
        assert_eq!(code, Code::InvalidArgument, "{message}");
        message
    };
    outcomes.map(refusal).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_over_a_limit_is_refused_with_the_limit() {
    let flags = [("limits.max_image_bytes", "500"), ("limits.max_image_pixels", "5000")];
    let server = TestServer::start(&flags).await;
    let raw = |width, height, bytes| {
        let raw = proto::RawImage { width, height, rgb8: vec![7; bytes].into() };
        proto::Image { source: Some(Source::Raw(raw)) }
    };
    let said = refusals(
        &server,
        vec![
            encoded(vec![0; 501]),
            raw(80, 80, 80 * 80 * 3),
            raw(u32::MAX, u32::MAX, 3),
            raw(402, 2, 402 * 2 * 3),
            raw(0, 4, 0),
            raw(30, 30, 2699),
        ],
    )
    .await;
    for (said, words) in said.iter().zip([
        "items[1].image.encoded: the file has 501 bytes; it may have 500",
        "items[2].image.raw: the picture is 80 x 80, 6400 pixels; it may have 5000",
        "items[3].image.raw: the picture is 4294967295 x 4294967295, 18446744065119617025 pixels; it may have 5000",
        "items[4].image.raw: the picture is 402 x 2 pixels; one side may be at most 200 times the other",
        "items[5].image.raw: the picture is 0 x 4 pixels; both sides must be above 0",
        "items[6].image.raw: 30 x 30 pixels of RGB are 2700 bytes; there are 2699",
    ]) {
        assert_eq!(said, words);
    }
}

/// Each scan is a pass over the whole picture. As a file it is no longer in order, so that its error must name them.
#[tokio::test(flavor = "multi_thread")]
async fn a_jpeg_of_a_thousand_scans_is_refused_for_them() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/processor/images/progressive.jpg");
    let file = std::fs::read(path).unwrap();
    let last = file.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap();
    let (head, scan) = (&file[..file.len() - 2], &file[last..file.len() - 2]);
    let server = TestServer::start(&[]).await;
    let said = refusals(&server, vec![encoded([head, &scan.repeat(1000), &[0xff, 0xd9]].concat())]).await;
    assert!(said[0].contains("scans, and at most 64 are decoded"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_has_a_limit_in_tokens() {
    let server = TestServer::start(&[("limits.max_prompt_tokens", "60")]).await;
    let mut request = request([1, 2]);
    request.items[1].prompt = Some("left of ".repeat(100));
    let response = server.client().await.score(request).await.unwrap().into_inner();
    let outcomes = outcomes(&response);
    assert_eq!(outcomes[0], Ok(1.0));
    let (code, message) = outcomes[1].as_ref().unwrap_err();
    assert_eq!(*code, Code::InvalidArgument);
    assert!(message.starts_with("items[1].prompt: the item's text has ") && message.ends_with("may have 60"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_that_a_caller_must_keep_are_published() {
    let flags = [
        ("limits.max_image_bytes", "501"),
        ("limits.max_prompt_tokens", "61"),
        ("limits.max_calls_per_caller", "3"),
    ];
    let server = TestServer::start(&flags).await;
    let model =
        server.client().await.get_model(proto::GetModelRequest::default()).await.unwrap().into_inner();
    let limits = model.limits.unwrap();
    assert_eq!((limits.max_image_bytes, limits.max_prompt_tokens, limits.max_calls_per_caller), (501, 61, 3));
}

/// A grey PNG that states these sides, with few pixels in it, if any.
fn stated(width: u32, height: u32) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::One);
    let mut writer = encoder.write_header().unwrap();
    let mut pixels = writer.stream_writer().unwrap();
    // As many rows as make a file of a few kilobytes.
    pixels.write_all(&vec![0; 4 << 20]).unwrap();
    drop(pixels);
    drop(writer);
    file
}

/// 60,000 x 60,000 pixels would be 10 GB once they are unpacked.
#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_refused_within_milliseconds_and_megabytes() {
    let server = tokio::task::block_in_place(Server::serving);
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let bomb = stated(60_000, 60_000);
    assert!(bomb.len() < 10_000, "{} bytes", bomb.len());
    let mut bombs = request([]);
    bombs.items.push(item(image(7)));
    bombs.items.extend(std::iter::repeat_n(item(encoded(bomb)), 100));
    client.score(request([7])).await.unwrap();

    let (before, start) = (server.memory("VmRSS"), Instant::now());
    let response = client.score(bombs).await.unwrap().into_inner();
    let (took, peak) = (start.elapsed(), server.memory("VmHWM"));
    let outcomes = outcomes(&response);
    assert!(outcomes[0].is_ok());
    for outcome in &outcomes[1..] {
        let (code, message) = outcome.as_ref().unwrap_err();
        assert_eq!(*code, Code::InvalidArgument);
        assert!(message.contains("60000 x 60000, 3600000000 pixels; it may have 50000000"), "{message}");
    }
    println!("100 bombs: {took:?}, {} kB more", peak.saturating_sub(before) >> 10);
    // A few milliseconds each; on a machine that is busy with something else, tens of them.
    assert!(took < Duration::from_secs(10), "{took:?} for 100 of them");
    assert!(peak.saturating_sub(before) < 64 << 20, "{} bytes", peak - before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_does_not_arrive_is_given_up() {
    let server = TestServer::start(&[("limits.message_timeout_seconds", "1")]).await;
    let raw = Raw::connect(server.address).await;
    let message = framed(&request([7]).encode_to_vec());
    let half = Bytes::copy_from_slice(message.split_at(message.len() / 2).0);
    let stalled = |piece: Bytes| stream::iter([piece]).chain(stream::pending());
    let dripping = stream::iter(message.clone()).then(|byte| async move {
        sleep(Duration::from_millis(100)).await;
        Bytes::from(vec![byte])
    });
    let start = Instant::now();
    let (a, b, c, d) = soon(async {
        tokio::join!(
            raw.pieces("Score", &[], stalled(half.clone())),
            raw.pieces("Score", &[], stalled(Bytes::new())),
            raw.pieces("ScoreStream", &[], stalled(half.clone())),
            raw.pieces("Score", &[], dripping),
        )
    })
    .await;
    for answer in [a, b, c, d] {
        let status = answer.unwrap().status;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert_eq!(status.message(), "the message did not arrive whole within 1 s");
    }
    assert!(start.elapsed() >= Duration::from_secs(1));
    // The connection is as good as before, and a stream may be silent between its messages.
    assert_eq!(raw.call("Score", message).await.status.code(), Code::Ok);
    let items = stream::iter([1, 2]).then(|shade| async move {
        sleep(Duration::from_millis(1500)).await;
        stream_item("x", shade)
    });
    let answers = server.client().await.score_stream(items).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(|answer| outcome(&answer.unwrap().result.unwrap())).collect().await;
    assert_eq!(answers, [Ok(1.0), Ok(2.0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_caller_cannot_open_all_the_calls() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (greedy, other) = ("greedy-0123456789", "other-0123456789");
    std::fs::write(file.path(), format!("greedy:{greedy}\nother:{other}\n")).unwrap();
    let flags = [("auth.tokens_file", file.path().to_str().unwrap()), ("limits.max_calls_per_caller", "2")];
    let server = TestServer::loading(&flags).await;
    server.device.release();
    let client = server.client().await;
    let call = |token: &str, shade| {
        let mut request = Request::new(request([shade]));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut client = client.clone();
        tokio::spawn(async move { client.score(request).await.map(|response| outcomes(response.get_ref())) })
    };
    soon(async { while call(other, 1).await.unwrap().is_err() {} }).await;

    server.device.hold();
    let held = call(greedy, 2);
    server.device.reached(2).await;
    let second = call(greedy, 3);
    let refused = loop {
        // The second may still be on its way.
        let third = call(greedy, 4);
        if let Ok(answer) = tokio::time::timeout(Duration::from_millis(500), third).await {
            break answer.unwrap().unwrap_err();
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("has 2 calls open"), "{refused}");
    assert!(refused.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    let others = call(other, 5);
    server.device.release();
    assert_eq!(others.await.unwrap().unwrap(), [Ok(5.0)]);
    assert_eq!(held.await.unwrap().unwrap(), [Ok(2.0)]);
    drop(second);
    soon(async { while call(greedy, 6).await.unwrap().is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_carries_so_many_calls_and_the_next_waits() {
    let server = TestServer::start(&[("server.max_streams_per_connection", "1")]).await;
    let client = server.client().await;
    server.device.hold();
    let mut held = client.clone();
    let first = tokio::spawn(async move { held.score(request([1])).await });
    server.device.reached(1).await;
    // Nothing but the first call is in the way of this one.
    let mut asking = client.clone();
    let mut second = tokio::spawn(async move { asking.get_model(proto::GetModelRequest::default()).await });
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut second).await.is_err());
    server.device.release();
    assert!(soon(first).await.unwrap().is_ok() && soon(second).await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_at_once() {
    let refused = "spatialscore_connections_refused_total";
    let server = TestServer::start(&[("server.max_connections", "2")]).await;
    let answers = async |raw: &Raw| {
        let body = stream::iter([Bytes::from(framed(&[]))]);
        raw.pieces("GetModel", &[], body).await.is_ok()
    };
    // The one that waited for the start may take a moment to end.
    let first = soon(async {
        loop {
            let (first, second) = (Raw::connect(server.address).await, Raw::connect(server.address).await);
            if answers(&first).await && answers(&second).await {
                let before = metric(refused);
                let mut third = TcpStream::connect(server.address).await.unwrap();
                assert_eq!(soon(third.read(&mut [0; 64])).await.unwrap(), 0, "it was not closed");
                assert!(metric(refused) > before);
                return first;
            }
        }
    })
    .await;
    // The others never noticed, and the second's place is free again.
    assert!(answers(&first).await);
    soon(async { while !answers(&Raw::connect(server.address).await).await {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_in_order_and_a_busy_one_is_not() {
    let server = TestServer::start(&[("server.idle_timeout_seconds", "1")]).await;
    let idle = Raw::connect(server.address).await;
    assert_eq!(idle.call("GetModel", framed(&[])).await.status.code(), Code::Ok);
    // One that opens, and says nothing at all.
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    // One with a call that is silent.
    let busy = Raw::connect(server.address).await;
    let held = busy.pieces("ScoreStream", &[], stream::pending());
    let mut held = Box::pin(held);
    assert!(futures::poll!(held.as_mut()).is_pending());
    // In order means with a farewell: an error would end this with one.
    soon(idle.connection).await.unwrap().unwrap();
    let (mut channel, start) = (server.client().await, Instant::now());
    assert!(channel.get_model(proto::GetModelRequest::default()).await.is_ok());
    soon(silent.read_to_end(&mut Vec::new())).await.unwrap();
    sleep(Duration::from_secs(3).saturating_sub(start.elapsed())).await;
    assert!(!busy.connection.is_finished() && futures::poll!(held.as_mut()).is_pending());
    // A client that comes back after a pause connects anew and notices nothing.
    assert!(channel.get_model(proto::GetModelRequest::default()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_sign_of_life_is_closed() {
    let server = TestServer::start(&[("server.keepalive_seconds", "1")]).await;
    // A live one, which answers pings as HTTP/2 wants it.
    let alive = Raw::connect(server.address).await;
    let mut dead = TcpStream::connect(server.address).await.unwrap();
    // The preface, and settings without any.
    dead.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    soon(dead.read_to_end(&mut Vec::new())).await.unwrap();
    assert_eq!(alive.call("GetModel", framed(&[])).await.status.code(), Code::Ok);
    let lazy = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    assert!(lazy.connect().await.is_ok());
}

/// It would keep a place that others wait for.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_says_nothing_is_closed() {
    let server = TestServer::start(&[]).await;
    let silent = [server.address, server.http].map(|port| async move {
        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.read(&mut [0]).await.unwrap()
    });
    assert_eq!(soon(join_all(silent)).await, [0, 0]);
}

/// Begins a message of so many bytes, and never ends it.
fn begun(bytes: usize) -> impl Stream<Item = Bytes> + Send + 'static {
    let prefix = [&[0][..], &u32::try_from(bytes).unwrap().to_be_bytes()].concat();
    let piece = Bytes::from(vec![0; 1 << 20]);
    let pieces = std::iter::once(prefix.into()).chain(std::iter::repeat_n(piece, (bytes >> 20) - 1));
    stream::iter(pieces).chain(stream::pending())
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_under_way_hold_no_more_memory_than_they_may() {
    const LARGE: usize = 8 << 20;
    let flags =
        [format!("limits.max_message_bytes={LARGE}"), format!("limits.max_bytes_in_flight={}", 4 * LARGE)];
    let flags: Vec<&str> = flags.iter().flat_map(|flag| ["--set", flag]).collect();
    let server = tokio::task::block_in_place(|| Server::serving_with(&flags));
    let address = server.address.parse().unwrap();
    let small = framed(&request([7]).encode_to_vec());
    let other = Raw::connect_from("127.0.0.3", address).await;
    assert_eq!(other.call("Score", small.clone()).await.status.code(), Code::Ok);
    let before = server.memory("VmRSS");

    let greedy = Raw::connect_from("127.0.0.2", address).await;
    let mut calls: FuturesUnordered<_> = (0..64).map(|_| greedy.pieces("Score", &[], begun(LARGE))).collect();
    // Half of the room is a lone caller's: two of the messages.
    for _ in 0..62 {
        let status = soon(calls.next()).await.unwrap().unwrap().status;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("messages under way"), "{status}");
        assert!(status.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    }
    let page = || tokio::task::block_in_place(|| get(server.metrics_address(), "/metrics"));
    let has = |line: &str| page().lines().any(|l| l == line);
    assert!(has(&format!("spatialscore_messages_in_flight_bytes {}", 2 * LARGE)), "{}", page());
    assert!(has("spatialscore_calls_refused_total{reason=\"bytes\"} 62"), "{}", page());
    // Others are served.
    assert_eq!(other.call("Score", small.clone()).await.status.code(), Code::Ok);
    let peak = server.memory("VmHWM").saturating_sub(before);
    println!("64 messages of {} MiB begun: {} MiB more", LARGE >> 20, peak >> 20);
    // What is counted, and what a connection may send ahead. All of them would be 448 MiB.
    assert!(peak < 128 << 20, "{peak} bytes");
    // The room comes back with the end of the calls.
    drop(calls);
    until(|| has("spatialscore_messages_in_flight_bytes 0")).await;
    assert_eq!(greedy.call("Score", small).await.status.code(), Code::Ok);
}

/// Each is a few kB that stand for megabytes, and comes without an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_message_takes_no_memory_before_its_call_has_ended() {
    let server = tokio::task::block_in_place(Server::serving);
    let raw = Raw::connect(server.address.parse().unwrap()).await;
    let small = framed(&request([7]).encode_to_vec());
    assert_eq!(raw.call("Score", small.clone()).await.status.code(), Code::Ok);
    let before = server.memory("VmRSS");
    let mut large = request([9]);
    large.items[0].image = Some(proto::Image { source: Some(Source::Encoded(vec![0; 16 << 20].into())) });
    let mut zip = GzEncoder::new(Vec::new(), flate2::Compression::best());
    zip.write_all(&large.encode_to_vec()).unwrap();
    let mut zipped = framed(&zip.finish().unwrap());
    zipped[0] = 1;
    assert!(zipped.len() < 32 << 10);
    let endless = || stream::iter([Bytes::from(zipped.clone())]).chain(stream::pending());
    let headers = [("grpc-encoding", "gzip")];
    let mut calls: FuturesUnordered<_> = (0..32).map(|_| raw.pieces("Score", &headers, endless())).collect();
    assert!(tokio::time::timeout(Duration::from_secs(2), calls.next()).await.is_err(), "it was answered");
    let peak = server.memory("VmHWM").saturating_sub(before);
    println!("32 messages of 16 MiB, compressed, without an end: {} MiB more", peak >> 20);
    assert!(peak < 128 << 20, "{peak} bytes");
    drop(calls);
    assert_eq!(raw.call("Score", small).await.status.code(), Code::Ok);
    // With an end it is unpacked, and read.
    let ended = raw.pieces("Score", &headers, stream::iter([Bytes::from(zipped)])).await.unwrap();
    assert_eq!(ended.status.code(), Code::Ok, "{}", ended.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_has_one_message() {
    let server = TestServer::start(&[]).await;
    let raw = Raw::connect(server.address).await;
    let message = framed(&request([7]).encode_to_vec());
    let empty = framed(&[]);
    for body in
        [[message.clone(), message.clone()].concat(), empty.repeat(1 << 16), [message, empty].concat()]
    {
        let status = raw.call("Score", body).await.status;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("there is more than one"), "{status}");
    }
}

/// No token is asked for health, so what is sent there must cost nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_health_or_a_description_sends_a_name_and_sends_it_in_time() {
    let server = TestServer::start(&[("limits.message_timeout_seconds", "5")]).await;
    let raw = &Raw::connect(server.address).await;
    let (large, late) = (Code::InvalidArgument, Code::DeadlineExceeded);
    // What tonic's reflection cannot read it takes for the end.
    let methods = [
        ("/grpc.health.v1.Health/Check", large, late),
        ("/grpc.health.v1.Health/Watch", large, late),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Code::Ok, Code::Ok),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Code::Ok, Code::Ok),
    ];
    let start = Instant::now();
    for (method, large, _) in methods {
        let answer = soon(raw.pieces(method, &[], begun(2 << 20))).await.unwrap();
        assert_eq!(answer.status.code(), large, "{method}");
    }
    assert!(start.elapsed() < Duration::from_secs(5), "only time ended them");
    let calls = methods.map(|(method, _, late)| async move {
        let prefix = Bytes::from_static(&[0, 0, 0, 0, 9]);
        let answer = raw.pieces(method, &[], stream::iter([prefix]).chain(stream::pending())).await.unwrap();
        assert_eq!(answer.status.code(), late, "{method}");
    });
    soon(join_all(calls)).await;
}

/// What reflection does not find it names; of a name that is long the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_name_is_not_said_again_whole() {
    let server = TestServer::start(&[]).await;
    let raw = Raw::connect(server.address).await;
    for version in ["v1", "v1alpha"] {
        // Field 4, which asks for the file that has a symbol.
        let asked = [&[0x22, 0xb8, 0x17][..], &[b'x'; 3000]].concat();
        let method = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let status = soon(raw.call(&method, framed(&asked))).await.status;
        assert_eq!(status.code(), Code::NotFound, "{status}");
        assert!((100..=512).contains(&status.message().len()), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_waits_until_there_is_room_for_its_message_and_a_call_is_refused() {
    let flags = [
        ("limits.max_message_bytes", "1048576"),
        ("limits.max_bytes_in_flight", "1048576"),
        ("queue.max_items", "2"),
        ("batch.max_items", "1"),
        ("limits.max_items_per_request", "2"),
    ];
    let server = TestServer::start(&flags).await;
    let client = server.client().await;
    // 300 kB, of which a caller may hold 512; compressed, next to nothing.
    let large = |shade| image_of(316, 316, shade);
    let streamed = |shades: std::ops::Range<u8>| {
        let mut client = client.clone();
        let items = stream::iter(shades).map(move |shade| {
            let mut message = stream_item("x", shade);
            message.item.as_mut().unwrap().image = Some(large(shade));
            message
        });
        tokio::spawn(async move {
            let answers = client.score_stream(items).await.unwrap().into_inner();
            answers
                .map(|answer| outcome(&answer.unwrap().result.unwrap()).unwrap())
                .collect::<Vec<f32>>()
                .await
        })
    };
    server.device.hold();
    let first = streamed(1..6);
    server.device.occupied().await;
    // What is on the device and what waits for it has its pixels; the next one waits for room with its bytes.
    let plain = client.clone();
    let zipped = server.client().await.send_compressed(CompressionEncoding::Gzip);
    for mut client in [plain, zipped] {
        let refused = soon(async {
            loop {
                let mut request = request([9]);
                request.items[0].image = Some(large(9));
                let status = client.score(request).await.unwrap_err();
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                if !status.message().contains("queue") {
                    break status;
                }
                sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(refused.await.message().contains("messages under way"));
    }
    let second = streamed(11..16);
    sleep(Duration::from_millis(300)).await;
    assert!(!second.is_finished(), "{:?}", second.await);
    server.device.release();
    for (answers, first) in [(first, 1.0), (second, 11.0)] {
        let mut means = soon(answers).await.unwrap();
        means.sort_by(f32::total_cmp);
        assert_eq!(means, [0.0, 1.0, 2.0, 3.0, 4.0].map(|step| first + step));
    }
}

/// Sixteen megabytes of items of nothing, two bytes each, would be half a gigabyte once they are decoded.
#[tokio::test(flavor = "multi_thread")]
async fn items_of_nothing_are_counted_before_they_are_decoded() {
    let server = tokio::task::block_in_place(Server::serving);
    let raw = Raw::connect(server.address.parse().unwrap()).await;
    assert_eq!(raw.call("Score", framed(&request([7]).encode_to_vec())).await.status.code(), Code::Ok);
    let before = server.memory("VmRSS");
    let status = soon(raw.call("Score", framed(&[0x12, 0].repeat(8 << 20)))).await.status;
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("fields"), "{status}");
    let peak = server.memory("VmHWM").saturating_sub(before);
    println!("8 million items: {} MiB more", peak >> 20);
    assert!(peak < 96 << 20, "{peak} bytes");
}

/// Each is 287 kB that take half a gigabyte while they are decoded.
#[tokio::test(flavor = "multi_thread")]
async fn pictures_that_are_decoded_hold_no_more_memory_than_they_may() {
    const MOST: u64 = 1 << 30;
    let file = jpeg(7000, 7000, 3, true, false);
    let large = |n: usize| {
        let mut request = request([]);
        request.items = (0..n)
            .map(|n| proto::ScoreItem {
                prompt: Some(format!("{PROMPT} {n}")),
                ..item(encoded(file.clone()))
            })
            .collect();
        request
    };
    // As it is; and where one picture is more than there may be.
    let mut cases = vec![(MOST, 8), (1024, 2)];
    // As it was before there was a bound.
    cases.extend(std::env::var_os("UNBOUNDED").map(|_| (1 << 40, 8)));
    for (most, count) in cases {
        let flag = format!("--set=limits.max_decode_bytes={most}");
        let server = tokio::task::block_in_place(|| {
            Server::serving_with(&["--set=processor.threads=8", flag.as_str()])
        });
        let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
        client.score(request([7])).await.unwrap();
        let before = server.reset_peak();
        let small = async {
            let other = Raw::connect_from("127.0.0.3", server.address.parse().unwrap()).await;
            sleep(Duration::from_millis(500)).await;
            let start = Instant::now();
            let answer = other.call("Score", framed(&request([8]).encode_to_vec())).await;
            assert_eq!(answer.status.code(), Code::Ok);
            println!("a small picture beside them: {:?}", start.elapsed());
        };
        let start = Instant::now();
        let (large, ()) = tokio::join!(client.score(large(count)), small);
        let peak = server.memory("VmHWM").saturating_sub(before);
        println!(
            "{count} pictures of 49 megapixels, {most} bytes: {} MiB more, {:?}",
            peak >> 20,
            start.elapsed()
        );
        assert!(outcomes(&large.unwrap().into_inner()).iter().all(Result::is_ok));
        // What was sent, and the forward.
        assert!(most > MOST || peak < MOST + (128 << 20), "{} MiB", peak >> 20);
    }
}

/// The port of gRPC says to what is no call of gRPC what its protocol has for it, as HTTP.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_call_of_grpc_is_refused_as_http_does() {
    let server = TestServer::start(&[]).await;
    let client: Client<_, tonic::body::Body> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let uri = format!("http://{}/spatialscore.v1.SpatialScoreService/GetModel", server.address);
    let send = async |method: &str, content_type: Option<&str>| {
        let mut request = http::Request::builder().method(method).uri(&uri);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let body = tonic::body::Body::new(http_body_util::Full::from(framed(&[])));
        soon(client.request(request.body(body).unwrap())).await.unwrap()
    };
    for method in ["GET", "PUT", "DELETE", "OPTIONS"] {
        let response = send(method, Some("application/grpc")).await;
        assert_eq!(
            (response.status().as_u16(), &response.headers()["allow"]),
            (405, &"POST".parse().unwrap())
        );
    }
    for content_type in [None, Some("text/plain"), Some("application/json"), Some("application/grpc-web")] {
        assert_eq!(send("POST", content_type).await.status(), 415, "{content_type:?}");
    }
    for content_type in ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"] {
        let response = send("POST", Some(content_type)).await;
        assert_eq!(response.status(), 200);
        let trailers = response.into_body().collect().await.unwrap().trailers().cloned().unwrap();
        assert_eq!(trailers["grpc-status"], "0", "{content_type}");
    }
}
