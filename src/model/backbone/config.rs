//! `config.json` of a Qwen-VL checkpoint, and the tensors that it promises.

use serde::Deserialize;
use serde_json::Value;

use super::family::Family;

/// The shape of a model: the reference's `Qwen2VLConfig`, `Qwen2_5_VLConfig` or `Qwen3VLConfig`, as far as pictures
/// and text need it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which family it is of.
    pub family: Family,
    /// The vision tower.
    pub vision: VisionConfig,
    /// The decoder.
    pub text: TextConfig,
    /// The id of the placeholder that stands for one visual token.
    pub image_token_id: u32,
}

/// The vision tower of any family, by the names and with the defaults of the reference's `Qwen2_5_VLVisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    #[serde(skip)]
    family: Family,
    /// Blocks.
    pub depth: usize,
    /// Width of a patch's vector.
    pub hidden_size: i64,
    /// The activation of the MLP; each family has one.
    pub hidden_act: String,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Attention heads.
    pub num_heads: i64,
    /// Channels of a picture.
    pub in_channels: i64,
    /// Side of a patch in pixels.
    pub patch_size: i64,
    /// Side, in patches, of the square that becomes one visual token.
    pub spatial_merge_size: i64,
    /// Frames of a patch.
    pub temporal_patch_size: i64,
    /// Side of an attention window in pixels, in Qwen2.5-VL.
    pub window_size: i64,
    /// Width of a visual token: the decoder's.
    pub out_hidden_size: i64,
    /// The blocks that attend over the whole picture, in Qwen2.5-VL; in the other families all do.
    pub fullatt_block_indexes: Vec<usize>,
    /// Places of the square of learnt positions that is stretched over each picture, in Qwen3-VL.
    pub num_position_embeddings: i64,
    /// The blocks whose outputs are added behind the decoder's first layers, in Qwen3-VL.
    pub deepstack_visual_indexes: Vec<usize>,
    rope_parameters: Option<Rope>,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            family: Family::default(),
            depth: 32,
            hidden_size: 3584,
            hidden_act: "silu".into(),
            intermediate_size: 3420,
            num_heads: 16,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            out_hidden_size: 3584,
            fullatt_block_indexes: vec![7, 15, 23, 31],
            num_position_embeddings: 0,
            deepstack_visual_indexes: Vec::new(),
            rope_parameters: None,
        }
    }
}

/// The decoder of any family, by the names and with the defaults of the reference's `Qwen2_5_VLTextConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    #[serde(skip)]
    family: Family,
    /// Width of a token's vector.
    pub hidden_size: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: i64,
    /// Heads of the keys and values; absent means as many as of the queries.
    pub num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    attention_bias: bool,
    /// The gate of the MLP; only `silu` exists in these families.
    pub hidden_act: String,
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Sliding-window attention, which is not served.
    pub use_sliding_window: Option<bool>,
    // transformers 5 keeps all of the rotary positions in rope_parameters, its forerunners in the other two.
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    rope_theta: Option<f64>,
}

/// How the angles of the rotary positions are made.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Rope {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    mrope_section: Option<Vec<i64>>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            family: Family::default(),
            hidden_size: 8192,
            intermediate_size: 29568,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            num_key_value_heads: Some(8),
            head_dim: None,
            attention_bias: false,
            hidden_act: "silu".into(),
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-5,
            use_sliding_window: None,
            rope_parameters: None,
            rope_scaling: None,
            rope_theta: None,
        }
    }
}

impl VisionConfig {
    /// Width of an attention head.
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_heads
    }

    /// The base of the rotary angles.
    pub fn rope_theta(&self) -> f64 {
        self.rope_parameters.as_ref().and_then(|r| r.rope_theta).unwrap_or(1e4)
    }

    /// Side of an attention window in visual tokens.
    pub fn window_tokens(&self) -> usize {
        (self.window_size / self.spatial_merge_size / self.patch_size) as usize
    }

    /// Which family the tower is of.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Whether a block attends over the whole picture, not within windows.
    pub fn attends_to_all(&self, block: usize) -> bool {
        self.family != Family::Qwen25Vl || self.fullatt_block_indexes.contains(&block)
    }

    /// Whether any block attends within windows.
    pub fn has_windows(&self) -> bool {
        (0..self.depth).any(|n| !self.attends_to_all(n))
    }

    /// Side of the square of learnt positions, or `None` where the tower has none.
    pub fn position_side(&self) -> Option<i64> {
        (self.family == Family::Qwen3Vl).then(|| self.num_position_embeddings.max(0).isqrt())
    }

    /// Bytes of RGB in a patch.
    pub fn patch_bytes(&self) -> usize {
        (self.in_channels * self.patch_size * self.patch_size) as usize
    }

    /// Patches that become one visual token.
    pub fn merge_unit(&self) -> usize {
        (self.spatial_merge_size * self.spatial_merge_size) as usize
    }
}

