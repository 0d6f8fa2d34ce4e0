//! Models that come and go while a server serves: nothing is lost, and nothing is judged by half.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::process::{Server, get, run};
use common::{encoded, item};
use golden::Case;
use spatialscore::edge::proto;
use spatialscore::edge::proto::admin_service_client::AdminServiceClient;
use spatialscore::edge::proto::health::HealthCheckRequest;
use spatialscore::edge::proto::health::health_client::HealthClient;
use spatialscore::edge::proto::score_result::Outcome;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Request};

type Client = SpatialScoreServiceClient<Channel>;

fn checkpoint(case: &str) -> String {
    Case::open(case).checkpoint()
}

/// A server of these models with an address for its keepers, and that address.
fn kept(models: &[&str], more: &[&str]) -> (Server, String) {
    let arguments = [&["--admin=127.0.0.1:0", "--set=cache.max_items=0"], more].concat();
    let server = Server::of_models(models, &arguments);
    let logged = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).ok()?["admin"].as_str().map(str::to_owned)
    };
    let admin = server.lines.lines().find_map(logged).expect("it listens");
    (server, admin)
}

fn admin(address: &str, order: &[&str]) -> (i32, String, String) {
    run(&[&["admin", "--server", address], order].concat())
}

#[track_caller]
fn done(address: &str, order: &[&str]) -> String {
    let (code, out, said) = admin(address, order);
    assert_eq!(code, 0, "{order:?}: {said}");
    out
}

#[track_caller]
fn refused(address: &str, order: &[&str], words: &str) {
    let (code, _, said) = admin(address, order);
    assert!(code == 1 && said.contains(words), "{order:?}: {code} {said}");
}

/// The state of a model, as `list` has it.
fn state(address: &str, name: &str) -> String {
    let models = done(address, &["list", "--json"]);
    let models = models.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let state = models.into_iter().find(|model| model["name"] == name).map(|model| model["state"].clone());
    state.map_or("none".into(), |state| state.as_str().unwrap().to_owned())
}

async fn client(server: &Server) -> Client {
    SpatialScoreServiceClient::connect(server.url()).await.unwrap()
}

/// All items of a case that a model of one picture reads, asked of this model.
fn items(case: &Case, model: &str) -> proto::ScoreRequest {
    let item = |n: usize| proto::ScoreItem {
        prompt: Some(case.items[n].prompt.clone()),
        ..item(encoded(case.items[n].files(&case.directory).pop().unwrap()))
    };
    let items = (0..case.items.len()).map(item).collect();
    proto::ScoreRequest { items, models: vec![model.into()], wants_receipts: true, ..Default::default() }
}

fn means(response: &proto::ScoreResponse) -> Vec<f32> {
    let mean = |result: &proto::ScoreResult| match &result.outcome {
        Some(Outcome::Score(score)) => score.mean,
        other => panic!("{other:?}"),
    };
    response.results.iter().map(mean).collect()
}

