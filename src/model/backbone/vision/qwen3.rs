//! Qwen3-VL's tower, the reference's `Qwen3VLVisionModel`: LayerNorm, an MLP without a gate, every block over the whole
//! picture, learnt positions beside the rotary ones, and features of a few blocks for the decoder's first layers.

use tch::{Kind, Tensor};

use super::{Merger, MergerNames, MlpStyle, NormStyle, Shapes, Style};
use crate::model::backbone::batch::Taps;
use crate::model::backbone::config::VisionConfig;
use crate::model::backbone::family::Family;
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::layers::Gelu;

pub(super) const STYLE: Style = Style {
    patch_bias: true,
    norm: NormStyle::Layer,
    mlp: MlpStyle::Plain { up: "linear_fc1", down: "linear_fc2", gelu: Gelu::Tanh },
    merger: MergerNames { norm: "norm", up: "linear_fc1", down: "linear_fc2" },
};

const POSITIONS: &str = "visual.pos_embed.weight";

fn deepstack_merger(n: usize) -> String {
    format!("visual.deepstack_merger_list.{n}")
}

/// The blocks that have a merger of their own.
pub(super) fn deepstack_blocks(config: &VisionConfig) -> &[usize] {
    match config.family() {
        Family::Qwen3Vl => &config.deepstack_visual_indexes,
        Family::Qwen2Vl | Family::Qwen25Vl => &[],
    }
}

/// What this tower has besides, with its shapes; nothing in the other families.
pub(super) fn tensors(config: &VisionConfig) -> Shapes {
    if config.family() != Family::Qwen3Vl {
        return Vec::new();
    }
    let merged = config.hidden_size * config.merge_unit() as i64;
    let mut list = vec![(POSITIONS.to_owned(), vec![config.num_position_embeddings, config.hidden_size])];
    for n in 0..config.deepstack_visual_indexes.len() {
        list.extend(STYLE.merger.tensors(&deepstack_merger(n), config, STYLE.norm, merged));
    }
    list
}

/// A square of learnt positions, stretched over each picture.
#[derive(Debug)]
pub(super) struct PositionEmbedding {
    /// `[side × side, width]`, fp32 of the backbone's precision.
    table: Tensor,
    kind: Kind,
}

impl PositionEmbedding {
    /// Takes the weights, where the family has them.
    pub(super) fn load(
        weights: &mut Weights,
        config: &VisionConfig,
    ) -> Result<Option<Self>, CheckpointError> {
        if config.position_side().is_none() {
            return Ok(None);
        }
        // The reference rounds the table, and then computes in fp32.
        let table = weights.take(POSITIONS)?.to_kind(Kind::Float);
        Ok(Some(Self { table, kind: weights.kind }))
    }

    /// `[patches, width]`.
    pub(super) fn forward(&self, Taps { indices, weights, offsets }: &Taps) -> Tensor {
        const SUM: i64 = 0;
        let (embedded, ..) =
            Tensor::embedding_bag(&self.table, indices, offsets, false, SUM, false, Some(weights), false);
        embedded.to_kind(self.kind)
    }
}

/// Mergers of their own for the outputs of some blocks.
#[derive(Debug)]
pub(super) struct DeepStack {
    /// The block that each stands behind.
    blocks: Vec<usize>,
    mergers: Vec<Merger>,
}

impl DeepStack {
    pub(super) fn load(weights: &mut Weights, config: &VisionConfig) -> Result<Self, CheckpointError> {
        let blocks = deepstack_blocks(config).to_vec();
        let merger =
            |n| Merger::load(weights, config, &deepstack_merger(n), &STYLE.merger, (STYLE.norm, true));
        Ok(Self { mergers: (0..blocks.len()).map(merger).collect::<Result<_, _>>()?, blocks })
    }

    /// The merger behind a block: as in the reference the first that names it.
    pub(super) fn behind(&self, block: usize) -> Option<&Merger> {
        self.blocks.iter().position(|&named| named == block).and_then(|n| self.mergers.get(n))
    }
}
