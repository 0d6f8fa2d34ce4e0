//! `config.json` of a Qwen-VL checkpoint, and the tensors that it promises.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config_keys::{faults, section, vision_section};
use super::config_rope::{AXIAL, Rope};
use super::family::Family;
use crate::model::checkpoint::python_json::one_of;

/// The gates of the decoder's MLPs that are supported, by the reference's names: one function.
const GATES: [&str; 2] = ["silu", "swish"];
/// The kinds of attention that are supported, by the reference's names of today and of old.
const FULL_ATTENTION: [&str; 2] = ["full_attention", "attention"];

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
    /// Whether `lm_head` and the embeddings are one tensor, so that either stands for both.
    pub ties_embeddings: bool,
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
    head_dim: Option<i64>,
    #[serde(skip)]
    rope: Rope,
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
            head_dim: None,
            rope: Rope::default(),
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
    /// Rows of the vocabulary, if the file says so. The checkpoint may have fewer.
    pub vocab_size: Option<i64>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<i64>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    #[serde(skip)]
    rope: Rope,
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
            vocab_size: None,
            use_sliding_window: None,
            sliding_window: Some(4096),
            max_window_layers: Some(80),
            layer_types: None,
            rope: Rope::default(),
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
        self.rope.theta
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
        self.rope.theta
    }

    /// How many of a head's frequencies turn with time, height, width, time again, and so on.
    pub fn mrope_section(&self) -> &[i64] {
        &self.rope.sections
    }

    /// The axis by whose position each pair of a head's numbers turns: 0 time, 1 height, 2 width.
    ///
    /// One section behind the other; in Qwen3-VL height and width take every third pair each, as many as their
    /// sections say, and time all others. The reference's `recomposition_frequencies`.
    pub fn rotary_axes(&self) -> Vec<i64> {
        let sections = self.mrope_section();
        if self.family != Family::Qwen3Vl {
            let runs = (0..).zip(sections).map(|(part, &length)| vec![part % 3; length.max(0) as usize]);
            return runs.flatten().collect();
        }
        let axis = |pair: i64| match usize::try_from(pair % 3) {
            Ok(axis @ 1..) if sections.get(axis).is_some_and(|&length| pair < 3 * length) => pair % 3,
            _ => 0,
        };
        (0..self.head_dim() / 2).map(axis).collect()
    }

    /// The kinds of attention that are not over all tokens before: as the reference reads them of several keys.
    fn other_attention(&self) -> Option<String> {
        let windowed = self.use_sliding_window == Some(true) && self.sliding_window.is_some();
        match &self.layer_types {
            Some(types) => types.iter().find(|kind| !FULL_ATTENTION.contains(&kind.as_str())).cloned(),
            None if windowed && self.max_window_layers.is_none_or(|n| n < self.num_hidden_layers as i64) => {
                Some("sliding_attention".to_owned())
            }
            None => None,
        }
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
        let (text, prefix) = match section(top, "text_config")? {
            Some(text) => (text, "text_config."),
            None if family == Family::Qwen3Vl => {
                return Err("text_config is missing, must be an object".into());
            }
            None => (top, ""),
        };
        let text = family.text_section(text);
        let vision = section(top, "vision_config")?.ok_or("vision_config is missing, must be an object")?;
        let vision = family.vision_section(&vision_section(vision))?;
        let mut faults = faults(top, &text, prefix, &vision);
        let mut rope = |section, prefix, kind| {
            Rope::read(section, prefix, kind).map_err(|fault| faults.push(fault)).unwrap_or_default()
        };
        let (text_rope, vision_rope) =
            (rope(&text, prefix, family.rope()), rope(&vision, "vision_config.", &AXIAL));
        if !faults.is_empty() {
            return Err(family.in_its_names(faults.join("; ")));
        }
        let ties =
            |section: &Map<String, Value>| section.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let config = Self {
            family,
            vision: VisionConfig { family, rope: vision_rope, ..read(vision, "vision_config")? },
            text: TextConfig { family, rope: text_rope, ..read(text.clone(), "text_config")? },
            // Some releases wrote it beside the decoder's keys.
            image_token_id: [top, &text]
                .into_iter()
                .find_map(|section| section.get("image_token_id").filter(|id| !id.is_null()))
                .map_or(Ok(151_655), u32::deserialize)
                .map_err(|e| format!("image_token_id: {e}"))?,
            ties_embeddings: ties(top) || ties(&text),
        };
        let faults = config.faults(prefix);
        if faults.is_empty() { Ok(config) } else { Err(family.in_its_names(faults.join("; "))) }
    }

    /// What does not fit together, or is not served.
    fn faults(&self, prefix: &str) -> Vec<String> {
        let (v, t) = (&self.vision, &self.text);
        let mut faults = Vec::new();
        let mut rule = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        let activations = [
            ("vision_config.", &v.hidden_act, self.family.vision_activations()),
            (prefix, &t.hidden_act, &GATES[..]),
        ];
        for (section, said, supported) in activations {
            let fault = format!(
                "{section}hidden_act is {said:?}, must be {}: others are not supported",
                one_of(supported)
            );
            rule(supported.contains(&said.as_str()), fault);
        }
        if let Some(kind) = t.other_attention() {
            let supported = one_of(&FULL_ATTENTION);
            rule(
                false,
                format!("{prefix}layer_types has {kind:?}, must be {supported}: others are not supported"),
            );
        }
        let (layers, kinds) =
            (t.num_hidden_layers, t.layer_types.as_ref().map_or(t.num_hidden_layers, Vec::len));
        rule(
            layers == kinds,
            format!("{prefix}layer_types has {kinds} entries for num_hidden_layers {layers}"),
        );
        rule(v.in_channels == 3, format!("vision_config.in_channels is {}, must be 3", v.in_channels));
        rule(
            v.out_hidden_size == t.hidden_size,
            format!(
                "vision_config.out_hidden_size is {}, {prefix}hidden_size is {}; they must be equal",
                v.out_hidden_size, t.hidden_size
            ),
        );
        rule(
            v.hidden_size % v.num_heads == 0 && v.head_dim() % 4 == 0,
            format!(
                "vision_config.hidden_size {} must be a multiple of 4 × num_heads {}",
                v.hidden_size, v.num_heads
            ),
        );
        let interleaved = self.family == Family::Qwen3Vl;
        rule(
            interleaved && t.head_dim() > 0 && t.head_dim() % 2 == 0
                || !interleaved && t.hidden_size % t.num_attention_heads == 0 && t.head_dim() % 2 == 0,
            format!(
                "{prefix}hidden_size {} must be a multiple of 2 × num_attention_heads {}",
                t.hidden_size, t.num_attention_heads
            ),
        );
        rule(
            t.num_attention_heads % t.key_value_heads() == 0,
            format!(
                "{prefix}num_attention_heads {} must be a multiple of num_key_value_heads {}",
                t.num_attention_heads,
                t.key_value_heads()
            ),
        );
        for (section, said, width) in
            [("vision_config.", v.head_dim, v.head_dim()), (prefix, t.head_dim, t.head_dim())]
        {
            // The reference takes 0 for nothing.
            let said = said.filter(|&said| said != 0).unwrap_or(width);
            let fault = format!("{section}head_dim is {said}, but hidden_size over the heads is {width}");
            rule(said == width, fault);
        }
        let sections: i128 = t.mrope_section().iter().map(|&n| i128::from(n)).sum();
        // Interleaved sections may leave pairs to time, and reach beyond the last.
        rule(
            (interleaved && t.mrope_section().len() == 3 || sections * 2 == i128::from(t.head_dim()))
                && (!interleaved || t.mrope_section().len() >= 3)
                && t.mrope_section().iter().all(|&n| (0..=1 << 32).contains(&n)),
            format!(
                "{prefix}{}s parts must be at least 0 and must add up to half the width of a head, {}",
                t.rope.said_of_sections,
                t.head_dim() / 2
            ),
        );
        rule(
            v.position_side() != Some(0),
            format!(
                "vision_config.num_position_embeddings is {}, must be at least 1",
                v.num_position_embeddings
            ),
        );
        rule(
            self.family != Family::Qwen25Vl || v.window_size >= v.patch_size * v.spatial_merge_size,
            format!(
                "vision_config.window_size {} must be at least a visual token's side, {}",
                v.window_size,
                v.patch_size * v.spatial_merge_size
            ),
        );
        faults
    }

    /// Every tensor of the backbone with its shape, by the names that [`super::canonical_name`] gives. The
    /// vocabulary's rows are the checkpoint's to say. The head is not among them.
    pub fn tensors(&self, vocabulary: i64) -> Vec<(String, Vec<i64>)> {
        let mut list = self.vision.tensors();
        list.extend(self.text.tensors(vocabulary));
        list
    }
}

fn read<T: for<'de> Deserialize<'de>>(section: Map<String, Value>, name: &str) -> Result<T, String> {
    T::deserialize(Value::Object(section)).map_err(|e| format!("{name}: {e}"))
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
            rope: Rope { sections: vec![4, 3, 1], ..Rope::default() },
            ..TextConfig::default()
        };
        assert_eq!(text.rotary_axes(), [0, 0, 0, 0, 1, 1, 1, 2]);
    }
}