async fn serves(server: &Server) -> bool {
    let mut health = HealthClient::connect(server.url()).await.unwrap();
    let request = HealthCheckRequest { service: String::new() };
    health.check(request).await.unwrap().into_inner().status == 1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_replaced_under_load_and_each_call_is_answered_whole_by_one() {
    let (server, address) = kept(&["m=flat"], &[]);
    let case = Case::open("flat");
    let mut first = client(&server).await;
    // What each of the two makes of the items, by its revision.
    let mut table: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for other in ["mlp", "flat"] {
        done(&address, &["load", &format!("{other}={}", checkpoint(other))]);
        let answer = first.score(items(&case, other)).await.unwrap().into_inner();
        table.insert(answer.receipts[0].revision.clone(), means(&answer));
        done(&address, &["unload", other]);
    }
    for (n, mean) in table.values().flatten().enumerate() {
        assert!(table.values().flatten().skip(n + 1).all(|other| (other - mean).abs() > 1e-3), "{table:?}");
    }
    let golden: Vec<f32> = (0..case.items.len()).map(|n| case.score(n, "mean").unwrap()).collect();
    let near = |one: &[f32], other: &[f32]| {
        one.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(0.1))
    };
    assert!(table.values().any(|means| near(means, &golden)));

    let (over, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let table = Arc::new(table);
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (over, calls, table, request) =
                (Arc::clone(&over), Arc::clone(&calls), Arc::clone(&table), items(&case, "m"));
            let mut client = first.clone();
            tokio::spawn(async move {
                let mut seen = BTreeMap::new();
                while !over.load(Ordering::SeqCst) {
                    let answer = client.score(request.clone()).await.unwrap().into_inner();
                    let by = answer.receipts[0].revision.clone();
                    let (got, wanted) = (means(&answer), &table[&by]);
                    assert!(near(&got, wanted), "{by}: {got:?} is not {wanted:?}");
                    *seen.entry(by).or_insert(0) += 1;
                    calls.fetch_add(1, Ordering::SeqCst);
                }
                seen
            })
        })
        .collect();
    let turns = tokio::task::spawn_blocking({
        let (address, calls) = (address.clone(), Arc::clone(&calls));
        move || {
            for case in ["mlp", "flat", "mlp", "flat"] {
                let before = calls.load(Ordering::SeqCst);
                while calls.load(Ordering::SeqCst) < before + 16 {
                    std::thread::sleep(Duration::from_millis(5));
                }
                done(&address, &["replace", &format!("m={}", checkpoint(case))]);
            }
        }
    });
    tokio::time::timeout(Duration::from_secs(240), turns).await.unwrap().unwrap();
    over.store(true, Ordering::SeqCst);
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for caller in callers {
        for (revision, count) in caller.await.unwrap() {
            *seen.entry(revision).or_default() += count;
        }
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
    // No worker was lost, and no item failed.
    let page = get(server.metrics_address(), "/metrics");
    let bad =
        page.lines().filter(|line| line.starts_with("spatialscore_items_total{") && !line.contains("\"OK\""));
    assert_eq!(bad.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_loaded_leaves_what_was_there() {
    let (server, address) = kept(&["a=flat"], &[]);
    let case = Case::open("flat");
    let mut client = client(&server).await;
    let before = client.score(items(&case, "a")).await.unwrap().into_inner();
    refused(
        &address,
        &["replace", "a=./none"],
        "FAILED_PRECONDITION: the checkpoint cannot be served: no checkpoint",
    );
    refused(&address, &["load", "b=./none"], "FAILED_PRECONDITION");
    refused(&address, &["load", &format!("a={}", checkpoint("mlp"))], "ALREADY_EXISTS");
    refused(&address, &["replace", &format!("b={}", checkpoint("mlp"))], "NOT_FOUND");
    refused(&address, &["load", &format!("b={},device=cuda:7", checkpoint("mlp"))], "cuda:7");
    refused(
        &address,
        &["load", &format!("b/={}", checkpoint("mlp"))],
        "INVALID_ARGUMENT: model.name = \"b/\"",
    );
    refused(&address, &["unload", "a"], "INVALID_ARGUMENT: \"a\" is the default model");
    for order in ["unload", "sleep", "wake"] {
        refused(&address, &[order, "c"], "NOT_FOUND: there is no model \"c\"");
    }
    // Weights that give no finite score pass no self-test.
    let broken = tempfile::tempdir().unwrap();
    copy(&checkpoint("flat"), broken.path());
    let path = broken.path().join("model.safetensors");
    let mut weights = fs::read(&path).unwrap();
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, weights).unwrap();
    refused(&address, &["replace", &format!("a={}", broken.path().display())], "FAILED_PRECONDITION");

    assert_eq!(done(&address, &["list"]).lines().count(), 1);
    let after = client.score(items(&case, "a")).await.unwrap().into_inner();
    same(&before, &after);
    assert!(serves(&server).await);
}

/// The same scores, as near as they are in other batches, by the same judges.
#[track_caller]
fn same(before: &proto::ScoreResponse, after: &proto::ScoreResponse) {
    let (was, now) = (means(before), means(after));
    assert!(was.iter().zip(&now).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(0.1)), "{was:?} {now:?}");
    assert_eq!(before.receipts, after.receipts);
}

