//! The families of models that are served, and what their configurations call by other names.

use serde_json::{Map, Value, json};

use super::config_rope::{INTERLEAVED, Kind, MULTIMODAL};

/// A family of models, which the `model_type` of a checkpoint's `config.json` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Qwen2-VL.
    Qwen2Vl,
    /// Qwen2.5-VL.
    #[default]
    Qwen25Vl,
    /// Qwen3-VL, dense.
    Qwen3Vl,
}

impl Family {
    /// Those that are served.
    const ALL: [Self; 3] = [Self::Qwen2Vl, Self::Qwen25Vl, Self::Qwen3Vl];

    /// The `model_type` of the family.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Qwen2Vl => "qwen2_vl",
            Self::Qwen25Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// The family of a `config.json`.
    pub(super) fn of(top: &Map<String, Value>) -> Result<Self, String> {
        let served = Self::ALL.map(|family| format!("{:?}", family.model_type())).join(" or ");
        match top.get("model_type").and_then(Value::as_str) {
            Some(named) => Self::ALL
                .into_iter()
                .find(|family| family.model_type() == named)
                .ok_or_else(|| format!("model_type is {named:?}, must be {served}")),
            None => Err(format!("model_type is missing, must be {served}")),
        }
    }

    /// What the family's `vision_config` says under the names and with the defaults of Qwen2.5-VL's.
    pub(super) fn vision_section(self, said: &Map<String, Value>) -> Result<Map<String, Value>, String> {
        match self {
            Self::Qwen2Vl => qwen2_vision(said),
            Self::Qwen25Vl => Ok(said.clone()),
            Self::Qwen3Vl => Ok(over(
                said,
                json!({
                    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304,
                    "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
                }),
            )),
        }
    }

    /// What the family's `text_config` says with the defaults of Qwen2.5-VL's.
    pub(super) fn text_section(self, said: &Map<String, Value>) -> Map<String, Value> {
        match self {
            Self::Qwen2Vl | Self::Qwen25Vl => said.clone(),
            Self::Qwen3Vl => over(
                said,
                json!({
                    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 128_000,
                    "rms_norm_eps": 1e-6,
                }),
            ),
        }
    }

    /// A fault that speaks of Qwen2.5-VL's names in those of this family.
    pub(super) fn in_its_names(self, fault: String) -> String {
        match self {
            Self::Qwen2Vl => fault
                .replace("vision_config.hidden_size", "vision_config.embed_dim")
                .replace("vision_config.out_hidden_size", "vision_config.hidden_size"),
            Self::Qwen25Vl | Self::Qwen3Vl => fault,
        }
    }

    /// The activations of the vision tower's MLPs that are supported, by the reference's names: one function.
    pub(super) fn vision_activations(self) -> &'static [&'static str] {
        match self {
            Self::Qwen2Vl => &["quick_gelu"],
            Self::Qwen25Vl => &["silu", "swish"],
            Self::Qwen3Vl => &["gelu_pytorch_tanh"],
        }
    }

    /// The decoder's rope.
    pub(super) fn rope(self) -> &'static Kind {
        match self {
            Self::Qwen2Vl | Self::Qwen25Vl => &MULTIMODAL,
            Self::Qwen3Vl => &INTERLEAVED,
        }
    }
}

/// Qwen2-VL calls the tower's width `embed_dim`, the decoder's `hidden_size`, and has a ratio for the MLP's.
fn qwen2_vision(said: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let defaults =
        json!({"embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4});
    let mut section = over(said, defaults);
    let ratio = section.remove("mlp_ratio").unwrap_or_default();
    let ratio = ratio.as_i64().ok_or(format!("vision_config.mlp_ratio is {ratio}, must be an integer"))?;
    let [tower, decoder] = ["embed_dim", "hidden_size"].map(|key| section.remove(key).unwrap_or_default());
    // What is no number is refused by its key.
    if let Some(width) = tower.as_i64() {
        section.insert("intermediate_size".into(), json!(width.saturating_mul(ratio)));
    }
    section.insert("hidden_size".into(), tower);
    section.insert("out_hidden_size".into(), decoder);
    Ok(section)
}

/// `defaults`, and in their place what a file says.
fn over(said: &Map<String, Value>, defaults: Value) -> Map<String, Value> {
    let Value::Object(mut all) = defaults else { return said.clone() };
    all.extend(said.clone());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_is_not_served_is_refused_with_those_that_are() {
        for (said, found) in
            [(json!({"model_type": "qwen3_vl_moe"}), "is \"qwen3_vl_moe\""), (json!({}), "is missing")]
        {
            let reason = Family::of(said.as_object().unwrap()).unwrap_err();
            let served = "must be \"qwen2_vl\" or \"qwen2_5_vl\" or \"qwen3_vl\"";
            assert_eq!(reason, format!("model_type {found}, {served}"));
        }
    }
}
