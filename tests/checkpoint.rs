//! What a checkpoint may be, and what is refused: with the file, the key and both shapes, and never half loaded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/copies.rs"]
mod copies;
#[path = "common/golden.rs"]
mod golden;

use std::fs;
use std::path::Path;

use copies::key;
use golden::Case;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use spatialscore::model::checkpoint::{CheckpointError, CheckpointFiles};
use spatialscore::model::{Normalisation, RewardModel};
use tch::{Device, Kind};

const PLAIN: Normalisation = Normalisation { rescale: 1.0 / 255.0, mean: [0.5; 3], std: [0.5; 3] };

/// A copy of a case's checkpoint, to be broken.
struct Copy(copies::Copy);

impl std::ops::Deref for Copy {
    type Target = copies::Copy;

    fn deref(&self) -> &copies::Copy {
        &self.0
    }
}

impl Copy {
    fn of(case: &str) -> Self {
        Self(copies::Copy::of(Path::new(&Case::open(case).checkpoint())))
    }

    fn load(&self) -> Result<RewardModel, CheckpointError> {
        let files = CheckpointFiles::open(self.name(), None, None)?;
        RewardModel::load(&files, PLAIN, Device::Cpu, Kind::Float)
    }

    /// The refusal's text, which must hold all of `parts`.
    fn refused(&self, parts: &[&str]) {
        let text = self.load().map(|_| ()).expect_err("loaded").to_string();
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }
}

#[test]
fn a_missing_tensor_is_named_with_its_shape() {
    let copy = Copy::of("mlp");
    copy.edit_tensors("model.safetensors", |tensors| {
        let name = key(tensors, "layers.0.mlp.up_proj.weight");
        tensors.remove(&name);
    });
    copy.refused(&["model.safetensors", "layers.0.mlp.up_proj.weight", "is missing", "should be ["]);
}

#[test]
fn an_unexpected_tensor_is_named_as_it_stands_on_disk() {
    let copy = Copy::of("mlp");
    copy.edit_tensors("model.safetensors", |tensors| {
        tensors.insert("model.layers.0.mlp.gate.weight".into(), (Dtype::F32, vec![2, 3], vec![0; 24]));
    });
    copy.refused(&["model.layers.0.mlp.gate.weight [2, 3] is unexpected"]);
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let copy = Copy::of("mlp");
    let mut shapes = String::new();
    copy.edit_tensors("model.safetensors", |tensors| {
        let name = key(tensors, "layers.0.self_attn.k_proj.weight");
        let (dtype, shape, data) = tensors.get_mut(&name).unwrap();
        let (was, size) = (shape.clone(), data.len() / shape[0] / shape[1]);
        shape[0] -= 1;
        data.truncate(shape[0] * shape[1] * size);
        assert_eq!(*dtype, Dtype::F32);
        shapes = format!("is {shape:?}, should be {was:?}");
    });
    copy.refused(&["layers.0.self_attn.k_proj.weight", &shapes]);
}

