//! The processor against the reference: `transformers` on the same files, as `tests/reference` wrote it down.
//!
//! `SPATIALSCORE_FIXTURES` names another folder of fixtures than `tests/fixtures`. With `--nocapture` each test
//! prints its worst difference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use spatialscore::error::ScoreError;
use spatialscore::model::Normalisation;
use spatialscore::model::checkpoint::{CheckpointError, CheckpointFiles};
use spatialscore::model::profile::RewardConfig;
use spatialscore::model::{Patches, Sample};
use spatialscore::processor::{Picture, Processor, ProcessorLimits, smart_resize};
use tempfile::TempDir;
use tokenizers::Tokenizer;

const LIMITS: ProcessorLimits = ProcessorLimits {
    max_prompt_bytes: 8192,
    max_image_pixels: 1 << 24,
    max_item_tokens: 16384,
    ..ProcessorLimits::NONE
};

/// Cases of `make_fixtures.py` with a golden file of every stage.
const CASES: [&str; 17] = [
    "mlp",
    "flat",
    "shards",
    "half",
    "lora",
    "rslora",
    "deep",
    "several",
    "qwen2",
    "qwen2_old",
    "qwen2_shards",
    "qwen2_several",
    "qwen3",
    "qwen3_flat",
    "qwen3_shards",
    "qwen3_lora",
    "qwen3_several",
];

fn fixtures() -> PathBuf {
    std::env::var_os("SPATIALSCORE_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a fixture")).unwrap()
}

fn load(directory: &Path, limits: ProcessorLimits) -> Result<Processor, CheckpointError> {
    load_for(directory, limits, None)
}

/// The processor for items of so many pictures, or of as many as the checkpoint says.
fn load_for(
    directory: &Path,
    limits: ProcessorLimits,
    pictures: Option<usize>,
) -> Result<Processor, CheckpointError> {
    let files = CheckpointFiles::open(directory.to_str().unwrap(), None, None)?;
    let mut reward: RewardConfig = files.require_json("reward_config.json")?;
    reward.pictures = pictures.unwrap_or(reward.pictures);
    Processor::load(&files, &reward, limits)
}

fn case(name: &str) -> Processor {
    load(&fixtures().join(name).join("checkpoint"), LIMITS).unwrap()
}

/// A copy of the case `mlp`'s small files in which some keys are others; a null removes its key.
fn changed(file: &str, changes: Value) -> TempDir {
    changed_of("mlp", file, changes)
}

/// The same of any case.
fn changed_of(case: &str, file: &str, changes: Value) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures().join(case).join("checkpoint")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json" || e == "jinja") {
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    edit(&copy, file, changes);
    copy
}

fn edit(copy: &TempDir, file: &str, changes: Value) {
    let path = copy.path().join(file);
    let mut content = if path.exists() { read_json(&path) } else { json!({}) };
    merge(&mut content, changes);
    fs::write(path, content.to_string()).unwrap();
}

fn merge(content: &mut Value, changes: Value) {
    match (content, changes) {
        (Value::Object(content), Value::Object(changes)) => {
            for (key, change) in changes {
                if change.is_null() {
                    content.remove(&key);
                } else {
                    merge(content.entry(key).or_insert(Value::Null), change);
                }
            }
        }
        (content, change) => *content = change,
    }
}

fn raw(width: u32, height: u32) -> Picture {
    let rgb8 = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect();
    Picture::Raw { width, height, rgb8 }
}

fn encoded(bytes: impl Into<Vec<u8>>) -> Picture {
    Picture::Encoded(Bytes::from(bytes.into()))
}

fn sample(processor: &Processor, prompt: &str, picture: Picture) -> Result<Sample, ScoreError> {
    let draft = processor.admit(prompt, picture)?;
    let cost = draft.tokens();
    let sample = processor.prepare(draft)?;
    assert_eq!(cost, sample.tokens(), "a draft must know its cost");
    Ok(sample)
}

/// The field and the reason of a refusal.
fn refused<T>(result: Result<T, ScoreError>) -> (&'static str, String) {
    match result {
        Err(ScoreError::Invalid { field, reason }) => (field, reason),
        Err(other) => panic!("refused as {other:?}"),
        Ok(_) => ("", "it was not refused".into()),
    }
}

/// Largest and mean difference, and the share of values that differ by more than one.
#[derive(Debug, Default)]
struct Difference {
    largest: u8,
    mean: f64,
    beyond_one: f64,
    differing: f64,
}

fn difference(ours: &[u8], theirs: &[u8]) -> Difference {
    assert_eq!(ours.len(), theirs.len());
    let count = ours.len() as f64;
    let mut result = Difference::default();
    for (a, b) in ours.iter().zip(theirs) {
        let d = a.abs_diff(*b);
        result.largest = result.largest.max(d);
        result.mean += f64::from(d) / count;
        result.beyond_one += f64::from(u8::from(d > 1)) / count;
        result.differing += f64::from(u8::from(d > 0)) / count;
    }
    result
}

