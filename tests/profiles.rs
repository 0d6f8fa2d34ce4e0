//! Profiles that ship, held against references written with transformers alone (`tests/reference/make_profiles.py`).
//!
//! `SPATIALSCORE_FIXTURES` names another folder of fixtures than `tests/fixtures`. With `--nocapture` each test prints the
//! worst difference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use spatialscore::model::profile::{self, RewardConfig};
use spatialscore::model::{RewardModel, Sample, Score, Scorer};
use spatialscore::processor::{Item, Picture, Processor, ProcessorLimits, Question};
use tch::{Device, Kind};
use tempfile::NamedTempFile;

/// How far a number may be from the reference's.
const TOLERANCE: f64 = 1e-4;
/// How far it may be from its own in another batch.
const ROUNDING: f64 = 1e-5;

fn fixtures() -> PathBuf {
    std::env::var_os("SPATIALSCORE_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
        .join("profiles")
}

fn read(file: &str) -> Value {
    serde_json::from_slice(&fs::read(fixtures().join(file)).unwrap()).unwrap()
}

/// A profile that ships, with `changes` to it.
fn changed(name: &str, changes: &[(&str, Value)]) -> NamedTempFile {
    let mut profile: Value = serde_json::from_slice(profile::shipped(name).unwrap().1).unwrap();
    for (key, value) in changes {
        profile[*key] = value.clone();
    }
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), profile.to_string()).unwrap();
    file
}

/// A profile that ships, with a base that lies here.
fn on_base(name: &str, base: &Value) -> NamedTempFile {
    changed(name, &[("base", json!(fixtures().join(base.as_str().unwrap())))])
}

struct Model {
    processor: Processor,
    model: RewardModel,
}

impl Model {
    fn open(checkpoint: &str, profile: &str) -> Self {
        let folder = fixtures().join(checkpoint);
        let files = profile::open(folder.to_str().unwrap(), None, Some(profile)).unwrap();
        let reward = RewardConfig::load(&files).unwrap();
        let processor = Processor::load(&files, &reward, ProcessorLimits::NONE).unwrap();
        let model = RewardModel::load(&files, processor.reading(), Device::Cpu, Kind::Float).unwrap();
        Self { processor, model }
    }

    fn sample(&self, item: Item) -> Sample {
        self.processor.prepare(self.processor.admit_item(item).unwrap()).unwrap()
    }

    /// The scores of items, each alone, which are the same in one batch.
    fn scores(&mut self, items: Vec<Item>, scale: Scale) -> Vec<Score> {
        let samples: Vec<Sample> = items.into_iter().map(|item| self.sample(item)).collect();
        let alone: Vec<Score> =
            samples.iter().flat_map(|sample| self.model.score(&[sample]).unwrap()).collect();
        let together = self.model.score(&samples.iter().collect::<Vec<_>>()).unwrap();
        for (alone, together) in alone.iter().zip(&together) {
            same(together.mean, alone.mean, scale);
            assert_eq!(alone.components.len(), together.components.len());
            for (alone, together) in alone.components.iter().zip(&together.components) {
                same(together.mean, alone.mean, scale);
            }
        }
        alone
    }
}

thread_local! {
    /// The worst difference to the reference so far.
    static WORST: Cell<f64> = const { Cell::new(0.0) };
}

fn tell(test: &str) {
    println!("{test}: worst {:.1e} of the reference", WORST.get());
}

/// What the difference of two numbers is measured by.
type Scale = fn(f64) -> f64;

fn of_number(wanted: f64) -> f64 {
    wanted.abs().max(0.1)
}

/// A probability is as near as its logarithm is, which is a difference of logits.
fn of_share(wanted: f64) -> f64 {
    wanted * wanted.ln().abs().max(1.0)
}

/// The logarithm of odds is a difference, and near nought no nearer than what it is the difference of.
fn of_odds(wanted: f64) -> f64 {
    wanted.abs().max(1.0)
}

#[track_caller]
fn same(together: f32, alone: f32, scale: Scale) {
    let (together, alone) = (f64::from(together), f64::from(alone));
    assert!((together - alone).abs() <= ROUNDING * scale(alone), "{together} is not {alone}");
}

#[track_caller]
fn near_number(got: f32, wanted: &Value) {
    near_reference(got, wanted, of_number);
}

#[track_caller]
fn near_share(got: f32, wanted: &Value) {
    near_reference(got, wanted, of_share);
}

