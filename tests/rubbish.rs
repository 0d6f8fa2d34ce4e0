//! Thousands of bad inputs through a real socket to a real server: each gets its right status, a good neighbour its
//! known score, and the server is afterwards what it was before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::process::{Server, get};
use common::raw::{Answer, Raw, framed};
use common::*;
use futures::{StreamExt, stream};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tonic::Code;

/// Bad items of one request, and after how many of them a good one stands.
const ITEMS: usize = 200;
const GOOD_EVERY: usize = 8;
/// Callers who begin a message and do not end it.
const STALLED: usize = 64;
/// Calls under way at once.
const CALLS: usize = 16;
/// What two more passes over the same inputs may add to the memory: the allocator's.
const FLAT: u64 = 4 << 20;
/// The metrics' line while there is nobody but the one good client.
const ONE_CONNECTION: &str = "spatialscore_connections 1";

/// What may become of a bad item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It can only be refused.
    Refused,
    /// It may still be a picture, and is then scored.
    Either,
}

/// A picture that something was done to.
struct Bad {
    what: String,
    image: proto::Image,
    fate: Fate,
}

impl Bad {
    fn file(what: String, bytes: Vec<u8>, fate: Fate) -> Self {
        Self { what, image: encoded(bytes), fate }
    }

    fn check(&self, outcome: &Result<f32, (Code, String)>) {
        match (outcome, self.fate) {
            (Ok(score), Fate::Either) => assert!(score.is_finite(), "{}", self.what),
            (Ok(_), Fate::Refused) => panic!("{} got a score", self.what),
            (Err((code, message)), _) => {
                assert_eq!(*code, Code::InvalidArgument, "{}: {message}", self.what);
                assert!(message.contains("image"), "{}: {message}", self.what);
            }
        }
    }
}

/// Where the parts of a PNG file begin and end: signature, then length, type, data and checksum of each chunk; and
/// where the last of the pixels begin.
fn png_parts(bytes: &[u8]) -> (Vec<usize>, usize) {
    let (mut parts, mut at, mut pixels) = (vec![0, 4], 8, 0);
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
        parts.extend([at, at + 4, at + 8, at + 8 + length / 2, at + 8 + length]);
        if &head[4..] == b"IDAT" && length > 0 {
            pixels = at + 8 + length / 2;
        }
        at += 12 + length;
    }
    (parts, pixels)
}

/// Where the segments of a JPEG file begin and end, up to the first scan, and that scan's middle; all of it must be
/// there.
fn jpeg_parts(bytes: &[u8]) -> (Vec<usize>, usize) {
    let (mut parts, mut at) = (vec![0, 1], 2);
    loop {
        // Fill bytes may stand before a marker.
        at += bytes[at + 1..].iter().take_while(|&&byte| byte == 0xff).count();
        let length = usize::from(bytes[at + 2]) << 8 | usize::from(bytes[at + 3]);
        parts.extend([at, at + 1, at + 2, at + 3, at + 2 + length / 2]);
        if bytes[at + 1] == 0xda {
            parts.extend([at + 2 + length, (at + bytes.len()) / 2]);
            return (parts, bytes.len());
        }
        at += 2 + length;
    }
}

/// Where the chunks of a WebP file begin and end.
fn webp_parts(bytes: &[u8]) -> (Vec<usize>, usize) {
    let (mut parts, mut at) = (vec![0, 4, 8, 10], 12);
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_le_bytes(head[4..].try_into().unwrap()) as usize;
        parts.extend([at, at + 4, at + 8, at + 8 + length / 2]);
        at += 8 + length + length % 2;
    }
    (parts, bytes.len() - 1)
}

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/processor/images");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| fs::metadata(path).unwrap().len() < 40_000);
    files.sort();
    files
}

