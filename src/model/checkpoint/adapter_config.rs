//! `adapter_config.json`: every key that PEFT writes, and what it does to the weights.

use std::collections::BTreeMap;
use std::fmt;

use regex::RegexBuilder;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::CheckpointError;
use super::folder::Folder;
use super::lora::ADAPTER_CONFIG;

/// The most patterns of one kind: a model has a few hundred modules.
const MAX_PATTERNS: usize = 1024;
/// The most bytes of a compiled pattern.
const MAX_PATTERN: usize = 256 << 10;

/// What to do about an adapter that cannot be merged here.
const MERGE: &str = "merge the adapter with PEFT (merge_and_unload) and serve the result";

/// Keys that change no number of a merged adapter: what it was trained for and with, which modules it was put on (its
/// tensors say that too), and the settings of initialisations that only ran before training.
/// `fan_in_fan_out` among them: PEFT itself ignores it on the layers of this family.
const WITHOUT_EFFECT: [&str; 22] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// Keys that change more than two factors can say, and how.
const NOT_MERGED: [(&str, &str); 11] = [
    (
        "alora_invocation_tokens",
        "it acts on the tokens behind these alone, so it can be merged into no weights",
    ),
    ("arrow_config", "it is one of several that are chosen between at each token"),
    ("kasa_config", "it cuts the base's weights, and has singular values between its factors"),
    ("layer_replication", "it repeats layers of the base"),
    ("megatron_config", "its layers are Megatron's"),
    ("monteclora_config", "it draws samples at each forward"),
    ("target_parameters", "it is on parameters, where here only modules are merged"),
    ("use_bdlora", "its factors are block-diagonal"),
    ("use_dora", "its weights have a magnitude beside their direction"),
    ("use_qalora", "its inputs are pooled in groups"),
    ("velora_config", "its layers are of another kind"),
];

/// What a LoRA says of itself.
#[derive(Debug, Deserialize)]
pub(super) struct AdapterConfig {
    peft_type: String,
    #[serde(default = "eight")]
    r: i64,
    #[serde(default = "eight_point")]
    lora_alpha: f64,
    use_rslora: Option<bool>,
    lora_bias: Option<bool>,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    #[serde(default)]
    rank_pattern: Patterns,
    #[serde(default)]
    alpha_pattern: Patterns,
    pub trainable_token_indices: Option<Tokens>,
    pub modules_to_save: Option<Vec<String>>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// PEFT's defaults.
fn eight() -> i64 {
    8
}

fn eight_point() -> f64 {
    8.0
}

/// The tokens whose rows were trained alone: of the embeddings, or by the module's name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Tokens {
    Embeddings(Vec<i64>),
    Named(BTreeMap<String, Vec<i64>>),
}

impl Tokens {
    /// The tokens of a module, by its names.
    pub fn of(&self, names: &Names) -> Option<&[i64]> {
        match self {
            Self::Embeddings(tokens) => Some(tokens),
            Self::Named(map) => {
                let is_it = |key: &str| names.all().any(|n| n == key || n.ends_with(&format!(".{key}")));
                map.iter().find(|(key, _)| is_it(key)).map(|(_, tokens)| tokens.as_slice())
            }
        }
    }
}

/// What PEFT took out of the base's weight before it trained the factors, and takes out when it loads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Nothing.
    Whole,
    /// The part of the greatest singular values (`pissa`).
    SingularValues,
    /// The part along its first columns (`olora`).
    Columns,
}

/// How large a module's update is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub rank: i64,
    pub scale: f64,
}

/// A module's names: as the adapter's file has it, and as it was before transformers 4.52 and is since.
#[derive(Debug)]
pub(super) struct Names {
    pub on_disk: String,
    old: String,
    new: String,
}

impl Names {
    /// `canonical` is the module's name in this program.
    pub fn new(on_disk: &str, canonical: &str) -> Self {
        let (old, new) = match canonical.strip_prefix("language_model.") {
            Some(rest) => (format!("model.{rest}"), format!("model.{canonical}")),
            None if canonical.starts_with("visual.") => (canonical.to_owned(), format!("model.{canonical}")),
            None => (canonical.to_owned(), canonical.to_owned()),
        };
        Self { on_disk: on_disk.to_owned(), old, new }
    }

