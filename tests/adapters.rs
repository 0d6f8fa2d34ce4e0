//! LoRA adapters against PEFT: every kind that it saves has the score that it gives, and what cannot be merged is
//! refused by name. `tests/reference/make_adapters.py` made the fixtures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/copies.rs"]
mod copies;
#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use copies::{Copy, key};
use golden::{Case, fixtures};
use serde::Deserialize;
use serde_json::{Value, json};
use spatialscore::model::checkpoint::{CheckpointError, CheckpointFiles};
use spatialscore::model::{Normalisation, RewardModel, Sample, Scorer};
use spatialscore::processor::{Processor, ProcessorLimits};
use tch::{Device, Kind};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const BASE: &str = "mlp";

/// A kind of adapter and its score by PEFT.
#[derive(Deserialize)]
struct AdapterKind {
    /// What it stands on: the base, or another kind.
    on: String,
    mean: f32,
}

fn kinds() -> BTreeMap<String, AdapterKind> {
    serde_json::from_slice(&fs::read(fixtures().join("adapters/cases.json")).unwrap()).unwrap()
}

/// An adapter and all that it stands on, the outermost first; the base itself stays where it is.
fn stack(kind: &str) -> Vec<Copy> {
    if kind == BASE {
        return Vec::new();
    }
    let on = &kinds()[kind].on;
    let below = stack(on);
    let copy = Copy::of(&fixtures().join("adapters").join(kind));
    let base = below.first().map_or_else(|| Case::open(BASE).checkpoint(), |copy| copy.name().to_owned());
    copy.edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(base));
    [vec![copy], below].into_iter().flatten().collect()
}

fn mean(name: &str, sample: &Sample) -> Result<f32, CheckpointError> {
    let files = CheckpointFiles::open(name, None, None)?;
    let plain = Normalisation { rescale: 1.0 / 255.0, mean: [0.5; 3], std: [0.5; 3] };
    // The fixtures' own normalisation, where there is a processor.
    let reward = files.require_json("reward_config.json")?;
    let processor = Processor::load(&files, &reward, ProcessorLimits::NONE);
    let normalisation = processor.map_or(plain, |processor| processor.normalisation());
    let mut model = RewardModel::load(&files, normalisation, Device::Cpu, Kind::Float)?;
    Ok(model.score(&[sample]).unwrap()[0].mean)
}

fn sample() -> Sample {
    Case::open(BASE).sample(0).unwrap()
}

#[test]
fn every_kind_has_the_score_that_peft_gives_it() {
    let sample = sample();
    let plain = mean(&Case::open(BASE).checkpoint(), &sample).unwrap();
    let mut worst = 0.0_f32;
    for (name, kind) in kinds() {
        let stack = stack(&name);
        let ours = mean(stack[0].name(), &sample).unwrap_or_else(|e| panic!("{name}: {e}"));
        // How far the adapter moves the score is its size, where the score itself is near zero.
        let size = kind.mean.abs().max((kind.mean - plain).abs());
        let difference = (ours - kind.mean).abs() / size;
        println!("{name:<20} {ours:>9.5} {:>9.5} {difference:.1e}", kind.mean);
        assert!(difference <= 1e-4, "{name}: {ours}, PEFT {}", kind.mean);
        worst = worst.max(difference);
    }
    println!("worst relative difference: {worst:.2e}");
    assert!(kinds().len() >= 30);
}

/// Adapters beside whole weights, on which another stands.
#[test]
fn an_adapter_beside_whole_weights_is_merged_before_what_stands_on_it() {
    let sample = sample();
    let stack = stack("on_plain");
    let whole = Copy::of(Path::new(&Case::open(BASE).checkpoint()));
    for file in [CONFIG, WEIGHTS] {
        fs::copy(stack[1].path(file), whole.path(file)).unwrap();
    }
    // What it names is not asked for: the weights are here.
    whole.edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!("/no/such/place"));
    stack[0].edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(whole.name()));
    let [ours, peft] = [mean(stack[0].name(), &sample).unwrap(), kinds()["on_plain"].mean];
    assert!((ours - peft).abs() <= 1e-4 * peft.abs(), "{ours}, PEFT {peft}");
}