impl TextConfig {
    /// Width of an attention head: in Qwen3-VL, where it is free of the width of a token, the configuration says it.
    pub fn head_dim(&self) -> i64 {
        match self.family {
            Family::Qwen3Vl => self.head_dim.unwrap_or(128),
            _ => self.hidden_size / self.num_attention_heads.max(1),
        }
    }

    /// Whether the queries', keys' and values' projections have a bias.
    pub fn qkv_bias(&self) -> bool {
        self.family != Family::Qwen3Vl || self.attention_bias
    }

    /// Whether the projection behind attention has a bias.
    pub fn output_bias(&self) -> bool {
        self.family == Family::Qwen3Vl && self.attention_bias
    }

    /// Whether each head's query and key is normed before it is turned.
    pub fn query_key_norm(&self) -> bool {
        self.family == Family::Qwen3Vl
    }

    /// Heads of the keys and of the values.
    pub fn key_value_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// The base of the rotary angles.
    pub fn rope_theta(&self) -> f64 {
        let default = if self.family == Family::Qwen3Vl { 5e5 } else { 1e6 };
        self.rope().and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(default)
    }

    fn rope(&self) -> Option<&Rope> {
        self.rope_scaling.as_ref().or(self.rope_parameters.as_ref())
    }

    /// How many of a head's frequencies turn with time, height and width.
    pub fn mrope_section(&self) -> [i64; 3] {
        let section = self.rope().and_then(|r| r.mrope_section.as_deref());
        let default = if self.family == Family::Qwen3Vl { [24, 20, 20] } else { [16, 24, 24] };
        section.and_then(|s| s.try_into().ok()).unwrap_or(default)
    }

    /// The axis by whose position each pair of a head's numbers turns: 0 time, 1 height, 2 width.
    ///
    /// One section behind the other; in Qwen3-VL height and width take every third pair each, as many as their
    /// sections say, and time all others. The reference's `recomposition_frequencies`.
    pub fn rotary_axes(&self) -> Vec<i64> {
        let pairs = self.head_dim() / 2;
        let [time, height, width] = self.mrope_section();
        let axis = |pair: i64| match self.family {
            Family::Qwen3Vl if pair % 3 == 1 && pair < 3 * height => 1,
            Family::Qwen3Vl if pair % 3 == 2 && pair < 3 * width => 2,
            Family::Qwen3Vl => 0,
            _ => i64::from(pair >= time) + i64::from(pair >= time + height),
        };
        (0..pairs).map(axis).collect()
    }
}

