//! Shapes of models that can be made without a checkpoint, with random weights, to measure a device.

use serde_json::Value;

use super::config::Config;

/// A shape with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Qwen2.5-VL-7B, the base of the paper's reward model.
    Qwen25Vl7b,
    /// The same architecture, small enough for a test.
    Tiny,
}

impl Shape {
    /// `config.json`, as transformers reads it too.
    pub fn json(self) -> &'static str {
        match self {
            Self::Qwen25Vl7b => include_str!("shapes/qwen2.5-vl-7b.json"),
            Self::Tiny => include_str!("shapes/tiny.json"),
        }
    }

    /// The configuration, and the rows of the vocabulary.
    ///
    /// # Errors
    /// The file that this program carries is wrong.
    pub fn config(self) -> Result<(Config, i64), String> {
        let json: Value = serde_json::from_str(self.json()).map_err(|e| e.to_string())?;
        let rows = json.pointer("/text_config/vocab_size").and_then(Value::as_i64);
        Ok((Config::from_json(&json)?, rows.ok_or("no vocab_size")?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parameters(config: &Config, rows: i64) -> i64 {
        config.tensors(rows).into_iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }

    #[test]
    fn the_large_shape_has_the_parameters_of_the_published_model() {
        let (config, rows) = Shape::Qwen25Vl7b.config().unwrap();
        // Qwen/Qwen2.5-VL-7B-Instruct has 8,292,166,656 parameters, 152064 × 3584 of them lm_head's.
        assert_eq!(parameters(&config, rows), 8_292_166_656 - 152_064 * 3584);
        Shape::Tiny.config().unwrap();
    }

    /// A decoder as the published configurations have it, with the keys at the top or in a section.
    fn decoder([hidden, intermediate, layers, heads, key_value_heads]: [i64; 5], section: Value) -> Value {
        let mut decoder = json!({
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 128,
            "rope_scaling": {"rope_type": "default", "mrope_section": section},
        });
        if section == json!([16, 24, 24]) {
            decoder.as_object_mut().unwrap().remove("head_dim");
        }
        decoder
    }

    /// What each published model has by the hub's count, `lm_head` among it where it is not tied.
    #[test]
    fn each_published_size_has_the_parameters_that_the_hub_counts() {
        let of = |family: &str, text: Value, vision: Value| {
            let json = json!({"model_type": family, "text_config": text, "vision_config": vision});
            Config::from_json(&json).unwrap()
        };
        let qwen2 = |shape: [i64; 5]| {
            let vision = json!({"depth": 32, "embed_dim": 1280, "hidden_size": shape[0], "in_chans": 3});
            of("qwen2_vl", decoder(shape, json!([16, 24, 24])), vision)
        };
        let qwen2_5 = |shape: [i64; 5], intermediate: i64| {
            let vision = json!({
                "hidden_size": 1280, "intermediate_size": intermediate, "out_hidden_size": shape[0],
            });
            of("qwen2_5_vl", decoder(shape, json!([16, 24, 24])), vision)
        };
        let qwen3 = |shape: [i64; 5], [depth, hidden, intermediate]: [i64; 3]| {
            let vision = json!({
                "depth": depth, "hidden_size": hidden, "intermediate_size": intermediate,
                "out_hidden_size": shape[0], "deepstack_visual_indexes": [5, 11, 17],
            });
            of("qwen3_vl", decoder(shape, json!([24, 20, 20])), vision)
        };
        let (large, small) = (152_064, 151_936);
        for (name, config, rows, tied, counted) in [
            ("Qwen2-VL-2B", qwen2([1536, 8960, 28, 12, 2]), small, true, 2_208_985_600),
            ("Qwen2-VL-7B", qwen2([3584, 18944, 28, 28, 4]), large, false, 8_291_375_616),
            ("Qwen2.5-VL-3B", qwen2_5([2048, 11008, 36, 16, 2], 3420), small, true, 3_754_622_976),
            ("Qwen2.5-VL-32B", qwen2_5([5120, 27648, 64, 40, 8], 3456), large, false, 33_452_718_336),
            ("Qwen2.5-VL-72B", qwen2_5([8192, 29568, 80, 64, 8], 3456), large, false, 73_410_777_344),
            ("Qwen3-VL-2B", qwen3([2048, 6144, 28, 16, 8], [24, 1024, 4096]), small, true, 2_127_532_032),
            ("Qwen3-VL-4B", qwen3([2560, 9728, 36, 32, 8], [24, 1024, 4096]), small, true, 4_437_815_808),
            ("Qwen3-VL-8B", qwen3([4096, 12288, 36, 32, 8], [27, 1152, 4304]), small, false, 8_767_123_696),
        ] {
            let logits = if tied { 0 } else { rows * config.text.hidden_size };
            assert_eq!(parameters(&config, rows) + logits, counted, "{name}");
        }
    }
}
