//! Qwen2.5-VL's tower, the reference's `Qwen2_5_VisionTransformerPretrainedModel`: RMSNorm, a gated MLP, and windows in
//! all blocks but a few.

use super::{MergerNames, MlpStyle, NormStyle, Style};

pub(super) const STYLE: Style = Style {
    patch_bias: false,
    norm: NormStyle::Rms,
    mlp: MlpStyle::Gated,
    merger: MergerNames { norm: "ln_q", up: "mlp.0", down: "mlp.2" },
};
