//! The vision tower: the reference's `Qwen2_5_VisionTransformerPretrainedModel`.

use tch::{Device, Kind, Tensor};

use super::activations::Activations;
use super::batch::VisionBatch;
use super::config::VisionConfig;
use super::varlen_attention::Segments;
use crate::model::Normalisation;
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::layers::{GatedMlp, Linear, RmsNorm, rotate, turns};

/// All norms of the tower have this in the reference, whatever the configuration.
const EPS: f64 = 1e-6;

/// Pictures to visual tokens.
#[derive(Debug)]
pub struct VisionTower {
    patch_embed: PatchEmbed,
    blocks: Vec<Block>,
    merger: Merger,
    /// `[width of a head / 4]`, fp32.
    inverse_frequencies: Tensor,
}

impl VisionTower {
    /// Takes the weights under `visual`.
    pub fn load(
        weights: &mut Weights,
        config: &VisionConfig,
        normalisation: Normalisation,
    ) -> Result<Self, CheckpointError> {
        let blocks = (0..config.depth).map(|n| Block::load(weights, config, n)).collect::<Result<_, _>>()?;
        Ok(Self {
            patch_embed: PatchEmbed::load(weights, config, normalisation)?,
            blocks,
            merger: Merger::load(weights, config)?,
            inverse_frequencies: inverse_frequencies(
                config.head_dim() / 2,
                config.rope_theta(),
                weights.device,
            ),
        })
    }

    /// `[visual tokens, width of the decoder]`, in the order of the batch.
    pub fn forward(&self, batch: &VisionBatch, activations: &mut Activations) -> Tensor {
        let mut x = self.patch_embed.forward(&batch.pixels);
        activations.see("vision.patch_embed", || in_natural_order(&x, &batch.natural));

        // Angles of the row for the first half of the pairs, of the column for the second.
        let angles = batch.positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse_frequencies;
        let turns = turns(&angles.flatten(1, 2));
        for (n, block) in self.blocks.iter().enumerate() {
            let segments = if block.attends_to_all { &batch.pictures } else { &batch.windows };
            x = block.forward(x, &turns, segments);
            activations.see(&format!("vision.blocks.{n}"), || in_natural_order(&x, &batch.natural));
        }
        let visual = self.merger.forward(&x);
        activations.see("vision.merger", || {
            let unit = self.merger.merge_unit;
            let tokens: Vec<i64> =
                batch.natural.iter().step_by(unit as usize).map(|patch| patch / unit).collect();
            in_natural_order(&visual, &tokens)
        });
        visual
    }
}

/// Undoes the order of the batch: row `r` of `x` goes to row `natural[r]`.
fn in_natural_order(x: &Tensor, natural: &[i64]) -> Tensor {
    x.empty_like().index_copy(0, &Tensor::from_slice(natural).to_device(x.device()), x)
}

/// `1 / theta^(2i / width)` for each pair of a head's `width` numbers.
pub(super) fn inverse_frequencies(width: i64, theta: f64, device: Device) -> Tensor {
    let exponents = Tensor::arange_start_step(0, width, 2, (Kind::Float, Device::Cpu)) / width as f64;
    Tensor::from(theta as f32).pow(&exponents).reciprocal().to_device(device)
}

/// The reference's `Qwen2_5_VisionPatchEmbed`, for still pictures.
///
/// A still picture is repeated along the temporal axis, so the kernel's frames are summed once, at load.
#[derive(Debug)]
struct PatchEmbed {
    projection: Linear,
    rescale: f64,
    /// `[channels × patch × patch]`, fp32, as is `std`.
    mean: Tensor,
    std: Tensor,
}

impl PatchEmbed {
    fn load(
        weights: &mut Weights,
        config: &VisionConfig,
        normalisation: Normalisation,
    ) -> Result<Self, CheckpointError> {
        let kernel = weights.take_fp32("visual.patch_embed.proj.weight")?;
        let summed = kernel.sum_dim_intlist(2, false, Kind::Float).flatten(1, -1).to_kind(weights.kind);
        let Normalisation { mean, std, rescale } = normalisation;
        let area = config.patch_size * config.patch_size;
        let per_value = |channels: [f32; 3]| {
            Tensor::from_slice(&channels).repeat_interleave_self_int(area, 0, None).to_device(weights.device)
        };
        Ok(Self {
            projection: Linear { weight: summed, bias: None },
            rescale: rescale.into(),
            mean: per_value(mean),
            std: per_value(std),
        })
    }

    fn forward(&self, pixels: &Tensor) -> Tensor {
        // In the reference's order, so that the values are its values to the last bit.
        let mut values = pixels.to_kind(Kind::Float);
        values *= self.rescale;
        values -= &self.mean;
        values /= &self.std;
        self.projection.forward(&values.to_kind(self.projection.weight.kind()))
    }
}

/// The reference's `Qwen2_5_VLVisionBlock`.
#[derive(Debug)]
struct Block {
    norm1: RmsNorm,
    qkv: Linear,
    projection: Linear,
    norm2: RmsNorm,
    mlp: GatedMlp,
    heads: i64,
    /// Over the whole picture, not within a window.
    attends_to_all: bool,
}

impl Block {
    fn load(weights: &mut Weights, config: &VisionConfig, n: usize) -> Result<Self, CheckpointError> {
        let name = format!("visual.blocks.{n}");
        Ok(Self {
            norm1: RmsNorm::load(weights, &format!("{name}.norm1"), EPS)?,
            qkv: Linear::load(weights, &[&format!("{name}.attn.qkv")], true)?
                .with_pairs_together(2 * config.num_heads, config.head_dim()),
            projection: Linear::load(weights, &[&format!("{name}.attn.proj")], true)?,
            norm2: RmsNorm::load(weights, &format!("{name}.norm2"), EPS)?,
            mlp: GatedMlp::load(weights, &format!("{name}.mlp"), true)?,
            heads: config.num_heads,
            attends_to_all: config.fullatt_block_indexes.contains(&n),
        })
    }

    fn forward(&self, x: Tensor, turns: &Tensor, segments: &Segments) -> Tensor {
        let heads = self.qkv.forward(&self.norm1.forward(&x)).unflatten(1, [3 * self.heads, -1]);
        // Queries and keys turn together.
        let turned = rotate(&heads.narrow(1, 0, 2 * self.heads), turns);
        let [q, k] = [0, 1].map(|n| turned.narrow(1, n * self.heads, self.heads));
        let v = heads.narrow(1, 2 * self.heads, self.heads);
        let x = self.projection.add_to(x, &segments.attend(&q, &k, &v, false));
        let normed = self.norm2.forward(&x);
        self.mlp.add_to(x, &normed)
    }
}

/// The reference's `Qwen2_5_VLPatchMerger`: the patches of a square become one visual token.
#[derive(Debug)]
struct Merger {
    norm: RmsNorm,
    up: Linear,
    down: Linear,
    merge_unit: i64,
}

impl Merger {
    fn load(weights: &mut Weights, config: &VisionConfig) -> Result<Self, CheckpointError> {
        Ok(Self {
            norm: RmsNorm::load(weights, "visual.merger.ln_q", EPS)?,
            up: Linear::load(weights, &["visual.merger.mlp.0"], true)?,
            down: Linear::load(weights, &["visual.merger.mlp.2"], true)?,
            merge_unit: config.merge_unit() as i64,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let squares = self.norm.forward(x).unflatten(0, [-1, self.merge_unit]).flatten(1, 2);
        self.down.forward(&self.up.forward(&squares).gelu_("none"))
    }
}
