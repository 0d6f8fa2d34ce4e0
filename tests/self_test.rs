//! The self-test at load: scores that do not differ are said loudly wherever they are, and a model without finite scores
//! serves nobody.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use std::fs;
use std::path::Path;

use common::process::{Server, get, run};
use golden::Case;
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::Value;
use spatialscore::edge::proto::GetModelRequest;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tempfile::TempDir;

/// What the first words of a constant reward's notice are.
const ALIKE: &str = "EVERY SCORE IS ";
/// And of a reward that does not see.
const BLIND: &str = "THE PICTURE DOES NOT MATTER";

/// The case `mlp`, a head of three layers in fp32, with these tensors' numbers replaced where `edit` says so.
fn changed(edit: impl Fn(&str, usize, f32) -> f32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(Case::open("mlp").checkpoint()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let path = directory.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let numbers: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, view)| {
            let numbers = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            let edited = numbers.enumerate().flat_map(|(n, old)| edit(name, n, old).to_le_bytes()).collect();
            (name.to_owned(), view.shape().to_vec(), edited)
        })
        .collect();
    let views = numbers.iter().map(|(name, shape, data)| {
        (name.clone(), TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    directory
}

fn serving(checkpoint: &Path) -> Server {
    Server::start_with(&[&format!("--set=model.checkpoint={}", checkpoint.display())])
}

/// The notice of the model that a server has, and the metric.
async fn notice(checkpoint: &Path) -> (String, String, String) {
    let mut server = serving(checkpoint);
    server.logged("serving", "model");
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let notice = client.get_model(GetModelRequest::default()).await.unwrap().into_inner().notice;
    let page = get(server.metrics_address(), "/metrics");
    let metric =
        page.lines().find(|line| line.starts_with("spatialscore_constant_scores ")).unwrap().to_owned();
    (notice, metric, std::mem::take(&mut server.lines))
}

fn inspect(checkpoint: &Path) -> (i32, Value) {
    let (code, out, said) = run(&["inspect", checkpoint.to_str().unwrap(), "--json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {said}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_that_do_not_differ_are_said_everywhere() {
    // A last layer of zeros; a norm of zeros, behind which no layer of the head sees anything; and a vision tower that
    // gives the same for every picture.
    for (zero, words) in
        [("rm_head.5.weight", ALIKE), ("model.norm.weight", ALIKE), ("visual.merger.mlp.2.weight", BLIND)]
    {
        let broken = changed(|name, _, old| if name == zero { 0.0 } else { old });
        let (said, metric, log) = notice(broken.path()).await;
        assert!(said.starts_with(words), "{zero}: {said:?}");
        assert_eq!(metric, "spatialscore_constant_scores 1");
        assert!(log.lines().any(|line| line.contains(words) && line.contains("ERROR")), "{log}");
        let (code, report) = inspect(broken.path());
        assert_eq!(code, 0);
        assert!(report["self_test"].as_str().unwrap().starts_with(words), "{report}");
        let (_, text, _) = run(&["inspect", broken.path().to_str().unwrap()]);
        assert!(text.contains(&format!("SELF-TEST     {words}")), "{text}");
        let (_, text, _) = run(&["inspect", broken.path().to_str().unwrap(), "--headers-only"]);
        assert!(!text.contains("SELF-TEST"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_sound_model_nothing_is_said() {
    let sound = changed(|_, _, old| old);
    let (said, metric, log) = notice(sound.path()).await;
    assert_eq!((said.as_str(), metric.as_str()), ("", "spatialscore_constant_scores 0"));
    assert!(!log.contains("self-test"), "{log}");
    let (code, report) = inspect(sound.path());
    assert_eq!((code, &report["self_test"]), (0, &Value::Null));
}

#[test]
fn a_model_without_finite_scores_serves_nobody() {
    // A log of the standard deviation whose exponential is infinite, and a mean that is.
    for (column, number) in [(1, 100.0), (0, f32::MAX)] {
        let broken = changed(|name, n, old| match name {
            "rm_head.5.bias" if n == column => number,
            "rm_head.5.weight" if column == 0 => f32::MAX,
            _ => old,
        });
        let (code, log) = serving(broken.path()).end();
        assert_eq!(code, Some(1));
        assert!(log.contains("score is not finite: mean "), "{log}");
        let (code, report) = inspect(broken.path());
        assert_eq!(code, 1);
        assert!(report["faults"][0].as_str().unwrap().contains("score is not finite: mean "), "{report}");
    }
}

#[test]
fn a_token_that_the_model_has_no_row_for_is_named_at_load() {
    // As where the reward's token was added to the tokenizer and the table was never resized.
    let broken = changed(|_, _, old| old);
    let path = broken.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let views = tensors.iter().map(|(name, view)| {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data());
        if name.ends_with("embed_tokens.weight") {
            shape[0] -= 1;
            data = &data[..data.len() - shape[1] * 4];
        }
        (name.to_owned(), TensorView::new(view.dtype(), shape, data).unwrap())
    });
    let written = safetensors::serialize(views, None).unwrap();
    fs::write(&path, written).unwrap();
    let (code, report) = inspect(broken.path());
    assert_eq!(code, 1);
    let fault = report["faults"][0].as_str().unwrap();
    assert!(fault.contains("<|Reward|>") && fault.contains("a row for every token"), "{fault}");
    let (code, log) = serving(broken.path()).end();
    assert_eq!(code, Some(1));
    assert!(log.contains("a row for every token"), "{log}");
}
