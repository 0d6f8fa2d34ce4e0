//! `config.json` of a Qwen2.5-VL checkpoint, and the tensors that it promises.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config_keys::{faults, section, vision_section};
use super::config_rope::{AXIAL, MULTIMODAL, Rope};
use crate::model::checkpoint::python_json::one_of;

/// The gates of the MLPs that are supported, by the reference's names: one function.
const ACTIVATIONS: [&str; 2] = ["silu", "swish"];
/// The kinds of attention that are supported, by the reference's names of today and of old.
const FULL_ATTENTION: [&str; 2] = ["full_attention", "attention"];

/// The shape of a model: the reference's `Qwen2_5_VLConfig`, as far as pictures and text need it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The vision tower.
    pub vision: VisionConfig,
    /// The decoder.
    pub text: TextConfig,
    /// The id of the placeholder that stands for one visual token.
    pub image_token_id: u32,
    /// Whether `lm_head` and the embeddings are one tensor, so that either stands for both.
    pub ties_embeddings: bool,
}

/// The reference's `Qwen2_5_VLVisionConfig`, with its defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of a patch's vector.
    pub hidden_size: i64,
    /// The gate of the MLP; only `silu` exists in this family.
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
    /// Side of an attention window in pixels.
    pub window_size: i64,
    /// Width of a visual token: the decoder's.
    pub out_hidden_size: i64,
    /// The blocks that attend over the whole picture.
    pub fullatt_block_indexes: Vec<usize>,
    head_dim: Option<i64>,
    #[serde(skip)]
    rope: Rope,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
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
            head_dim: None,
            rope: Rope::default(),
        }
    }
}