#[test]
fn every_fault_is_told_at_once() {
    let copy = Copy::of("mlp");
    copy.edit_tensors("model.safetensors", |tensors| {
        let norm = key(tensors, "layers.1.input_layernorm.weight");
        tensors.remove(&norm);
        tensors.insert("visual.spare".into(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    copy.refused(&["2 of its tensors", "layers.1.input_layernorm.weight", "visual.spare"]);
}

#[test]
fn a_head_whose_layers_do_not_fit_together_is_refused() {
    let copy = Copy::of("mlp");
    copy.edit_tensors("model.safetensors", |tensors| {
        let last = tensors.keys().rfind(|k| k.starts_with("rm_head") && k.ends_with("weight")).unwrap();
        let last = last.clone();
        let (_, shape, data) = tensors.get_mut(&last).unwrap();
        data.extend_from_within(..shape[1] * 4);
        shape[0] += 1;
    });
    copy.refused(&["rm_head.", "should be [2, "]);
}

#[test]
fn nan_and_infinity_are_refused() {
    for (value, case) in [(f32::NAN, "mlp"), (f32::INFINITY, "mlp")] {
        let copy = Copy::of(case);
        let mut name = String::new();
        copy.edit_tensors("model.safetensors", |tensors| {
            name = key(tensors, "visual.merger.mlp.2.weight");
            let (_, _, data) = tensors.get_mut(&name).unwrap();
            let end = data.len() - 4;
            data[end..].copy_from_slice(&value.to_le_bytes());
        });
        copy.refused(&["model.safetensors", &name, "NaN or an infinity"]);
    }
    // In bfloat16 the check takes another way.
    let copy = Copy::of("shards");
    let shard = fs::read_dir(copy.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .find(|n| n.starts_with("model-00001"))
        .unwrap();
    copy.edit_tensors(&shard, |tensors| {
        let (dtype, _, data) = tensors.values_mut().next().unwrap();
        assert_eq!(*dtype, Dtype::BF16);
        data[..2].copy_from_slice(&0x7f80_u16.to_le_bytes());
    });
    copy.refused(&[&shard, "NaN or an infinity"]);
}

#[test]
fn truncated_and_foreign_files_are_refused() {
    let whole = fs::read(Copy::of("mlp").path("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, header - 1, header, header + 1, whole.len() - 1] {
        let copy = Copy::of("mlp");
        fs::write(copy.path("model.safetensors"), &whole[..length]).unwrap();
        copy.refused(&["model.safetensors"]);
    }
    for foreign in [&b"PK\x03\x04 this is a pickle, not a safetensors file"[..], &[0xff; 64], &[0; 64]] {
        let copy = Copy::of("mlp");
        fs::write(copy.path("model.safetensors"), foreign).unwrap();
        copy.refused(&["model.safetensors"]);
    }
}

#[test]
fn a_missing_file_is_named() {
    for (case, file) in [("mlp", "config.json"), ("mlp", "reward_config.json"), ("mlp", "model.safetensors")]
    {
        let copy = Copy::of(case);
        fs::remove_file(copy.path(file)).unwrap();
        copy.refused(&[file, "missing"]);
    }
    let copy = Copy::of("shards");
    let shard = fs::read_dir(copy.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .find(|n| n.starts_with("model-00002"))
        .unwrap();
    fs::remove_file(copy.path(&shard)).unwrap();
    copy.refused(&[&shard, "missing"]);
}

#[test]
fn a_configuration_that_cannot_be_served_says_what_would_be_right() {
    let cases: [(&str, Value, &str); 6] = [
        ("/model_type", json!("llava"), "must be \"qwen2_vl\" or \"qwen2_5_vl\" or \"qwen3_vl\""),
        ("/text_config/num_key_value_heads", json!(0), "num_key_value_heads is 0, must be at least 1"),
        ("/text_config/hidden_act", json!("gelu"), "must be \"silu\""),
        ("/text_config/rope_parameters/mrope_section", json!([1, 1, 1]), "must add up to half"),
        ("/vision_config/out_hidden_size", json!(7), "they must be equal"),
        ("/vision_config/num_heads", json!(3), "must be a multiple"),
    ];
    for (pointer, value, reason) in cases {
        let copy = Copy::of("deep");
        copy.edit_json("config.json", |json| *json.pointer_mut(pointer).unwrap() = value);
        copy.refused(&["config.json", reason]);
    }
    let copy = Copy::of("deep");
    copy.edit_json("reward_config.json", |json| json["reward_tokn"] = json!("last"));
    copy.refused(&["reward_config.json", "reward_tokn"]);
}

#[test]
fn an_adapter_alone_finds_its_base() {
    let whole = Copy::of("lora");
    let expected = whole.load().unwrap();
    let adapter = Copy(copies::Copy::empty());
    for file in ["adapter_config.json", "adapter_model.safetensors", "reward_config.json"] {
        fs::rename(whole.path(file), adapter.path(file)).unwrap();
    }
    adapter.edit_json("adapter_config.json", |json| {
        json["base_model_name_or_path"] = json!(whole.name());
    });
    let sample = Case::open("lora").sample(0).unwrap();
    let [a, b] =
        [expected, adapter.load().unwrap()].map(|model| model.trace(&sample).unwrap().pop().unwrap().1);
    assert_eq!(a, b);
}

#[test]
fn names_that_are_no_checkpoint_are_explained() {
    let error = CheckpointFiles::open("/no/such/place", None, None).unwrap_err().to_string();
    assert!(error.contains("nor a directory, nor a hub id"), "{error}");
    assert!(Path::new(&Case::open("mlp").checkpoint()).is_dir());
}