/// Every fixture, cut at the boundaries of its parts, and with bits of it turned.
fn spoilt_files(random: &mut StdRng) -> Vec<Bad> {
    let mut bad = Vec::new();
    for path in fixtures() {
        let (bytes, name) =
            (fs::read(&path).unwrap(), path.file_name().unwrap().to_str().unwrap().to_owned());
        let (parts, pixels) = match path.extension().unwrap().to_str().unwrap() {
            "png" => png_parts(&bytes),
            "jpg" => jpeg_parts(&bytes),
            "webp" => webp_parts(&bytes),
            other => panic!("{other}"),
        };
        for at in parts.into_iter().filter(|&at| at < bytes.len()) {
            let fate = if at <= pixels { Fate::Refused } else { Fate::Either };
            bad.push(Bad::file(format!("{name} cut at {at}"), bytes[..at].to_vec(), fate));
        }
        for _ in 0..6 {
            let (mut turned, bit) = (bytes.clone(), random.random_range(0..bytes.len() * 8));
            turned[bit / 8] ^= 1 << (bit % 8);
            bad.push(Bad::file(format!("{name} with bit {bit} turned"), turned, Fate::Either));
        }
        let mut wrong = bytes.clone();
        wrong[..2].copy_from_slice(b"XX");
        bad.push(Bad::file(format!("{name} with a wrong magic"), wrong, Fate::Refused));
    }
    bad
}

/// A file that states its sides, in each format, with next to nothing behind.
fn stated(width: u32, height: u32) -> [(&'static str, Vec<u8>); 4] {
    let mut header = [&b"IHDR"[..], &width.to_be_bytes(), &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let mut crc = png_crc(&header).to_be_bytes().to_vec();
    header.append(&mut crc);
    let png = [&b"\x89PNG\r\n\x1a\n\0\0\0\r"[..], &header, b"\0\0\0\0IDAT\x35\xaf\x06\x1e"].concat();
    let (w, h) = (width.to_be_bytes(), height.to_be_bytes());
    let frame = [&[0xff, 0xc0, 0, 11, 8][..], &h[2..], &w[2..], &[1, 1, 0x11, 0]].concat();
    let jpeg = [&[0xff, 0xd8][..], &frame, &[0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0]].concat();
    let (w, h) = (width.wrapping_sub(1).to_le_bytes(), height.wrapping_sub(1).to_le_bytes());
    let canvas = [&b"VP8X\x0a\0\0\0\0\0\0\0"[..], &w[..3], &h[..3]].concat();
    let extended = [&b"RIFF\x16\0\0\0WEBP"[..], &canvas].concat();
    let sides = (width.wrapping_sub(1) & 0x3fff) | (height.wrapping_sub(1) & 0x3fff) << 14;
    let lossless = [&b"RIFF\x12\0\0\0WEBPVP8L\x05\0\0\0\x2f"[..], &sides.to_le_bytes(), &[0]].concat();
    [("PNG", png), ("JPEG", jpeg), ("WebP", extended), ("lossless WebP", lossless)]
}

fn png_crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { 0xedb8_8320 ^ crc >> 1 } else { crc >> 1 },
        )
    })
}

/// Sides of zero, sides that nobody has the memory for, other formats, and nothing at all.
fn made_files() -> Vec<Bad> {
    let mut bad = Vec::new();
    let sides = [0, 1, 200, 65_535, 60_000, 1 << 24, i32::MAX as u32, u32::MAX];
    for (width, height) in sides.into_iter().flat_map(|w| sides.into_iter().map(move |h| (w, h))) {
        for (format, bytes) in stated(width, height) {
            bad.push(Bad::file(format!("a {format} of {width} x {height}"), bytes, Fate::Refused));
        }
        let raw = proto::RawImage { width, height, rgb8: vec![0; 12].into() };
        let image = proto::Image { source: Some(proto::image::Source::Raw(raw)) };
        bad.push(Bad { what: format!("raw {width} x {height}"), image, fate: Fate::Refused });
    }
    for magic in
        [&b"GIF89a"[..], b"BM", b"II*\0", b"MM\0*", b"\0\0\x01\0", b"%PDF-1.7", b"<svg", b"", b"\xff"]
    {
        let bytes = [magic, &[0; 64]].concat();
        bad.push(Bad::file(format!("{magic:?}"), bytes, Fate::Refused));
    }
    bad.push(Bad::file("nothing".into(), Vec::new(), Fate::Refused));
    bad.push(Bad { what: "no source".into(), image: proto::Image { source: None }, fate: Fate::Refused });
    bad
}

