//! Qwen2-VL, Qwen2.5-VL and Qwen3-VL for still pictures: the reference's `Qwen2VLModel`, `Qwen2_5_VLModel` and
//! `Qwen3VLModel`, from patches and token ids to the hidden state of each sample's last token.

mod activations;
mod batch;
mod config;
mod config_keys;
mod config_rope;
mod decoder;
mod family;
mod flops;
mod rope;
mod shapes;
mod varlen_attention;
mod vision;

use tch::{Device, Tensor};

pub use activations::Activations;
pub use config::{Config, TextConfig, VisionConfig};
pub use family::Family;
pub use flops::forward_flops;
pub use shapes::Shape;

use super::checkpoint::{CheckpointError, Weights};
use super::profile::Positions;
use super::{ModelError, Normalisation, Sample};

/// The backbone.
#[derive(Debug)]
pub struct Backbone {
    config: Config,
    positions: Positions,
    vision: vision::VisionTower,
    decoder: decoder::Decoder,
}

/// Samples as the towers read them.
#[derive(Debug)]
pub struct Batch {
    pictures: batch::VisionBatch,
    texts: batch::TextBatch,
}

/// The name under which the model asks for a tensor that has this key on disk, or `None` for what it never needs.
///
/// transformers since 4.52 writes `model.language_model.` and `model.visual.`, its forerunners `model.` and
/// `visual.`.
pub fn canonical_name(key: &str) -> Option<String> {
    if key.starts_with("lm_head.")
        || key.ends_with("rotary_emb.inv_freq")
        || key.ends_with("rotary_pos_emb.inv_freq")
    {
        return None;
    }
    let Some(rest) = key.strip_prefix("model.") else { return Some(key.to_owned()) };
    if rest.starts_with("visual.") || rest.starts_with("language_model.") {
        Some(rest.to_owned())
    } else {
        Some(format!("language_model.{rest}"))
    }
}

impl Backbone {
    /// Takes the backbone's weights.
    pub fn load(
        weights: &mut Weights,
        config: Config,
        positions: Positions,
        normalisation: Normalisation,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            vision: vision::VisionTower::load(weights, &config.vision, normalisation)?,
            decoder: decoder::Decoder::load(weights, &config.text)?,
            config,
            positions,
        })
    }

    /// The hidden state of each sample's last token, or of the last of each of its branches: `[readings, width]`.
    ///
    /// # Errors
    /// A sample does not fit the model.
    pub fn forward(&self, samples: &[&Sample], activations: &mut Activations) -> Result<Tensor, ModelError> {
        Ok(self.run(&self.stage(samples)?, activations))
    }

    /// Lays out a batch and begins to copy it to the device.
    ///
    /// # Errors
    /// A sample does not fit the model.
    pub fn stage(&self, samples: &[&Sample]) -> Result<Batch, ModelError> {
        let device = self.device();
        let pictures = batch::vision_batch(&self.config, samples, device);
        let texts = batch::text_batch(
            &self.config,
            self.positions,
            self.decoder.vocabulary(),
            samples,
            &pictures.natural,
            device,
        )?;
        Ok(Batch { pictures, texts })
    }

    /// The forward pass of a batch, as [`Backbone::forward`] gives it.
    pub fn run(&self, batch: &Batch, activations: &mut Activations) -> Tensor {
        let visual = self.vision.forward(&batch.pictures, activations);
        self.decoder.forward(&batch.texts, &visual, activations)
    }

    /// The table of embeddings, `[rows, width]`, which a tied model's output layer is too.
    pub fn embeddings(&self) -> &Tensor {
        self.decoder.embeddings()
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.decoder.device()
    }
}
