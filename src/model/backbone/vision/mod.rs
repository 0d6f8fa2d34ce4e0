//! The vision tower of every family: patches, blocks that attend within a picture or a window, and the merger that
//! makes one visual token of a square of patches. What a family does its own way stands in the file of its name.

mod qwen2;
mod qwen2_5;
mod qwen3;

use tch::{Kind, Tensor};

use self::qwen3::{DeepStack, PositionEmbedding};
use super::activations::Activations;
use super::batch::VisionBatch;
use super::config::VisionConfig;
use super::family::Family;
use super::rope::inverse_frequencies;
use super::varlen_attention::Segments;
use crate::model::Normalisation;
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::layers::{GatedMlp, Gelu, LayerNorm, Linear, PlainMlp, RmsNorm, rotate, turns};

/// All norms of the tower have this in the reference, whatever the configuration.
const EPS: f64 = 1e-6;

/// What a family's tower calls its parts, and of what sort they are.
#[derive(Debug)]
struct Style {
    /// Whether the patches' projection has a bias.
    patch_bias: bool,
    norm: NormStyle,
    mlp: MlpStyle,
    merger: MergerNames,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NormStyle {
    Rms,
    Layer,
}

#[derive(Debug)]
enum MlpStyle {
    Gated,
    Plain { up: &'static str, down: &'static str, gelu: Gelu },
}

/// The parts of a merger.
#[derive(Debug)]
struct MergerNames {
    norm: &'static str,
    up: &'static str,
    down: &'static str,
}

impl Style {
    fn of(family: Family) -> &'static Self {
        match family {
            Family::Qwen2Vl => &qwen2::STYLE,
            Family::Qwen25Vl => &qwen2_5::STYLE,
            Family::Qwen3Vl => &qwen3::STYLE,
        }
    }
}

type Shapes = Vec<(String, Vec<i64>)>;

impl VisionConfig {
    /// Every tensor of the tower with its shape.
    pub(super) fn tensors(&self) -> Shapes {
        let style = Style::of(self.family());
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let patch = vec![d, self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size];
        let mut list = vec![("visual.patch_embed.proj.weight".to_owned(), patch)];
        if style.patch_bias {
            list.push(("visual.patch_embed.proj.bias".to_owned(), vec![d]));
        }
        list.extend(style.merger.tensors("visual.merger", self, style.norm, d));
        list.extend(qwen3::tensors(self));
        for n in 0..self.depth {
            let block = format!("visual.blocks.{n}");
            for norm in ["norm1", "norm2"] {
                list.extend(style.norm.tensors(&format!("{block}.{norm}"), d));
            }
            list.extend(Linear::tensors(&format!("{block}.attn.qkv"), 3 * d, d, true));
            list.extend(Linear::tensors(&format!("{block}.attn.proj"), d, d, true));
            let (up, down) = match style.mlp {
                MlpStyle::Gated => (vec!["gate_proj", "up_proj"], "down_proj"),
                MlpStyle::Plain { up, down, .. } => (vec![up], down),
            };
            for up in up {
                list.extend(Linear::tensors(&format!("{block}.mlp.{up}"), i, d, true));
            }
            list.extend(Linear::tensors(&format!("{block}.mlp.{down}"), d, i, true));
        }
        list
    }

    /// How often patches become visual tokens.
    pub(super) fn mergers(&self) -> usize {
        1 + qwen3::deepstack_blocks(self).len()
    }

    /// How many matrices of width × inner width an MLP has.
    pub(super) fn mlp_matrices(&self) -> usize {
        match Style::of(self.family()).mlp {
            MlpStyle::Gated => 3,
            MlpStyle::Plain { .. } => 2,
        }
    }
}

/// Pictures to visual tokens.
#[derive(Debug)]
pub struct VisionTower {
    patch_embed: PatchEmbed,
    position_embedding: Option<PositionEmbedding>,
    blocks: Vec<Block>,
    merger: Merger,
    deepstack: DeepStack,
    /// `[width of a head / 4]`, fp32.
    inverse_frequencies: Tensor,
}

/// What the decoder sees of the pictures of a batch, in the order of the batch.
#[derive(Debug)]
pub struct Visual {
    /// `[visual tokens, width of the decoder]`.
    pub tokens: Tensor,
    /// What is added to the visual tokens behind each of the decoder's first layers, each of the same shape.
    pub deepstack: Vec<Tensor>,
}

