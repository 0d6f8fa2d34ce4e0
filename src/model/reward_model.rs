//! The whole: backbone and head.

use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::backbone::{Activations, Backbone, Batch, Config, Shape, canonical_name};
use super::checkpoint::{CheckpointError, CheckpointFiles, Fault, Weights};
use super::cpu_parallel::Lanes;
use super::profile::{Output, Positions, RewardConfig};
use super::readout::{LM_HEAD, Readout, Reads, expected_tensors};
use super::{ModelError, Reading, Sample, Score, Scorer, SelfTested};

/// The weight that has a row for every token.
const EMBEDDINGS: &str = "language_model.embed_tokens.weight";
/// The rows of a product that are computed at a time where a score shall not depend on its batch. On a GPU enough to keep
/// it busy, and no more than a single picture has patches of; on the CPU as few as make products efficient.
const TILES: [i64; 2] = [1024, 64];
/// How far apart two scores of one item may be in different batches, as a share of how large scores are.
const ROUNDING: f32 = 1e-5;

/// A SpatialScore model on one device.
#[derive(Debug)]
pub struct RewardModel {
    backbone: Backbone,
    readout: Readout,
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
        let reward = RewardConfig::load(files)?;
        let has_output_layer = reward.reads_answers() && !config.ties_embeddings;
        let canonical = |key: &str| match key {
            LM_HEAD if has_output_layer => Some(LM_HEAD.to_owned()),
            key => canonical_name(key),
        };
        let mut weights = Weights::open(files, canonical, device, kind)?;
        if config.ties_embeddings && weights.inventory().shape(EMBEDDINGS).is_none() {
            // One tensor under two names, of which a file may hold either.
            let tied = |key: &str| match key {
                LM_HEAD => Some(EMBEDDINGS.to_owned()),
                key => canonical_name(key),
            };
            weights = Weights::open(files, tied, device, kind)?;
        }
        let inventory = weights.inventory();
        // Before a list is made of them: the files' headers are bounded, what a configuration says is not.
        let layers = config.text.num_hidden_layers.saturating_add(config.vision.depth);
        if layers > inventory.len() {
            return Err(CheckpointError::invalid(
                "config.json",
                format!(
                    "num_hidden_layers {} and vision_config.depth {} are more layers than the {} tensors that there \
                     are",
                    config.text.num_hidden_layers,
                    config.vision.depth,
                    inventory.len()
                ),
            ));
        }
        // The vocabulary's rows are the tensor's to say: trainers that add a token cut the padded table to size. One
        // that has grown is not the one that the configuration is of.
        let rows = inventory.shape(EMBEDDINGS).and_then(|s| s.first().copied()).unwrap_or_default();
        if let Some(said) = config.text.vocab_size.filter(|said| rows > *said) {
            return Err(CheckpointError::invalid(
                "config.json",
                format!("vocab_size is {said}, but {EMBEDDINGS} has {rows} rows, must be at least as many"),
            ));
        }
        let mut expected = config.tensors(rows);
        expected.extend(
            expected_tensors(inventory, &reward, config.text.hidden_size, rows, config.ties_embeddings)
                .map_err(|reason| CheckpointError::invalid("model.safetensors", reason))?,
        );
        let faults = inventory.compare(&expected);
        Ok(Self { config, reward, weights, faults })
    }

    /// The same, computed so that a score is the same to the last bit whatever batch its item is in. Costs a part of the
    /// rate, and more of it the smaller a batch is. Probabilities of answers depend on their batch by the rounding of an
    /// fp32 sum over the vocabulary.
    #[must_use]
    pub fn batch_invariant(mut self) -> Self {
        let [gpu, cpu] = TILES;
        self.weights.tile = Some(if self.weights.device.is_cuda() { gpu } else { cpu });
        self
    }

    /// Rows of the vocabulary, if the checkpoint has embeddings.
    pub fn vocabulary(&self) -> Option<u32> {
        let rows = self.weights.inventory().shape(EMBEDDINGS)?.first()?;
        u32::try_from(*rows).ok()
    }

    /// A model of this shape with random weights and one linear layer for a head.
    ///
    /// # Errors
    /// The shape that this program carries is wrong.
    pub fn random(shape: Shape, device: Device, kind: Kind) -> Result<Self, CheckpointError> {
        let (config, vocabulary) =
            shape.config().map_err(|reason| CheckpointError::invalid("random weights", reason))?;
        let reward =
            RewardConfig { positions: Positions::Mrope, ..RewardConfig::plain("{prompt}", Output::Gaussian) };
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
        reading: impl Into<Reading>,
        device: Device,
        kind: Kind,
    ) -> Result<Self, CheckpointError> {
        Self::build(Blueprint::open(files, device, kind)?, reading)
    }

    /// Loads what a blueprint describes.
    ///
    /// # Errors
    /// As [`RewardModel::load`].
    pub fn build(blueprint: Blueprint, reading: impl Into<Reading>) -> Result<Self, CheckpointError> {
        let _no_grad = no_grad_guard();
        let Blueprint { config, reward, mut weights, faults } = blueprint;
        if !faults.is_empty() {
            return Err(CheckpointError::Tensors(faults));
        }
        let Reading { normalisation, answers } = reading.into();
        let tied = config.ties_embeddings;
        let backbone = Backbone::load(&mut weights, config, reward.positions, normalisation)?;
        let embeddings = tied.then(|| backbone.embeddings());
        let readout = Readout::load(&mut weights, &reward, answers.as_ref(), embeddings)?;
        let lanes = match backbone.device() {
            Device::Cpu => Some(Lanes::new().map_err(|e| CheckpointError::io("a thread", e))?),
            _ => None,
        };
        match weights.untaken().first() {
            None => Ok(Self { backbone, readout, lanes }),
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
        let reads = self.readout.stage(&[sample], self.backbone.device());
        activations.see("head", || self.readout.forward(&hidden, &reads));
        Ok(activations.into_stages())
    }
}