/// PNG files whose palette ends within a colour.
fn torn_palettes() -> impl Iterator<Item = Bad> {
    [4, 5, 766, 767].into_iter().map(|length| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 56, 56);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_palette(vec![9; length]);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[0; 56 * 56]).unwrap();
        drop(writer);
        Bad::file(format!("a palette of {length} bytes"), bytes, Fate::Refused)
    })
}

/// A progressive JPEG whose one last scan is repeated, each time a pass over all of the picture.
fn scans() -> Bad {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/processor/images/progressive.jpg");
    let bytes = fs::read(path).unwrap();
    let last = bytes.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap();
    let (head, scan) = (&bytes[..bytes.len() - 2], &bytes[last..bytes.len() - 2]);
    Bad::file("1000 scans".into(), [head, &scan.repeat(1000), &[0xff, 0xd9]].concat(), Fate::Refused)
}

/// Always the same picture; no two that `image` makes are.
fn good() -> proto::ScoreItem {
    static GOOD: LazyLock<proto::Image> = LazyLock::new(|| image(7));
    item(GOOD.clone())
}

/// The good item's score, alone.
async fn known(client: &mut SpatialScoreServiceClient<tonic::transport::Channel>) -> f32 {
    let mut request = request([]);
    request.items.push(good());
    *outcomes(client.score(request).await.unwrap().get_ref())[0].as_ref().unwrap()
}

fn same(score: f32, known: f32) -> bool {
    (score - known).abs() <= 1e-4 * known.abs().max(1.0)
}

/// Sends the items, good ones among them, and checks what becomes of each.
async fn items(client: &SpatialScoreServiceClient<tonic::transport::Channel>, bad: &[Bad], known: f32) {
    let requests = bad.chunks(ITEMS).map(|chunk| async move {
        let mut request = request([]);
        for group in chunk.chunks(GOOD_EVERY) {
            request.items.push(good());
            request.items.extend(group.iter().map(|bad| item(bad.image.clone())));
        }
        let response = client.clone().score(request).await.unwrap().into_inner();
        let outcomes = outcomes(&response);
        for (group, outcomes) in chunk.chunks(GOOD_EVERY).zip(outcomes.chunks(GOOD_EVERY + 1)) {
            let neighbour =
                outcomes[0].as_ref().unwrap_or_else(|error| panic!("{}: {error:?}", group[0].what));
            assert!(same(*neighbour, known), "before {}: {neighbour}, not {known}", group[0].what);
            for (bad, outcome) in group.iter().zip(&outcomes[1..]) {
                bad.check(outcome);
            }
        }
    });
    stream::iter(requests).buffer_unordered(CALLS).collect::<Vec<()>>().await;
}

/// A body that no well-made client would send, and the only codes that it may get.
struct Body {
    what: String,
    bytes: Vec<u8>,
    headers: Vec<(&'static str, &'static str)>,
    codes: Vec<Code>,
}

impl Body {
    fn new(what: String, bytes: Vec<u8>, code: Code) -> Self {
        Self { what, bytes, headers: Vec::new(), codes: vec![code] }
    }

    /// A message in order around bytes that may be none.
    fn around(what: String, message: &[u8]) -> Self {
        let codes = match proto::ScoreRequest::decode(message) {
            Ok(_) => vec![Code::Ok, Code::InvalidArgument],
            Err(_) => vec![Code::InvalidArgument],
        };
        Self { what, bytes: framed(message), headers: Vec::new(), codes }
    }
}

/// A small request in order: a PNG and raw pixels.
fn sound() -> Vec<u8> {
    let rgb8 = Bytes::from_static(&[9; 48]);
    let raw = proto::RawImage { width: 4, height: 4, rgb8 };
    let raw = proto::Image { source: Some(proto::image::Source::Raw(raw)) };
    let mut request = request([]);
    request.items = vec![item(encoded(png(3))), item(raw)];
    request.encode_to_vec()
}

