//! A PEFT LoRA adapter: what it adds to which weights.

use std::collections::BTreeMap;

use regex::Regex;
use serde::Deserialize;
use tch::{Device, Tensor};

use super::tensors::Inventory;
use super::{CheckpointError, CheckpointFiles, Fault, Problem};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// `adapter_config.json`, as far as it changes what is merged.
#[derive(Debug, Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: f64,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
}

/// What an adapter adds to a checkpoint's weights.
#[derive(Debug, Default)]
pub(super) struct Adapter {
    /// By the canonical name of the weight.
    updates: BTreeMap<String, Update>,
    /// The factors.
    factors: Inventory,
}

/// `scale · up · down` is added to a weight.
#[derive(Debug)]
struct Update {
    down: String,
    up: String,
    scale: f64,
}

impl Adapter {
    /// Reads the adapter of a checkpoint, if it has one. Weights that the adapter holds whole, as PEFT's
    /// `modules_to_save` does, take the place of those in `base`.
    ///
    /// # Errors
    /// It is no plain LoRA, or its factors do not fit the weights in `base`.
    pub(super) fn open(
        files: &CheckpointFiles,
        base: &mut Inventory,
        canonical: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CheckpointError> {
        let Some(config) = files.json::<AdapterConfig>(CONFIG)? else { return Ok(Self::default()) };
        config.check().map_err(|reason| CheckpointError::invalid(CONFIG, reason))?;

        let mut factors = Inventory::default();
        factors.add(files, WEIGHTS, |key| {
            let key = key.strip_prefix("base_model.model.").unwrap_or(key);
            canonical(&key.replace(".modules_to_save.", ".").replace(".default.", "."))
        })?;
        base.replace_with(factors.split_off(|name| !name.contains(".lora_")));

        let mut updates = BTreeMap::new();
        let mut used = Vec::new();
        for down in factors.names().filter(|name| name.ends_with(".lora_A.weight")) {
            let module = down.trim_end_matches(".lora_A.weight");
            let update = Update {
                down: down.to_owned(),
                up: format!("{module}.lora_B.weight"),
                scale: config.scale(module, factors.shape(down).unwrap_or_default())?,
            };
            used.extend(factors.expect_factors(&update, base.shape(&format!("{module}.weight")))?);
            updates.insert(format!("{module}.weight"), update);
        }
        let faults = factors.compare(&used);
        if faults.is_empty() { Ok(Self { updates, factors }) } else { Err(CheckpointError::Tensors(faults)) }
    }

    /// What the adapter adds to a weight, in fp32 on `device`, if it changes it.
    pub(super) fn delta(&self, weight: &str, device: Device) -> Result<Option<Tensor>, CheckpointError> {
        let Some(update) = self.updates.get(weight) else { return Ok(None) };
        let down = self.factors.read(&update.down, device)?;
        let up = self.factors.read(&update.up, device)?;
        Ok(Some(up.matmul(&down) * update.scale))
    }

    /// How many weights the adapter changes.
    pub(super) fn len(&self) -> usize {
        self.updates.len()
    }
}

impl Inventory {
    /// The shapes that both factors of an update must have beside a weight of shape `weight`.
    fn expect_factors(
        &self,
        update: &Update,
        weight: Option<&[i64]>,
    ) -> Result<[(String, Vec<i64>); 2], CheckpointError> {
        match (weight, self.shape(&update.down)) {
            (Some([out, input]), Some([rank, _])) => {
                Ok([(update.down.clone(), vec![*rank, *input]), (update.up.clone(), vec![*out, *rank])])
            }
            (_, found) => Err(CheckpointError::Tensors(vec![Fault {
                file: WEIGHTS.into(),
                key: update.down.clone(),
                problem: Problem::Unexpected { shape: found.unwrap_or_default().to_vec() },
            }])),
        }
    }
}

impl AdapterConfig {
    fn check(&self) -> Result<(), String> {
        let rules = [
            (self.peft_type == "LORA", format!("peft_type is {:?}, must be \"LORA\"", self.peft_type)),
            (self.r >= 1.0, format!("r is {}, must be at least 1", self.r)),
            (!self.use_dora, "use_dora is true; merge the adapter with PEFT and serve the result".into()),
            (!self.fan_in_fan_out, "fan_in_fan_out is true, must be false for linear layers".into()),
            (!self.lora_bias, "lora_bias is true; merge the adapter with PEFT and serve the result".into()),
        ];
        let bias = self.bias.as_deref().unwrap_or("none");
        let broken = rules.into_iter().find(|(holds, _)| !holds).map(|(_, rule)| rule);
        match broken {
            Some(rule) => Err(rule),
            None if bias != "none" => Err(format!("bias is {bias:?}, must be \"none\"")),
            None => Ok(()),
        }
    }

    /// PEFT's scaling of one module, whose down factor has shape `[rank, input]`.
    fn scale(&self, module: &str, down: &[i64]) -> Result<f64, CheckpointError> {
        let rank = down.first().map_or(self.r, |&rank| rank as f64);
        let mut alpha = self.lora_alpha;
        for (pattern, value) in &self.alpha_pattern {
            let regex = Regex::new(&format!(r"^(.*\.)?({pattern})$"))
                .map_err(|e| CheckpointError::invalid(CONFIG, format!("alpha_pattern {pattern:?}: {e}")))?;
            // PEFT matches the module's path in its own model, of which the canonical name is the end.
            if regex.is_match(module) || regex.is_match(&format!("model.{module}")) {
                alpha = *value;
                break;
            }
        }
        Ok(if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank })
    }
}