impl VisionTower {
    /// Takes the weights under `visual`.
    pub fn load(
        weights: &mut Weights,
        config: &VisionConfig,
        normalisation: Normalisation,
    ) -> Result<Self, CheckpointError> {
        let style = Style::of(config.family());
        let blocks =
            (0..config.depth).map(|n| Block::load(weights, config, style, n)).collect::<Result<_, _>>()?;
        let merger = Merger::load(weights, config, "visual.merger", &style.merger, (style.norm, false))?;
        Ok(Self {
            patch_embed: PatchEmbed::load(weights, config, style, normalisation)?,
            position_embedding: PositionEmbedding::load(weights, config)?,
            blocks,
            merger,
            deepstack: DeepStack::load(weights, config)?,
            inverse_frequencies: inverse_frequencies(
                config.head_dim() / 2,
                config.rope_theta(),
                weights.device,
            ),
        })
    }

    /// The pictures of a batch as the decoder sees them.
    pub fn forward(&self, batch: &VisionBatch, activations: &mut Activations) -> Visual {
        let mut x = self.patch_embed.forward(&batch.pixels);
        activations.see("vision.patch_embed", || in_natural_order(&x, &batch.natural));
        if let Some((embedding, taps)) = self.position_embedding.as_ref().zip(batch.taps.as_ref()) {
            x += embedding.forward(taps);
            activations.see("vision.position_embed", || in_natural_order(&x, &batch.natural));
        }

        // Angles of the row for the first half of the pairs, of the column for the second.
        let angles = batch.positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse_frequencies;
        let turns = turns(&angles.flatten(1, 2));
        let mut deepstack = Vec::new();
        for (n, block) in self.blocks.iter().enumerate() {
            let segments = if block.attends_to_all { &batch.pictures } else { &batch.windows };
            x = block.forward(x, &turns, segments);
            activations.see(&format!("vision.blocks.{n}"), || in_natural_order(&x, &batch.natural));
            deepstack.extend(self.deepstack.behind(n).map(|merger| merger.forward(&x)));
        }
        let visual = Visual { tokens: self.merger.forward(&x), deepstack };

        let natural_tokens = |x: &Tensor| {
            let unit = self.merger.merge_unit;
            let tokens: Vec<i64> =
                batch.natural.iter().step_by(unit as usize).map(|patch| patch / unit).collect();
            in_natural_order(x, &tokens)
        };
        activations.see("vision.merger", || natural_tokens(&visual.tokens));
        for (n, features) in visual.deepstack.iter().enumerate() {
            activations.see(&format!("vision.deepstack.{n}"), || natural_tokens(features));
        }
        visual
    }
}

/// Undoes the order of the batch: row `r` of `x` goes to row `natural[r]`.
fn in_natural_order(x: &Tensor, natural: &[i64]) -> Tensor {
    x.empty_like().index_copy(0, &Tensor::from_slice(natural).to_device(x.device()), x)
}

