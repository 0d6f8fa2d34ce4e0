//! Our own form over HTTP, each promise through a real socket; and the description of it, held against what is answered.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use common::web::*;
use common::*;
use futures::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::processor::{Item, Picture, Processor, ProcessorLimits, SpanKind};

const BOUNDARY: &str = "0123-boundary";

/// A body of JSON.
fn asked(files: &[Vec<u8>]) -> Value {
    let items: Vec<_> = files.iter().map(|file| json!({"image": BASE64.encode(file)})).collect();
    json!({"prompt": PROMPT, "items": items})
}

/// A form as curl writes it.
fn form(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in fields {
        let file = if *name == "image" { "; filename=\"a; name=\\\"prompt\\\".png\"" } else { "" };
        body.extend(
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n").bytes(),
        );
        body.extend_from_slice(value);
        body.extend_from_slice(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    body
}

async fn send_form(address: SocketAddr, path: &str, body: Vec<u8>) -> Answer {
    let mut request = post_request(path, body.into());
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    request.headers_mut().insert("content-type", kind.parse().unwrap());
    soon(try_send(address, request)).await.unwrap()
}

fn means(answer: &Answer) -> Vec<Option<f64>> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let items = answer.body["items"].as_array().unwrap();
    items.iter().map(|item| item["scores"][0]["mean"].as_f64()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_answers_in_our_form_what_it_answers_over_grpc() {
    let (server, http) = process(&["--set=model.checkpoint=spatialscore-mini"]);
    let description = Description::of(http).await;
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples");
    let files = ["panda.right.png", "panda.twin.png"].map(|name| std::fs::read(samples.join(name)).unwrap());
    let prompt = "A panda is partly hidden by an umbrella.";
    let message = proto::ScoreRequest {
        prompt: Some(prompt.into()),
        items: files.iter().map(|file| item(encoded(file.clone()))).collect(),
        wants_receipts: true,
        ..Default::default()
    };
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let theirs = client.score(message).await.unwrap().into_inner();
    let scores: Vec<(f64, f64)> = theirs
        .results
        .iter()
        .map(|result| match &result.outcome {
            Some(proto::score_result::Outcome::Score(score)) => {
                (score.mean.into(), score.stddev.unwrap().into())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_ne!(scores[0], scores[1]);

    let mut asked = asked(&files);
    asked["prompt"] = json!(prompt);
    description.holds("ScoreRequest", &asked);
    let by_json = post(http, "/v1/score", &asked).await;
    let fields = [("prompt", prompt.as_bytes()), ("image", &files[0]), ("image", &files[1])];
    let by_form = send_form(http, "/v1/score", form(&fields)).await;
    let each = [fields[0], fields[1], fields[0], fields[2]];
    let by_each = send_form(http, "/evaluation/models/spatialscore-mini/v1/score", form(&each)).await;
    for answer in [&by_json, &by_form, &by_each] {
        assert_eq!(answer.status, 200, "{answer:?}");
        description.holds("ScoreAnswer", &answer.body);
        for (item, (mean, stddev)) in answer.body["items"].as_array().unwrap().iter().zip(&scores) {
            // As text, since serde_json may read a double's last bit wrong.
            let score = &item["scores"][0];
            assert_eq!(score["model"], "spatialscore-mini");
            assert!(answer.text.contains(&format!(r#""mean":{mean:?},"stddev":{stddev:?}"#)), "{answer:?}");
        }
        let receipt = &answer.body["receipts"][0];
        assert_eq!(receipt["revision"], theirs.receipts[0].revision);
        assert_eq!(receipt["profile_digest"], theirs.receipts[0].profile_digest);
    }

    let listed = look(http, "/v1/models").await;
    description.holds("ModelsAnswer", &listed.body);
    let model = client.get_model(proto::GetModelRequest::default()).await.unwrap().into_inner();
    let said = &listed.body["models"][0];
    assert_eq!((&said["name"], &said["revision"]), (&json!(model.name), &json!(model.revision)));
    assert_eq!((&said["output"], &said["state"]), (&json!("gaussian"), &json!("serving")));
    assert_eq!(said["limits"]["max_image_bytes"], model.limits.unwrap().max_image_bytes);
    assert_eq!(said["notice"], model.notice);
}

/// What is shown is what is scored: sent again it has the same score to the last bit.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_model_sees_is_shown() {
    let (_server, http) = process(&["--set=model.checkpoint=spatialscore-mini", "--set=cache.max_items=0"]);
    let description = Description::of(http).await;
    // Larger than the model takes, see-through, and with a prompt of more bytes than letters. A square of any size becomes
    // the same square.
    let (width, height) = (500, 500);
    let pixels: Vec<u8> = (0..width * height * 4).map(|n: u32| (n * 7919 % 251) as u8).collect();
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgba);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&pixels).unwrap();
    drop(writer);
    let prompt = "Ein Würfel 左边的球 <|vision_end|>";
    let mut call = asked(&[file]);
    (call["prompt"], call["inspect"]) = (json!(prompt), json!(true));
    description.holds("ScoreRequest", &call);
    let answer = post(http, "/v1/score", &call).await;
    description.holds("ScoreAnswer", &answer.body);
    let score = &answer.body["items"][0]["scores"][0];
    let seen = &score["seen"];
    let shown = BASE64.decode(seen["pictures"][0]["png"].as_str().unwrap()).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(&shown)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    assert_eq!(json!(info.width), seen["pictures"][0]["width"]);
    assert!(info.width % 28 == 0 && info.height == info.width && info.width < width, "{info:?}");

    let mut again = asked(&[shown]);
    again["prompt"] = json!(prompt);
    let again = post(http, "/v1/score", &again).await;
    assert_eq!(again.body["items"][0]["scores"][0]["mean"], score["mean"]);

    let spans = seen["conversations"][0].as_array().unwrap();
    let tokens = |kind: &str| -> u64 {
        let of_kind = spans.iter().filter(|span| kind.is_empty() || span["kind"] == kind);
        of_kind.map(|span| span["tokens"].as_u64().unwrap()).sum()
    };
    assert_eq!(tokens(""), seen["tokens"].as_u64().unwrap());
    assert_eq!(tokens("picture"), seen["visual_tokens"].as_u64().unwrap());
    assert_eq!(tokens("picture"), u64::from(info.width / 28 * (info.height / 28)));
    assert_eq!((tokens("read"), &spans.last().unwrap()["kind"]), (1, &json!("read")));
    let of_caller = spans.iter().find(|span| span["kind"] == "prompt").unwrap();
    assert!(of_caller["text"].as_str().unwrap().contains(prompt), "{spans:?}");
    // By form, and only where it is asked for.
    let fields = [("prompt", prompt.as_bytes()), ("image", &png(3)), ("inspect", b"true")];
    let answer = send_form(http, "/v1/score", form(&fields)).await;
    assert_eq!(answer.body["items"][0]["scores"][0]["seen"]["visual_tokens"], 64);
    let answer = send_form(http, "/v1/score", form(&fields[..2])).await;
    assert!(answer.body["items"][0]["scores"][0].get("seen").is_none());
}

/// In each of these conversations the stretches are the tokens that are read, of every reading.
#[test]
fn the_stretches_of_a_conversation_are_its_tokens() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let prompt = "a red cube  left of\n a blue ball ";
    let mut kinds = BTreeMap::new();
    for case in ["flat", "mlp", "qwen2", "qwen3", "several", "spread", "qwen2_several", "deep"] {
        let files =
            CheckpointFiles::open(root.join(case).join("checkpoint").to_str().unwrap(), None, None).unwrap();
        let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
        let processor = Processor::load(&files, &reward, ProcessorLimits::NONE).unwrap();
        let picture = |n: usize| Picture::Raw {
            width: 56 + 28 * n as u32,
            height: 56,
            rgb8: vec![7; (56 + 28 * n) * 56 * 3].into(),
        };
        let pictures = (0..processor.pictures()).map(picture).collect();
        let item = Item { prompt: prompt.into(), pictures, questions: Vec::new() };
        let draft = processor.admit_item(item.clone()).unwrap();
        let sample = processor.prepare(processor.admit_item(item.clone()).unwrap()).unwrap();
        let seen = processor.see(&item, draft).unwrap();
        let readings: Vec<usize> = if sample.branches.is_empty() {
            vec![sample.input_ids.len()]
        } else {
            sample.branches.iter().map(|branch| sample.input_ids.len() + branch.input_ids.len()).collect()
        };
        let counted = |spans: &Vec<spatialscore::processor::Span>| spans.iter().map(|span| span.tokens).sum();
        assert_eq!(seen.conversations.iter().map(counted).collect::<Vec<usize>>(), readings, "{case}");
        assert_eq!(seen.tokens, sample.tokens(), "{case}");
        for spans in &seen.conversations {
            let last = spans.last().unwrap();
            assert_eq!((last.kind, last.tokens), (SpanKind::Read, 1), "{case}");
            assert!(!last.text.is_empty(), "{case}: {spans:?}");
            assert_eq!(spans.iter().filter(|span| span.kind == SpanKind::Read).count(), 1, "{case}");
            let text: String = spans.iter().map(|span| span.text.as_str()).collect();
            assert!(text.contains(prompt.trim()), "{case}: {text}");
            *kinds.entry(last.text.clone()).or_insert(0) += 1;
        }
    }
    // Special tokens, and ends of ordinary text.
    assert!(kinds.len() > 1, "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_without_a_score_has_words_and_its_neighbours_have_theirs() {
    let server = TestServer::of_models(&["a", "b"], &[]).await;
    let description = Description::of(server.http).await;
    let mut files: Vec<Vec<u8>> = [1, 2, POISON, 5].into_iter().map(png).collect();
    files[1] = b"no picture at all".to_vec();
    let mut call = asked(&files);
    (call["models"], call["inspect"]) = (json!(["b", "a"]), json!(true));
    let answer = post(server.http, "/v1/score", &call).await;
    description.holds("ScoreAnswer", &answer.body);
    assert_eq!(means(&answer), [Some(1.0), None, None, Some(5.0)]);
    let scores = |index: usize| &answer.body["items"][index]["scores"];
    for (index, code, words) in
        [(1, "INVALID_ARGUMENT", "items[1].image.encoded: "), (2, "INTERNAL", "a failure on purpose")]
    {
        for (place, model) in ["b", "a"].iter().enumerate() {
            let score = &scores(index)[place];
            assert_eq!((&score["model"], &score["error"]["code"]), (&json!(model), &json!(code)));
            assert!(score["error"]["message"].as_str().unwrap().contains(words), "{score}");
        }
    }
    // What is broken shows nothing, what a device failed at does.
    assert!(scores(1)[0].get("seen").is_none() && scores(2)[0].get("seen").is_some(), "{answer:?}");
    let revisions: Vec<_> =
        answer.body["receipts"].as_array().unwrap().iter().map(|r| r["model"].as_str().unwrap()).collect();
    assert_eq!(revisions, ["b", "a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_answered_is_refused_with_the_place() {
    let server = TestServer::start(&[("limits.max_items_per_request", "3")]).await;
    let description = Description::of(server.http).await;
    let changed = |key: &str, value: Value| {
        let mut call = asked(&[png(9)]);
        call[key] = value;
        call.to_string().into_bytes()
    };
    for (body, words) in [
        (changed("items", json!([])), "items: is empty; send 1 to 3"),
        (asked(&[9; 4].map(png)).to_string().into_bytes(), "items: has 4 items; send 1 to 3"),
        (changed("items", json!([{"image": "n o"}])), "body: items[0].image: no base64"),
        (changed("models", json!(["x"])), "models: "),
        (changed("inspect", json!("true")), "body: inspect: invalid type: a string"),
        (changed("prompt", json!(3)), "body: prompt: invalid type"),
        (b"{}".to_vec(), "missing field `items`"),
    ] {
        let answer = post_bytes(server.http, "/v1/score", body).await;
        description.holds("Refusal", &answer.body);
        assert!(
            answer.status == 400 && answer.body["detail"].as_str().unwrap().contains(words),
            "{words}: {answer:?}"
        );
    }
    let file = png(9);
    for (fields, words) in [
        (vec![("prompt", &b"a"[..])], "items: is empty; send 1 to 3"),
        (vec![("image", &file), ("colour", b"red")], "body: has a field \"colour\"; there are image"),
        (vec![("image", &file), ("inspect", b"yes")], "inspect: is \"yes\"; send true or false"),
        (vec![("image", &file), ("prompt", b"\xff")], "prompt: is no UTF-8"),
        (
            vec![("image", &file), ("prompt", b"a"), ("prompt", b"b")],
            "prompt: stands 2 times for 1 pictures; send one for all or for each",
        ),
        (vec![("image", &file[..]); 4], "items: has 4 items; send 1 to 3"),
        (vec![("model", &b"a"[..]); 300], "body: it has more than 256 fields"),
    ] {
        let answer = send_form(server.http, "/v1/score", form(&fields)).await;
        let said = answer.body["detail"].as_str().unwrap();
        assert!(answer.status == 400 && said.starts_with(words), "{words}: {answer:?}");
    }
    // Without a prompt each item says so, as over gRPC.
    let answer = send_form(server.http, "/v1/score", form(&[("image", &file)])).await;
    let said = answer.body["items"][0]["scores"][0]["error"]["message"].as_str().unwrap();
    assert!(said.starts_with("items[0].prompt: is absent"), "{answer:?}");
    assert_eq!(look(server.http, "/v1/score").await.status, 405);
    assert_eq!(post(server.http, "/v1/models", &json!({})).await.status, 405);
    assert!(!server.device.seen().contains(&9));
}

/// What an answer shows is bounded, and counts as what is under way does.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_shows_no_more_than_fits() {
    // The fixture shows a large picture in 16 tokens, and a small one in 4.
    let server = TestServer::start(&[("limits.max_item_tokens", "80")]).await;
    let large = |shade| png_of(28 * 17, shade);
    let mut call = asked(&[1, 2, 3, 4, 5, 6].map(large));
    assert_eq!(means(&post(server.http, "/v1/score", &call).await).len(), 6);
    call["inspect"] = json!(true);
    let answer = post(server.http, "/v1/score", &call).await;
    let said = &answer.body["detail"];
    let words = "inspect: the pictures are 96 tokens together, of all models; 80 can be shown";
    assert_eq!((answer.status, said), (400, &json!(words)), "{:.500}", answer.text);

    let limits = [("limits.max_message_bytes", "400000"), ("limits.max_bytes_in_flight", "400000")];
    let server = TestServer::start(&limits).await;
    let mut call = asked(&[3, 3].map(large));
    assert_eq!(means(&post(server.http, "/v1/score", &call).await), [Some(3.0); 2]);
    call["inspect"] = json!(true);
    let answer = post(server.http, "/v1/score", &call).await;
    assert_eq!(answer.status, 429, "{answer:?}");
    assert!(answer.reason.starts_with("the messages under way hold"), "{answer:?}");
    // What was taken is given back.
    call["items"] = asked(&[png(4)])["items"].clone();
    for _ in 0..20 {
        assert_eq!(means(&post(server.http, "/v1/score", &call).await), [Some(4.0)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_there_is_the_description_and_nothing_else() {
    let token = "trainer-0123456789abcdef";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("trainer:{token}\n")).unwrap();
    let server = TestServer::loading(&[("auth.tokens_file", file.path().to_str().unwrap())]).await;
    server.device.release();
    soon(async { while look(server.http, "/health").await.status != 200 {} }).await;
    let description = Description::of(server.http).await;
    let fields = form(&[("prompt", PROMPT.as_bytes()), ("image", &png(1))]);
    for refused in [
        look(server.http, "/v1/models").await,
        post(server.http, "/v1/score", &asked(&[png(1)])).await,
        send_form(server.http, "/v1/score", fields.clone()).await,
        send_form(server.http, "/evaluation/v1/score", fields).await,
    ] {
        assert_eq!(refused.status, 401, "{refused:?}");
        description.holds("Refusal", &refused.body);
    }
    let mut request = post_request("/v1/score", asked(&[png(1)]).to_string().into());
    request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    assert_eq!(means(&soon(try_send(server.http, request)).await.unwrap()), [Some(1.0)]);
}

/// What can be done to a form in order.
fn spoilt_forms(sound: &[u8], random: &mut StdRng) -> Vec<Bad> {
    let end = sound.len() - "\r\n".len();
    let cuts = (0..end).map(|at| Bad::new(format!("cut at {at}"), &sound[..at], true));
    let mut bad: Vec<_> = cuts.collect();
    for _ in 0..400 {
        let (mut turned, bit) = (sound.to_vec(), random.random_range(0..sound.len() * 8));
        turned[bit / 8] ^= 1 << (bit % 8);
        bad.push(Bad::new(format!("bit {bit} turned"), turned, false));
    }
    let head = format!("--{BOUNDARY}\r\n");
    let many = format!("{head}Content-Disposition: form-data; name=\"model\"\r\n\r\n\r\n").repeat(20_000);
    for (what, body) in [
        ("20000 fields", many),
        ("20000 headers", format!("{head}{}\r\n", "A: b\r\n".repeat(20_000))),
        ("a long header", format!("{head}A: {}\r\n\r\n", "b".repeat(1 << 20))),
        (
            "a long name",
            format!("{head}Content-Disposition: form-data; name=\"{}\"\r\n\r\n", "b".repeat(1 << 20)),
        ),
        ("boundaries alone", head.repeat(20_000)),
        ("ends alone", format!("--{BOUNDARY}--").repeat(20_000)),
        ("dashes", "-".repeat(1 << 20)),
        ("line ends", "\r\n".repeat(1 << 19)),
    ] {
        bad.push(Bad::new(what, body, true));
    }
    bad
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_is_refused_and_good_neighbours_have_their_scores() {
    let server = TestServer::start(&[("cache.max_items", "0")]).await;
    let address = server.http;
    let mut random = StdRng::seed_from_u64(20_261_126);
    let mut sound = asked(&[png(7)]);
    (sound["models"], sound["inspect"]) = (json!(["fake"]), json!(true));
    let fields = ["", "/items", "/items/0", "/items/0/image", "/models/0", "/inspect"];
    let by_json = spoilt(&sound, &fields, &mut random);
    let (sound, file) = (&sound, png(7));
    let in_form = form(&[("prompt", PROMPT.as_bytes()), ("inspect", b"true"), ("image", &file)]);
    let by_form = spoilt_forms(&in_form, &mut random);
    println!("{} bad bodies, {} bad forms", by_json.len(), by_form.len());
    let bad = by_json.iter().map(|bad| (false, bad)).chain(by_form.iter().map(|bad| (true, bad)));
    let calls = bad.enumerate().map(|(index, (is_form, bad))| async move {
        let answer = if is_form {
            send_form(address, "/v1/score", bad.body.clone()).await
        } else {
            post_bytes(address, "/v1/score", bad.body.clone()).await
        };
        bad.check("/v1/score", &answer);
        assert!(answer.status == 200 || answer.text.len() < 700, "{answer:?}");
        if index % 16 == 0 {
            assert_eq!(means(&post(address, "/v1/score", sound).await), [Some(7.0)], "{}", bad.what);
        }
    });
    stream::iter(calls).buffer_unordered(16).collect::<Vec<()>>().await;
    // A kind that says it is a form and has no boundary, or another.
    for kind in
        ["multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x", "multipart/"]
    {
        let mut request = post_request("/v1/score", in_form.clone().into());
        request.headers_mut().insert("content-type", kind.parse().unwrap());
        assert_eq!(soon(try_send(address, request)).await.unwrap().status, 400, "{kind}");
    }
}

/// The lines of an explanation.
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Sends a call whose answer is lines.
async fn explain(address: SocketAddr, body: &Value) -> (String, Vec<Value>) {
    let host = address.to_string();
    let body = body.to_string();
    let said = tokio::task::spawn_blocking(move || {
        common::process::say(&host, "POST /v1/explain HTTP/1.1", body.as_bytes())
    });
    let said = soon(said).await.unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    // Without the lengths of chunks.
    let body: String =
        body.lines().filter(|line| line.starts_with('{')).map(|line| format!("{line}\n")).collect();
    (head.to_owned(), lines(&body))
}

/// What no well-made client would ask to have explained.
fn bad_questions(sound: &Value, random: &mut StdRng) -> Vec<Bad> {
    let mut bad = spoilt(sound, &["", "/image", "/cells", "/model", "/questions"], random);
    // What may be left out may be null.
    for bad in bad.iter_mut().filter(|bad| bad.what.ends_with(" is null") && bad.what != "/image is null") {
        bad.hopeless &= bad.what.starts_with(" ");
    }
    let mut changed = |what: &str, key: &str, value: Value, hopeless: bool| {
        let mut body = sound.clone();
        body[key] = value;
        bad.push(Bad::new(what, body.to_string(), hopeless));
    };
    for cells in [json!(17), json!(4097), json!(i64::MAX), json!(1e300), json!(3.5), json!("4"), json!([4])] {
        changed(&format!("{cells} cells"), "cells", cells, true);
    }
    changed("a prompt of a megabyte", "prompt", json!("a".repeat(1 << 20)), true);
    changed("a prompt of nothing but ends of clauses", "prompt", json!(". ; , and".repeat(900)), false);
    changed("thousands of clauses", "prompt", json!("A is left of B. ".repeat(500)), false);
    changed("thousands of relations", "prompt", json!("left above ".repeat(700)), false);
    changed("letters of many bytes", "prompt", json!("左边。".repeat(800)), false);
    changed("a thousand references", "references", json!(vec![sound["image"].clone(); 1000]), true);
    changed("a thousand questions", "questions", json!(vec![json!({"text": "a?"}); 1000]), true);
    changed("a name of a megabyte", "model", json!("a".repeat(1 << 20)), true);
    changed("a picture of a megabyte of zeros", "image", json!(BASE64.encode(vec![0; 1 << 20])), true);
    bad
}

/// Rubbish is refused in few words, or explained like anything else: also the smallest picture, and a prompt of thousands of
/// clauses, of which no more than so many are changed.
#[tokio::test(flavor = "multi_thread")]
async fn rubbish_is_refused_or_explained_and_good_neighbours_have_their_scores() {
    let server = TestServer::start(&[("cache.max_items", "0"), ("http.explain_cells", "16")]).await;
    let description = Description::of(server.http).await;
    let address = server.http;
    let mut random = StdRng::seed_from_u64(20_261_127);
    let sound = json!({
        "prompt": PROMPT, "image": BASE64.encode(png(7)), "cells": 4, "model": "fake", "questions": [],
    });
    let by_json = bad_questions(&sound, &mut random);
    let file = png(7);
    let by_form =
        spoilt_forms(&form(&[("prompt", PROMPT.as_bytes()), ("cells", b"2"), ("image", &file)]), &mut random);
    println!("{} bad bodies, {} bad forms", by_json.len(), by_form.len());
    let bad = by_json.iter().map(|bad| (false, bad)).chain(by_form.iter().map(|bad| (true, bad)));
    let (description, neighbour) = (&description, &asked(&[png(9)]));
    let calls = bad.enumerate().map(|(index, (is_form, bad))| async move {
        let mut request = post_request("/v1/explain", bad.body.clone().into());
        if is_form {
            let kind = format!("multipart/form-data; boundary={BOUNDARY}");
            request.headers_mut().insert("content-type", kind.parse().unwrap());
        }
        let answer = soon(try_lines(address, request)).await.unwrap();
        if answer.status == 200 {
            assert!(!bad.hopeless, "{}: {answer:?}", bad.what);
            let lines = lines(&answer.text);
            lines.iter().for_each(|line| description.holds("ExplainLine", line));
            let last = lines.last().unwrap();
            assert!(last["kind"] == "done" || last["kind"] == "error", "{}: {last}", bad.what);
            // The whole, the mirrored, and what may be of each sort.
            assert!(lines.len() <= 2 + 2 + 32 + 32 + 16, "{}: {} lines", bad.what, lines.len());
        } else {
            bad.check("/v1/explain", &answer);
            assert!(answer.text.len() < 700, "{answer:?}");
        }
        if index % 16 == 0 {
            assert_eq!(means(&post(address, "/v1/score", neighbour).await), [Some(9.0)], "{}", bad.what);
        }
    });
    stream::iter(calls).buffer_unordered(16).collect::<Vec<()>>().await;

    // A picture of one pixel has one cell.
    let call = json!({"prompt": PROMPT, "image": BASE64.encode(png_of_one_pixel()), "cells": 16});
    let (_, lines) = explain(address, &call).await;
    let cells: Vec<_> = lines.iter().filter(|line| line["kind"] == "cell").collect();
    assert_eq!((&lines[0]["rows"], &lines[0]["columns"], cells.len()), (&json!(1), &json!(1), 1));
    assert_eq!(lines.last().unwrap()["kind"], "done");
}

fn png_of_one_pixel() -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = png::Encoder::new(&mut file, 1, 1).write_header().unwrap();
    writer.write_image_data(&[7]).unwrap();
    writer.finish().unwrap();
    file
}

/// An explanation has the deadline of its call, and its turn among the evaluations of others.
#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_keeps_its_deadline_and_its_turn() {
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tokens.path(), "one:one-0123456789abcdef\ntwo:two-0123456789abcdef\n").unwrap();
    let flags = [("batch.max_items", "1"), ("auth.tokens_file", tokens.path().to_str().unwrap())];
    let server = TestServer::loading(&flags).await;
    server.device.release();
    let address = server.http;
    soon(async { while look(address, "/health").await.status != 200 {} }).await;
    let request = |path: &str, body: &Value, token: &str| {
        let mut request = post_request(path, body.to_string().into());
        let token = format!("Bearer {token}-0123456789abcdef").parse().unwrap();
        request.headers_mut().insert("authorization", token);
        request
    };
    let call = |shade: u8| json!({"prompt": PROMPT, "image": BASE64.encode(png(shade)), "cells": 100});
    server.device.hold();
    let mut late = request("/v1/explain", &call(3), "one");
    late.headers_mut().insert("grpc-timeout", "300m".parse().unwrap());
    let answer = soon(try_lines(address, late)).await.unwrap();
    assert_eq!(answer.status, 504, "{answer:?}");
    server.device.release();

    server.device.pace(std::time::Duration::from_millis(50));
    let explaining = request("/v1/explain", &call(5), "one");
    let explaining = tokio::spawn(async move { try_lines(address, explaining).await.unwrap() });
    server.device.reached(5).await;
    let other = request("/evaluation/v1/score", &asked(&[png(11)]), "two");
    assert_eq!(means(&soon(try_send(address, other)).await.unwrap()), [Some(11.0)]);
    let answer = explaining.await.unwrap();
    assert!(answer.text.contains(r#""kind":"done""#), "{answer:?}");
    assert_ne!(server.device.seen().last(), Some(&11), "the other was the last");
}

/// Each number is the score of the picture and the prompt that the line speaks of.
#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_is_made_of_scores() {
    let (_server, http) = process(&["--set=model.checkpoint=spatialscore-mini", "--set=cache.max_items=0"]);
    let description = Description::of(http).await;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/banana.right.png");
    let file = std::fs::read(file).unwrap();
    let prompt = "Above a tree there is a banana. The tree stands along the bottom edge.";
    let call = json!({"prompt": prompt, "image": BASE64.encode(&file), "cells": 4});
    description.holds("ExplainRequest", &call);
    let (head, lines) = explain(http, &call).await;
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("application/x-ndjson"), "{head}");
    lines.iter().for_each(|line| description.holds("ExplainLine", line));
    let kinds: Vec<&str> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    let cells = ["cell"; 4];
    let start = ["plan", "whole", "mirrored", "dropped", "dropped", "turned", "turned"];
    assert_eq!(kinds, [&start[..], &cells, &["done"]].concat());
    assert_eq!(lines[0]["scores"], lines.len() - 2);
    assert_eq!((&lines[0]["rows"], &lines[0]["columns"]), (&json!(2), &json!(2)));

    // The same by hand: the pixels of the file, changed.
    let mut reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    let (width, height) = (info.width as usize, info.height as usize);
    let mean: Vec<u8> = (0..3)
        .map(|channel| {
            let sum: u64 = pixels.iter().skip(channel).step_by(3).map(|&value| u64::from(value)).sum();
            (sum as f64 / (width * height) as f64).round() as u8
        })
        .collect();
    let file_of = |pixels: &[u8]| {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, info.width, info.height);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(pixels).unwrap();
        drop(writer);
        file
    };
    let covered = |row: usize, column: usize| {
        let mut pixels = pixels.clone();
        for y in row * height / 2..(row + 1) * height / 2 {
            for x in column * width / 2..(column + 1) * width / 2 {
                pixels[3 * (y * width + x)..3 * (y * width + x) + 3].copy_from_slice(&mean);
            }
        }
        file_of(&pixels)
    };
    let mirrored: Vec<u8> = pixels
        .chunks(3 * width)
        .flat_map(|line| line.chunks(3).rev().flatten().copied().collect::<Vec<_>>())
        .collect();
    let cases = [
        (file.clone(), prompt),
        (file_of(&mirrored), prompt),
        (file.clone(), "The tree stands along the bottom edge."),
        (file.clone(), "Above a tree there is a banana."),
        (file.clone(), "Below a tree there is a banana. The tree stands along the bottom edge."),
        (file.clone(), "Above a tree there is a banana. The tree stands along the top edge."),
        (covered(0, 0), prompt),
        (covered(0, 1), prompt),
        (covered(1, 0), prompt),
        (covered(1, 1), prompt),
    ];
    let whole = lines[1]["mean"].as_f64().unwrap();
    for ((file, prompt), line) in cases.into_iter().zip(&lines[1..]) {
        let mut call = asked(&[file]);
        call["prompt"] = json!(prompt);
        let mean = means(&post(http, "/v1/score", &call).await)[0].unwrap();
        // In float32 a score is the same alone and among others, to 1e-5.
        let said = line["mean"].as_f64().unwrap();
        assert!((said - mean).abs() < 1e-4, "{line}: {mean} by hand");
        assert!((line["cost"].as_f64().unwrap() - (whole - said)).abs() < 1e-9, "{line}");
    }
    assert_eq!(
        (&lines[3]["text"], &lines[5]["from"]),
        (&json!("Above a tree there is a banana"), &json!("Above"))
    );

    // As a form, with no cells.
    let fields = [("prompt", prompt.as_bytes()), ("image", &file), ("cells", b"0")];
    let mut request = post_request("/v1/explain", form(&fields).into());
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    request.headers_mut().insert("content-type", kind.parse().unwrap());
    let text = soon(try_lines(http, request)).await.unwrap().text;
    assert!(text.contains(r#""kind":"done""#) && !text.contains(r#""kind":"cell""#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_keeps_the_limits_and_goes_behind_training() {
    let flags = [("http.explain_cells", "30"), ("batch.max_items", "1")];
    let server = TestServer::of_models(&["a", "b"], &flags).await;
    let description = Description::of(server.http).await;
    assert_eq!(look(server.http, "/v1/models").await.body["explain"]["max_cells"], 30);
    let call = |shade: u8| json!({"prompt": PROMPT, "image": BASE64.encode(png(shade)), "cells": 9});
    let changed = |key: &str, value: Value| {
        let mut call = call(9);
        call[key] = value;
        call
    };
    for (body, words) in [
        (changed("cells", json!(31)), "cells: is more than the 30 that there may be"),
        (changed("cells", json!("9")), "body: cells: invalid type: a string"),
        (changed("cells", json!(-1)), "body: cells: "),
        (changed("prompt", Value::Null), "prompt: is absent"),
        (changed("image", json!(BASE64.encode("no picture"))), "image.encoded: "),
        (changed("model", json!("c")), "models: "),
    ] {
        let answer = post(server.http, "/v1/explain", &body).await;
        description.holds("Refusal", &answer.body);
        let said = answer.body["detail"].as_str().unwrap();
        assert!(answer.status == 400 && said.starts_with(words), "{words}: {answer:?}");
    }
    for (fields, words) in [
        (vec![("prompt", &b"a"[..])], "image: must be one"),
        (vec![("image", b"a"), ("prompt", b"a"), ("cells", b"many")], "cells: is \"many\", no number"),
        (
            vec![("image", b"a"), ("prompt", b"a"), ("inspect", b"true")],
            "body: has a field \"inspect\"; there are",
        ),
        (vec![("image", b"a"), ("prompt", b"a"), ("model", b"a"), ("model", b"b")], "model: must be one"),
    ] {
        let answer = send_form(server.http, "/v1/explain", form(&fields)).await;
        let said = answer.body["detail"].as_str().unwrap();
        assert!(answer.status == 400 && said.starts_with(words), "{words}: {answer:?}");
    }
    assert!(!server.device.seen().contains(&9));

    // A picture that the device fails at has no score, and there is nothing to hold others against.
    let (_, lines) = explain(server.http, &call(POISON)).await;
    let last = lines.last().unwrap();
    description.holds("ExplainLine", last);
    assert_eq!(
        (lines.len(), &last["kind"], &last["error"]["code"]),
        (2, &json!("error"), &json!("INTERNAL"))
    );

    // Training comes between.
    server.device.pace(std::time::Duration::from_millis(100));
    let address = server.http;
    let body = changed("model", json!("a"));
    let explaining = tokio::spawn(async move { explain(address, &body).await });
    server.device.reached(9).await;
    let mut training = asked(&[png(11)]);
    training["models"] = json!(["a"]);
    assert_eq!(means(&post(address, "/v1/score", &training).await), [Some(11.0)]);
    let (_, lines) = explaining.await.unwrap();
    assert_eq!(lines.last().unwrap()["kind"], "done");
    assert_ne!(server.device.seen().last(), Some(&11), "training was the last");
}

/// Who hangs up costs no more than what is on its way, and who waits is told when the server stops.
#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_ends_with_its_caller_and_with_the_server() {
    let server = TestServer::start(&[("batch.max_items", "1"), ("limits.max_calls_per_caller", "2")]).await;
    let address = server.http;
    let call = |shade: u8| json!({"prompt": PROMPT, "image": BASE64.encode(png(shade)), "cells": 200});
    server.device.pace(std::time::Duration::from_millis(5));
    let body = call(5).to_string();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = format!("POST /v1/explain HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
    tokio::io::AsyncWriteExt::write_all(&mut stream, (head + &body).as_bytes()).await.unwrap();
    server.device.reached(5).await;
    drop(stream);
    // No more of it comes once its call is gone.
    let seen = || server.device.seen().iter().filter(|&&shade| shade == 5).count();
    let mut before = seen();
    soon(async {
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            match seen() {
                same if same == before => break,
                more => before = more,
            }
        }
    })
    .await;
    assert!(before < 100, "{before} of 200 were computed for nobody");

    server.device.pace(std::time::Duration::from_millis(50));
    let body = call(6);
    let explaining = tokio::spawn(async move { explain(address, &body).await });
    server.device.reached(6).await;
    let ending = server.shut_down();
    let (_, lines) = explaining.await.unwrap();
    let last = lines.last().unwrap();
    assert_eq!((&last["kind"], &last["error"]["code"]), (&json!("error"), &json!("UNAVAILABLE")), "{last}");
    assert_eq!(last["error"]["message"], "the server is shutting down");
    ending.end().await;
}

/// The page is there with what keeps it safe, and not where it is not wanted.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_given_without_a_token_and_with_a_policy() {
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "a:0123456789abcdef\n").unwrap();
    let server = TestServer::loading(&[("auth.tokens_file", token.path().to_str().unwrap())]).await;
    server.device.release();
    let get = async |address: SocketAddr, path: &'static str| {
        tokio::task::spawn_blocking(move || {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            let mut said = Vec::new();
            stream.read_to_end(&mut said).unwrap();
            String::from_utf8_lossy(&said).into_owned()
        })
        .await
        .unwrap()
    };
    for (path, kind, words) in [
        ("/", "text/html; charset=utf-8", "<title>SpatialScore</title>"),
        ("/page/main.js", "text/javascript; charset=utf-8", "import"),
        ("/page/style.css", "text/css; charset=utf-8", ":root"),
        ("/page/icon.svg", "image/svg+xml", "<svg"),
        ("/page/samples/manifest.jsonl", "text/plain; charset=utf-8", "panda.right.png"),
        ("/page/samples/panda.right.png", "image/png", "PNG"),
    ] {
        let said = get(server.http, path).await;
        let (head, body) = said.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200") && body.contains(words), "{path}: {head}");
        for line in [
            &format!("content-type: {kind}")[..],
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ] {
            assert!(head.lines().any(|l| l == line), "{path} without {line}: {head}");
        }
        let policy = head.lines().find(|line| line.starts_with("content-security-policy: ")).unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    }
    for path in
        ["/page/../samples/panda.right.png", "/page/samples/../page/main.js", "/page/", "/page/nothing"]
    {
        let said = get(server.http, path).await;
        assert!(said.starts_with("HTTP/1.1 404"), "{path}: {said}");
    }
    let without = TestServer::start(&[("http.page", "false")]).await;
    for path in ["/", "/page/main.js"] {
        assert!(get(without.http, path).await.starts_with("HTTP/1.1 404"), "{path}");
    }
    assert_eq!(means(&post(without.http, "/v1/score", &asked(&[png(3)])).await), [Some(3.0)]);
}