/// The refusal of an adapter with an edit, which must hold all of `parts`.
fn refused(kind: &str, edit: impl FnOnce(&Copy), parts: &[&str]) {
    let stack = stack(kind);
    edit(&stack[0]);
    let error = mean(stack[0].name(), &sample()).expect_err("loaded").to_string();
    for part in parts {
        assert!(error.contains(part), "{kind}: {part:?} is not in {error:?}");
    }
}

fn says(key: &'static str, value: Value) -> impl FnOnce(&Copy) {
    move |copy: &Copy| copy.edit_json(CONFIG, |json| json[key] = value)
}

#[test]
fn keys_that_change_numbers_in_ways_that_are_not_merged_are_refused_by_name() {
    let cases: [(&str, Value, &str); 23] = [
        ("peft_type", json!("IA3"), "must be \"LORA\""),
        ("r", json!(0), "at least 1"),
        ("r", json!(2.0), "expected i64"),
        ("lora_alpha", json!("8"), "expected f64"),
        ("bias", json!("some"), "must be \"none\", \"all\" or \"lora_only\""),
        ("init_lora_weights", json!("pissa_niter_16"), "drawn at random"),
        ("init_lora_weights", json!("corda"), "what only its training knew"),
        ("init_lora_weights", json!("loftq"), "what only its training knew"),
        ("init_lora_weights", json!("lora_ga"), "what only its training knew"),
        ("init_lora_weights", json!("svd_of_tomorrow"), "does not know"),
        ("alora_invocation_tokens", json!([1, 2]), "tokens behind these"),
        ("layer_replication", json!([[0, 2]]), "repeats layers"),
        ("use_dora", json!(true), "magnitude"),
        ("use_qalora", json!(true), "pooled"),
        ("use_bdlora", json!({"nblocks": 2}), "block-diagonal"),
        ("arrow_config", json!({"top_k": 1}), "chosen between"),
        ("kasa_config", json!({"beta": 1e-4}), "singular values"),
        ("monteclora_config", json!({"num_samples": 8}), "draws samples"),
        ("velora_config", json!({"rank": 1}), "another kind"),
        ("megatron_config", json!({"hidden_size": 8}), "Megatron"),
        ("target_parameters", json!(["experts.up_proj"]), "on parameters"),
        ("use_something_new", json!(true), "does not know what that does"),
        ("alpha_pattern", json!({"q_proj(": 3}), "alpha_pattern"),
    ];
    for (key, value, reason) in cases {
        refused("plain", says(key, value), &[CONFIG, key, reason]);
    }
    // What says nothing, and what PEFT itself ignores, is let pass.
    let stack = stack("plain");
    stack[0].edit_json(CONFIG, |json| {
        json["use_something_new"] = json!(null);
        json["fan_in_fan_out"] = json!(true);
        json["lora_dropout"] = json!(0.1);
        json["eva_config"] = json!({"rho": 2.0});
    });
    let [ours, peft] = [mean(stack[0].name(), &sample()).unwrap(), kinds()["plain"].mean];
    assert!((ours - peft).abs() <= 1e-4 * peft.abs(), "{ours}, PEFT {peft}");
}