fn copy(from: &str, to: &std::path::Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_sleeps_and_wakes_as_it_was() {
    let (server, address) = kept(&["a=flat", "b=mlp"], &[]);
    let case = Case::open("mlp");
    let mut client = client(&server).await;
    let before = client.score(items(&case, "b")).await.unwrap().into_inner();
    let asleep = Instant::now();
    done(&address, &["sleep", "b"]);
    assert!(asleep.elapsed() < Duration::from_secs(10));
    assert_eq!(state(&address, "b"), "asleep");
    let model = client.get_model(proto::GetModelRequest { name: "b".into() }).await.unwrap().into_inner();
    assert_eq!(model.state(), proto::ModelState::Asleep);
    let status = client.score(items(&case, "b")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the model \"b\" is asleep"));
    // All of its models or none.
    let both = proto::ScoreRequest { models: vec!["a".into(), "b".into()], ..items(&case, "b") };
    assert_eq!(client.score(both.clone()).await.unwrap_err().code(), Code::Unavailable);
    client.score(items(&case, "a")).await.unwrap();
    assert!(serves(&server).await);

    done(&address, &["wake", "b"]);
    let after = client.score(items(&case, "b")).await.unwrap().into_inner();
    same(&before, &after);
    client.score(both).await.unwrap();
    // Both orders may be given twice.
    done(&address, &["wake", "b"]);
    done(&address, &["sleep", "a"]);
    done(&address, &["sleep", "a"]);
    // The default one sleeps too, and nobody has another's scores for it.
    let none = proto::ScoreRequest { models: Vec::new(), ..items(&case, "a") };
    assert_eq!(client.score(none).await.unwrap_err().message(), "the model \"a\" is asleep");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_what_it_was_does_not_wake() {
    let folder = tempfile::tempdir().unwrap();
    copy(&checkpoint("mlp"), folder.path());
    let (server, address) = kept(&["a=flat"], &[]);
    let model = format!("b={}", folder.path().display());
    done(&address, &["load", &model]);
    let case = Case::open("mlp");
    let mut client = client(&server).await;
    client.score(items(&case, "b")).await.unwrap();
    done(&address, &["sleep", "b"]);
    // Another head under the same name.
    let path = folder.path().join("model.safetensors");
    let was = fs::read(&path).unwrap();
    let mut weights = was.clone();
    let end = weights.len();
    weights[end - 3] ^= 1;
    fs::write(&path, &weights).unwrap();
    refused(&address, &["wake", "b"], "the files of \"b\" are sha256:");
    assert_eq!(state(&address, "b"), "failed");
    let status = client.score(items(&case, "b")).await.unwrap_err();
    assert!(status.code() == Code::Unavailable && status.message().contains("out of service"), "{status:?}");
    assert!(!serves(&server).await, "health says so");
    client.score(items(&case, "a")).await.unwrap();
    // As it was, or replaced by what it is now.
    fs::write(&path, &was).unwrap();
    done(&address, &["wake", "b"]);
    assert!(serves(&server).await);
    fs::write(&path, &weights).unwrap();
    done(&address, &["replace", &model]);
    client.score(items(&case, "b")).await.unwrap();
    // What cannot be told for what it was does not wake either; and where nothing can be read, it sleeps on.
    done(&address, &["sleep", "b"]);
    fs::remove_file(&path).unwrap();
    refused(&address, &["wake", "b"], "FAILED_PRECONDITION");
    assert_eq!(state(&address, "b"), "failed");
    done(&address, &["sleep", "b"]);
    fs::remove_dir_all(folder.path()).unwrap();
    refused(&address, &["wake", "b"], "FAILED_PRECONDITION: the checkpoint cannot be served: no checkpoint");
    assert_eq!(state(&address, "b"), "asleep");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_wakes_a_model_where_it_may() {
    let (server, address) = kept(&["a=flat", "b=mlp"], &["--set=admin.wake_on_call=true"]);
    let case = Case::open("mlp");
    let mut client = client(&server).await;
    let before = client.score(items(&case, "b")).await.unwrap().into_inner();
    done(&address, &["sleep", "b"]);
    let several: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, request) = (client.clone(), items(&case, "b"));
            tokio::spawn(async move { client.score(request).await.unwrap().into_inner() })
        })
        .collect();
    for call in several {
        same(&before, &call.await.unwrap());
    }
    assert_eq!(state(&address, "b"), "serving");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_its_keepers_may_and_only_at_their_address() {
    let folder = tempfile::tempdir().unwrap();
    let (keepers, callers) = (folder.path().join("keepers"), folder.path().join("callers"));
    let (keeper, caller) = ("k".repeat(40), "c".repeat(40));
    fs::write(&keepers, format!("keeper:{keeper}\n")).unwrap();
    fs::write(&callers, format!("caller:{caller}\n")).unwrap();
    let files = [
        format!("--set=admin.tokens_file={}", keepers.display()),
        format!("--tokens-file={}", callers.display()),
    ];
    let (server, address) = kept(&["a=flat", "b=mlp"], &[&files[0], &files[1]]);
    refused(&address, &["sleep", "b"], "UNAUTHENTICATED");
    refused(&address, &["--token-file", callers.to_str().unwrap(), "sleep", "b"], "UNAUTHENTICATED");
    done(&address, &["--token-file", keepers.to_str().unwrap(), "sleep", "b"]);

    let mut elsewhere = AdminServiceClient::connect(server.url()).await.unwrap();
    for token in [&keeper, &caller] {
        let mut request = Request::new(proto::DescribeModelsRequest {});
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let status = elsewhere.describe_models(request).await.unwrap_err();
        assert!(matches!(status.code(), Code::Unauthenticated | Code::Unimplemented), "{status:?}");
    }
    let mut client = SpatialScoreServiceClient::connect(format!("http://{address}")).await.unwrap();
    let mut request = Request::new(proto::GetModelRequest::default());
    request.metadata_mut().insert("authorization", format!("Bearer {keeper}").parse().unwrap());
    assert_eq!(client.get_model(request).await.unwrap_err().code(), Code::Unimplemented);
    let (code, _, said) = run(&["serve", "--admin=0.0.0.0:0"]);
    assert!(code == 64 && said.contains("admin.listen = \"0.0.0.0:0\""), "{said}");
}
