//! Loading holds no second copy of the weights in the host's memory.
//!
//! The only test of its process, so that the process's peak is its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::fs::{self, File};
use std::io::Write;

use common::process::own_memory;
use serde_json::{Map, Value, json};
use spatialscore::model::backbone::Config;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::{Normalisation, RewardModel};
use tch::{Device, Kind};

#[test]
fn loading_needs_less_than_a_gibibyte_beside_the_weights() {
    // Wide enough that the embeddings alone are larger than the bound, as a 7B checkpoint's are.
    let config = json!({
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
            "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048,
            "fullatt_block_indexes": [1],
        },
    });
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut tensors = Config::from_json(&config).unwrap().tensors(300_000);
    tensors.push(("rm_head.weight".into(), vec![1, 2048]));

    let (mut header, mut end) = (Map::new(), 0_u64);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<i64>() as u64;
        let name = name.replace("language_model.", "model.");
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(directory.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // The weights are a hole: zeros that take no room on disk.
    file.set_len(8 + header.len() as u64 + end).unwrap();
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let reward = json!({
        "instruction": "{prompt}", "reward_token": "last", "positions": "mrope", "output": "scalar",
    });
    fs::write(directory.path().join("reward_config.json"), reward.to_string()).unwrap();

    let before = own_memory("VmRSS");
    let files = CheckpointFiles::open(directory.path().to_str().unwrap(), None, None).unwrap();
    let plain = Normalisation { rescale: 1.0 / 255.0, mean: [0.5; 3], std: [0.5; 3] };
    let model = RewardModel::load(&files, plain, Device::Cpu, Kind::BFloat16).unwrap();
    let beside = (own_memory("VmHWM") - before).saturating_sub(end);
    drop(model);
    println!("weights {} MiB, peak beside them {} MiB", end >> 20, beside >> 20);
    assert!(end > 3 << 29, "too small to tell: {end} bytes");
    assert!(beside < 1 << 30, "{} MiB beside the weights", beside >> 20);
}