    pub fn all(&self) -> impl Iterator<Item = &str> {
        [&self.on_disk, &self.old, &self.new].into_iter().map(String::as_str)
    }
}

impl AdapterConfig {
    /// Reads an adapter's configuration and refuses what changes numbers in a way that is not known here.
    pub fn read(folder: &Folder) -> Result<Self, CheckpointError> {
        let label = folder.label(ADAPTER_CONFIG);
        let said: Option<Result<Self, _>> = folder.json(ADAPTER_CONFIG).transpose();
        let config = said.ok_or_else(|| CheckpointError::MissingFile(label.clone()))?;
        let config = config.map_err(|error| match faulty_key(folder) {
            Some(reason) => CheckpointError::invalid(&label, reason),
            None => error,
        })?;
        config.check().map_err(|reason| CheckpointError::invalid(&label, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.peft_type != "LORA" {
            return Err(format!("peft_type is {:?}, must be \"LORA\"; else {MERGE}", self.peft_type));
        }
        if self.r < 1 {
            return Err(format!("r is {}, must be at least 1", self.r));
        }
        if !self.lora_alpha.is_finite() {
            return Err(format!("lora_alpha is {}, must be finite", self.lora_alpha));
        }
        if let Some(other) = self.bias.as_deref().filter(|b| !["none", "all", "lora_only"].contains(b)) {
            return Err(format!("bias is {other:?}, must be \"none\", \"all\" or \"lora_only\""));
        }
        for (key, value) in &self.rest {
            if says_nothing(value) || WITHOUT_EFFECT.contains(&key.as_str()) {
                continue;
            }
            let value = shortened(value);
            return Err(match NOT_MERGED.iter().find(|(known, _)| known == key) {
                Some((_, why)) => format!("{key} is {value}: {why}; {MERGE}"),
                None => format!(
                    "{key} is {value}: this server does not know what that does to the weights; {MERGE}"
                ),
            });
        }
        self.start().map(|_| ())
    }

    /// What was taken out of the base.
    pub fn start(&self) -> Result<Start, String> {
        let name = match &self.init_lora_weights {
            None | Some(Value::Null | Value::Bool(_)) => return Ok(Start::Whole),
            Some(Value::String(name)) => name.as_str(),
            Some(other) => return Err(format!("init_lora_weights is {other}, must be a boolean or a name")),
        };
        match name.to_lowercase().as_str() {
            "gaussian" | "orthogonal" | "eva" | "mica" => Ok(Start::Whole),
            "pissa" if name == "pissa" => Ok(Start::SingularValues),
            "olora" => Ok(Start::Columns),
            lower if lower.starts_with("pissa_niter_") => Err(format!(
                "init_lora_weights is {name:?}: what it takes out of the base is drawn at random each time it is \
                 loaded; save it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion) or \
                 {MERGE}"
            )),
            "corda" | "loftq" | "lora_ga" => Err(format!(
                "init_lora_weights is {name:?}: it changes the base by what only its training knew; save it as a \
                 plain LoRA (save_pretrained with path_initial_model_for_weight_conversion) or {MERGE}"
            )),
            _ => Err(format!("init_lora_weights is {name:?}, which this server does not know; {MERGE}")),
        }
    }

    /// Whether the second factors have biases.
    pub fn has_bias(&self) -> bool {
        self.lora_bias.unwrap_or(false)
    }

    /// Rank and scale of each module.
    pub fn sizes(&self, modules: &[Names]) -> Result<Vec<Size>, String> {
        let ranks = self.rank_pattern.values("rank_pattern", modules)?;
        let alphas = self.alpha_pattern.values("alpha_pattern", modules)?;
        let size = |(rank, alpha): (Option<f64>, Option<f64>)| {
            let rank = rank.unwrap_or(self.r as f64);
            if rank < 1.0 || rank.fract() != 0.0 || rank > f64::from(i32::MAX) {
                return Err(format!("rank_pattern has {rank}, a rank must be an integer of at least 1"));
            }
            let alpha = alpha.unwrap_or(self.lora_alpha);
            let scale = alpha / if self.use_rslora.unwrap_or(false) { rank.sqrt() } else { rank };
            Ok(Size { rank: rank as i64, scale })
        };
        ranks.into_iter().zip(alphas).map(size).collect()
    }
}

/// The key whose value is of the wrong type, and what it must be.
fn faulty_key(folder: &Folder) -> Option<String> {
    let map: BTreeMap<String, Value> = folder.json(ADAPTER_CONFIG).ok()??;
    map.into_iter().find_map(|(key, value)| {
        let mut alone = serde_json::Map::from_iter([("peft_type".to_owned(), "LORA".into())]);
        alone.insert(key.clone(), value);
        AdapterConfig::deserialize(Value::Object(alone)).err().map(|error| format!("{key}: {error}"))
    })
}

/// Whether a value is what Python calls false.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(60).chain(['…']).collect() } else { text }
}

/// `rank_pattern` or `alpha_pattern`: of the patterns that match a module's name the first counts, so their order is
/// kept.
#[derive(Debug, Default)]
struct Patterns(Vec<(String, f64)>);

impl Patterns {
    /// The value of each module, if a pattern matches it. PEFT matches the name that the module had when it was trained,
    /// which is the one in the adapter's keys.
    fn values(&self, key: &str, modules: &[Names]) -> Result<Vec<Option<f64>>, String> {
        let names: Vec<&str> = modules.iter().flat_map(Names::all).collect();
        let found = self.first_matches(key, &names)?;
        modules.iter().zip(found.chunks(3)).map(|(names, found)| one_value(key, names, found)).collect()
    }