/// Patches back to `[height, width, 3]` pixels.
fn uncut(patches: &Patches, patch: usize, merge: usize) -> Vec<u8> {
    let width = patches.columns * patch;
    let mut pixels = vec![0; patches.pixels.len()];
    let mut index = 0;
    for block_row in 0..patches.rows / merge {
        for block_column in 0..patches.columns / merge {
            for within in 0..merge * merge {
                let row = block_row * merge + within / merge;
                let column = block_column * merge + within % merge;
                for channel in 0..3 {
                    for y in 0..patch {
                        for x in 0..patch {
                            let at = (row * patch + y) * width + column * patch + x;
                            pixels[at * 3 + channel] = patches.pixels[index];
                            index += 1;
                        }
                    }
                }
            }
        }
    }
    pixels
}

#[test]
fn ten_thousand_sizes_equal_the_reference() {
    compare_sizes("sizes.csv", 28, 10_000);
    // Qwen3-VL's.
    compare_sizes("sizes32.csv", 32, 2_000);
}

fn compare_sizes(file: &str, factor: u64, least: usize) {
    let mut lines = csv::Reader::from_path(fixtures().join("processor").join(file)).unwrap();
    let (mut count, mut refusals) = (0, 0);
    for line in lines.records() {
        let line = line.unwrap();
        let number = |at: usize| line[at].parse::<u64>().unwrap();
        let size = (number(0) as u32, number(1) as u32);
        let ours = smart_resize(size, factor, number(2), number(3));
        if line[6].is_empty() {
            assert_eq!(ours, Ok((number(5), number(4))), "{line:?}");
        } else {
            assert!(ours.is_err(), "{line:?}");
            refusals += 1;
        }
        count += 1;
    }
    println!("{count} sizes, {refusals} of them refused");
    assert!(count >= least && refusals > 0);
}

/// The golden conversation with its placeholder expanded, up to the token at which the reward is read.
fn expected_ids(golden: &Value, visual_tokens: usize, image: u32, reward: u32) -> Vec<u32> {
    let ids = golden.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
    let mut ids: Vec<u32> =
        ids.flat_map(|id| std::iter::repeat_n(id, if id == image { visual_tokens } else { 1 })).collect();
    let end = ids.iter().rposition(|&id| id == reward).unwrap();
    ids.truncate(end + 1);
    ids
}

#[test]
fn token_ids_equal_the_reference_and_no_prompt_brings_in_a_special_token() {
    assert!(compare_tokens("mlp", "processor/tokens.json") > 150);
    // Qwen's real vocabulary is too large for the repository: `make parity` brings it.
    if fixtures().join("qwen").exists() {
        assert!(compare_tokens("qwen", "qwen/tokens.json") > 2000);
    }
}

/// Holds the ids of a file of prompts, under the vocabulary of a case, against the reference. Returns their number.
fn compare_tokens(name: &str, prompts: &str) -> usize {
    let processor = case(name);
    let checkpoint = fixtures().join(name).join("checkpoint");
    let tokenizer = Tokenizer::from_file(checkpoint.join("tokenizer.json")).unwrap();
    let token = read_json(&checkpoint.join("reward_config.json"))["special_token"].clone();
    let reward = tokenizer.token_to_id(token.as_str().unwrap()).unwrap();
    let image = read_json(&checkpoint.join("config.json"))["image_token_id"].as_u64().unwrap() as u32;
    let decoder = tokenizer.get_added_tokens_decoder();
    let specials = |ids: &[u32]| -> Vec<u32> {
        ids.iter().copied().filter(|id| decoder.get(id).is_some_and(|t| t.special)).collect()
    };
    let benign = specials(&sample(&processor, "a cup", raw(56, 56)).unwrap().input_ids);

    let prompts = read_json(&fixtures().join(prompts));
    let (mut compared, mut long, mut spelled) = (0, 0, 0);
    for item in prompts.as_array().unwrap() {
        let prompt = item["prompt"].as_str().unwrap();
        if prompt.is_empty() {
            continue;
        }
        let ids = sample(&processor, prompt, raw(56, 56)).unwrap().input_ids;
        assert_eq!(specials(&ids), benign, "{prompt:?} brought in a special token");
        spelled += usize::from(decoder.values().any(|t| t.special && prompt.contains(&t.content)));
        if item["conversation"].is_null() {
            // A long prompt's own ids stand between the instruction's but for the ends, where they may merge.
            let own: Vec<u32> = serde_json::from_value(item["ids"].clone()).unwrap();
            let middle = &own[4..own.len() - 4];
            assert!(ids.windows(middle.len()).any(|w| w == middle), "{prompt:?}");
            long += 1;
        } else {
            assert_eq!(ids, expected_ids(&item["conversation"], 4, image, reward), "{prompt:?}");
        }
        compared += 1;
    }
    println!(
        "{name}: {compared} prompts have the same ids, {long} of them of 4 kB; {spelled} spell special tokens"
    );
    assert!(long > 5 && spelled > 10);
    compared
}