/// The reference's `PatchEmbed`, for still pictures.
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
        style: &Style,
        normalisation: Normalisation,
    ) -> Result<Self, CheckpointError> {
        let bias = style.patch_bias.then(|| weights.take("visual.patch_embed.proj.bias")).transpose()?;
        let kernel = weights.take_fp32("visual.patch_embed.proj.weight")?;
        let summed = kernel.sum_dim_intlist(2, false, Kind::Float).flatten(1, -1).to_kind(weights.kind);
        let Normalisation { mean, std, rescale } = normalisation;
        let area = config.patch_size * config.patch_size;
        let per_value = |channels: [f32; 3]| {
            Tensor::from_slice(&channels).repeat_interleave_self_int(area, 0, None).to_device(weights.device)
        };
        Ok(Self {
            projection: Linear { weight: summed, bias, tile: weights.tile },
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

/// A norm of either sort.
#[derive(Debug)]
enum Norm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl NormStyle {
    fn load(self, weights: &mut Weights, name: &str) -> Result<Norm, CheckpointError> {
        Ok(match self {
            Self::Rms => Norm::Rms(RmsNorm::load(weights, name, EPS)?),
            Self::Layer => Norm::Layer(LayerNorm::load(weights, name, EPS)?),
        })
    }

    fn tensors(self, name: &str, width: i64) -> Shapes {
        let ends: &[&str] = if self == Self::Rms { &["weight"] } else { &["weight", "bias"] };
        ends.iter().map(|end| (format!("{name}.{end}"), vec![width])).collect()
    }
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

/// An MLP of either sort.
#[derive(Debug)]
enum Mlp {
    Gated(GatedMlp),
    Plain(PlainMlp),
}

impl MlpStyle {
    fn load(&self, weights: &mut Weights, name: &str) -> Result<Mlp, CheckpointError> {
        Ok(match self {
            Self::Gated => Mlp::Gated(GatedMlp::load(weights, name, true)?),
            Self::Plain { up, down, gelu } => {
                let [up, down] = [up, down].map(|part| format!("{name}.{part}"));
                Mlp::Plain(PlainMlp::load(weights, [&up, &down], *gelu)?)
            }
        })
    }
}

impl Mlp {
    fn add_to(&self, x: Tensor, y: &Tensor) -> Tensor {
        match self {
            Self::Gated(mlp) => mlp.add_to(x, y),
            Self::Plain(mlp) => mlp.add_to(x, y),
        }
    }
}

/// A block: the reference's `Qwen2VLVisionBlock`, `Qwen2_5_VLVisionBlock` or `Qwen3VLVisionBlock`.
#[derive(Debug)]
struct Block {
    norm1: Norm,
    qkv: Linear,
    projection: Linear,
    norm2: Norm,
    mlp: Mlp,
    heads: i64,
    /// Over the whole picture, not within a window.
    attends_to_all: bool,
}

impl Block {
    fn load(
        weights: &mut Weights,
        config: &VisionConfig,
        style: &Style,
        n: usize,
    ) -> Result<Self, CheckpointError> {
        let name = format!("visual.blocks.{n}");
        Ok(Self {
            norm1: style.norm.load(weights, &format!("{name}.norm1"))?,
            qkv: Linear::load(weights, &[&format!("{name}.attn.qkv")], true)?
                .with_pairs_together(2 * config.num_heads, config.head_dim()),
            projection: Linear::load(weights, &[&format!("{name}.attn.proj")], true)?,
            norm2: style.norm.load(weights, &format!("{name}.norm2"))?,
            mlp: style.mlp.load(weights, &format!("{name}.mlp"))?,
            heads: config.num_heads,
            attends_to_all: config.attends_to_all(n),
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

/// The patches of a square become one visual token: the reference's `PatchMerger`.
#[derive(Debug)]
struct Merger {
    norm: Norm,
    /// On the patches of a square side by side, not on each patch by itself.
    norm_behind: bool,
    mlp: PlainMlp,
    merge_unit: i64,
}

impl MergerNames {
    /// The tensors of the merger `name`, whose norm is of this style and width.
    fn tensors(&self, name: &str, config: &VisionConfig, norm: NormStyle, width: i64) -> Shapes {
        let merged = config.hidden_size * config.merge_unit() as i64;
        let mut list = norm.tensors(&format!("{name}.{}", self.norm), width);
        list.extend(Linear::tensors(&format!("{name}.{}", self.up), merged, merged, true));
        list.extend(Linear::tensors(&format!("{name}.{}", self.down), config.out_hidden_size, merged, true));
        list
    }
}

impl Merger {
    fn load(
        weights: &mut Weights,
        config: &VisionConfig,
        name: &str,
        parts: &MergerNames,
        (norm, norm_behind): (NormStyle, bool),
    ) -> Result<Self, CheckpointError> {
        let [up, down] = [parts.up, parts.down].map(|part| format!("{name}.{part}"));
        Ok(Self {
            norm: norm.load(weights, &format!("{name}.{}", parts.norm))?,
            norm_behind,
            mlp: PlainMlp::load(weights, [&up, &down], Gelu::Exact)?,
            merge_unit: config.merge_unit() as i64,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let squares = |x: &Tensor| x.unflatten(0, [-1, self.merge_unit]).flatten(1, 2);
        let normed =
            if self.norm_behind { self.norm.forward(&squares(x)) } else { squares(&self.norm.forward(x)) };
        self.mlp.forward(&normed)
    }
}