fn spoilt_messages(random: &mut StdRng) -> Vec<Body> {
    let message = sound();
    let cuts = (0..message.len()).map(|at| Body::around(format!("a message cut at {at}"), &message[..at]));
    let mut bodies: Vec<_> = cuts.collect();
    for _ in 0..300 {
        let (mut turned, bit) = (message.clone(), random.random_range(0..message.len() * 8));
        turned[bit / 8] ^= 1 << (bit % 8);
        bodies.push(Body::around(format!("a message with bit {bit} turned"), &turned));
    }
    for _ in 0..50 {
        let noise: Vec<u8> = (0..random.random_range(1..200)).map(|_| random.random()).collect();
        bodies.push(Body::around("noise".into(), &noise));
    }
    // Each field of the request with each wire type, right and wrong, and numbers that there are none of.
    for field in [0, 1, 2, 3, 4, 15, 16, 1 << 20, (1 << 29) - 1] {
        for wire in 0..8_u64 {
            for payload in [&[][..], &[0], &[1, 0xff], &[4, 0, 0, 0, 0, 0, 0, 0, 0]] {
                let mut message = Vec::new();
                encode_varint(field << 3 | wire, &mut message);
                message.extend_from_slice(payload);
                bodies.push(Body::around(format!("field {field} of wire type {wire}"), &message));
            }
        }
    }
    for text in
        [&b"\xff"[..], b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"a cup\xc3", b"\x80 left of"]
    {
        let mut message = Vec::new();
        encode_key(1, WireType::LengthDelimited, &mut message);
        encode_varint(text.len() as u64, &mut message);
        message.extend_from_slice(text);
        message.extend_from_slice(&sound());
        // The sound prompt comes later and would win.
        let body = Body::around(format!("a prompt of {text:?}"), &message);
        assert_eq!(body.codes, [Code::InvalidArgument]);
        bodies.push(body);
    }
    let nested = vec![0x1b; 100_000];
    bodies.push(Body::around("groups without an end".into(), &nested));
    bodies
}