    fn first_matches(&self, key: &str, names: &[&str]) -> Result<Vec<Option<f64>>, String> {
        if self.0.len() > MAX_PATTERNS {
            return Err(format!("{key} has {} patterns; it may have {MAX_PATTERNS}", self.0.len()));
        }
        let mut found = vec![None; names.len()];
        for (pattern, value) in &self.0 {
            if !value.is_finite() {
                return Err(format!("{key}: {pattern:?} is {value}, must be finite"));
            }
            let regex = RegexBuilder::new(&format!(r"^(.*\.)?({pattern})$"))
                .size_limit(MAX_PATTERN)
                .build()
                .map_err(|e| format!("{key} {pattern:?}: {e}"))?;
            for (slot, name) in found.iter_mut().zip(names) {
                if slot.is_none() && regex.is_match(name) {
                    *slot = Some(*value);
                }
            }
        }
        Ok(found)
    }
}

/// What patterns say of a module, where they may have been written for its other name.
fn one_value(key: &str, names: &Names, found: &[Option<f64>]) -> Result<Option<f64>, String> {
    let (mine, others) = found.split_first().map(|(mine, others)| (*mine, others)).unwrap_or_default();
    let other = others.iter().flatten().find(|&&value| Some(value) != mine).copied();
    match (mine, other) {
        (value, None) => Ok(value),
        (Some(mine), Some(other)) => Err(format!(
            "{key} says {mine} of {}, and {other} of {} or {}, which are the same module; it must say one",
            names.on_disk, names.old, names.new
        )),
        // Keys of old belong to an old trainer, but patterns of today are what PEFT of today would match.
        (None, value) if names.on_disk != names.new => Ok(value),
        (None, Some(value)) => Err(format!(
            "{key} says {value} of {}, a name from before transformers 4.52; the adapter's keys are of today, where \
             it is {}: write it so, or PEFT will not find it either",
            names.old, names.new
        )),
    }
}

impl<'de> Deserialize<'de> for Patterns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Patterns;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from patterns to numbers")
            }

            fn visit_unit<E>(self) -> Result<Patterns, E> {
                Ok(Patterns::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Patterns, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
        }
        deserializer.deserialize_any(InOrder)
    }
}
