//! `config.json` of a Qwen2.5-VL checkpoint, and the tensors that it promises.

use serde::Deserialize;
use serde_json::{Map, Value};

/// The shape of a model: the reference's `Qwen2_5_VLConfig`, as far as pictures and text need it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The vision tower.
    pub vision: VisionConfig,
    /// The decoder.
    pub text: TextConfig,
    /// The id of the placeholder that stands for one visual token.
    pub image_token_id: u32,
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
    rope_parameters: Option<Rope>,
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
            rope_parameters: None,
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
            hidden_size: 8192,
            intermediate_size: 29568,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            num_key_value_heads: Some(8),
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
        self.rope().and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(1e6)
    }

    fn rope(&self) -> Option<&Rope> {
        self.rope_scaling.as_ref().or(self.rope_parameters.as_ref())
    }

    /// How many of a head's frequencies turn with time, height and width.
    pub fn mrope_section(&self) -> [i64; 3] {
        let section = self.rope().and_then(|r| r.mrope_section.as_deref());
        section.and_then(|s| s.try_into().ok()).unwrap_or([16, 24, 24])
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
        expect(top, "model_type", "qwen2_5_vl")?;
        if top.get("quantization_config").is_some_and(|v| !v.is_null()) {
            return Err("quantization_config: quantised weights are not served; save them as bfloat16".into());
        }
        let text = top.get("text_config").filter(|v| !v.is_null()).unwrap_or(json);
        let vision = top.get("vision_config").ok_or("vision_config is missing")?;
        let config = Self {
            vision: section(vision, "vision_config")?,
            text: section(text, "text_config")?,
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
        let rope = t.rope().and_then(|r| r.rope_type.as_deref().or(r.r#type.as_deref())).unwrap_or("default");
        let rules = [
            (v.in_channels == 3, format!("vision_config.in_channels is {}, must be 3", v.in_channels)),
            (
                v.hidden_act == "silu",
                format!("vision_config.hidden_act is {:?}, must be \"silu\"", v.hidden_act),
            ),
            (t.hidden_act == "silu", format!("hidden_act is {:?}, must be \"silu\"", t.hidden_act)),
            (
                !t.use_sliding_window.unwrap_or(false),
                "use_sliding_window is true; sliding windows are not served".into(),
            ),
            (
                ["default", "mrope"].contains(&rope),
                format!("rope_type is {rope:?}, must be \"default\" or \"mrope\""),
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
                t.hidden_size % t.num_attention_heads.max(1) == 0,
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
                t.mrope_section().iter().sum::<i64>() * 2 == t.hidden_size / t.num_attention_heads.max(1),
                format!(
                    "mrope_section {:?} must add up to half the width of a head, {}",
                    t.mrope_section(),
                    t.hidden_size / t.num_attention_heads.max(1) / 2
                ),
            ),
            (
                v.window_size >= v.patch_size * v.spatial_merge_size,
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
            Some(fault) => Err(fault),
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

fn section<T: for<'de> Deserialize<'de>>(json: &Value, name: &str) -> Result<T, String> {
    T::deserialize(json).map_err(|e| format!("{name}: {e}"))
}

fn expect(top: &Map<String, Value>, key: &str, wanted: &str) -> Result<(), String> {
    match top.get(key).and_then(Value::as_str) {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(format!("{key} is {found:?}, must be {wanted:?}")),
        None => Err(format!("{key} is missing, must be {wanted:?}")),
    }
}
