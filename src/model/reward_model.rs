//! The whole: backbone and head.

use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::backbone::{Activations, Backbone, Batch, Config, Shape, canonical_name};
use super::checkpoint::{
    CheckpointError, CheckpointFiles, Fault, Output, Positions, RewardConfig, RewardToken, Weights,
};
use super::lanes::Lanes;
use super::reward_head::{RewardHead, expected_tensors};
use super::{ModelError, Normalisation, Sample, Score, Scorer};

/// A SpatialScore model on one device.
#[derive(Debug)]
pub struct RewardModel {
    backbone: Backbone,
    head: RewardHead,
    /// On the CPU.
    lanes: Option<Lanes>,
}

/// What a checkpoint says of itself, its weights opened but not read.
#[derive(Debug)]
pub struct Blueprint {
    /// `config.json`.
    pub config: Config,
    /// `reward_config.json`.
    pub reward: RewardConfig,
    /// The weights, by their headers.
    pub weights: Weights,
    /// Tensors that are missing, unexpected or misshapen.
    pub faults: Vec<Fault>,
}

impl Blueprint {
    /// Reads a checkpoint's configuration and the headers of its weights.
    ///
    /// # Errors
    /// A file is missing or says what cannot be served. Faults of single tensors are listed in the result.
    pub fn open(files: &CheckpointFiles, device: Device, kind: Kind) -> Result<Self, CheckpointError> {
        let config = Config::from_json(&files.require_json::<Value>("config.json")?)
            .map_err(|reason| CheckpointError::invalid("config.json", reason))?;
        let reward: RewardConfig = files.require_json("reward_config.json")?;
        let weights = Weights::open(files, canonical_name, device, kind)?;
        let inventory = weights.inventory();
        // The vocabulary's rows are the tensor's to say.
        let rows = inventory.shape("language_model.embed_tokens.weight").and_then(|s| s.first().copied());
        let mut expected = config.tensors(rows.unwrap_or_default());
        expected.extend(expected_tensors(inventory, config.text.hidden_size, reward.output));
        let faults = inventory.compare(&expected);
        Ok(Self { config, reward, weights, faults })
    }

    /// A model of this shape with random weights and one linear layer for a head.
    ///
    /// # Errors
    /// The shape that this program carries is wrong.
    pub fn random(shape: Shape, device: Device, kind: Kind) -> Result<Self, CheckpointError> {
        let (config, vocabulary) =
            shape.config().map_err(|reason| CheckpointError::invalid("random weights", reason))?;
        let reward = RewardConfig {
            instruction: "{prompt}".into(),
            reward_token: RewardToken::Last,
            special_token: None,
            positions: Positions::Mrope,
            min_pixels: None,
            max_pixels: None,
            output: Output::Gaussian,
            notice: None,
            pictures: 1,
        };
        let mut tensors = config.tensors(vocabulary);
        tensors.push(("rm_head.weight".into(), vec![2, config.text.hidden_size]));
        let weights = Weights::random(tensors, device, kind);
        Ok(Self { config, reward, weights, faults: Vec::new() })
    }
}

impl RewardModel {
    /// Loads a checkpoint onto a device, the backbone in the number format `kind`, the head in fp32.
    ///
    /// # Errors
    /// Anything that is missing, unexpected, misshapen, truncated or not finite. There is no half-loaded model.
    pub fn load(
        files: &CheckpointFiles,
        normalisation: Normalisation,
        device: Device,
        kind: Kind,
    ) -> Result<Self, CheckpointError> {
        Self::build(Blueprint::open(files, device, kind)?, normalisation)
    }

    /// Loads what a blueprint describes.
    ///
    /// # Errors
    /// As [`RewardModel::load`].
    pub fn build(blueprint: Blueprint, normalisation: Normalisation) -> Result<Self, CheckpointError> {
        let _no_grad = no_grad_guard();
        let Blueprint { config, reward, mut weights, faults } = blueprint;
        if !faults.is_empty() {
            return Err(CheckpointError::Tensors(faults));
        }
        let backbone = Backbone::load(&mut weights, config, reward.positions, normalisation)?;
        let head = RewardHead::load(&mut weights, reward.output)?;
        let lanes = match backbone.device() {
            Device::Cpu => Some(Lanes::new().map_err(|e| CheckpointError::io("a thread", e))?),
            _ => None,
        };
        match weights.untaken().first() {
            None => Ok(Self { backbone, head, lanes }),
            Some(name) => {
                Err(CheckpointError::invalid("model.safetensors", format!("{name} was never read")))
            }
        }
    }

    /// Scores one sample and returns the tensor of every stage, by the names that the fixtures of the parity tests
    /// use.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    pub fn trace(&self, sample: &Sample) -> Result<Vec<(String, Tensor)>, ModelError> {
        let _no_grad = no_grad_guard();
        let mut activations = Activations::keep();
        let hidden = self.backbone.forward(&[sample], &mut activations)?;
        activations.see("head", || self.head.forward(&hidden));
        Ok(activations.into_stages())
    }
}

/// The head's columns, `[samples, columns]`, which the device may still compute.
#[derive(Debug)]
pub struct Running(Tensor);

impl RewardModel {
    fn run(&self, parts: Vec<Batch>) -> Tensor {
        let columns = |model: &Self, part: Batch| {
            let _no_grad = no_grad_guard();
            model.head.forward(&model.backbone.run(&part, &mut Activations::default()))
        };
        let columns = match &self.lanes {
            Some(lanes) => lanes.run(self, parts, columns),
            None => parts.into_iter().map(|part| columns(self, part)).collect(),
        };
        Tensor::cat(&columns, 0)
    }
}

impl Scorer for RewardModel {
    type Staged = Vec<Batch>;
    type Running = Running;

    fn stage(&mut self, samples: &[&Sample]) -> Result<Vec<Batch>, ModelError> {
        let _no_grad = no_grad_guard();
        // The whole of it, or in parts that run side by side.
        let parts = if self.lanes.is_some() { Lanes::split(samples) } else { vec![samples] };
        parts.into_iter().map(|part| self.backbone.stage(part)).collect()
    }

    fn launch(&mut self, parts: Vec<Batch>) -> Result<Running, ModelError> {
        Ok(Running(self.run(parts)))
    }

    fn collect(&mut self, Running(columns): Running) -> Result<Vec<Score>, ModelError> {
        let _no_grad = no_grad_guard();
        Ok(self.head.scores(&columns)?)
    }

    /// After an error that leaves a CUDA context dead, even a single number cannot be made and fetched.
    fn is_lost(&mut self) -> bool {
        let device = self.backbone.device();
        let one = Tensor::f_ones([1], (Kind::Float, device)).and_then(|one| one.f_double_value(&[0]));
        !one.is_ok_and(|one| one == 1.0)
    }
}