/// Samples as the model reads them, in parts that run side by side.
#[derive(Debug)]
pub struct Staged {
    parts: Vec<(Batch, Reads)>,
    /// How many branches each sample has.
    branches: Vec<usize>,
}

/// What is read, `[readings, columns]`, which the device may still compute.
#[derive(Debug)]
pub struct Running {
    columns: Tensor,
    branches: Vec<usize>,
}

impl RewardModel {
    fn run(&self, parts: Vec<(Batch, Reads)>) -> Tensor {
        let columns = |model: &Self, (part, reads): (Batch, Reads)| {
            let _no_grad = no_grad_guard();
            model.readout.forward(&model.backbone.run(&part, &mut Activations::default()), &reads)
        };
        let columns = match &self.lanes {
            Some(lanes) => lanes.run(self, parts, columns),
            None => parts.into_iter().map(|part| columns(self, part)).collect(),
        };
        Tensor::cat(&columns, 0)
    }
}

impl Scorer for RewardModel {
    type Staged = Staged;
    type Running = Running;

    fn stage(&mut self, samples: &[&Sample]) -> Result<Staged, ModelError> {
        let stage = |model: &Self, part: &[&Sample]| {
            let _no_grad = no_grad_guard();
            Ok::<_, ModelError>((
                model.backbone.stage(part)?,
                model.readout.stage(part, model.backbone.device()),
            ))
        };
        // The whole of it, or in parts that run side by side.
        let parts = match &self.lanes {
            Some(lanes) => lanes.run(self, Lanes::split(samples), stage),
            None => vec![stage(self, samples)],
        };
        Ok(Staged {
            parts: parts.into_iter().collect::<Result<_, _>>()?,
            branches: samples.iter().map(|sample| sample.branches.len()).collect(),
        })
    }

    fn launch(&mut self, Staged { parts, branches }: Staged) -> Result<Running, ModelError> {
        Ok(Running { columns: self.run(parts), branches })
    }

    fn collect(&mut self, Running { columns, branches }: Running) -> Result<Vec<Score>, ModelError> {
        let _no_grad = no_grad_guard();
        Ok(self.readout.scores(&columns, &branches)?)
    }

    fn self_test(&mut self, samples: &[Sample; 4]) -> Result<SelfTested, ModelError> {
        let scores = self.score(&samples.each_ref())?;
        let [a, b, c, d] = <&[Score; 4]>::try_from(scores.as_slice())
            .map_err(|_| ModelError::Sample(format!("{} scores for 4 samples", scores.len())))?
            .each_ref()
            .map(|score| score.mean);
        // Less than what the neighbours in a batch change is no difference.
        let scale = [a, b, c, d].map(f32::abs).into_iter().fold(0.0, f32::max);
        let alike = |one: f32, other: f32| (one - other).abs() <= ROUNDING * scale;
        let (in_picture, in_prompt) = (alike(a, b) && alike(c, d), alike(a, c) && alike(b, d));
        let remark = match (in_picture, in_prompt) {
            (true, true) => {
                Some(format!("EVERY SCORE IS {a}: two pictures under two prompts are scored alike"))
            }
            (true, false) => Some("THE PICTURE DOES NOT MATTER: two of them are scored alike".to_owned()),
            (false, true) => Some("THE PROMPT DOES NOT MATTER: a picture has one score under two".to_owned()),
            (false, false) => None,
        };
        Ok(SelfTested { remark, scores })
    }

    /// After an error that leaves a CUDA context dead, even a single number cannot be made and fetched.
    fn is_lost(&mut self) -> bool {
        let device = self.backbone.device();
        let one = Tensor::f_ones([1], (Kind::Float, device)).and_then(|one| one.f_double_value(&[0]));
        !one.is_ok_and(|one| one == 1.0)
    }
}
