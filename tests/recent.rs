//! What was scored of late: who sees what of it, that it is bounded, and that none of it is there where it is not wanted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use common::web::*;
use common::{
    METRICS, PROMPT, SIDE, TestServer, encoded, image, item, metric, outcomes, png, request, soon, until,
};
use futures::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tonic::transport::Channel;

const KEPT: (&str, &str) = ("recent.keep", "600");
const ALL: [(&str, &str); 3] = [KEPT, ("recent.prompts", "true"), ("recent.thumbnails", "true")];

async fn score(client: &mut SpatialScoreServiceClient<Channel>, message: proto::ScoreRequest) {
    let several = message.models.len() > 1;
    let answer = soon(client.score(message)).await.unwrap().into_inner();
    assert!(several || outcomes(&answer).iter().all(Result::is_ok), "{answer:?}");
}

/// Pictures of these shades under a prompt.
fn group(prompt: &str, shades: impl IntoIterator<Item = u8>) -> proto::ScoreRequest {
    proto::ScoreRequest { prompt: Some(prompt.into()), ..request(shades) }
}

/// The series of an answer that must be one.
fn series(answer: &Answer) -> &Vec<Value> {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body["series"].as_array().unwrap()
}

fn numbers(list: &Value, key: &str) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|one| one[key].as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_scored_is_shown_with_groups_and_pictures() {
    let server = TestServer::of_models(&["a", "b"], &ALL).await;
    let description = Description::of(server.http).await;
    let mut client = server.client_from("127.0.0.3").await;
    score(&mut client, proto::ScoreRequest { models: vec!["a".into(), "b".into()], ..group("wide", 1..=9) })
        .await;
    score(&mut client, group("flat", [7; 4])).await;
    let mut evaluated = group("wide", [100]);
    evaluated.priority = proto::Priority::Evaluation.into();
    score(&mut client, evaluated).await;
    // What has no score is nowhere.
    let mut broken = request([]);
    broken.items.push(item(encoded(b"no picture".to_vec())));
    soon(client.score(broken)).await.unwrap();

    let answer = look(server.http, "/v1/recent").await;
    description.holds("RecentAnswer", &answer.body);
    assert_eq!((&answer.body["of_all_callers"], &answer.body["keep_seconds"]), (&json!(true), &json!(600)));
    let all = series(&answer);
    let names: Vec<_> =
        all.iter().map(|one| [&one["model"], &one["priority"], &one["scores"]["count"]]).collect();
    assert_eq!(json!(names), json!([["a", "training", 13], ["b", "training", 9], ["a", "evaluation", 1]]));
    let first = &all[0];
    assert_eq!((&first["caller"], &first["revision"]), (&json!("127.0.0.3"), &json!("none")));
    assert_eq!(first["groups"], json!({"count": 2, "without_spread": 1}));
    assert_eq!(numbers(&first["highest"], "mean"), [9.0, 8.0, 7.0, 7.0, 7.0, 7.0]);
    assert_eq!(numbers(&first["lowest"], "mean"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(
        (&first["least_spread"][0]["prompt"], &first["least_spread"][0]["count"]),
        (&json!("flat"), &json!(4))
    );
    assert_eq!(
        (&first["least_spread"][1]["lowest"], &first["least_spread"][1]["highest"]),
        (&json!(1.0), &json!(9.0))
    );
    assert_eq!(first["highest"][0]["stddev"], 0.5);
    let counted: u64 =
        first["over_time"].as_array().unwrap().iter().map(|slot| slot["count"].as_u64().unwrap()).sum();
    assert_eq!(counted, 13);
    // The picture itself, grey and with its number in a corner. It is as small as it was sent.
    let file = BASE64.decode(first["highest"][0]["png"].as_str().unwrap()).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height, &pixels[..3]), (SIDE, SIDE, &[9; 3][..]));
    let saturation = &first["highest"][0]["saturation"];
    assert!(saturation.as_f64().unwrap() < 0.01, "{saturation}");

    // By the model, by the path of one, and no more than asked for.
    for path in ["/v1/recent?model=b&most=2", "/models/b/v1/recent?most=2"] {
        let answer = look(server.http, path).await;
        description.holds("RecentAnswer", &answer.body);
        let [one] = &series(&answer)[..] else { panic!("{answer:?}") };
        assert_eq!((&one["model"], numbers(&one["lowest"], "mean").len()), (&json!("b"), 2));
    }
    for path in ["/v1/recent?caller=127.0.0.9", "/v1/recent?model=c"] {
        assert_eq!(series(&look(server.http, path).await), &[Value::Null; 0]);
    }
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_sees_its_own_and_who_administers_all() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let [one, two, admin] = ["one-0123456789abcdef", "two-0123456789abcdef", "admin-0123456789abcdef"];
    let callers = file("callers", &format!("one:{one}\ntwo:{two}\n"));
    let admins = file("admins", &format!("chief:{admin}\n"));
    let flags = [&ALL[..], &[("auth.tokens_file", &callers), ("admin.tokens_file", &admins)]].concat();
    let server = TestServer::loading(&flags).await;
    server.device.release();
    soon(async { while look(server.http, "/health").await.status != 200 {} }).await;
    let send = async |token: &str, shade: u8, path: &str| {
        let body = json!({"prompt": PROMPT, "items": [{"image": BASE64.encode(png(shade))}]});
        let mut request = post_request(path, body.to_string().into());
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        soon(try_send(server.http, request)).await.unwrap()
    };
    assert_eq!(send(one, 1, "/v1/score").await.status, 200);
    assert_eq!(send(two, 2, "/v1/score").await.status, 200);
    let of = async |token: &str, path: &str| look_with(server.http, path, Some(token)).await;
    let seen = |answer: &Answer| -> Vec<(String, f64)> {
        let of = |one: &Value| {
            (one["caller"].as_str().unwrap().to_owned(), one["scores"]["mean"].as_f64().unwrap())
        };
        series(answer).iter().map(of).collect()
    };
    let (mine, yours) = (("one".to_owned(), 1.0), ("two".to_owned(), 2.0));
    for path in ["/v1/recent", "/v1/recent?caller=one", "/evaluation/v1/recent"] {
        let answer = of(one, path).await;
        assert_eq!((seen(&answer), &answer.body["of_all_callers"]), (vec![mine.clone()], &json!(false)));
    }
    assert_eq!(seen(&of(two, "/v1/recent").await), std::slice::from_ref(&yours));
    let refused = of(one, "/v1/recent?caller=two").await;
    assert_eq!(refused.status, 400);
    assert!(refused.body["detail"].as_str().unwrap().starts_with("caller: is another; "), "{refused:?}");
    // One that there is not is refused in the same words.
    assert_eq!(of(one, "/v1/recent?caller=three").await.text, refused.text);
    assert_eq!(seen(&of(admin, "/v1/recent").await), [mine, yours.clone()]);
    assert_eq!(seen(&of(admin, "/v1/recent?caller=two").await), [yours]);

    // What the administrator's token opens, and what it does not: neither scores nor anything over gRPC.
    assert_eq!(of(admin, "/v1/models").await.status, 200);
    assert_eq!(send(admin, 3, "/v1/score").await.status, 401);
    assert_eq!(send(admin, 3, "/v1/explain").await.status, 401);
    let mut asked = tonic::Request::new(proto::GetModelRequest::default());
    asked.metadata_mut().insert("authorization", format!("Bearer {admin}").parse().unwrap());
    let refused = server.client().await.get_model(asked).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    for token in [None, Some("three-0123456789abcdef"), Some("")] {
        assert_eq!(look_with(server.http, "/v1/recent", token).await.status, 401, "{token:?}");
    }
    assert!(!server.device.seen().contains(&3));
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_where_that_is_not_asked_for() {
    let server = TestServer::start(&[]).await;
    let description = Description::of(server.http).await;
    score(&mut server.client().await, request([1, 2])).await;
    let answer = look(server.http, "/v1/recent").await;
    description.holds("Refusal", &answer.body);
    assert_eq!(
        (answer.status, &answer.body["detail"]),
        (404, &json!("nothing is kept of what was scored: recent.keep is 0"))
    );

    // Scores, and nothing of what was sent.
    let server = TestServer::start(&[KEPT]).await;
    score(&mut server.client().await, request([1, 2])).await;
    let answer = look(server.http, "/v1/recent").await;
    description.holds("RecentAnswer", &answer.body);
    assert_eq!(series(&answer)[0]["scores"]["count"], 2);
    assert!(!answer.text.contains(PROMPT) && !answer.text.contains("png"), "{answer:?}");
    assert!(answer.text.contains("saturation"), "{answer:?}");
}

/// What the server makes up to explain a picture is nobody's picture.
#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_leaves_no_scores() {
    let server = TestServer::start(&[KEPT]).await;
    let call = json!({"prompt": PROMPT, "image": BASE64.encode(png(5)), "cells": 4});
    let request = post_request("/v1/explain", call.to_string().into());
    let answer = soon(try_lines(server.http, request)).await.unwrap();
    assert!(answer.text.contains(r#""kind":"done""#), "{answer:?}");
    assert_eq!(series(&look(server.http, "/v1/recent").await), &[Value::Null; 0]);
}

/// A score that is known already, or computed for another, shows the picture all the same; and counts once in its group.
#[tokio::test(flavor = "multi_thread")]
async fn who_sends_a_picture_again_has_it_shown() {
    let flags = [KEPT, ("recent.thumbnails", "true"), ("cache.max_items", "16")];
    let server = TestServer::of_models(&["again"], &flags).await;
    let mut client = server.client().await;
    let picture = image(5);
    let call = proto::ScoreRequest {
        prompt: Some(PROMPT.into()),
        items: vec![item(picture.clone()), item(picture.clone()), item(image(9))],
        ..Default::default()
    };
    score(&mut client, call.clone()).await;
    score(&mut client, call).await;
    assert_eq!(server.device.seen().iter().filter(|&&shade| shade == 5).count(), 1);
    let answer = look(server.http, "/v1/recent").await;
    let [one] = &series(&answer)[..] else { panic!("{answer:?}") };
    assert_eq!((&one["scores"]["count"], &one["least_spread"][0]["count"]), (&json!(6), &json!(2)));
    assert_eq!(numbers(&one["highest"], "mean"), [9.0, 5.0]);
    for shown in one["highest"].as_array().unwrap() {
        assert!(shown["png"].is_string() && shown["saturation"].is_number(), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_bounded_and_who_sends_much_loses_its_own() {
    let flags = [KEPT, ("recent.thumbnails", "true"), ("recent.max_bytes", "1048576")];
    let server = TestServer::start(&flags).await;
    score(&mut server.client_from("127.0.0.4").await, request([1, 2, 3])).await;
    let mut busy = server.client_from("127.0.0.5").await;
    for _ in 0..4 {
        score(&mut busy, request(0..32)).await;
    }
    let answer = look(server.http, "/v1/recent?most=24").await;
    let counts: Vec<_> =
        series(&answer).iter().map(|one| (&one["caller"], &one["scores"]["count"])).collect();
    // A small picture counts for 27648 bytes, and an entry for 1024.
    let room = 1048576 / (27648 + 1024) - 3;
    assert_eq!(counts, [(&json!("127.0.0.5"), &json!(room)), (&json!("127.0.0.4"), &json!(3))]);

    let server = TestServer::start(&[("recent.keep", "1")]).await;
    score(&mut server.client().await, request([1, 2, 3])).await;
    soon(async { while !series(&look(server.http, "/v1/recent").await).is_empty() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_without_spread_are_measured() {
    let server = TestServer::of_models(&["spread"], &[KEPT]).await;
    let mut client = server.client().await;
    score(&mut client, group("wide", [2, 4])).await;
    score(&mut client, group("flat", [3, 3])).await;
    score(&mut client, group("alone", [3])).await;
    let mut evaluated = group("evaluated", [100, 100]);
    evaluated.priority = proto::Priority::Evaluation.into();
    score(&mut client, evaluated).await;
    let of = |name: &str| metric(&format!("spatialscore_recent_{name}{{model=\"spread\"}}"));
    until(|| of("groups") == 2.0).await;
    assert_eq!(of("groups_without_spread"), 1.0);
    assert!((of("score_stddev") - 0.4_f64.sqrt()).abs() < 1e-9, "{}", METRICS.render());
}

/// What no well-made client would ask.
fn bad_queries(random: &mut StdRng) -> Vec<(String, bool)> {
    let mut bad = Vec::new();
    for name in ["seconds", "most"] {
        for value in [
            "",
            "-1",
            "0.5",
            "1e3",
            "x",
            "NaN",
            "null",
            "true",
            "99999999999999999999",
            "%00",
            "%ff",
            "1%2C2",
            "+1+",
            "０",
        ] {
            bad.push((format!("{name}={value}"), true));
        }
        bad.push((format!("{name}={}", "9".repeat(5000)), true));
        bad.push((format!("{name}=1&{name}=1"), true));
    }
    for (query, hopeless) in [
        ("seconds=0", true),
        ("seconds=601", true),
        ("most=25", true),
        ("=", true),
        ("&&&&", false),
        ("?", true),
        ("model", false),
        ("model=%ff%00%0a", false),
        ("model=a&model=a", true),
        ("caller=%22%3E%3Cscript%3E", false),
        ("most[]=1", true),
        ("MOST=1", true),
    ] {
        bad.push((query.to_owned(), hopeless));
    }
    bad.push((format!("model={}", "a".repeat(5000)), false));
    bad.push((format!("caller={}", "%00".repeat(1500)), false));
    bad.push((format!("{}=1", "n".repeat(5000)), true));
    bad.push(("most=1&".repeat(700), true));
    for _ in 0..300 {
        let byte = |random: &mut StdRng| b"&=%+?#;[]0a9f_"[random.random_range(0..14)] as char;
        let length = random.random_range(1..40);
        let query: String = (0..length).map(|_| byte(random)).collect();
        bad.push((query.replace('#', "%23"), false));
    }
    bad
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_is_refused_in_few_words() {
    let server = TestServer::start(&ALL).await;
    let address: SocketAddr = server.http;
    score(&mut server.client().await, request([7])).await;
    let description = Description::of(address).await;
    let bad = bad_queries(&mut StdRng::seed_from_u64(20_261_126));
    let (description, all) = (&description, &bad);
    let calls = all.iter().map(|(query, hopeless)| async move {
        // As it stands: what no URI may hold is the server's to refuse.
        let host = address.to_string();
        let head = format!("GET /v1/recent?{query} HTTP/1.1");
        let said =
            tokio::task::spawn_blocking(move || common::process::say(&host, &head, b"")).await.unwrap();
        let status = said.split_whitespace().nth(1).unwrap();
        let body: Value = said
            .split_once("\r\n\r\n")
            .and_then(|(_, body)| serde_json::from_str(body).ok())
            .unwrap_or_default();
        match status {
            "200" => {
                assert!(!hopeless, "{query}: {said}");
                description.holds("RecentAnswer", &body);
            }
            // Not even a request.
            "400" if body.is_null() => {}
            "400" => {
                description.holds("Refusal", &body);
                assert!(said.len() < 1500, "{query}: {said}");
            }
            _ => panic!("{query}: {said}"),
        }
    });
    stream::iter(calls).buffer_unordered(16).collect::<Vec<()>>().await;
    for (method, status) in [("POST", 405), ("PUT", 405), ("DELETE", 405)] {
        let mut request = post_request("/v1/recent", "{}".into());
        *request.method_mut() = method.parse().unwrap();
        assert_eq!(soon(try_send(address, request)).await.unwrap().status, status, "{method}");
    }
    assert_eq!(series(&look(address, "/v1/recent").await)[0]["scores"]["count"], 1);
}

/// Answers count as messages do: no number of them takes more memory than there may be.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_needs_room() {
    let limits = [("limits.max_message_bytes", "100000"), ("limits.max_bytes_in_flight", "100000")];
    let server = TestServer::start(&[&ALL[..], &limits].concat()).await;
    score(&mut server.client().await, request(0..8)).await;
    let refused = look(server.http, "/v1/recent").await;
    assert_eq!(refused.status, 429, "{refused:?}");
    for _ in 0..20 {
        assert_eq!(series(&look(server.http, "/v1/recent?most=0").await).len(), 1);
    }
}
