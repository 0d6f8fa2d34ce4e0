//! Several models in one server: each with its reference's numbers, one queue, one room.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use common::process::{Server, get, run};
use common::{TestServer, encoded, growth, item, outcomes, request, soon};
use golden::Case;
use serde_json::json;
use spatialscore::edge::proto;
use spatialscore::edge::proto::model_outcome::Outcome as Of;
use spatialscore::edge::proto::score_result::Outcome;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::processor::{Decoded, Picture, Processor, ProcessorLimits};
use tonic::Code;
use tonic::transport::Channel;

/// How far a score may be from the reference's.
const TOLERANCE: f32 = 1e-4;

type Client = SpatialScoreServiceClient<Channel>;

async fn client(server: &Server) -> Client {
    SpatialScoreServiceClient::connect(server.url()).await.unwrap()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// An item of a case, which all models of one picture can score.
fn item_of(case: &Case, index: usize) -> proto::ScoreItem {
    let picture = case.items[index].files(&case.directory).pop().unwrap();
    proto::ScoreItem { prompt: Some(case.items[index].prompt.clone()), ..item(encoded(picture)) }
}

#[track_caller]
fn near(score: &proto::Score, case: &Case, index: usize) {
    let wanted = case.score(index, "mean").unwrap();
    let (got, scale) = (score.mean, wanted.abs().max(0.1));
    assert!((got - wanted).abs() <= TOLERANCE * scale, "{} {index}: {got} is not {wanted}", case.name);
}

/// The scores of a result of several models, by their names.
#[track_caller]
fn scores(result: &proto::ScoreResult) -> Vec<(&str, &proto::Score)> {
    assert_eq!(result.outcome, None);
    result
        .outcomes
        .iter()
        .map(|outcome| match &outcome.outcome {
            Some(Of::Score(score)) => (outcome.model.as_str(), score),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_names_models_and_has_each_ones_reference_scores() {
    let cases = ["flat", "mlp", "qwen3"].map(Case::open);
    let server = Server::of_models(&["flat=flat", "m.l-p_1=mlp", "third=qwen3"], &[]);
    let mut client = client(&server).await;
    let named = ["flat", "m.l-p_1", "third"];
    let items: Vec<_> =
        cases.iter().flat_map(|case| (0..case.items.len()).map(|index| item_of(case, index))).collect();

    let asked = names(&["third", "flat", "m.l-p_1"]);
    let all = proto::ScoreRequest { items: items.clone(), models: asked.clone(), ..Default::default() };
    let answer =
        client.score(proto::ScoreRequest { wants_receipts: true, ..all }).await.unwrap().into_inner();
    let mut results = answer.results.iter();
    for (own, case) in cases.iter().enumerate() {
        for index in 0..case.items.len() {
            let scores = scores(results.next().unwrap());
            assert_eq!(scores.iter().map(|(name, _)| *name).collect::<Vec<_>>(), asked);
            near(scores.iter().find(|(name, _)| *name == named[own]).unwrap().1, case, index);
        }
    }
    assert_eq!(results.next(), None);

    // What judged it is what is served under these names.
    for (receipt, name) in answer.receipts.iter().zip(&asked) {
        let served =
            client.get_model(proto::GetModelRequest { name: name.clone() }).await.unwrap().into_inner();
        assert_eq!((&receipt.model, &receipt.revision), (name, &served.revision));
        assert_eq!((&receipt.profile_digest, &receipt.dtype), (&served.profile_digest, &served.dtype));
        assert_eq!(receipt.server_version, served.server_version);
        assert!(receipt.revision.starts_with("sha256:") && receipt.profile_digest.starts_with("sha256:"));
    }
    assert_eq!(answer.receipts.len(), 3);

    // One model, or none named: as ever.
    for (own, case) in cases.iter().enumerate() {
        for models in [names(&[named[own]]), Vec::new()] {
            if models.is_empty() && own > 0 {
                continue;
            }
            let request = proto::ScoreRequest { items: vec![item_of(case, 0)], models, ..Default::default() };
            let answer = client.score(request).await.unwrap().into_inner();
            assert!(answer.receipts.is_empty() && answer.results[0].outcomes.is_empty());
            let Some(Outcome::Score(score)) = &answer.results[0].outcome else { panic!("{answer:?}") };
            near(score, case, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_names_models_item_by_item() {
    let cases = ["flat", "mlp"].map(Case::open);
    let server = Server::of_models(&["a=flat", "b=mlp"], &[]);
    let mut client = client(&server).await;
    let message = |id: &str, models: &[&str], case: usize| proto::ScoreStreamRequest {
        id: id.into(),
        item: Some(item_of(&cases[case], 0)),
        models: names(models),
        wants_receipts: id == "both",
        ..Default::default()
    };
    let messages = vec![
        message("both", &["b", "a"], 1),
        message("default", &[], 0),
        message("b", &["b"], 1),
        message("nobody", &["a", "c"], 0),
    ];
    let mut answers = client.score_stream(futures::stream::iter(messages)).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(answer) = soon(answers.message()).await.unwrap() {
        seen += 1;
        let result = answer.result.unwrap();
        assert_eq!(answer.receipts.len(), if answer.id == "both" { 2 } else { 0 });
        match (answer.id.as_str(), &result.outcome) {
            ("both", _) => {
                let scores = scores(&result);
                assert_eq!([scores[0].0, scores[1].0], ["b", "a"]);
                near(scores[0].1, &cases[1], 0);
            }
            ("default", Some(Outcome::Score(score))) => near(score, &cases[0], 0),
            ("b", Some(Outcome::Score(score))) => near(score, &cases[1], 0),
            ("nobody", Some(Outcome::Error(error))) => {
                assert_eq!(Code::from(error.code), Code::InvalidArgument);
                assert!(
                    error.message.starts_with("models: there is no model \"c\"; there are a, b"),
                    "{error:?}"
                );
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_asked_for_by_name() {
    let server = Server::of_models(&["first=mlp", "second=qwen3"], &[]);
    let mut client = client(&server).await;
    let models = client.list_models(proto::ListModelsRequest {}).await.unwrap().into_inner().models;
    let told: Vec<_> = models.iter().map(|model| (&*model.name, &*model.architecture)).collect();
    assert_eq!(told, [("first", "qwen2_5_vl"), ("second", "qwen3_vl")]);
    assert!(models.iter().all(|model| model.weight_bytes > 0 && model.forward_bytes > 0));
    assert!(models[0].checkpoint.ends_with("mlp/checkpoint"));
    assert_eq!(models[0].state(), proto::ModelState::Serving);
    for (name, wanted) in [("", &models[0]), ("first", &models[0]), ("second", &models[1])] {
        let told = client.get_model(proto::GetModelRequest { name: name.into() }).await.unwrap().into_inner();
        assert_eq!(&told, wanted);
    }
    let case = Case::open("mlp");
    let long = "x".repeat(5000);
    for (asked, said) in [
        (&["third"][..], "models: there is no model \"third\"; there are first, second"),
        (&["first", ""], "models: there is no model \"\""),
        (&["first", "second", "first"], "models: \"first\" is named twice"),
        (&[long.as_str()], "models: there is no model \"xxxx"),
    ] {
        let request = proto::ScoreRequest {
            items: vec![item_of(&case, 0)],
            models: names(asked),
            ..Default::default()
        };
        let status = client.score(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(said) && status.message().len() < 600, "{status:?}");
        if let [name] = asked {
            let status = client.get_model(proto::GetModelRequest { name: (*name).into() }).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_model_cannot_score_the_other_does() {
    // The second reads two pictures.
    let server = Server::of_models(&["one=flat", "two=several"], &[]);
    let mut client = client(&server).await;
    let case = Case::open("flat");
    let broken = proto::ScoreItem { prompt: Some("a".into()), ..item(encoded(b"no picture".to_vec())) };
    let items = vec![item_of(&case, 0), broken, proto::ScoreItem { prompt: None, ..item_of(&case, 1) }];
    let request = proto::ScoreRequest { items, models: names(&["one", "two"]), ..Default::default() };
    let results = client.score(request).await.unwrap().into_inner().results;
    let said = |result: &proto::ScoreResult, model: usize| match &result.outcomes[model].outcome {
        Some(Of::Error(error)) => error.message.clone(),
        other => panic!("{other:?}"),
    };
    let Some(Of::Score(score)) = &results[0].outcomes[0].outcome else { panic!("{results:?}") };
    near(score, &case, 0);
    assert!(said(&results[0], 1).starts_with("items[0].references: the model reads 2 pictures"));
    assert!(said(&results[1], 0).starts_with("items[1].image.encoded: "));
    assert!((0..2).all(|model| said(&results[2], model).starts_with("items[2].prompt: is absent")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_measured_and_logged_says_which_model() {
    let server = Server::of_models(&["a=flat", "b=mlp"], &["--log-level=debug"]);
    let mut client = client(&server).await;
    let case = Case::open("flat");
    let ask = |models: &[&str]| proto::ScoreRequest {
        items: vec![item_of(&case, 0)],
        models: names(models),
        ..Default::default()
    };
    for models in [&["a", "b"][..], &["b"], &["a"], &["b"]] {
        client.score(ask(models)).await.unwrap();
    }
    let page = get(server.metrics_address(), "/metrics");
    let value = |name: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse::<f64>().unwrap()
    };
    for (model, asked) in [("a", 2.0), ("b", 3.0)] {
        let of = |name: &str| value(&format!("spatialscore_{name}{{model=\"{model}\"}}"));
        assert_eq!(of("score_mean_count"), asked);
        assert_eq!(
            (of("batch_items_count"), of("cache_misses_total"), of("queue_wait_seconds_count")),
            (1.0, 1.0, 1.0)
        );
        assert_eq!(value(&format!("spatialscore_items_total{{model=\"{model}\",outcome=\"OK\"}}")), asked);
        assert_eq!(
            value(&format!("spatialscore_cache_hits_total{{model=\"{model}\",from=\"memory\"}}")),
            asked - 1.0
        );
        assert_eq!(
            value(&format!("spatialscore_forward_seconds_count{{model=\"{model}\",device=\"cpu\"}}")),
            1.0
        );
        assert_eq!(of("constant_scores"), 0.0);
    }
    // An item is prepared once for all its models: once its header, once its pixels.
    assert_eq!(value("spatialscore_preparation_seconds_count"), 8.0);
    server.signal("TERM");
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    let scored = |model: &str| {
        log.lines()
            .filter(|line| line.contains("\"scored\"") && line.contains(&format!("\"model\":\"{model}\"")))
            .count()
    };
    assert_eq!((scored("a"), scored("b")), (1, 1), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_items_of_all_models_find_room_together_or_none_does() {
    let server = TestServer::of_models(
        &["a", "b"],
        &[("queue.max_items", "6"), ("batch.max_items", "1"), ("limits.max_items_per_request", "6")],
    )
    .await;
    let [a, b] = [0, 1].map(|n| server.devices[n].clone());
    a.hold();
    let both = |shades: Vec<u8>| proto::ScoreRequest { models: names(&["a", "b"]), ..request(shades) };
    let mut client = server.client().await;
    let status = client.score(both(vec![1, 2, 3, 4])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("8 items"), "{status:?}");

    let first = tokio::spawn({
        let mut client = server.client().await;
        let request = both(vec![11, 12]);
        async move { client.score(request).await }
    });
    a.occupied().await;
    // Of its four places one is on the device; four more are not there, though two are.
    let mut other = server.client_from("127.0.0.2").await;
    let status = other.score(both(vec![21, 22])).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    a.release();
    let answer = soon(first).await.unwrap().unwrap().into_inner();
    for (result, shade) in answer.results.iter().zip([11.0, 12.0]) {
        assert_eq!(scores(result).iter().map(|(_, score)| score.mean).collect::<Vec<_>>(), [shade; 2]);
    }
    soon(other.score(both(vec![31]))).await.unwrap();
    for device in [a, b] {
        assert!(
            !device.seen().iter().any(|shade| [1, 2, 3, 4, 21, 22].contains(shade)),
            "{:?}",
            device.seen()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_of_one_model_and_no_model_starves() {
    let server =
        TestServer::of_models(&["a", "b"], &[("batch.max_items", "4"), ("cache.max_items", "0")]).await;
    let [a, b] = [0, 1].map(|n| server.devices[n].clone());
    let (batches_a, batches_b) = (a.forwards().len(), b.forwards().len());
    a.hold();
    let flood = tokio::spawn({
        let mut client = server.client().await;
        let request = proto::ScoreRequest { models: names(&["a"]), ..request((0..120).map(|n| n % 100 + 1)) };
        async move { client.score(request).await }
    });
    a.occupied().await;
    let few = tokio::spawn({
        let mut client = server.client_from("127.0.0.2").await;
        let request = proto::ScoreRequest { models: names(&["b"]), ..request([201, 202]) };
        async move { client.score(request).await }
    });
    // Long enough for it to wait in line. Thirty batches of the first take six seconds.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    a.pace(std::time::Duration::from_millis(50));
    a.release();
    let answer = soon(few).await.unwrap().unwrap().into_inner();
    assert_eq!(outcomes(&answer), [Ok(201.0), Ok(202.0)]);
    let ahead = a.forwards().len() - batches_a;
    assert!(ahead <= 12, "{ahead} batches of the other model went first");
    assert_eq!(b.forwards().len() - batches_b, 1, "they went together");
    let answer = soon(flood).await.unwrap().unwrap().into_inner();
    let wanted: Vec<_> = (0..120).map(|n| Ok(f32::from(n % 100 + 1_u8))).collect();
    assert_eq!(outcomes(&answer), wanted);
}

#[test]
fn what_does_not_fit_is_refused_with_the_figures() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let model = |name: &str, case: &str| format!("--model={name}={fixtures}/{case}/checkpoint");
    let serve = |more: &[&str]| {
        let (a, b) = (model("a", "flat"), model("b", "mlp"));
        let all =
            [&["serve", "--listen=127.0.0.1:0", "--metrics-listen=", "--device=cpu", &a, &b], more].concat();
        run(&all)
    };
    let (code, _, said) = serve(&["--set=model.max_memory_bytes=100000"]);
    assert_eq!(code, 1);
    let said = said.lines().last().unwrap();
    assert!(
        said.contains("the models do not fit cpu: weights ") && said.contains("(a ") && said.contains(", b "),
        "{said}"
    );
    assert!(said.contains("model.max_memory_bytes allows 0.1 MiB"), "{said}");

    // Each fault of each model, at once.
    let (code, _, said) = run(&["serve", "--model=a=./none", &model("b", "mlp"), "--model=c=./nowhere"]);
    assert_eq!(code, 1);
    assert!(said.contains("the model \"a\": ") && said.contains("the model \"c\": "), "{said}");
    let (code, _, said) = run(&["serve", "--model=a=x", "--model=a=y", "--model=c=x,dtype=int8"]);
    assert_eq!(code, 64);
    assert!(
        said.contains("models[2].dtype = \"int8\"") && said.contains("another model has this name"),
        "{said}"
    );
    let (code, _, said) = run(&["serve", "--checkpoint=x", "--model=a=y"]);
    assert_eq!(code, 64);
    assert!(said.contains("model.checkpoint = \"x\" (from a flag): there are models beside it"), "{said}");
}

#[tokio::test]
async fn one_model_without_a_name_is_measured_as_ever() {
    let server = TestServer::start(&[]).await;
    let grown = growth();
    server.client().await.score(request([7])).await.unwrap();
    assert_eq!(grown("spatialscore_items_total{outcome=\"OK\"}"), 1.0);
    assert_eq!(grown("spatialscore_score_mean_count"), 1.0);
}

/// Sends JSON over HTTP; the status and the JSON of the answer.
async fn post(
    address: std::net::SocketAddr,
    path: &'static str,
    body: serde_json::Value,
) -> (u16, serde_json::Value) {
    let address = address.to_string();
    let sent =
        move || common::process::say(&address, &format!("POST {path} HTTP/1.1"), body.to_string().as_bytes());
    let answer = soon(tokio::task::spawn_blocking(sent)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}")))
}

fn sample(shade: u8, rewards: &[&str]) -> serde_json::Value {
    let file = base64(&common::png(shade));
    json!({"history": [{"text": common::PROMPT, "image_b64": file}], "required_rewards": rewards})
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn trainers_over_http_ask_for_models_by_reward_and_by_path() {
    let server = TestServer::of_models(&["a", "b"], &[]).await;
    let [a, b] = [0, 1].map(|n| server.devices[n].clone());
    let requests = json!({"requests": [
        sample(11, &["b", "a"]),
        sample(12, &["a"]),
        sample(13, &["b_stddev", "spatialscore", "b"]),
    ], "protocol_version": "1"});
    let (status, answer) = post(server.http, "/score", requests).await;
    assert_eq!(status, 200, "{answer}");
    let one = |name: &str, value: f64| json!({name: value});
    assert_eq!(
        answer["results"],
        json!([
            {"a": one("a", 11.0), "b": one("b", 11.0)},
            {"a": one("a", 12.0)},
            {"b": one("b", 13.0), "b_stddev": one("b_stddev", 0.5), "spatialscore": one("spatialscore", 13.0)},
        ])
    );
    assert_eq!(answer["errors"], json!([{}, {}, {}]));
    let versions: Vec<_> = answer["identities"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["scorer_version"].as_str().unwrap())
        .collect();
    assert_eq!(versions, ["none+none", "none", "none+none"]);
    // Who was not asked has not worked.
    assert!(!b.seen().contains(&12) && a.seen().contains(&12) && b.seen().contains(&11));

    let (status, answer) = post(server.http, "/score", json!({"requests": [sample(1, &["a", "c"])]})).await;
    assert_eq!(status, 400);
    let said = answer.to_string();
    assert!(said.contains("unknown reward \\\"c\\\"; there are a, a_stddev, b, b_stddev"), "{said}");

    let compute = |shade: u8| json!({"prompt": [common::PROMPT], "image": [base64(&common::png(shade))]});
    for (path, shade, on_a, on_b) in [
        ("/models/b/compute", 21, false, true),
        ("/models/a/compute", 22, true, false),
        ("/compute", 23, true, false),
        ("/evaluation/models/b/compute", 24, false, true),
    ] {
        assert_eq!(
            post(server.http, path, compute(shade)).await,
            (200, json!({"rewards": [f64::from(shade)]}))
        );
        assert_eq!((a.seen().contains(&shade), b.seen().contains(&shade)), (on_a, on_b), "{path}");
    }
    // Flow-Factory's client reads a reason of a 200 alone.
    let (status, answer) = post(server.http, "/models/c/compute", compute(9)).await;
    assert_eq!(status, 200);
    assert!(
        answer["error"].as_str().unwrap().contains("there is no model \"c\"; there are a, b"),
        "{answer}"
    );
    let address = server.http.to_string();
    let page = tokio::task::spawn_blocking(move || get(&address, "/rewards")).await.unwrap();
    assert!(page.ends_with(r#"{"rewards":["a","a_stddev","b","b_stddev"]}"#), "{page}");
}

#[test]
fn the_command_line_asks_models_by_name() {
    let server = Server::of_models(&["a=flat", "b=mlp"], &[]);
    let cases = ["flat", "mlp"].map(Case::open);
    let picture = cases[1].directory.join(&cases[1].items[0].image);
    let prompt = cases[1].items[0].prompt.clone();
    let score = |more: &[&str]| {
        let all =
            [&["score", "--server", &server.address, "--prompt", &prompt, picture.to_str().unwrap()], more];
        run(&all.concat())
    };
    let (code, out, said) = score(&["--model", "b", "--model", "a", "--format", "json"]);
    assert_eq!(code, 0, "{said}");
    let rows: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!([&rows[0]["model"], &rows[1]["model"]], ["b", "a"]);
    let mean = rows[0]["mean"].as_f64().unwrap();
    near(&proto::Score { mean: mean as f32, ..Default::default() }, &cases[1], 0);
    let (_, out, _) = score(&["--model", "b", "--model", "a", "--format", "csv"]);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines.len(), lines[0]), (3, "id,image,prompt,model,mean,stddev,error"));
    assert!(lines[1].contains(",b,") && lines[2].contains(",a,"), "{out}");
    let (_, out, _) = score(&["--model", "b", "--format", "csv"]);
    assert!(out.starts_with("id,image,prompt,mean,stddev,error\n") && out.lines().count() == 2, "{out}");
    let (_, out, _) = score(&["--model", "b", "--model", "a"]);
    assert!(out.contains("IMAGE  MODEL") && out.lines().any(|line| line.ends_with("  a")), "{out}");
    let (code, _, said) = score(&["--model", "c"]);
    assert_eq!(code, 1);
    assert!(said.contains("there is no model \"c\"; there are a, b"), "{said}");
}

#[test]
fn pictures_are_decoded_once_for_all_models() {
    let open = |case: &str| {
        let files = CheckpointFiles::open(&Case::open(case).checkpoint(), None, None).unwrap();
        let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
        Processor::load(&files, &reward, ProcessorLimits::NONE).unwrap()
    };
    let (one, other) = (open("flat"), open("qwen3"));
    let draft = |processor: &Processor, shade: u8| {
        processor.admit("a", Picture::Encoded(common::png(shade).into())).unwrap()
    };
    let alone = |processor: &Processor, shade| processor.prepare(draft(processor, shade)).unwrap();
    let mut decoded = Decoded::default();
    assert_eq!(one.prepare_with(draft(&one, 50), Some(&mut decoded)).unwrap().pictures[0].pixels[0], 50);
    // Another picture of this size would be taken for the first: nothing is decoded again.
    let second = other.prepare_with(draft(&other, 60), Some(&mut decoded)).unwrap();
    assert_eq!(second.pictures[0].pixels[0], 50);
    // Each model has it in its own size.
    assert_eq!(second.pictures[0].rows, alone(&other, 50).pictures[0].rows);
    // What is broken is broken for each.
    let broken = |processor: &Processor| {
        let mut file = common::png(1);
        file.truncate(file.len() - 30);
        processor.admit("a", Picture::Encoded(file.into())).unwrap()
    };
    let mut decoded = Decoded::default();
    let said = [&one, &other].map(|p| p.prepare_with(broken(p), Some(&mut decoded)).unwrap_err().to_string());
    assert!(said[0].starts_with("image.encoded: ") && said[0] == said[1], "{said:?}");
}