#[test]
fn patterns_that_mean_another_name_of_a_module_are_refused_where_they_are_a_guess() {
    let old = json!({"model.layers.0.self_attn.q_proj": 12});
    refused("plain", says("alpha_pattern", old), &[CONFIG, "alpha_pattern", "before transformers 4.52"]);
    let both =
        json!({"model.layers.0.self_attn.q_proj": 12, "model.language_model.layers.0.self_attn.q_proj": 3});
    refused("old_plain", says("alpha_pattern", both), &["alpha_pattern says 12", "and 3", "must say one"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_the_adapters_own_file() {
    let drop = |end: &'static str| {
        move |copy: &Copy| {
            copy.edit_tensors(WEIGHTS, |tensors| drop(tensors.remove(&key(tensors, end))));
        }
    };
    refused(
        "plain",
        drop("q_proj.lora_B.weight"),
        &[WEIGHTS, "q_proj.lora_B.weight is missing, should be [48, 2]"],
    );
    refused("embedding", drop("lora_embedding_B"), &[WEIGHTS, "lora_embedding_B is missing"]);
    refused("lora_bias", drop("q_proj.lora_B.bias"), &[WEIGHTS, "lora_B.bias is missing"]);
    refused("tokens", drop("trainable_tokens_delta"), &["trainable_tokens_delta is missing"]);
    refused("tokens", says("trainable_token_indices", json!([5, 300])), &["should be [2, 48]"]);
    refused("tokens", says("trainable_token_indices", json!([5, 300, 100_000])), &["has 100000"]);
    refused("tokens", says("trainable_token_indices", json!([5, -1, 7])), &["has -1"]);
    refused("tokens", says("trainable_token_indices", json!([5, 5, 7])), &["twice"]);
    refused("tokens", says("trainable_token_indices", json!(null)), &["does not say which rows"]);
    refused("plain", says("rank_pattern", json!({"q_proj": 3})), &[WEIGHTS, "is [2, 48], should be [3, 48]"]);
    refused("plain", says("modules_to_save", json!(["rm_head"])), &[WEIGHTS, "rm_head.0.weight is missing"]);
    // The output projection has no bias.
    refused("gaussian", says("lora_bias", json!(true)), &["lora_bias", "o_proj has no bias"]);
    refused("plain", says("lora_bias", json!(true)), &["lora_B.bias is missing"]);
    let spare = |copy: &Copy| {
        copy.edit_tensors(WEIGHTS, |tensors| {
            let lora = tensors[&key(tensors, "q_proj.lora_A.weight")].clone();
            tensors.insert(
                "base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight".into(),
                lora,
            );
        });
    };
    refused("plain", spare, &[WEIGHTS, "layers.7.mlp.up_proj.lora_A.weight", "unexpected"]);
    for value in [f32::NAN, f32::INFINITY, f32::MAX] {
        let poison = move |copy: &Copy| {
            copy.edit_tensors(WEIGHTS, |tensors| {
                let name = key(tensors, "q_proj.lora_B.weight");
                for number in tensors.get_mut(&name).unwrap().2.chunks_exact_mut(4) {
                    number.copy_from_slice(&value.to_le_bytes());
                }
            });
        };
        refused("plain", poison, &[WEIGHTS, "q_proj.lora_", "NaN or an infinity"]);
    }
    // `lm_head` is the table of embeddings here.
    let head = |copy: &Copy| {
        copy.edit_tensors(WEIGHTS, |tensors| {
            let lora = tensors[&key(tensors, "q_proj.lora_A.weight")].clone();
            tensors.insert("base_model.model.lm_head.lora_A.weight".into(), lora);
        });
    };
    refused("plain", head, &["lm_head", "ties"]);
    refused("pissa", says("lora_alpha", json!(-6)), &["init_lora_weights", "above 0"]);
}

#[test]
fn an_adapter_without_its_other_half_is_refused() {
    refused(
        "plain",
        |copy| fs::remove_file(copy.path(CONFIG)).unwrap(),
        &[WEIGHTS, "adapter_config.json is missing"],
    );
    refused(
        "plain",
        |copy| fs::remove_file(copy.path(WEIGHTS)).unwrap(),
        &["adapter_model.safetensors", "missing"],
    );
    let pickle = |copy: &Copy| {
        fs::rename(copy.path(WEIGHTS), copy.path("adapter_model.bin")).unwrap();
    };
    refused("plain", pickle, &["adapter_model.bin", "never reads", "spatialscore-convert"]);
    refused("plain", says("base_model_name_or_path", json!(null)), &[CONFIG, "base_model_name_or_path"]);
    refused("plain", says("base_model_name_or_path", json!("/no/such/place")), &[CONFIG, "/no/such/place"]);
}

#[test]
fn adapters_that_lead_in_a_circle_or_too_far_are_refused() {
    let stack = stack("on_plain");
    stack[1].edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(stack[0].name()));
    let error = CheckpointFiles::open(stack[0].name(), None, None).unwrap_err().to_string();
    assert!(error.contains("back to the adapter itself") && error.contains(stack[1].name()), "{error}");
    stack[0].edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(stack[0].name()));
    let error = CheckpointFiles::open(stack[0].name(), None, None).unwrap_err().to_string();
    assert!(error.contains("back to the adapter itself"), "{error}");
    let copies: Vec<Copy> = (0..9).map(|_| Copy::of(&fixtures().join("adapters/plain"))).collect();
    for pair in copies.windows(2) {
        pair[0].edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(pair[1].name()));
    }
    let error = CheckpointFiles::open(copies[0].name(), None, None).unwrap_err().to_string();
    assert!(error.contains("past 8 folders"), "{error}");
}