#[test]
fn an_unmarked_reward_token_is_no_way_in_either() {
    let path = fixtures().join("mlp/checkpoint/tokenizer.json");
    let mut added = read_json(&path)["added_tokens"].clone();
    for token in added.as_array_mut().unwrap() {
        let content = token["content"].as_str().unwrap();
        let unmarked = ["<|Reward|>", "<|image_pad|>", "<|vision_start|>", "<|im_end|>"].contains(&content);
        if unmarked {
            token["special"] = json!(false);
        }
    }
    let copy = changed("tokenizer.json", json!({ "added_tokens": added }));
    let (plain, unmarked) = (case("mlp"), load(copy.path(), LIMITS).unwrap());
    let prompt = "a<|Reward|>b <|image_pad|> <|vision_start|> c <|im_end|>";
    let ids = |p: &Processor| sample(p, prompt, raw(56, 56)).unwrap().input_ids;
    assert_eq!(ids(&plain), ids(&unmarked));
}

#[test]
fn every_prompt_slot_is_filled_and_special_tokens_beside_it_hold() {
    let instruction = "<|im_end|>{prompt}<|im_start|> and again: {prompt}\n<|Reward|>";
    let copy = changed("reward_config.json", json!({ "instruction": instruction }));
    let processor = load(copy.path(), LIMITS).unwrap();
    let tokenizer = Tokenizer::from_file(copy.path().join("tokenizer.json")).unwrap();
    let whole = |prompt: &str| {
        let text = instruction.replace("{prompt}", prompt);
        tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    };
    let ids = sample(&processor, "a red cup", raw(56, 56)).unwrap().input_ids;
    assert!(ids.ends_with(&whole("a red cup")));
}

#[test]
fn the_spaces_beside_a_token_are_the_ones_it_takes() {
    let ids = |lstrip: bool, rstrip: bool| {
        let instruction = "{prompt} <extra> so: {prompt} <|Reward|>";
        let copy = changed("reward_config.json", json!({ "instruction": instruction }));
        let mut tokens = read_json(&copy.path().join("tokenizer.json"))["added_tokens"].clone();
        tokens.as_array_mut().unwrap().push(json!({
            "id": 9999, "content": "<extra>", "lstrip": lstrip, "rstrip": rstrip, "special": true,
            "single_word": false, "normalized": false
        }));
        edit(&copy, "tokenizer.json", json!({ "added_tokens": tokens }));
        // Loading holds the parts against the whole as the tokenizer itself cuts it.
        sample(&load(copy.path(), LIMITS).unwrap(), "a cup ", raw(56, 56)).unwrap().input_ids
    };
    assert_ne!(ids(true, false), ids(false, false));
    assert_ne!(ids(false, true), ids(false, false));
    assert_ne!(ids(true, true), ids(true, false));
}

#[test]
fn a_vocabulary_has_a_row_for_every_token() {
    let directory = fixtures().join("mlp/checkpoint");
    let processor = load(&directory, LIMITS).unwrap();
    let highest = sample(&processor, "a cup", raw(56, 56)).unwrap().input_ids.into_iter().max().unwrap();
    let refused_at_load =
        load(&directory, LIMITS).unwrap().with_vocabulary(Some(highest)).err().unwrap().to_string();
    assert!(refused_at_load.contains(&format!("{highest} rows")), "{refused_at_load}");
    let processor = processor.with_vocabulary(Some(highest + 1)).unwrap();
    sample(&processor, "a cup", raw(56, 56)).unwrap();
}

#[test]
fn cases_give_the_ids_and_patches_of_the_reference() {
    for name in CASES {
        let directory = fixtures().join(name);
        let given = case(name);
        let bytes = fs::read(directory.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        for (k, item) in read_json(&directory.join("items.json")).as_array().unwrap().iter().enumerate() {
            let references = item["references"].as_array().into_iter().flatten();
            let paths: Vec<&str> = references.chain([&item["image"]]).map(|p| p.as_str().unwrap()).collect();
            let checkpoint = directory.join("checkpoint");
            let processor = (paths.len() != given.pictures())
                .then(|| load_for(&checkpoint, LIMITS, Some(paths.len())).unwrap());
            let processor = processor.as_ref().unwrap_or(&given);
            let read = |path: &&str| encoded(fs::read(directory.join(path)).unwrap());
            let draft = processor
                .admit_all(item["prompt"].as_str().unwrap(), paths.iter().map(read).collect())
                .unwrap();
            let sample = processor.prepare(draft).unwrap();
            let grids: Vec<u32> =
                sample.pictures.iter().flat_map(|p| [p.rows as u32, p.columns as u32]).collect();
            assert_eq!(grids, integers(&golden, &format!("{k}/grid")), "{name} {paths:?}");
            assert_eq!(sample.input_ids, integers(&golden, &format!("{k}/input_ids")), "{name} {paths:?}");
            let pixels = golden.tensor(&format!("{k}/pixels")).unwrap();
            let ours: Vec<u8> = sample.pictures.iter().flat_map(|p| &p.pixels).copied().collect();
            let d = difference(&ours, pixels.data());
            println!("{name} {paths:?}: {d:?}");
            assert!(d.beyond_one < 0.001, "{name} {paths:?}: {d:?}");
            if let Ok(values) = golden.tensor(&format!("{k}/pixel_values")) {
                check_values(&sample, processor.normalisation(), &floats(values.data()));
            }
        }
    }
}

fn integers(golden: &SafeTensors, name: &str) -> Vec<u32> {
    let tensor = golden.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64);
    let chunks = tensor.data().as_chunks::<8>().0;
    chunks.iter().map(|c| i64::from_le_bytes(*c) as u32).collect()
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
}

