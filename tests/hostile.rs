//! Checkpoints that are broken, absurd or meant to harm: `inspect` and `serve` say the same of each, none ends the
//! process, takes long, or takes memory beyond its weights, and what is broken by intent is never served.
//!
//! The corpus is made here: each case is a small healthy checkpoint with one thing changed, a part of them by a seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/copies.rs"]
mod copies;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use copies::{Copy, Tensors, key};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use spatialscore::config::{Settings, Sources};
use spatialscore::engine::{self, Engine, Examination};
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::processor::ProcessorLimits;

const WEIGHTS: &str = "model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";
const SEED: u64 = 13;
/// How many cases the seed makes beside those that are written out.
const SEEDED: usize = 180;
/// The most work that a case may make, five seconds for each of `inspect` and `serve`, of this process's processor time:
/// a machine with other things to do does not change it.
const WORK: Duration = Duration::from_secs(10);
/// What waits without working, for a pipe or a lock, does so for ever; what is only slow on a busy machine ends by then.
const PATIENCE: Duration = Duration::from_secs(120);
/// The most memory that all cases together may come to need, the small weights and libtorch included.
const MEMORY: u64 = 1 << 30;

/// One way to break a checkpoint.
struct Case {
    name: String,
    base: &'static str,
    break_it: Box<dyn Fn(&Copy)>,
    /// Whether it must be refused. Else both must merely agree.
    broken: bool,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn case(name: impl Into<String>, base: &'static str, break_it: impl Fn(&Copy) + 'static) -> Case {
    Case { name: name.into(), base, break_it: Box::new(break_it), broken: true }
}

impl Case {
    /// The folder. Adapters stand on the checkpoint `mlp`.
    fn make(&self) -> Copy {
        let folder = fixtures().join(self.base);
        let copy = Copy::of(&if self.base.contains('/') { folder } else { folder.join("checkpoint") });
        if self.base.starts_with("adapters/") {
            let base = fixtures().join("mlp/checkpoint");
            copy.edit_json("adapter_config.json", |json| json["base_model_name_or_path"] = json!(base));
        }
        (self.break_it)(&copy);
        copy
    }
}

fn put(json: &mut Value, pointer: &str, value: Value) {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    json.pointer_mut(parent).unwrap()[name] = value;
}

/// A key of a JSON file with another value, as text: some are no JSON that is written otherwise.
fn says(file: &'static str, pointer: &'static str, value: &'static str, base: &'static str) -> Case {
    case(format!("{file} {pointer} {value}"), base, move |copy| {
        copy.edit_json(file, |json| put(json, pointer, json!("@@")));
        let text = fs::read_to_string(copy.path(file)).unwrap();
        copy.write(file, text.replace("\"@@\"", value));
    })
}

fn tensors(
    name: &str,
    file: &'static str,
    base: &'static str,
    edit: impl Fn(&mut Tensors) + 'static,
) -> Case {
    case(format!("{file}: {name}"), base, move |copy| copy.edit_tensors(file, |tensors| edit(tensors)))
}

fn fill(tensors: &mut Tensors, end: &str, value: f32) {
    let name = key(tensors, end);
    for number in tensors.get_mut(&name).unwrap().2.chunks_exact_mut(4) {
        number.copy_from_slice(&value.to_le_bytes());
    }
}

/// Keeps so many rows of a tensor.
fn cut(tensors: &mut Tensors, end: &str, rows: usize) {
    let name = key(tensors, end);
    let (_, shape, data) = tensors.get_mut(&name).unwrap();
    data.truncate(rows * data.len() / shape[0]);
    shape[0] = rows;
}

fn replace(copy: &Copy, file: &str, how: impl FnOnce(&Path)) {
    let _ = fs::remove_file(copy.path(file));
    how(&copy.path(file));
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A file of 64 GiB that takes no room, with a header of one tensor that fills it, or none.
fn sparse(path: &Path, header: Option<Value>) {
    let length: u64 = 64 << 30;
    let file = File::create(path).unwrap();
    if let Some(header) = header {
        use std::io::Write;
        let text = header.to_string();
        (&file).write_all(&(text.len() as u64).to_le_bytes()).unwrap();
        (&file).write_all(text.as_bytes()).unwrap();
        file.set_len(8 + text.len() as u64 + length).unwrap();
    } else {
        file.set_len(length).unwrap();
    }
}

fn one_tensor(name: &str, shape: [u64; 2]) -> Value {
    json!({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 64_u64 << 30]}})
}