fn spoilt_framing() -> Vec<Body> {
    let message = framed(&sound());
    let bad = Code::InvalidArgument;
    // Half closed: the caller has no more to say, in the middle of a message.
    let cuts = (0..message.len())
        .step_by(3)
        .map(|at| Body::new(format!("a frame cut at {at}"), message[..at].to_vec(), bad));
    let mut bodies: Vec<_> = cuts.collect();
    let with = |flag: u8, length: u32| {
        let mut bytes = message.clone();
        bytes[0] = flag;
        bytes[1..5].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    let length = message.len() as u32 - 5;
    for flag in [2, 3, 127, 128, 255] {
        bodies.push(Body::new(format!("a frame with flag {flag}"), with(flag, length), bad));
    }
    bodies.push(Body::new("compressed, and not said how".into(), with(1, length), bad));
    for length in [length + 1, 1 << 26, (1 << 26) + 1, i32::MAX as u32, u32::MAX] {
        bodies.push(Body::new(format!("a frame that states {length} bytes"), with(0, length), bad));
    }
    for (encoding, code) in [("gzip", bad), ("br", Code::Unimplemented), ("nonsense", Code::Unimplemented)] {
        let mut body = Body::new(format!("said to be {encoding}"), with(1, length), code);
        body.headers.push(("grpc-encoding", encoding));
        bodies.push(body);
    }
    bodies
}

fn check(what: &str, codes: &[Code], answer: &Answer) {
    assert!(codes.contains(&answer.status.code()), "{what}: {}, not one of {codes:?}", answer.status);
}

/// Sends the bodies as calls, and behind a good item on streams; every so often a good call goes between.
async fn bodies(server: &Server, bodies: &[Body], known: f32) {
    let raw = Raw::connect(server.address.parse().unwrap()).await;
    let raw = &raw;
    let mut first = stream_item("first", 7);
    first.item.as_mut().unwrap().image = good().image;
    let streamed = framed(&first.encode_to_vec());
    let calls = bodies.iter().enumerate().map(|(index, body)| {
        let streamed = streamed.clone();
        async move {
            let bytes = Bytes::copy_from_slice(&body.bytes);
            let answer = raw.pieces("Score", &body.headers, stream::iter([bytes.clone()])).await.unwrap();
            check(&body.what, &body.codes, &answer);
            if index % 16 == 0 {
                let mut request = request([]);
                request.items.push(good());
                let answer = raw.call("Score", framed(&request.encode_to_vec())).await;
                let response: proto::ScoreResponse = answer.message();
                assert!(same(*outcomes(&response)[0].as_ref().unwrap(), known), "after {}", body.what);
            }
            // What is refused before its message is looked at is refused on a stream too, behind a good item.
            let framing = body.bytes.len() > 5 && body.bytes[0] > 1;
            if framing && body.headers.is_empty() {
                let pieces = [Bytes::from(streamed), bytes];
                let answer = raw.pieces("ScoreStream", &[], stream::iter(pieces)).await.unwrap();
                check(&format!("{} on a stream", body.what), &[Code::InvalidArgument], &answer);
                let first: proto::ScoreStreamResponse = answer.message();
                assert!(same(outcome(&first.result.unwrap()).unwrap(), known), "before {}", body.what);
            }
        }
    });
    stream::iter(calls).buffer_unordered(CALLS).collect::<Vec<()>>().await;
}

/// Callers who begin and do not go on: some leave, some are waited for in vain.
async fn stalled(server: &Server) {
    let address = server.address.parse().unwrap();
    let half = Bytes::from(framed(&sound())).slice(..50);
    let raw = Raw::connect(address).await;
    let slow = (0..STALLED / 2).map(|index| {
        let method = ["Score", "ScoreStream"][index % 2];
        let body = stream::iter([half.clone()]).chain(stream::pending());
        raw.pieces(method, &[], body)
    });
    for answer in futures::future::join_all(slow).await {
        check("a slow sender", &[Code::DeadlineExceeded], &answer.unwrap());
    }
    for index in 0..STALLED / 2 {
        let leaving = Raw::connect(address).await;
        let method = ["Score", "ScoreStream"][index % 2];
        let body = stream::iter([half.clone()]).chain(stream::pending());
        let call = leaving.pieces(method, &[], body);
        let _ = tokio::time::timeout(Duration::from_millis(5), call).await;
        leaving.connection.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_gets_its_status_and_good_neighbours_their_scores() {
    let mut random = StdRng::seed_from_u64(20_261_123);
    let mut bad = spoilt_files(&mut random);
    bad.extend(made_files());
    bad.extend(torn_palettes());
    bad.push(scans());
    let mut broken = spoilt_messages(&mut random);
    broken.extend(spoilt_framing());
    let count = bad.len() + broken.len() + STALLED;
    assert!(bad.len() >= 1000 && broken.len() >= 700 && count >= 2000, "{} and {}", bad.len(), broken.len());

    let server = tokio::task::block_in_place(|| {
        Server::serving_with(&[
            "--set",
            "limits.message_timeout_seconds=1",
            "--set",
            "queue.max_items=100000",
            "--set",
            "cache.max_items=0",
        ])
    });
    let page = || tokio::task::block_in_place(|| get(server.metrics_address(), "/metrics"));
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let known = known(&mut client).await;
    assert!(page().lines().any(|line| line == ONE_CONNECTION), "{}", page());
    let start = Instant::now();
    items(&client, &bad, known).await;
    bodies(&server, &broken, known).await;
    stalled(&server).await;
    println!("{count} bad inputs, in {:?}", start.elapsed());
    // Again and again. Once the allocator has all that it needs, what leaks with each of them shows: over two passes,
    // a kilobyte.
    let mut memory = Vec::new();
    for _ in 0..6 {
        items(&client, &bad, known).await;
        bodies(&server, &broken, known).await;
        memory.push(server.memory("VmRSS"));
    }
    // Free memory goes back to the system now and then: any one pass may end right behind that.
    let (before, after) = memory.split_at(4);
    assert!(after.iter().max() < before.iter().max().map(|most| most + FLAT).as_ref(), "{memory:?}");

    assert!(same(self::known(&mut client).await, known));
    // What is left of the others may take a moment to go.
    until(|| page().lines().any(|line| line == ONE_CONNECTION)).await;
    let page = page();
    assert!(!page.contains("\"INTERNAL\"") && !page.contains("\"UNKNOWN\""), "{page}");
    for line in [
        "spatialscore_messages_in_flight_bytes 0",
        "spatialscore_queue_items{priority=\"training\"} 0",
        "spatialscore_queue_tokens{priority=\"training\"} 0",
    ] {
        assert!(page.lines().any(|l| l == line), "{line:?} is not in {page}");
    }
    server.signal("TERM");
    drop(client);
    let (code, log) = tokio::task::block_in_place(|| server.end());
    assert_eq!(code, Some(0));
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}