/// The reference's `Qwen2_5_VLTextConfig`, with its defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
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
    /// The gate of the MLP; only `silu` exists in this family.
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
    head_dim: Option<i64>,
    #[serde(skip)]
    rope: Rope,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            hidden_size: 8192,
            intermediate_size: 29568,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            num_key_value_heads: Some(8),
            hidden_act: "silu".into(),
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-5,
            vocab_size: None,
            use_sliding_window: None,
            sliding_window: Some(4096),
            max_window_layers: Some(80),
            layer_types: None,
            head_dim: None,
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

    /// Whether any block attends within windows.
    pub fn has_windows(&self) -> bool {
        (0..self.depth).any(|n| !self.fullatt_block_indexes.contains(&n))
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
    /// Width of an attention head.
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
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
    /// What the reference refuses is refused, and so is what it computes otherwise than this model would.
    ///
    /// # Errors
    /// Everything that cannot be served, and what would be right.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let top = json.as_object().ok_or("not an object")?;
        expect(top, "model_type", "qwen2_5_vl")?;
        let (text, prefix) = match section(top, "text_config")? {
            Some(text) => (text, "text_config."),
            None => (top, ""),
        };
        let vision = section(top, "vision_config")?.ok_or("vision_config is missing, must be an object")?;
        let vision = vision_section(vision);
        let mut faults = faults(top, text, prefix, &vision);
        let mut rope = |section, prefix, kind| {
            Rope::read(section, prefix, kind).map_err(|fault| faults.push(fault)).unwrap_or_default()
        };
        let (text_rope, vision_rope) =
            (rope(text, prefix, &MULTIMODAL), rope(&vision, "vision_config.", &AXIAL));
        if !faults.is_empty() {
            return Err(faults.join("; "));
        }
        let ties =
            |section: &Map<String, Value>| section.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let config = Self {
            vision: VisionConfig { rope: vision_rope, ..read(vision, "vision_config")? },
            text: TextConfig { rope: text_rope, ..read(text.clone(), "text_config")? },
            // Some releases wrote it beside the decoder's keys.
            image_token_id: [top, text]
                .into_iter()
                .find_map(|section| section.get("image_token_id").filter(|id| !id.is_null()))
                .map_or(Ok(151_655), u32::deserialize)
                .map_err(|e| format!("image_token_id: {e}"))?,
            ties_embeddings: ties(top) || ties(text),
        };
        let faults = config.faults(prefix);
        if faults.is_empty() { Ok(config) } else { Err(faults.join("; ")) }
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
        let gates = [("vision_config.", &v.hidden_act), (prefix, &t.hidden_act)];
        for (section, gate) in gates {
            let supported = one_of(&ACTIVATIONS);
            let fault =
                format!("{section}hidden_act is {gate:?}, must be {supported}: others are not supported");
            rule(ACTIVATIONS.contains(&gate.as_str()), fault);
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
        rule(
            t.hidden_size % t.num_attention_heads == 0 && t.head_dim() % 2 == 0,
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
        rule(
            sections * 2 == i128::from(t.head_dim()) && t.mrope_section().iter().all(|&n| n >= 0),
            format!(
                "{prefix}{}s parts must be at least 0 and must add up to half the width of a head, {}",
                t.rope.said_of_sections,
                t.head_dim() / 2
            ),
        );
        rule(
            v.window_size >= v.patch_size * v.spatial_merge_size,
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

impl VisionConfig {
    fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let merged = d * self.spatial_merge_size * self.spatial_merge_size;
        let patch = vec![d, self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size];
        let mut list = vec![
            ("visual.patch_embed.proj.weight".to_owned(), patch),
            ("visual.merger.ln_q.weight".to_owned(), vec![d]),
        ];
        list.extend(linear("visual.merger.mlp.0", merged, merged, true));
        list.extend(linear("visual.merger.mlp.2", self.out_hidden_size, merged, true));
        for n in 0..self.depth {
            let block = format!("visual.blocks.{n}");
            list.push((format!("{block}.norm1.weight"), vec![d]));
            list.push((format!("{block}.norm2.weight"), vec![d]));
            list.extend(linear(&format!("{block}.attn.qkv"), 3 * d, d, true));
            list.extend(linear(&format!("{block}.attn.proj"), d, d, true));
            list.extend(linear(&format!("{block}.mlp.gate_proj"), i, d, true));
            list.extend(linear(&format!("{block}.mlp.up_proj"), i, d, true));
            list.extend(linear(&format!("{block}.mlp.down_proj"), d, i, true));
        }
        list
    }
}

impl TextConfig {
    fn tensors(&self, vocabulary: i64) -> Vec<(String, Vec<i64>)> {
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let kv = self.key_value_heads() * self.head_dim();
        let mut list = vec![
            ("language_model.embed_tokens.weight".to_owned(), vec![vocabulary, d]),
            ("language_model.norm.weight".to_owned(), vec![d]),
        ];
        for n in 0..self.num_hidden_layers {
            let layer = format!("language_model.layers.{n}");
            list.push((format!("{layer}.input_layernorm.weight"), vec![d]));
            list.push((format!("{layer}.post_attention_layernorm.weight"), vec![d]));
            list.extend(linear(&format!("{layer}.self_attn.q_proj"), d, d, true));
            list.extend(linear(&format!("{layer}.self_attn.k_proj"), kv, d, true));
            list.extend(linear(&format!("{layer}.self_attn.v_proj"), kv, d, true));
            list.extend(linear(&format!("{layer}.self_attn.o_proj"), d, d, false));
            list.extend(linear(&format!("{layer}.mlp.gate_proj"), i, d, false));
            list.extend(linear(&format!("{layer}.mlp.up_proj"), i, d, false));
            list.extend(linear(&format!("{layer}.mlp.down_proj"), d, i, false));
        }
        list
    }
}

fn linear(name: &str, out: i64, input: i64, bias: bool) -> Vec<(String, Vec<i64>)> {
    let mut list = vec![(format!("{name}.weight"), vec![out, input])];
    if bias {
        list.push((format!("{name}.bias"), vec![out]));
    }
    list
}

fn read<T: for<'de> Deserialize<'de>>(section: Map<String, Value>, name: &str) -> Result<T, String> {
    T::deserialize(Value::Object(section)).map_err(|e| format!("{name}: {e}"))
}

fn expect(top: &Map<String, Value>, key: &str, wanted: &str) -> Result<(), String> {
    match top.get(key).and_then(Value::as_str) {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(format!("{key} is {found:?}, must be {wanted:?}")),
        None => Err(format!("{key} is missing, must be {wanted:?}")),
    }
}