/// Rescaled, normalised and repeated along the temporal axis, the bytes are the reference's `pixel_values`.
fn check_values(sample: &Sample, normalisation: Normalisation, golden: &[f32]) {
    let pixels: Vec<u8> = sample.pictures.iter().flat_map(|p| &p.pixels).copied().collect();
    let area = pixels.len() / sample.patches() / 3;
    let mut worst: f32 = 0.0;
    for (index, theirs) in golden.iter().enumerate() {
        let (patch, channel, at) = (index / (6 * area), index % (6 * area) / (2 * area), index % area);
        let byte = f32::from(pixels[(patch * 3 + channel) * area + at]);
        let ours = (byte * normalisation.rescale - normalisation.mean[channel]) / normalisation.std[channel];
        worst = worst.max((ours - theirs).abs());
    }
    println!("  pixel values differ by at most {worst:.2e}");
    // One step of a byte is 0.0146 or more after normalising.
    assert!(worst < 0.016, "{worst}");
}

fn golden_pictures(mut check: impl FnMut(&str, Picture, &Value, &SafeTensors)) {
    let directory = fixtures().join("processor");
    let bytes = fs::read(directory.join("images.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    for (name, limits) in read_json(&directory.join("images.json")).as_object().unwrap() {
        let picture = encoded(fs::read(directory.join("images").join(name)).unwrap());
        check(name, picture, limits, &golden);
    }
}

#[test]
fn pictures_are_decoded_as_the_reference_decodes_them() {
    // Patches of one pixel: nothing is resized, and the patches are the picture.
    let one = json!({ "patch_size": 1, "merge_size": 1 });
    let copy = changed("preprocessor_config.json", one);
    edit(&copy, "config.json", json!({ "vision_config": { "patch_size": 1, "spatial_merge_size": 1 } }));
    edit(&copy, "reward_config.json", json!({ "min_pixels": 1, "max_pixels": 1 << 21 }));
    let limits = ProcessorLimits { max_item_tokens: 1 << 21, ..LIMITS };
    let processor = load(copy.path(), limits).unwrap();
    let mut count = 0;
    golden_pictures(|name, picture, _, golden| {
        let theirs = golden.tensor(&format!("{name}/decoded")).unwrap();
        let ours = sample(&processor, "a cup", picture).unwrap().pictures.remove(0);
        assert_eq!([ours.rows, ours.columns, 3], theirs.shape(), "{name}");
        let d = difference(&ours.pixels, theirs.data());
        assert_eq!(d.largest, 0, "{name}: {d:?}");
        count += 1;
    });
    assert!(count > 130);
}

#[test]
fn pictures_are_resized_as_the_reference_resizes_them() {
    let mut worst = BTreeMap::new();
    golden_pictures(|name, picture, limits, golden| {
        let copy = changed("reward_config.json", limits.clone());
        let processor = load(copy.path(), LIMITS).unwrap();
        let theirs = golden.tensor(&format!("{name}/resized")).unwrap();
        let ours = sample(&processor, "a cup", picture).unwrap().pictures.remove(0);
        assert_eq!([ours.rows * 14, ours.columns * 14, 3], theirs.shape(), "{name}");
        let d = difference(&uncut(&ours, 14, 2), theirs.data());
        println!("{name}: {d:?}");
        worst.insert(name.to_owned(), d);
    });
    for (name, d) in &worst {
        assert!(d.beyond_one < 0.001, "{name}: {d:?}");
    }
}

/// HPSv3++'s code: qwen-vl-utils' `fetch_image`, then Qwen3-VL's processor, whose visual tokens are larger.
#[test]
fn pictures_are_resized_twice_as_the_reference_resizes_them_twice() {
    let directory = fixtures().join("processor");
    let bytes = fs::read(directory.join("twice.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let copy = changed_of("qwen3", "reward_config.json", read_json(&directory.join("twice.json")));
    let processor = load(copy.path(), LIMITS).unwrap();
    for (name, theirs) in golden.tensors() {
        let picture = encoded(fs::read(directory.join("images").join(&name)).unwrap());
        let ours = sample(&processor, "a cup", picture).unwrap().pictures.remove(0);
        assert_eq!([ours.rows * 16, ours.columns * 16, 3], theirs.shape(), "{name}");
        let d = difference(&uncut(&ours, 16, 2), theirs.data());
        assert!(d.beyond_one < 0.001, "{name}: {d:?}");
    }
    assert_eq!(golden.len(), 5);
}

#[test]
fn raw_pixels_are_those_of_the_same_picture_as_a_file() {
    let processor = case("mlp");
    let directory = fixtures().join("processor");
    let file = fs::read(directory.join("images/large.png")).unwrap();
    let bytes = fs::read(directory.join("images.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let pixels = golden.tensor("large.png/decoded").unwrap();
    let [height, width, 3] = *pixels.shape() else { panic!("{:?}", pixels.shape()) };
    let rgb8 = Bytes::copy_from_slice(pixels.data());
    let raw = Picture::Raw { width: width as u32, height: height as u32, rgb8 };
    let ours = |picture| sample(&processor, "a cup", picture).unwrap();
    assert_eq!(ours(raw), ours(encoded(file)));
}

#[test]
fn prompts_that_can_never_be_scored_are_refused() {
    let limits = ProcessorLimits { max_prompt_bytes: 20, max_item_tokens: 64, ..LIMITS };
    let processor = load(&fixtures().join("mlp/checkpoint"), limits).unwrap();
    let (field, reason) = refused(processor.admit("", raw(56, 56)));
    assert_eq!((field, reason.contains("empty")), ("prompt", true));
    // 7 characters, 21 bytes.
    let (field, reason) = refused(processor.admit("红色的杯子在左", raw(56, 56)));
    assert_eq!((field, reason.contains("21") && reason.contains("20")), ("prompt", true), "{reason}");
    let (field, reason) = refused(processor.admit("€ ¥ £ ¢ ₿ ₹", raw(56, 56)));
    assert_eq!((field, reason.contains("64")), ("prompt", true), "{reason}");
}

#[test]
fn raw_pixels_of_another_size_are_refused() {
    let processor = case("mlp");
    let admit = |width, height, length: usize| {
        refused(processor.admit("a cup", Picture::Raw { width, height, rgb8: Bytes::from(vec![0; length]) }))
    };
    for (width, height, length) in [(10, 10, 299), (10, 10, 301), (10, 10, 0), (3, 5, 46)] {
        let (field, reason) = admit(width, height, length);
        assert_eq!(field, "image.raw");
        assert!(reason.contains(&length.to_string()), "{reason}");
        assert!(reason.contains(&(width * height * 3).to_string()), "{reason}");
    }
    for (width, height) in [(0, 0), (0, 10), (10, 0)] {
        let (field, reason) = admit(width, height, 0);
        assert_eq!((field, reason.contains("above 0")), ("image.raw", true), "{reason}");
    }
    let (_, reason) = admit(u32::MAX, u32::MAX, 16);
    assert!(reason.contains("may have"), "{reason}");
    let (field, reason) = admit(1, 201, 603);
    assert_eq!((field, reason.contains("200 times")), ("image.raw", true), "{reason}");
}

#[test]
fn a_picture_of_too_many_tokens_is_refused_before_it_is_decoded() {
    let limits = ProcessorLimits { max_item_tokens: 15, ..LIMITS };
    let copy = changed("reward_config.json", json!({ "min_pixels": 12544, "max_pixels": 12544 }));
    let processor = load(copy.path(), limits).unwrap();
    let (field, reason) = refused(processor.admit("a cup", raw(112, 112)));
    assert_eq!((field, reason.contains("15")), ("image.raw", true), "{reason}");
}

#[test]
fn truncated_and_corrupt_files_are_refused() {
    let processor = case("mlp");
    for name in [
        "rgb.png",
        "rgb_interlaced.png",
        "palette.png",
        "420.jpg",
        "progressive.jpg",
        "lossy.webp",
        "lossless.webp",
    ] {
        let whole = fs::read(fixtures().join("processor/images").join(name)).unwrap();
        // PIL takes a PNG file that ends anywhere behind its pixels, and of these no other that is cut.
        let spared = if name.ends_with(".png") { 23 } else { 1 };
        for length in whole.len() - spared + 4..whole.len() {
            let cut = sample(&processor, "a cup", encoded(&whole[..length])).unwrap();
            assert_eq!(cut, sample(&processor, "a cup", encoded(&*whole)).unwrap(), "{name} at {length}");
        }
        let most = whole.len() - spared;
        for length in (0..50).map(|part| most * part / 50).chain(most - 40..=most) {
            let (field, reason) = refused(sample(&processor, "a cup", encoded(&whole[..length])));
            let refused = field == "image.encoded" && reason.contains("send");
            assert!(refused, "{name} of {} at {length}: {reason}", whole.len());
        }
    }
}

#[test]
fn no_damage_to_a_file_stops_the_server() {
    let processor = case("mlp");
    let mut state = 1_u32;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    let (mut taken, mut left) = (0, 0);
    for name in [
        "rgb.png",
        "palette4_interlaced.png",
        "420.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "progressive411.jpg",
        "restarts.jpg",
        "exif_long_be.jpg",
        "exif_ztxt.png",
        "lossless_animated_clear.webp",
        "lossy_alpha.webp",
        "lossless.webp",
        "animated.webp",
    ] {
        let whole = fs::read(fixtures().join("processor/images").join(name)).unwrap();
        for _ in 0..200 {
            let mut damaged = whole.clone();
            for _ in 0..=random(8) {
                let at = random(damaged.len());
                damaged[at] = random(256) as u8;
            }
            match sample(&processor, "a cup", encoded(damaged)) {
                Ok(_) => taken += 1,
                Err(ScoreError::Invalid { .. }) => left += 1,
                Err(other) => panic!("{name}: {other}"),
            }
        }
    }
    println!("{taken} damaged files could still be read, {left} were refused");
}

#[test]
fn other_files_are_refused_by_their_first_bytes() {
    let processor = case("mlp");
    let cases: [(&[u8], &str); 5] = [
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "GIF"),
        (b"BM\x46\x00\x00\x00\x00\x00\x00\x00\x36\x00\x00\x00", "BMP"),
        (b"II*\x00\x08\x00\x00\x00\x00\x00", "TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known picture"),
        (b"", "no bytes"),
    ];
    for (bytes, word) in cases {
        let (field, reason) = refused(processor.admit("a cup", encoded(bytes)));
        assert_eq!(field, "image.encoded");
        assert!(reason.contains(word) && reason.contains("PNG, JPEG or WebP"), "{reason}");
    }
}

#[test]
fn a_bomb_is_refused_by_its_header() {
    // Sixty thousand by sixty thousand pixels of nothing: 450 MB of scanlines in a few kilobytes.
    let mut bomb = Vec::new();
    let mut encoder = png::Encoder::new(Cursor::new(&mut bomb), 60_000, 60_000);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 0x03, 0x00]).unwrap();
    drop(writer);
    let processor = case("mlp");
    let before = peak_memory();
    let (field, reason) = refused(processor.admit("a cup", encoded(bomb)));
    assert_eq!((field, reason.contains("60000 x 60000")), ("image.encoded", true), "{reason}");
    assert!(peak_memory() - before < 1 << 28, "it allocated");
}

#[test]
fn a_file_of_many_scans_is_refused() {
    let whole = fs::read(fixtures().join("processor/images/progressive.jpg")).unwrap();
    let start = whole.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap();
    let (first, end) = (&whole[..start], &whole[whole.len() - 2..]);
    let scan = &whole[start..whole.len() - 2];
    let with_scans = |count| encoded([first, &scan.repeat(count), end].concat());
    let processor = case("mlp");
    // The last scan refines what it found: libjpeg only warns where it comes again.
    assert!(sample(&processor, "a cup", with_scans(40)).is_ok());
    let (field, reason) = refused(sample(&processor, "a cup", with_scans(80)));
    assert_eq!((field, reason.contains("more than 64 scans")), ("image.encoded", true), "{reason}");
}

#[test]
fn a_jpeg_of_two_sizes_is_refused() {
    let whole = fs::read(fixtures().join("processor/images/420.jpg")).unwrap();
    let frame = whole.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    let length = 2 + usize::from(u16::from_be_bytes([whole[frame + 2], whole[frame + 3]]));
    let mut small = whole[frame..frame + length].to_vec();
    small[5..9].copy_from_slice(&[0, 8, 0, 8]);
    let twice = [&whole[..frame], &small, &whole[frame..]].concat();
    let (field, reason) = refused(sample(&case("mlp"), "a cup", encoded(twice)));
    assert_eq!((field, reason.contains("cannot be decoded")), ("image.encoded", true), "{reason}");
}

#[test]
fn a_header_tells_what_decoding_holds() {
    let processor = case("mlp");
    let memory = |picture| processor.admit("a cup", picture).unwrap().decoding_memory();
    let file = |name: &str| encoded(fs::read(fixtures().join("processor/images").join(name)).unwrap());
    let pixels = 46 * 35;
    assert_eq!(memory(raw(46, 35)), 0);
    assert_eq!(memory(file("420.jpg")), 6 * pixels);
    // Coefficients of two bytes, in whole blocks.
    assert_eq!(memory(file("progressive.jpg")), 3 * pixels + 64 * 64 * 3 * 2);
    assert_eq!(memory(file("rgb.png")), 7 * pixels);
    assert_eq!(memory(file("rgba16.png")), 11 * pixels);
    assert_eq!(memory(file("lossless.webp")), 11 * pixels);
}

/// The most memory that this process has held at once, in bytes; 0 where the system does not say.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The file and the reason of a refusal at load.
fn load_error(copy: &TempDir) -> (String, String) {
    match load(copy.path(), LIMITS) {
        Err(CheckpointError::Invalid { file, reason }) => (file, reason),
        Err(CheckpointError::MissingFile(file)) => (file, "missing".into()),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn checkpoints_that_cannot_be_served_are_refused_at_load() {
    let template = |text: &str| {
        let copy = changed("reward_config.json", json!({}));
        let own = "{%- for p in messages[0].content -%}{%- if p.type == 'image' -%}<|image_pad|>{%- else -%}";
        let source = format!("{own}{text}{{%- endif -%}}{{%- endfor -%}}");
        fs::write(copy.path().join("chat_template.jinja"), source).unwrap();
        copy
    };
    let reward = |changes| changed("reward_config.json", changes);
    let settings = |changes| changed("preprocessor_config.json", changes);
    let cases = [
        (settings(json!({ "do_resize": false })), "preprocessor_config.json", "do_resize"),
        (settings(json!({ "resample": 2 })), "preprocessor_config.json", "bicubic"),
        (settings(json!({ "patch_size": 16 })), "preprocessor_config.json", "vision_config.patch_size 14"),
        (settings(json!({ "merge_size": 1 })), "preprocessor_config.json", "spatial_merge_size 2"),
        (settings(json!({ "temporal_patch_size": 1 })), "preprocessor_config.json", "temporal_patch_size 2"),
        (settings(json!({ "image_std": [0.5, 0.5, 0.0] })), "preprocessor_config.json", "above 0"),
        (reward(json!({ "min_pixels": 4000, "max_pixels": 3000 })), "reward_config.json", "4000"),
        (reward(json!({ "instruction": "Rate. <|Reward|>" })), "reward_config.json", "{prompt}"),
        (reward(json!({ "instruction": "Rate {prompt}." })), "reward_config.json", "0 times"),
        (reward(json!({ "instruction": "<|Reward|>{prompt}<|Reward|>" })), "reward_config.json", "2 times"),
        (reward(json!({ "instruction": "<|Reward|>{prompt}" })), "reward_config.json", "before"),
        (reward(json!({ "special_token": "<|None|>" })), "reward_config.json", "vocabulary"),
        (reward(json!({ "special_token": null })), "reward_config.json", "special_token must name it"),
        (template("{{ p.text | replace('  ', ' ') }}"), "chat_template.jinja", "changes the prompt"),
        (template("{{ p.text | upper }}"), "chat_template.jinja", "changes the prompt"),
        (template("{{ p.text | tojson }}"), "chat_template.jinja", "changes the prompt"),
        (template("{{ p.text }}<|image_pad|>"), "chat_template.jinja", "2 times"),
        (template("{{ raise_exception('no') }}"), "chat_template.jinja", "no"),
        (template("{{ strftime_now('%d') }}{{ p.text }}"), "chat_template.jinja", "date"),
        (template("{{ p.text }"), "chat_template.jinja", "template"),
        (template("{{ p.text | groupby('x') }}"), "chat_template.jinja", "\"groupby\""),
        (template("a cup"), "chat_template.jinja", "leaves it out"),
        (template("{{ p.text * 17 }}"), "chat_template.jinja", "17 times"),
        (template("{{ 'x' * 2000000 ~ p.text }}"), "chat_template.jinja", "bytes"),
        (reward(json!({ "instruction": "{prompt}".repeat(17) })), "reward_config.json", "17 times"),
        (
            reward(json!({ "instruction": "x".repeat(100_000) + "{prompt}" })),
            "reward_config.json",
            "100008 bytes",
        ),
        (
            changed("tokenizer_config.json", json!({ "tokenizer_class": "LlamaTokenizer" })),
            "tokenizer_config.json",
            "Llama",
        ),
    ];
    for (copy, file, word) in cases {
        println!("{file}: {word}");
        let (named, reason) = load_error(&copy);
        assert_eq!(named, file, "{reason}");
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn settings_mean_what_they_mean_to_the_reference() {
    let normalisation =
        |changes| load(changed("preprocessor_config.json", changes).path(), LIMITS).unwrap().normalisation();
    let plain = json!({ "do_rescale": false, "do_normalize": false });
    assert_eq!(normalisation(plain), Normalisation { mean: [0.0; 3], std: [1.0; 3], rescale: 1.0 });
    let own = json!({ "image_mean": [0.5, 0.25, 0.0], "image_std": [1.0, 2.0, 3.0], "rescale_factor": 0.5 });
    let expected = Normalisation { mean: [0.5, 0.25, 0.0], std: [1.0, 2.0, 3.0], rescale: 0.5 };
    assert_eq!(normalisation(own), expected);

    // Limits: reward_config.json, else min_pixels and max_pixels, else size, else the class's defaults.
    let rows = |settings: Value, reward: Value| {
        let copy = changed("preprocessor_config.json", settings);
        edit(&copy, "reward_config.json", reward);
        let processor = load(copy.path(), LIMITS).unwrap();
        sample(&processor, "a cup", raw(280, 280)).unwrap().pictures[0].rows
    };
    let none = json!({ "min_pixels": null, "max_pixels": null });
    let size = json!({ "shortest_edge": 784, "longest_edge": 78400 / 4 });
    assert_eq!(rows(json!({ "size": size }), none.clone()), 10);
    assert_eq!(rows(json!({ "size": size, "max_pixels": 7056 }), none.clone()), 6);
    assert_eq!(rows(json!({ "size": size, "max_pixels": 7056 }), json!({ "max_pixels": 28224 })), 12);
    assert_eq!(rows(json!({ "size": null }), none), 20);
}

#[test]
fn settings_nested_in_processor_config_win() {
    let nested = json!({ "image_processor": { "do_normalize": false, "rescale_factor": 0.25 } });
    let copy = changed("processor_config.json", nested);
    let expected = Normalisation { mean: [0.0; 3], std: [1.0; 3], rescale: 0.25 };
    assert_eq!(load(copy.path(), LIMITS).unwrap().normalisation(), expected);
    fs::remove_file(copy.path().join("preprocessor_config.json")).unwrap();
    assert_eq!(load(copy.path(), LIMITS).unwrap().normalisation(), expected);
    fs::remove_file(copy.path().join("processor_config.json")).unwrap();
    assert_eq!(load_error(&copy).0, "preprocessor_config.json");
}

#[test]
fn the_placeholder_is_found_in_the_older_config_too() {
    let id = read_json(&fixtures().join("mlp/checkpoint/config.json"))["image_token_id"].clone();
    let copy =
        changed("config.json", json!({ "image_token_id": null, "text_config": { "image_token_id": id } }));
    assert!(load(copy.path(), LIMITS).is_ok());
    edit(&copy, "config.json", json!({ "text_config": { "image_token_id": null } }));
    let (_, reason) = load_error(&copy);
    assert!(reason.contains("151655"), "{reason}");
}

#[test]
fn a_token_that_the_model_has_no_row_for_is_the_callers_or_the_checkpoints_fault() {
    let copy = changed("tokenizer.json", json!({}));
    let path = copy.path().join("tokenizer.json");
    let mut content = read_json(&path);
    let tokens = content["added_tokens"].as_array_mut().unwrap();
    let rows = tokens.iter().map(|token| token["id"].as_u64().unwrap()).max().unwrap() + 1;
    tokens.push(json!({
        "id": rows, "content": "spare", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false
    }));
    fs::write(path, content.to_string()).unwrap();
    let load = |rows| load(copy.path(), LIMITS).unwrap().with_vocabulary(Some(rows));
    let processor = load(rows as u32).unwrap();
    assert!(processor.admit("a cup", raw(56, 56)).is_ok());
    let (field, reason) = refused(processor.admit("a spare cup", raw(56, 56)));
    assert_eq!(field, "prompt");
    assert!(reason.contains(&format!("token {rows} is not among the {rows} of")), "{reason}");
    // The last one is the reward's, which every conversation has.
    let Err(error) = load(rows as u32 - 1) else { panic!("not refused") };
    assert!(error.to_string().contains("<|Reward|>"), "{error}");
}

#[test]
fn a_prompt_is_never_cut_short_or_filled_up() {
    let padding = json!({ "strategy": { "Fixed": 512 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!" });
    let truncation =
        json!({ "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0 });
    let copy = changed("tokenizer.json", json!({}));
    let mut content = read_json(&copy.path().join("tokenizer.json"));
    content["padding"] = padding;
    content["truncation"] = truncation;
    fs::write(copy.path().join("tokenizer.json"), content.to_string()).unwrap();
    let prompt = "a red cup stands left of a blue bowl on the table";
    let ids = |p: &Processor| sample(p, prompt, raw(56, 56)).unwrap().input_ids;
    assert_eq!(ids(&load(copy.path(), LIMITS).unwrap()), ids(&case("mlp")));
}

#[test]
fn an_item_has_as_many_pictures_as_the_model_reads() {
    let directory = fixtures().join("several/checkpoint");
    let processor = load(&directory, LIMITS).unwrap();
    assert_eq!(processor.pictures(), 2);
    for given in [0, 1, 3] {
        let (field, reason) = refused(processor.admit_all("a cup", vec![raw(56, 56); given]));
        assert_eq!(field, "references");
        assert_eq!(
            reason,
            format!("the model reads 2 pictures, the judged one among them; the item has {given}")
        );
    }
    let draft = processor.admit_all("a cup", vec![raw(56, 56), raw(112, 56)]).unwrap();
    let tokens = draft.tokens();
    let sample = processor.prepare(draft).unwrap();
    assert_eq!((sample.tokens(), sample.pictures.len()), (tokens, 2));

    // What is wrong with which of them.
    let (field, reason) = refused(processor.admit_all("a cup", vec![raw(0, 4), raw(56, 56)]));
    assert!(field == "references" && reason.starts_with("[0]: "), "{field}: {reason}");
    let (field, _) = refused(processor.admit_all("a cup", vec![raw(56, 56), raw(0, 4)]));
    assert_eq!(field, "image.raw");
    let broken = || encoded(include_bytes!("../samples/sunflower.right.png")[..600].to_vec());
    let cut = |pictures| refused(processor.prepare(processor.admit_all("a cup", pictures).unwrap())).0;
    assert_eq!(cut(vec![broken(), raw(56, 56)]), "references");
    assert_eq!(cut(vec![raw(56, 56), broken()]), "image.encoded");
    let narrow = ProcessorLimits { max_item_tokens: 6, ..LIMITS };
    let processor = load(&directory, narrow).unwrap();
    let (field, reason) = refused(processor.admit_all("a cup", vec![raw(84, 84), raw(112, 112)]));
    assert_eq!((field, reason.as_str()), ("references", "the pictures are 8 tokens; an item may have 6"));
}

#[test]
fn a_template_shows_each_picture_once_and_apart() {
    for pictures in [0, 17] {
        let Err(error) = load_for(&fixtures().join("mlp/checkpoint"), LIMITS, Some(pictures)) else {
            panic!()
        };
        let text = error.to_string();
        assert!(text.contains(&format!("pictures is {pictures}, must be from 1 to 16")), "{text}");
    }
    let template = fs::read_to_string(fixtures().join("mlp/checkpoint/chat_template.jinja")).unwrap();
    let shown = "<|vision_start|><|image_pad|><|vision_end|>";
    for (instead, fault) in
        [("<|image_pad|>", "side by side"), ("{% if loop.first %}<|image_pad|>{% endif %}", "1 times")]
    {
        let copy = changed("config.json", json!({}));
        fs::write(copy.path().join("chat_template.jinja"), template.replace(shown, instead)).unwrap();
        load_for(copy.path(), LIMITS, Some(1)).unwrap();
        let Err(error) = load_for(copy.path(), LIMITS, Some(2)) else { panic!("{instead}") };
        let text = error.to_string();
        assert!(text.contains(fault) && text.contains("a turn with 2 pictures"), "{text}");
    }
}