/// What the adapter's folder says on a subject it says alone.
#[test]
fn files_of_two_folders_are_not_mixed_on_one_subject() {
    let base = Copy::of(Path::new(&Case::open(BASE).checkpoint()));
    let adapter = &stack("plain")[0];
    adapter.edit_json(CONFIG, |json| json["base_model_name_or_path"] = json!(base.name()));
    let read = |file: &str| {
        let files = CheckpointFiles::open(adapter.name(), None, None).unwrap();
        files.read(file).unwrap().map(|bytes| String::from_utf8(bytes.into_owned()).unwrap())
    };
    let template = |file: &str| {
        let files = CheckpointFiles::open(adapter.name(), None, None).unwrap().of_chat_template().unwrap();
        files.read(file).unwrap().map(|bytes| String::from_utf8(bytes.into_owned()).unwrap())
    };
    // Nothing of its own: all is the base's.
    assert!(read("chat_template.jinja").is_some() && read("tokenizer.json").is_some());
    // A template inside tokenizer_config.json beats the base's file; the base's vocabulary stays.
    adapter.write("tokenizer_config.json", r#"{"chat_template": "ours"}"#);
    assert_eq!(template("chat_template.jinja"), None);
    assert!(template("tokenizer_config.json").unwrap().contains("ours"));
    assert_eq!(read("chat_template.jinja"), None);
    assert!(read("tokenizer.json").is_some());
    // One without a template says nothing of templates.
    adapter.write("tokenizer_config.json", r#"{"eos_token": "x"}"#);
    assert!(template("chat_template.jinja").is_some() && read("chat_template.jinja").is_some());
    base.write("tokenizer_config.json", r#"{"chat_template": "theirs"}"#);
    fs::remove_file(base.path("chat_template.jinja")).unwrap();
    assert!(template("tokenizer_config.json").unwrap().contains("theirs"));
    assert!(read("tokenizer_config.json").unwrap().contains("eos_token"));
    // The other way round.
    adapter.write("chat_template.json", r#"{"chat_template": "ours"}"#);
    base.write("chat_template.jinja", "theirs");
    assert_eq!(template("chat_template.jinja"), None);
    // Its preprocessor beats the base's processor, and one file without settings of pictures says nothing of them.
    base.write("processor_config.json", r#"{"image_processor": {"patch_size": 1}}"#);
    assert!(read("processor_config.json").unwrap().contains("patch_size"));
    adapter.write("processor_config.json", r#"{"processor_class": "P"}"#);
    assert!(read("processor_config.json").unwrap().contains("patch_size"));
    adapter.write("preprocessor_config.json", "{}");
    assert!(!read("processor_config.json").unwrap().contains("patch_size"));
    assert_eq!(read("preprocessor_config.json").unwrap(), "{}");
    // A vocabulary of its own stands alone.
    base.write("added_tokens.json", "{}");
    assert!(read("added_tokens.json").is_some());
    adapter.write("tokenizer.json", "{}");
    assert_eq!(read("added_tokens.json"), None);
}
