//! Weights on their way from the files to a device.

use std::collections::BTreeSet;

use tch::{Device, Kind, Tensor};

use super::lora::Adapter;
use super::tensors::Inventory;
use super::{CheckpointError, CheckpointFiles};

/// The weights of a checkpoint, handed out one by one on the device and in the number format of the forward pass,
/// the LoRA adapter merged.
#[derive(Debug)]
pub struct Weights {
    inventory: Inventory,
    adapter: Adapter,
    taken: BTreeSet<String>,
    /// Where the weights go.
    pub device: Device,
    /// The number format of the backbone.
    pub kind: Kind,
}

impl Weights {
    /// Opens a checkpoint's weights and its adapter. Reads headers only.
    pub fn open(
        files: &CheckpointFiles,
        canonical: impl Fn(&str) -> Option<String>,
        device: Device,
        kind: Kind,
    ) -> Result<Self, CheckpointError> {
        let mut inventory = Inventory::open(files, &canonical)?;
        let adapter = Adapter::open(files, &mut inventory, &canonical)?;
        Ok(Self { inventory, adapter, taken: BTreeSet::new(), device, kind })
    }

    /// Random weights of these names and shapes, made on the device: for measuring it without a checkpoint.
    pub fn random(tensors: Vec<(String, Vec<i64>)>, device: Device, kind: Kind) -> Self {
        let (inventory, adapter) = (Inventory::random(tensors), Adapter::default());
        Self { inventory, adapter, taken: BTreeSet::new(), device, kind }
    }

    /// What there is.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// How many weights a LoRA adapter changes.
    pub fn adapted(&self) -> usize {
        self.adapter.len()
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
        match self.adapter.delta(name, self.device)? {
            None => self.inventory.read_into(name, target),
            Some(delta) => {
                // Merged in fp32 and rounded once.
                let merged = self.inventory.read(name, self.device)? + delta;
                target.shallow_clone().copy_(&merged);
                Ok(())
            }
        }
    }
}
