//! Every change of a configuration or of a head's keys: the reference's score, or a refusal that says what would be
//! right. `tests/reference/configurations.py` makes the list, with the reference's scores.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use golden::{Case, fixtures};
use safetensors::tensor::{SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::{Map, Value};
use spatialscore::model::checkpoint::{CheckpointFiles, python_json};
use spatialscore::model::profile::RewardConfig;
use spatialscore::model::{Blueprint, RewardModel, Scorer};
use spatialscore::processor::{Picture, Processor, ProcessorLimits};
use tch::{Device, Kind};

/// How far a score may be from the reference's, as a share of it, or of this where it is nearer to zero.
const BOUND: f32 = 1e-4;
const NEAR_ZERO: f32 = 0.3;

#[derive(Deserialize)]
struct Change {
    case: String,
    item: usize,
    edits: Vec<Edit>,
    renames: BTreeMap<String, String>,
    score: Option<f32>,
    refused: Option<String>,
}

#[derive(Deserialize)]
struct Edit {
    file: String,
    at: String,
    #[serde(default, deserialize_with = "present")]
    value: Option<Value>,
}

/// Null is a value here, and absence is none.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

fn changes() -> Vec<Change> {
    serde_json::from_slice(&fs::read(fixtures().join("configurations.json")).unwrap()).unwrap()
}

impl Edit {
    fn apply(&self, directory: &Path) {
        let path = directory.join(&self.file);
        let mut json = match fs::read(&path) {
            Ok(bytes) => python_json::parse(&bytes).unwrap(),
            Err(_) => Value::Object(Map::new()),
        };
        let (place, key) = self.at.rsplit_once('/').unwrap();
        let place = json.pointer_mut(place).unwrap().as_object_mut().unwrap();
        match &self.value {
            Some(value) => place.insert(key.to_owned(), value.clone()),
            None => place.remove(key),
        };
        // As Python writes them.
        let bare = ["-Infinity", "Infinity", "NaN"].iter().fold(json.to_string(), |text, word| {
            text.replace(&format!("{{\"__float__\":\"{word}\"}}"), word)
        });
        fs::write(path, bare).unwrap();
    }
}

fn rename(path: &Path, renames: &BTreeMap<String, String>) {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let name = |key: &str| {
        let renamed = renames
            .iter()
            .find_map(|(old, new)| Some(format!("{new}.{}", key.strip_prefix(old)?.strip_prefix('.')?)));
        renamed.unwrap_or_else(|| key.to_owned())
    };
    let views: Vec<(String, TensorView)> = tensors.iter().map(|(key, view)| (name(key), view)).collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The score of an item by the changed checkpoint, or why there is none.
fn score(change: &Change) -> Result<f32, String> {
    let case = Case::open(&change.case);
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(case.checkpoint()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    change.edits.iter().for_each(|edit| edit.apply(directory.path()));
    if !change.renames.is_empty() {
        rename(&directory.path().join("model.safetensors"), &change.renames);
    }
    let item = &case.items[change.item];
    let picture = Picture::Encoded(fs::read(case.directory.join(&item.image)).unwrap().into());
    let load = || {
        let files = CheckpointFiles::open(directory.path().to_str().unwrap(), None, None)?;
        let blueprint = Blueprint::open(&files, Device::Cpu, Kind::Float)?;
        let reward: RewardConfig = files.require_json("reward_config.json")?;
        let processor = Processor::load(&files, &reward, ProcessorLimits::NONE)?
            .with_vocabulary(blueprint.vocabulary())?;
        let model = RewardModel::build(blueprint, processor.normalisation())?;
        Ok((processor, model))
    };
    let (processor, mut model) =
        load().map_err(|error: spatialscore::model::checkpoint::CheckpointError| error.to_string())?;
    let sample = processor.prepare(processor.admit(&item.prompt, picture).unwrap()).unwrap();
    Ok(model.score(&[&sample]).unwrap()[0].mean)
}

#[test]
fn a_configuration_means_what_it_means_to_the_reference_or_is_refused() {
    let (mut faults, mut scored, mut refused) = (Vec::new(), 0, 0);
    for change in changes() {
        let said: Vec<String> =
            change.edits.iter().map(|edit| format!("{} {} {:?}", edit.file, edit.at, edit.value)).collect();
        let what = format!("{} {said:?} {:?}", change.case, change.renames);
        match (score(&change), change.score, &change.refused) {
            (Ok(ours), Some(theirs), None) => {
                scored += 1;
                if (ours - theirs).abs() > BOUND * theirs.abs().max(NEAR_ZERO) {
                    faults.push(format!("{what}: {ours}, the reference {theirs}"));
                }
            }
            (Err(reason), _, Some(words)) => {
                refused += 1;
                if !reason.contains(words.as_str()) {
                    faults.push(format!("{what}: {words:?} is not in {reason:?}"));
                }
            }
            (ours, theirs, _) => faults.push(format!("{what}: {ours:?}, the reference {theirs:?}")),
        }
    }
    println!("{scored} scored as the reference does, {refused} refused");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(scored > 60 && refused > 60, "{scored} scored, {refused} refused");
}

/// The reference refuses both, and its own trainers leave the second behind: a padded table that was cut to the tokens.
#[test]
fn a_vocabulary_may_have_lost_rows_but_not_gained_any() {
    let with = |rows: u64| {
        let edit = Edit {
            file: "config.json".into(),
            at: "/text_config/vocab_size".into(),
            value: Some(rows.into()),
        };
        let edits = vec![edit];
        score(&Change {
            case: "deep".into(),
            item: 1,
            edits,
            renames: BTreeMap::new(),
            score: None,
            refused: None,
        })
    };
    let (exact, more) = (with(723).unwrap(), with(1024).unwrap());
    assert!((exact - more).abs() <= f32::EPSILON * exact.abs(), "{exact} and {more}");
    let reason = with(722).unwrap_err();
    assert!(
        reason.contains("config.json: vocab_size is 722, but") && reason.contains("723 rows"),
        "{reason}"
    );
}