#[track_caller]
fn near_reference(got: f32, wanted: &Value, scale: Scale) {
    let wanted = wanted.as_f64().unwrap();
    let off = (f64::from(got) - wanted).abs() / scale(wanted);
    assert!(off <= TOLERANCE, "{got} is not {wanted}");
    WORST.set(WORST.get().max(off));
}

fn pictures(item: &Value) -> Vec<Picture> {
    let read =
        |path: &Value| Picture::Encoded(fs::read(fixtures().join(path.as_str().unwrap())).unwrap().into());
    item["pictures"].as_array().unwrap().iter().map(read).collect()
}

fn item(item: &Value) -> Item {
    Item { prompt: item["prompt"].as_str().unwrap().into(), pictures: pictures(item), questions: Vec::new() }
}

fn items(file: &Value) -> Vec<&Value> {
    file["items"].as_array().unwrap().iter().collect()
}

#[test]
fn hpsv3_scores_as_its_reference_from_one_file_on_its_base() {
    let file = read("hpsv3.json");
    let profile = on_base("hpsv3", &file["base"]);
    let mut model = Model::open("hpsv3", profile.path().to_str().unwrap());
    let items = items(&file);
    for wanted in &items {
        assert_eq!(
            model.sample(item(wanted)).tokens() as u64,
            wanted["tokens"].as_u64().unwrap(),
            "{wanted}"
        );
    }
    let scores = model.scores(items.iter().map(|wanted| item(wanted)).collect(), of_number);
    for (score, wanted) in scores.iter().zip(&items) {
        near_number(score.mean, &wanted["mean"]);
        near_number(score.stddev.unwrap(), &wanted["sigma"]);
        assert!(score.components.is_empty());
    }
    tell("hpsv3");
}

#[test]
fn editreward_reads_two_pictures_twice_and_fuses() {
    for (checkpoint, profiles) in [
        ("editreward", &[("editreward", "mean"), ("editreward-min", "min"), ("editreward-sum", "sum")][..]),
        ("editreward_shared", &[("editreward-shared", "mean")]),
    ] {
        let file = read(&format!("{checkpoint}.json"));
        let items = items(&file);
        for (name, fusion) in profiles {
            let profile = on_base(name, &file["base"]);
            let mut model = Model::open(checkpoint, profile.path().to_str().unwrap());
            let scores = model.scores(items.iter().map(|wanted| item(wanted)).collect(), of_number);
            for (score, wanted) in scores.iter().zip(&items) {
                near_number(score.mean, &wanted["fused"][fusion]["mean"]);
                near_number(score.stddev.unwrap(), &wanted["fused"][fusion]["sigma"]);
                let components = wanted["components"].as_array().unwrap();
                assert_eq!(score.components.len(), components.len());
                for (part, wanted) in score.components.iter().zip(components) {
                    near_number(part.mean, &wanted["mean"]);
                    near_number(part.stddev.unwrap(), &wanted["sigma"]);
                }
            }
        }
    }
    tell("editreward");
}

#[test]
fn answers_have_the_reference_s_probability_in_every_family() {
    let cases = read("probabilities.json");
    for case in cases.as_array().unwrap() {
        let base = case["base"].as_str().unwrap();
        let answers = match &case["negative"] {
            Value::Null => case["answers"].clone(),
            negative => json!({"positive": case["answers"], "negative": negative}),
        };
        let mut changes = vec![("instruction", case["text"].clone()), ("answers", answers)];
        if case["penalty"] != json!(1.0) {
            changes.push(("repetition_penalty", case["penalty"].clone()));
        }
        let items = items(case);
        for (name, scale, rounding) in
            [("probability", of_share as Scale, of_share as Scale), ("logit", of_number, of_odds)]
        {
            let changes = [&changes[..], &[("scale", json!(name))]].concat();
            let profile = changed("vqascore-geneval2", &changes);
            let mut model = Model::open(base, profile.path().to_str().unwrap());
            let scores = model.scores(items.iter().map(|wanted| item(wanted)).collect(), rounding);
            for (score, wanted) in scores.iter().zip(&items) {
                near_reference(score.mean, &wanted[name], scale);
                assert_eq!(score.stddev, None);
            }
        }
    }
    tell("answers");
}

