//! Qwen2-VL's tower, the reference's `Qwen2VisionTransformerPretrainedModel`: LayerNorm, an MLP without a gate, every
//! block over the whole picture.

use super::{MergerNames, MlpStyle, NormStyle, Style};
use crate::model::layers::Gelu;

pub(super) const STYLE: Style = Style {
    patch_bias: false,
    norm: NormStyle::Layer,
    mlp: MlpStyle::Plain { up: "fc1", down: "fc2", gelu: Gelu::Quick },
    merger: MergerNames { norm: "ln_q", up: "mlp.0", down: "mlp.2" },
};