impl Config {
    /// Reads `config.json`, of today's form with a `text_config` or of the older one that keeps the decoder's
    /// fields at the top.
    ///
    /// # Errors
    /// What cannot be served, and what would be right.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let top = json.as_object().ok_or("not an object")?;
        let family = Family::of(top)?;
        if top.get("quantization_config").is_some_and(|v| !v.is_null()) {
            return Err("quantization_config: quantised weights are not served; save them as bfloat16".into());
        }
        let vision = top.get("vision_config").ok_or("vision_config is missing")?;
        let text = match top.get("text_config").filter(|v| !v.is_null()) {
            Some(text) => text,
            None if family == Family::Qwen3Vl => return Err("text_config is missing".into()),
            None => json,
        };
        let vision = section(&family.vision_section(vision)?, "vision_config")?;
        let text = section(&family.text_section(text), "text_config")?;
        let config = Self {
            family,
            vision: VisionConfig { family, ..vision },
            text: TextConfig { family, ..text },
            image_token_id: match top.get("image_token_id") {
                None => 151_655,
                Some(id) => {
                    id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or("image_token_id is not an id")?
                }
            },
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let (v, t) = (&self.vision, &self.text);
        let sizes = [
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_heads", v.num_heads),
            ("vision_config.patch_size", v.patch_size),
            ("vision_config.spatial_merge_size", v.spatial_merge_size),
            ("vision_config.temporal_patch_size", v.temporal_patch_size),
            ("hidden_size", t.hidden_size),
            ("intermediate_size", t.intermediate_size),
            ("num_hidden_layers", t.num_hidden_layers as i64),
            ("num_attention_heads", t.num_attention_heads),
            ("num_key_value_heads", t.key_value_heads()),
        ];
        let interleaved = self.family == Family::Qwen3Vl;
        let activation = self.family.vision_activation();
        let rope = t.rope().and_then(|r| r.rope_type.as_deref().or(r.r#type.as_deref())).unwrap_or("default");
        let rules = [
            (v.in_channels == 3, format!("vision_config.in_channels is {}, must be 3", v.in_channels)),
            (
                v.hidden_act == activation,
                format!("vision_config.hidden_act is {:?}, must be {activation:?}", v.hidden_act),
            ),
            (t.hidden_act == "silu", format!("hidden_act is {:?}, must be \"silu\"", t.hidden_act)),
            (
                !t.use_sliding_window.unwrap_or(false),
                "use_sliding_window is true; sliding windows are not served".into(),
            ),
            (
                rope == "default" || (rope == "mrope" && !interleaved),
                format!("rope_type is {rope:?}, must be \"default\" or \"mrope\" (not in Qwen3-VL)"),
            ),
            (
                v.out_hidden_size == t.hidden_size,
                format!(
                    "vision_config.out_hidden_size is {}, hidden_size is {}; they must be equal",
                    v.out_hidden_size, t.hidden_size
                ),
            ),
            (
                v.hidden_size % v.num_heads.max(1) == 0 && (v.hidden_size / v.num_heads.max(1)) % 4 == 0,
                format!(
                    "vision_config.hidden_size {} must be a multiple of 4 × num_heads {}",
                    v.hidden_size, v.num_heads
                ),
            ),
            (
                interleaved || t.hidden_size % t.num_attention_heads.max(1) == 0,
                format!(
                    "hidden_size {} must be a multiple of num_attention_heads {}",
                    t.hidden_size, t.num_attention_heads
                ),
            ),
            (
                t.num_attention_heads % t.key_value_heads().max(1) == 0,
                format!(
                    "num_attention_heads {} must be a multiple of num_key_value_heads {}",
                    t.num_attention_heads,
                    t.key_value_heads()
                ),
            ),
            (
                t.head_dim.is_none_or(|width| width == t.head_dim()),
                format!("head_dim must be {}, hidden_size over num_attention_heads", t.head_dim()),
            ),
            (
                t.head_dim() > 0 && t.head_dim() % 2 == 0,
                format!("the width of a head is {}, must be even and above 0", t.head_dim()),
            ),
            (
                interleaved || t.mrope_section().iter().sum::<i64>() * 2 == t.head_dim(),
                format!(
                    "mrope_section {:?} must add up to half the width of a head, {}",
                    t.mrope_section(),
                    t.head_dim() / 2
                ),
            ),
            (
                v.position_side() != Some(0),
                format!(
                    "vision_config.num_position_embeddings is {}, must be at least 1",
                    v.num_position_embeddings
                ),
            ),
            (
                self.family != Family::Qwen25Vl || v.window_size >= v.patch_size * v.spatial_merge_size,
                format!(
                    "vision_config.window_size {} must be at least a visual token's side, {}",
                    v.window_size,
                    v.patch_size * v.spatial_merge_size
                ),
            ),
        ];
        let too_small =
            sizes.iter().find(|(_, n)| *n < 1).map(|(name, n)| format!("{name} is {n}, must be at least 1"));
        match too_small.or_else(|| rules.into_iter().find(|(holds, _)| !holds).map(|(_, rule)| rule)) {
            Some(fault) => Err(self.family.in_its_names(fault)),
            None => Ok(()),
        }
    }

    /// Every tensor of the backbone with its shape, by the names that [`super::canonical_name`] gives. The
    /// vocabulary's rows are the checkpoint's to say. The head is not among them.
    pub fn tensors(&self, vocabulary: i64) -> Vec<(String, Vec<i64>)> {
        let mut list = self.vision.tensors();
        list.extend(self.text.tensors(vocabulary));
        list
    }
}

fn section<T: for<'de> Deserialize<'de>>(json: &Value, name: &str) -> Result<T, String> {
    T::deserialize(json).map_err(|e| format!("{name}: {e}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn qwen3(text: Value) -> Config {
        let vision = json!({"out_hidden_size": 64});
        Config::from_json(&json!({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}))
            .unwrap()
    }

    /// The reference's own loop over slices, for a head whose width ends before and after the last slice.
    #[test]
    fn height_and_width_take_every_third_pair() {
        for (head_dim, section) in [(16, [4, 2, 2]), (16, [2, 3, 3]), (128, [24, 20, 20]), (12, [2, 2, 2])] {
            let text = json!({
                "hidden_size": 64, "head_dim": head_dim, "rope_parameters": {"mrope_section": section},
            });
            let mut axes = vec![0; head_dim / 2];
            for (axis, offset) in [(1, 1), (2, 2)] {
                for pair in (offset..section[axis] as usize * 3).step_by(3).filter(|&p| p < head_dim / 2) {
                    axes[pair] = axis as i64;
                }
            }
            assert_eq!(qwen3(text).text.rotary_axes(), axes);
        }
    }

    #[test]
    fn sections_stand_one_behind_the_other() {
        let text = TextConfig {
            hidden_size: 32,
            num_attention_heads: 2,
            rope_parameters: serde_json::from_value(json!({"mrope_section": [4, 3, 1]})).unwrap(),
            ..TextConfig::default()
        };
        assert_eq!(text.rotary_axes(), [0, 0, 0, 0, 1, 1, 1, 2]);
    }
}