#[test]
fn questions_are_answered_as_if_asked_alone() {
    let cases = read("soft_tifa.json");
    for case in cases.as_array().unwrap() {
        for (name, average) in [("soft-tifa", "arithmetic"), ("soft-tifa-geometric", "geometric")] {
            let profile = changed(name, &[("instruction", case["text"].clone())]);
            let mut model = Model::open(case["base"].as_str().unwrap(), profile.path().to_str().unwrap());
            let wanted = items(case);
            let item = |wanted: &&Value| Item {
                prompt: Arc::from(""),
                pictures: pictures(wanted),
                questions: wanted["questions"].as_array().unwrap().iter().map(question).collect(),
            };
            let scores = model.scores(wanted.iter().map(item).collect(), of_share);
            for (score, wanted) in scores.iter().zip(&wanted) {
                near_share(score.mean, &wanted[average]);
                let questions = wanted["questions"].as_array().unwrap();
                assert_eq!(score.components.len(), questions.len());
                for (part, wanted) in score.components.iter().zip(questions) {
                    near_share(part.mean, &wanted["probability"]);
                }
            }
        }
    }
    tell("questions");
}

fn question(wanted: &Value) -> Question {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    Question {
        text: text(&wanted["question"]),
        answers: wanted["answers"].as_array().unwrap().iter().map(text).collect(),
    }
}

#[test]
fn every_profile_that_ships_is_one() {
    let names: Vec<&str> = profile::names().collect();
    assert!(names.len() >= 8, "{names:?}");
    for name in names {
        let text = profile::shipped(name).unwrap().1;
        let config: RewardConfig = serde_json::from_slice(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        config.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(config.source.is_some(), "{name} does not say where it is from");
    }
}

/// A repository in the hub's cache, as `hf-hub` and `huggingface_hub` leave it.
fn cached(hub: &Path, id: &str, files: &[(&str, PathBuf)]) {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repository = hub.join(format!("hub/models--{}", id.replace('/', "--")));
    let snapshot = repository.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), commit).unwrap();
    for (name, file) in files {
        fs::copy(file, snapshot.join(name)).unwrap();
    }
}

/// HPSv3 by its id alone: one file of weights, known by its tensors, on the settings of a base whose weights are not there.
#[test]
fn a_base_on_the_hub_is_taken_from_the_cache_without_its_weights() {
    let hub = tempfile::tempdir().unwrap();
    let base = fixtures().join("bases/qwen2_vl");
    let settings = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"];
    let settings: Vec<(&str, PathBuf)> =
        settings.into_iter().chain(["chat_template.json"]).map(|name| (name, base.join(name))).collect();
    cached(
        hub.path(),
        "MizzenAI/HPSv3",
        &[("HPSv3.safetensors", fixtures().join("hpsv3/HPSv3.safetensors"))],
    );
    let inspect = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
        command.args(["inspect", "MizzenAI/HPSv3", "--json"]);
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", hub.path()).env_remove("HF_ENDPOINT");
        command.output().unwrap()
    };
    let without = inspect();
    assert!(!without.status.success());
    let said = String::from_utf8_lossy(&without.stderr).into_owned();
    assert!(said.contains("base: Qwen/Qwen2-VL-7B-Instruct@main"), "{said}");

    cached(hub.path(), "Qwen/Qwen2-VL-7B-Instruct", &settings);
    let found = inspect();
    let report = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(found.status.success(), "{report}{}", String::from_utf8_lossy(&found.stderr));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["profile"], "hpsv3");
    assert!(report["profile_reason"].as_str().unwrap().contains("tensors"), "{report}");
    assert_eq!(report["output"], "gaussian");
}

/// What a picture's questions share is computed once: it costs the tokens of their ends.
#[test]
fn questions_cost_their_ends_alone() {
    let profile = changed("soft-tifa", &[]);
    let model = Model::open("bases/qwen2_5_vl", profile.path().to_str().unwrap());
    let picture = || Picture::Raw { width: 448, height: 448, rgb8: vec![90; 3 * 448 * 448].into() };
    let cost = |count: usize| {
        let question = |n| Question { text: format!("Is there a cup number {n}?"), answers: Vec::new() };
        let questions = (0..count).map(question).collect();
        model.sample(Item { prompt: Arc::from(""), pictures: vec![picture()], questions }).tokens()
    };
    let (one, seven) = (cost(1), cost(7));
    assert!(seven < 2 * one, "{seven} tokens for seven questions, {one} for one");
}
