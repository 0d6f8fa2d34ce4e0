//! Weights on their way from the files to a device.

use std::collections::BTreeSet;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::lora::Adapter;
use super::tensors::Inventory;
use super::{CheckpointError, CheckpointFiles, Fault};

/// The weights of a checkpoint, handed out one by one on the device and in the number format of the forward pass,
/// adapters merged.
#[derive(Debug)]
pub struct Weights {
    inventory: Inventory,
    /// In the order in which they are merged.
    adapters: Vec<Adapter>,
    taken: BTreeSet<String>,
    /// Where the weights go.
    pub device: Device,
    /// The number format of the backbone.
    pub kind: Kind,
    /// So many rows of a product are computed at a time, whatever the batch, so that what a row gives does not depend on
    /// how many others there are. `None`: all at once.
    pub tile: Option<i64>,
}

impl Weights {
    /// Opens a checkpoint's weights and its adapters. Reads headers only.
    ///
    /// # Errors
    /// A file is missing or broken, or an adapter does not fit what it stands on.
    pub fn open(
        files: &CheckpointFiles,
        canonical: impl Fn(&str) -> Option<String>,
        device: Device,
        kind: Kind,
    ) -> Result<Self, CheckpointError> {
        let mut inventory = Inventory::open(files, &canonical)?;
        let tied = is_tied(files, &inventory)?;
        let mut adapters = Vec::new();
        for folder in files.adapters() {
            let adapter = Adapter::open(folder, &mut inventory, &mut adapters, &canonical, tied)?;
            adapters.push(adapter);
        }
        Ok(Self { inventory, adapters, taken: BTreeSet::new(), device, kind, tile: None })
    }

    /// Random weights of these names and shapes, made on the device: for measuring it without a checkpoint.
    pub fn random(tensors: Vec<(String, Vec<i64>)>, device: Device, kind: Kind) -> Self {
        let (inventory, adapters) = (Inventory::random(tensors), Vec::new());
        Self { inventory, adapters, taken: BTreeSet::new(), device, kind, tile: None }
    }

    /// What there is.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// How many weights are changed by adapters.
    pub fn adapted(&self) -> usize {
        self.adapters.iter().flat_map(Adapter::changed).collect::<BTreeSet<_>>().len()
    }

    /// Reads every value as loading would, adapters merged, and keeps none: the tensors that are not finite. `progress`
    /// is told the bytes of each.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn non_finite(&self, mut progress: impl FnMut(u64)) -> Result<Vec<Fault>, CheckpointError> {
        let mut faults = Vec::new();
        for name in self.inventory.names() {
            let finite = if self.is_adapted(name) {
                match self.merged(name) {
                    Ok(_) => true,
                    Err(CheckpointError::Tensors(found)) => {
                        faults.extend(found);
                        true
                    }
                    Err(other) => return Err(other),
                }
            } else {
                self.inventory.is_finite(name)?
            };
            if !finite {
                faults.extend(self.inventory.non_finite(name));
            }
            progress(self.inventory.bytes_of(name));
        }
        Ok(faults)
    }

    /// A weight of the backbone.
    pub fn take(&mut self, name: &str) -> Result<Tensor, CheckpointError> {
        self.take_stacked(&[name])
    }

    /// Weights that share an input, stacked along their outputs: one product in place of several.
    pub fn take_stacked(&mut self, names: &[&str]) -> Result<Tensor, CheckpointError> {
        let shapes: Vec<&[i64]> = names.iter().map(|n| self.inventory.shape(n).unwrap_or_default()).collect();
        let mut shape = shapes.first().map(|s| s.to_vec()).unwrap_or_default();
        if let Some(rows) = shape.first_mut() {
            *rows = shapes.iter().filter_map(|s| s.first()).sum();
        }
        let stacked = Tensor::empty(&shape, (self.kind, self.device));
        let mut row = 0;
        for name in names {
            let rows = self.inventory.shape(name).and_then(|s| s.first().copied()).unwrap_or_default();
            self.fill(name, &stacked.narrow(0, row, rows))?;
            row += rows;
        }
        Ok(stacked)
    }

    /// A weight in fp32, whatever the backbone's number format: the head's.
    pub fn take_fp32(&mut self, name: &str) -> Result<Tensor, CheckpointError> {
        let target =
            Tensor::empty(self.inventory.shape(name).unwrap_or_default(), (Kind::Float, self.device));
        self.fill(name, &target)?;
        Ok(target)
    }

    /// Those that nobody took, which is a fault of this program: the comparison with the configuration comes first.
    pub fn untaken(&self) -> Vec<&str> {
        self.inventory.names().filter(|name| !self.taken.contains(*name)).collect()
    }

    fn fill(&mut self, name: &str, target: &Tensor) -> Result<(), CheckpointError> {
        self.taken.insert(name.to_owned());
        if !self.is_adapted(name) {
            return self.inventory.read_into(name, target);
        }
        // Merged in fp32 and rounded once.
        target.shallow_clone().copy_(&self.merged(name)?);
        Ok(())
    }

    fn is_adapted(&self, name: &str) -> bool {
        self.adapters.iter().any(|adapter| adapter.changes(name))
    }

    /// A weight in fp32 with all that adapters do to it.
    fn merged(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let mut weight = self.inventory.read(name, self.device)?;
        for adapter in &self.adapters {
            weight = adapter.apply(name, weight, self.device)?;
        }
        Ok(weight)
    }
}

/// Whether the base's output layer is its table of embeddings.
fn is_tied(files: &CheckpointFiles, base: &Inventory) -> Result<bool, CheckpointError> {
    let config: Option<Value> = files.json("config.json")?;
    let said = |path| config.as_ref()?.pointer(path)?.as_bool();
    let said = said("/tie_word_embeddings").or_else(|| said("/text_config/tie_word_embeddings"));
    let has_own = || {
        base.shape("lm_head.weight").is_some()
            || base.skipped.iter().any(|key| key.ends_with("lm_head.weight"))
    };
    Ok(said.unwrap_or_else(|| !has_own()))
}