/// A safetensors file with this header and so many bytes behind it.
fn with_header(copy: &Copy, file: &str, header: &str, length: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + length, 0);
    copy.write(file, bytes);
}

fn absurd_settings() -> Vec<Case> {
    let huge =
        ["1000000000", "9223372036854775807", "18446744073709551615", "-1", "0", "1e400", "\"2\"", "[]"];
    let mut cases = Vec::new();
    for key in [
        "/text_config/num_hidden_layers",
        "/text_config/hidden_size",
        "/text_config/num_attention_heads",
        "/vision_config/depth",
        "/vision_config/patch_size",
        "/vision_config/spatial_merge_size",
    ] {
        cases.extend(huge.map(|value| says("config.json", key, value, "mlp")));
    }
    cases.push(says("config.json", "/vision_config/depth", "100000000", "mlp"));
    cases.push(says("config.json", "/image_token_id", "4294967295", "mlp"));
    cases.push(says("config.json", "/model_type", "\"qwen9_vl\"", "mlp"));
    for value in ["9223372036854775808", "0", "18446744073709551616", "-1", "\"many\""] {
        cases.push(says("reward_config.json", "/min_pixels", value, "mlp"));
        cases.push(says("reward_config.json", "/max_pixels", value, "mlp"));
    }
    cases.push(says("reward_config.json", "/min_pixels", "9000000", "mlp"));
    cases.push(says("reward_config.json", "/instruction", "\"no place\"", "mlp"));
    cases.push(says("reward_config.json", "/output", "\"scalar\"", "mlp"));
    cases.push(says("reward_config.json", "/special_token", "\"<|Nobody|>\"", "mlp"));
    for (name, text) in [("of 6 MB", "x".repeat(6 << 20)), ("of 65 KB", "x".repeat(65 << 10))] {
        cases.push(case(format!("an instruction {name}"), "mlp", move |copy| {
            copy.edit_json("reward_config.json", |json| {
                json["instruction"] = json!(format!("{text}{{prompt}}<|Reward|>"));
            });
        }));
    }
    // What the tokenizers' library answers with a panic.
    cases.push(case("pieces whose prefix is longer than they are", "mlp", |copy| {
        copy.edit_json("tokenizer_config.json", |json| {
            json["tokenizer_class"] = json!("PreTrainedTokenizerFast")
        });
        copy.edit_json("tokenizer.json", |json| json["model"]["continuing_subword_prefix"] = json!("##"));
    }));
    cases.push(case("an instruction with 200,000 prompts", "mlp", |copy| {
        copy.edit_json("reward_config.json", |json| {
            json["instruction"] = json!("{prompt}".repeat(200_000) + "<|Reward|>");
        });
    }));
    cases.push(case("a picture of the preprocessor's of 2^63 pixels", "half", |copy| {
        copy.edit_json("preprocessor_config.json", |json| {
            json["min_pixels"] = json!(1_u64 << 63);
            json["max_pixels"] = json!(u64::MAX);
        });
    }));
    cases
}

fn strange_files() -> Vec<Case> {
    let mut cases = Vec::new();
    let files = [
        "config.json",
        "reward_config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        WEIGHTS,
    ];
    for file in files {
        let mut add = |name: &str, how: fn(&Path)| {
            cases.push(case(format!("{file}: {name}"), "mlp", move |copy| replace(copy, file, how)));
        };
        add("a pipe", pipe);
        add("an endless device", |path| symlink("/dev/zero", path).unwrap());
        add("a folder", |path| fs::create_dir(path).unwrap());
        add("a link to nothing", |path| symlink("/no/such/place", path).unwrap());
        add("a link to itself", |path| symlink(path, path).unwrap());
        add("64 GiB of nothing", |path| sparse(path, None));
        add("empty", |path| fs::write(path, "").unwrap());
        add("brackets", |path| fs::write(path, "[".repeat(300_000)).unwrap());
        add("not text", |path| fs::write(path, [0xff; 4096]).unwrap());
        add("a pointer of git-lfs", |path| {
            let text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16000000000\n";
            fs::write(path, text).unwrap();
        });
        if file.ends_with(".json") {
            add("many empty values", |path| {
                fs::write(path, format!("[{}0]", "[],".repeat(1 << 20))).unwrap()
            });
        }
    }
    for (file, base) in [(ADAPTER, "adapters/plain"), ("adapter_config.json", "adapters/plain")] {
        let mut add = |name: &str, how: fn(&Path)| {
            cases.push(case(format!("{file}: {name}"), base, move |copy| replace(copy, file, how)));
        };
        add("a pipe", pipe);
        add("an endless device", |path| symlink("/dev/zero", path).unwrap());
        add("64 GiB of nothing", |path| sparse(path, None));
        add("empty", |path| fs::write(path, "").unwrap());
    }
    cases
}

fn strange_weights() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shape) in
        [("rm_head.0.weight", [1 << 30, 16]), ("model.embed_tokens.weight", [1 << 14, 1 << 20])]
    {
        cases.push(case(format!("a sparse {name}"), "mlp", move |copy| {
            replace(copy, WEIGHTS, |path| sparse(path, Some(one_tensor(name, shape))));
        }));
    }
    let headers = [
        (
            "overlap",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
        ),
        ("a gap", r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#),
        ("a side of 2^63", r#"{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}"#),
        (
            "sides that overflow",
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,12]}}"#,
        ),
        ("a negative offset", r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[-12,0]}}"#),
        ("integers", r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#),
        ("no tensor", "{}"),
    ];
    for (name, header) in headers {
        cases.push(case(format!("a header with {name}"), "mlp", move |copy| {
            with_header(copy, WEIGHTS, header, 12)
        }));
    }
    for length in [u64::MAX, 1 << 62, (8 << 20) + 1, 100_000] {
        cases.push(case(format!("a header of {length} bytes"), "mlp", move |copy| {
            copy.write(WEIGHTS, [&length.to_le_bytes()[..], &[b' '; 64]].concat());
        }));
    }
    cases.push(case("a header of many tensors", "mlp", |copy| {
        let tensor = |n| format!(r#""{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
        let header: Vec<String> = (0..100_000).map(tensor).collect();
        with_header(copy, WEIGHTS, &format!("{{{}}}", header.join(",")), 0);
    }));
    for part in 1..8_usize {
        cases.push(case(format!("{part} eighths of the weights"), "mlp", move |copy| {
            let bytes = fs::read(copy.path(WEIGHTS)).unwrap();
            copy.write(WEIGHTS, &bytes[..bytes.len() * part / 8]);
        }));
    }
    for shard in [
        "../outside.safetensors",
        "/etc/passwd.safetensors",
        "a/../b.safetensors",
        "config.json",
        "",
        "..",
        "nobody.safetensors",
    ] {
        cases.push(case(format!("a shard named {shard:?}"), "shards", move |copy| {
            let outside = copy.path("").parent().unwrap().join("outside.safetensors");
            assert!(!outside.exists());
            copy.edit_json("model.safetensors.index.json", |json| {
                json["weight_map"]["model.norm.weight"] = json!(shard);
            });
        }));
    }
    cases.push(case("100,000 shards", "shards", |copy| {
        copy.edit_json("model.safetensors.index.json", |json| {
            json["weight_map"] =
                (0..100_000).map(|n| (n.to_string(), json!(format!("{n}.safetensors")))).collect();
        });
    }));
    cases.push(says("model.safetensors.index.json", "/weight_map", "{}", "shards"));
    cases.push(tensors("no embeddings", WEIGHTS, "mlp", |t| cut(t, "embed_tokens.weight", 0)));
    cases.push(tensors("a row too few for the reward's token", WEIGHTS, "mlp", |t| {
        let rows = t[&key(t, "embed_tokens.weight")].1[0];
        cut(t, "embed_tokens.weight", rows - 1);
    }));
    cases.push(tensors("a head of one column", WEIGHTS, "mlp", |t| cut(t, "rm_head.5.weight", 1)));
    cases.push(tensors("a deviation that overflows", WEIGHTS, "mlp", |t| fill(t, "rm_head.5.bias", 1000.0)));
    cases.push(tensors("scores that overflow", WEIGHTS, "mlp", |t| {
        for layer in ["rm_head.0.weight", "rm_head.3.weight", "rm_head.5.weight"] {
            fill(t, layer, 1e30);
        }
    }));
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for end in ["embed_tokens.weight", "rm_head.0.bias", "visual.merger.ln_q.weight"] {
            cases.push(tensors(&format!("{value} in {end}"), WEIGHTS, "mlp", move |t| fill(t, end, value)));
        }
    }
    cases.push(tensors("none of a layer", WEIGHTS, "mlp", |t| {
        t.retain(|name, _| !name.contains("layers.1."))
    }));
    cases.push(tensors("one too many", WEIGHTS, "mlp", |t| {
        t.insert("model.layers.0.mlp.gate.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    }));
    cases
}

/// Heads that are none, and instructions for reading them that cannot be followed.
fn strange_heads() -> Vec<Case> {
    let layers = ["rm_head.0", "rm_head.3", "rm_head.5"];
    // The last of a Sequential of three is called otherwise.
    let names = [
        "rm_head",
        "rm_head.0.0",
        "rm_head.layer_1.0",
        "rm_head.layer_2.0",
        "rm_head.-1",
        "rm_head.+5",
        "rm_head.05",
        "rm_head. 5",
        "rm_head.18446744073709551616",
        "rm_head.output_layer.0",
        "rm_heads.head_0",
        "score",
        "",
    ];
    let mut cases: Vec<Case> = names
        .into_iter()
        .map(|name| {
            tensors(&format!("a head's layer named {name:?}"), WEIGHTS, "mlp", move |t| {
                for part in ["weight", "bias"] {
                    let tensor = t.remove(&format!("{}.{part}", layers[2])).unwrap();
                    t.insert(format!("{name}.{part}"), tensor);
                }
            })
        })
        .collect();
    for layer in layers {
        for part in ["weight", "bias"] {
            let name = format!("{layer}.{part}");
            for (what, shape) in [
                ("without rows", vec![0, 16]),
                ("without columns", vec![16, 0]),
                ("of one side", vec![16]),
                ("of no side", vec![]),
                ("of three sides", vec![1, 16, 16]),
                ("of one number", vec![1, 1]),
                ("that is wide", vec![2, 100_000]),
                ("that is tall", vec![100_000, 2]),
            ] {
                let name = name.clone();
                cases.push(tensors(&format!("{name} {what}"), WEIGHTS, "mlp", move |t| {
                    let numbers: usize = shape.iter().product();
                    t.insert(name.clone(), (Dtype::F32, shape.clone(), vec![0; 4 * numbers]));
                }));
            }
            for value in [f32::NAN, f32::NEG_INFINITY] {
                let name = name.clone();
                cases.push(tensors(&format!("{value} in {name}"), WEIGHTS, "mlp", move |t| {
                    fill(t, &name, value)
                }));
            }
            let integers = name.clone();
            cases.push(tensors(&format!("{name} of integers"), WEIGHTS, "mlp", move |t| {
                let tensor = t.get_mut(&integers).unwrap();
                tensor.0 = Dtype::I32;
            }));
            if part == "weight" {
                cases.push(tensors(&format!("no {name}"), WEIGHTS, "mlp", move |t| drop(t.remove(&name))));
            }
        }
    }
    cases.push(tensors("no head at all", WEIGHTS, "mlp", |t| {
        t.retain(|name, _| !name.starts_with("rm_head"))
    }));
    for end in [1_usize, 100_000] {
        cases.push(tensors(&format!("{end} layers more than the head has"), WEIGHTS, "mlp", move |t| {
            for n in 0..end {
                t.insert(format!("rm_head.{}.weight", 6 + n), (Dtype::F32, vec![1, 1], vec![0; 4]));
            }
        }));
    }
    cases.push(tensors("a head of two kinds", WEIGHTS, "mlp", |t| {
        let tensor = t["rm_head.0.weight"].clone();
        t.insert("rm_head.weight".into(), tensor);
    }));
    let table: [(&'static str, &'static [&'static str]); 7] = [
        ("/output", &["null", "4", "\"Gaussian\"", "[\"gaussian\"]", "{\"gaussian\": 4}"]),
        ("/pictures", &["0", "-1", "1000000000", "18446744073709551615", "1.5", "\"1\"", "null"]),
        ("/reward_token", &["null", "\"first\"", "7", "\"<|Reward|>\""]),
        ("/special_token", &["null", "\"\"", "\"a cup\"", "\"<|im_end|>\"", "7", "\"<|image_pad|>\""]),
        ("/positions", &["null", "\"rope\"", "{}"]),
        ("/notice", &["7", "[]"]),
        ("/output_dim", &["4", "2"]),
    ];
    for (key, values) in table {
        cases.extend(values.iter().map(|value| says("reward_config.json", key, value, "mlp")));
    }
    cases
}

fn strange_adapters() -> Vec<Case> {
    let on = "adapters/plain";
    let mut cases = Vec::new();
    let table: [(&'static str, &'static [&'static str]); 13] = [
        ("/r", &["0", "-1", "9223372036854775807", "2.5", "1e400", "\"2\""]),
        ("/lora_alpha", &["1e400", "1e308", "\"x\"", "NaN", "Infinity"]),
        ("/peft_type", &["\"IA3\"", "null", "7"]),
        ("/init_lora_weights", &["\"loftq\"", "\"pissa_niter_4\"", "7", "\"\""]),
        (
            "/rank_pattern",
            &["{\"q_proj\": 1e300}", "{\"q_proj\": 0}", "{\"(\": 1}", "{\"(a{1000}){1000}\": 1}", "[]"],
        ),
        ("/alpha_pattern", &["{\"q_proj\": 1e400}", "{\"(?!x)q_proj\": 1}"]),
        ("/use_dora", &["true"]),
        ("/layer_replication", &["[[0, 2], [0, 2]]"]),
        ("/alora_invocation_tokens", &["[1]"]),
        ("/trainable_token_indices", &["[1]", "[[1]]", "{\"embed_tokens\": [99999999999]}"]),
        ("/modules_to_save", &["[\"rm_head\"]", "7"]),
        ("/what_comes_next", &["1"]),
        (
            "/base_model_name_or_path",
            &["null", "\"\"", "\"/\"", "\"/proc\"", "\"..\"", "7", "\"/no/such/place\""],
        ),
    ];
    for (key, values) in table {
        cases.extend(values.iter().map(|value| says("adapter_config.json", key, value, on)));
    }
    cases.push(case("100,000 patterns", on, |copy| {
        copy.edit_json("adapter_config.json", |json| {
            json["alpha_pattern"] = (0..100_000).map(|n| (n.to_string(), json!(1))).collect();
        });
    }));
    cases.push(case("an adapter on itself", on, |copy| {
        let own = copy.name().to_owned();
        copy.edit_json("adapter_config.json", |json| json["base_model_name_or_path"] = json!(own));
    }));
    cases.push(case("an adapter on itself by another name", on, |copy| {
        symlink(copy.path(""), copy.path("again")).unwrap();
        let own = copy.path("again");
        copy.edit_json("adapter_config.json", |json| json["base_model_name_or_path"] = json!(own));
    }));
    cases.push(case("two adapters on each other", on, |copy| {
        let inner = copy.path("inner");
        fs::create_dir(&inner).unwrap();
        for file in ["adapter_config.json", ADAPTER] {
            fs::copy(copy.path(file), inner.join(file)).unwrap();
        }
        let own = copy.name().to_owned();
        copy.edit_json("inner/adapter_config.json", |json| json["base_model_name_or_path"] = json!(own));
        copy.edit_json("adapter_config.json", |json| json["base_model_name_or_path"] = json!(inner));
    }));
    cases.push(case("an adapter without a configuration", "mlp", |copy| {
        fs::copy(fixtures().join("adapters/plain").join(ADAPTER), copy.path(ADAPTER)).unwrap();
    }));
    cases.push(case("a configuration without an adapter", "mlp", |copy| {
        let file = "adapter_config.json";
        fs::copy(fixtures().join("adapters/plain").join(file), copy.path(file)).unwrap();
    }));
    for (end, value) in [("lora_A", f32::NAN), ("lora_B", f32::INFINITY), ("lora_B", f32::MAX)] {
        cases.push(tensors(&format!("{value} in {end}"), ADAPTER, on, move |t| {
            fill(t, &format!("{end}.weight"), value)
        }));
    }
    for end in ["q_proj.lora_A.weight", "v_proj.lora_B.weight"] {
        cases.push(tensors(&format!("no {end}"), ADAPTER, on, move |t| drop(t.remove(&key(t, end)))));
    }
    cases.push(tensors("nothing", ADAPTER, on, Tensors::clear));
    cases.push(tensors("rank 0", ADAPTER, on, |t| cut(t, "lora_A.weight", 0)));
    cases
}

/// What stands in a seeded case in place of a value.
fn nasty(rng: &mut StdRng) -> Value {
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(7),
        json!(0.5),
        json!(-1e300),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1_u64 << 40),
        json!(""),
        json!("x"),
        json!("\u{0}\u{ffff}<|im_end|>"),
        json!("x".repeat(100_000)),
        json!([]),
        json!([-1, 0, 1]),
        json!({}),
        json!({"type": "x"}),
    ];
    values[rng.random_range(0..values.len())].clone()
}

/// The paths to all values of a JSON file, but those of a vocabulary.
fn pointers(json: &Value, here: &str, found: &mut Vec<String>) {
    match json {
        Value::Object(map) if map.len() < 100 => {
            for (name, value) in map {
                let here = format!("{here}/{}", name.replace('~', "~0").replace('/', "~1"));
                found.push(here.clone());
                pointers(value, &here, found);
            }
        }
        Value::Array(list) if list.len() < 100 => {
            for (place, value) in list.iter().enumerate() {
                let here = format!("{here}/{place}");
                found.push(here.clone());
                pointers(value, &here, found);
            }
        }
        _ => {}
    }
}

/// A value of a file of settings that is another, or bytes of the weights that are others.
fn seeded(number: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(SEED + number as u64);
    let base =
        ["mlp", "flat", "half", "lora", "adapters/full_names", "adapters/tokens"][rng.random_range(0..6)];
    let files: &[&str] = match base {
        "adapters/full_names" | "adapters/tokens" => &["adapter_config.json"],
        "lora" => &["adapter_config.json", "config.json"],
        _ => &[
            "config.json",
            "config.json",
            "preprocessor_config.json",
            "reward_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
    };
    let file = files[rng.random_range(0..files.len())];
    let weights = if base.starts_with("adapters") { ADAPTER } else { WEIGHTS };
    let seed = rng.random();
    let bytes = number % 4 == 3;
    let name = format!("seeded {number}: {} of {base}", if bytes { weights } else { file });
    let break_it = move |copy: &Copy| {
        let mut rng = StdRng::seed_from_u64(seed);
        if bytes {
            let mut content = fs::read(copy.path(weights)).unwrap();
            for _ in 0..rng.random_range(1..4) {
                let place = rng.random_range(0..content.len().min(12_000));
                content[place] = rng.random();
            }
            copy.write(weights, content);
            return;
        }
        copy.edit_json(file, |json| {
            let mut places = Vec::new();
            pointers(json, "", &mut places);
            for _ in 0..rng.random_range(1..3) {
                let place = &places[rng.random_range(0..places.len())];
                if let Some(value) = json.pointer_mut(place) {
                    *value = nasty(&mut rng);
                }
            }
        });
    };
    Case { name, base, break_it: Box::new(break_it), broken: false }
}

fn corpus() -> Vec<Case> {
    let sorts = [absurd_settings(), strange_files(), strange_weights(), strange_heads(), strange_adapters()];
    let mut cases: Vec<Case> = sorts.into_iter().flatten().collect();
    cases.extend((0..SEEDED).map(seeded));
    cases
}

/// What `inspect` finds: nothing, or why it cannot be served.
fn inspected(name: &str, settings: &Settings) -> Result<(), String> {
    let files = CheckpointFiles::open(name, None, None).map_err(|e| e.to_string())?;
    let examination =
        Examination::of(&files, ProcessorLimits::from(&settings.limits)).map_err(|e| e.to_string())?;
    if let Some(fault) = examination.faults.first() {
        return Err(fault.to_string());
    }
    if let Some(fault) = examination.non_finite(|_| ()).map_err(|e| e.to_string())? {
        return Err(fault.to_string());
    }
    examination.rehearse().map(drop).map_err(|e| e.to_string())
}

/// What becomes of `serve`.
fn served(settings: &Settings) -> Result<(), String> {
    let loaded = engine::load(settings).map_err(|e| e.to_string())?;
    let (engine, lifeline) = Engine::start(settings, loaded).map_err(|e| e.to_string())?;
    drop(engine);
    lifeline.join();
    Ok(())
}

fn settings(name: &str) -> Settings {
    let flags = [("model.checkpoint", name), ("model.device", "cpu")];
    let flags = flags.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    Settings::load(&Sources { flags, ..Sources::default() }).unwrap()
}

/// Both, and how much work they were; or why they are not waited for any longer.
fn both(name: String) -> Result<([Result<(), String>; 2], Duration), String> {
    let (done, result) = mpsc::channel();
    let (start, before) = (Instant::now(), work());
    thread::spawn(move || {
        let settings = settings(&name);
        let caught = |work: &dyn Fn() -> Result<(), String>| {
            catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("PANIC".into()))
        };
        let _ = done.send([caught(&|| inspected(&name, &settings)), caught(&|| served(&settings))]);
    });
    loop {
        let results = result.recv_timeout(Duration::from_millis(20));
        let worked = work().saturating_sub(before);
        if worked > WORK {
            return Err(format!("it works for {worked:?}, and may for {WORK:?}"));
        }
        match results {
            Ok(results) => return Ok((results, worked)),
            Err(_) if start.elapsed() > PATIENCE => return Err("it waits for ever".into()),
            Err(_) => {}
        }
    }
}

/// The processor time of this process, all threads together.
fn work() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // The second field is a name in brackets, which may hold anything; ours are the 14th and 15th.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // Linux has 100 a second, whatever its own clock.
    Duration::from_millis(ticks * 10)
}

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn inspect_and_serve_agree_on_every_broken_checkpoint_and_outlive_it() {
    let only = std::env::var("HOSTILE").unwrap_or_default();
    let cases: Vec<Case> = corpus().into_iter().filter(|case| case.name.contains(&only)).collect();
    assert!(!only.is_empty() || cases.len() >= 300, "{}", cases.len());
    let (mut wrong, mut most, mut refused) = (Vec::new(), (Duration::ZERO, String::new()), 0);
    for case in &cases {
        let copy = case.make();
        let ([inspect, serve], took) = match both(copy.name().to_owned()) {
            Ok(done) => done,
            Err(reason) => {
                // Its thread goes on, and what comes after cannot be told from it.
                std::mem::forget(copy);
                wrong.push(format!("{}: {reason}", case.name));
                break;
            }
        };
        if std::env::var_os("HOSTILE").is_some() {
            println!("{} ({took:?})\n  inspect {inspect:?}\n  serve {serve:?}", case.name);
        }
        let text = |result: &Result<(), String>| result.clone().err().unwrap_or_default();
        let panicked = ["panicked", "PANIC", "a worker ended"]
            .iter()
            .any(|word| text(&inspect).contains(word) || text(&serve).contains(word));
        let bad = serve.is_ok() || panicked;
        if inspect.is_ok() != serve.is_ok() || case.broken && bad {
            wrong.push(format!("{}\n  inspect {inspect:?}\n  serve {serve:?}", case.name));
        }
        refused += usize::from(serve.is_err());
        most = most.max((took, case.name.clone()));
    }
    println!(
        "{} cases, {refused} refused, the most work {:?} ({}), {} MiB at most",
        cases.len(),
        most.0,
        most.1,
        peak() >> 20
    );
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert!(peak() < MEMORY, "{} MiB", peak() >> 20);
}

/// The same by the program itself, for a few of each sort: exit codes, and that it says why.
#[test]
fn the_program_says_the_same_of_them() {
    let cases = corpus();
    let program = |command: &str, name: &str, arguments: &[&str]| {
        let mut process = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
        process.arg(command).args(arguments).arg(name).stdout(Stdio::piped()).stderr(Stdio::piped());
        process.output().unwrap()
    };
    for case in cases.iter().filter(|case| case.broken).step_by(23) {
        let copy = case.make();
        let inspect = program("inspect", copy.name(), &[]);
        let serve = program(
            "serve",
            copy.name(),
            &["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--device=cpu", "--checkpoint"],
        );
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(inspect.status.code(), Some(1), "{}: {}", case.name, text(&inspect.stdout));
        assert_eq!(serve.status.code(), Some(1), "{}: {}", case.name, text(&serve.stderr));
        assert!(!text(&inspect.stdout).contains("can be served"), "{}", case.name);
    }
}
