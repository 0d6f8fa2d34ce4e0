//! The layers that the vision tower and the decoder share.

use tch::{Device, Kind, Tensor};

use super::checkpoint::{CheckpointError, Weights};

/// Copies a tensor from the host's memory to a device without waiting for what the device still has to do.
///
/// A copy from pageable memory waits for all work that was queued before it; one from pinned memory is queued like a
/// kernel, and libtorch's allocator keeps the source until it is done.
pub fn upload(host: &Tensor, device: Device) -> Tensor {
    if device.is_cuda() {
        host.pin_memory(device).to_device_(device, host.kind(), true, false)
    } else {
        host.to_device(device)
    }
}

/// `torch.nn.Linear`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Linear layers of one input, stacked into one: `names` without `.weight` and `.bias`.
    pub fn load(weights: &mut Weights, names: &[&str], bias: bool) -> Result<Self, CheckpointError> {
        let keys = |end: &str| names.iter().map(|n| format!("{n}.{end}")).collect::<Vec<_>>();
        let mut take = |end| weights.take_stacked(&keys(end).iter().map(String::as_str).collect::<Vec<_>>());
        Ok(Self { weight: take("weight")?, bias: if bias { Some(take("bias")?) } else { None } })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }

    /// The layer that gives only `count` of the outputs, from `start` on. Shares its weights.
    pub fn narrow(&self, start: i64, count: i64) -> Self {
        let narrow = |t: &Tensor| t.narrow(0, start, count);
        Self { weight: narrow(&self.weight), bias: self.bias.as_ref().map(narrow) }
    }
}

/// The reference's `Qwen2_5_VLRMSNorm`.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Takes the weight of the norm `name`.
    pub fn load(weights: &mut Weights, name: &str, eps: f64) -> Result<Self, CheckpointError> {
        Ok(Self { weight: weights.take(&format!("{name}.weight"))?, eps })
    }

    /// Normalises the last axis in fp32 and multiplies after casting back, as the reference does.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let variance = wide.square().mean_dim(-1, true, Kind::Float);
        (wide * (variance + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

/// The gated MLP of both towers: `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub struct GatedMlp {
    gate_up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// Takes the weights of the MLP `name`.
    pub fn load(weights: &mut Weights, name: &str, bias: bool) -> Result<Self, CheckpointError> {
        let [gate, up, down] = ["gate", "up", "down"].map(|part| format!("{name}.{part}_proj"));
        Ok(Self {
            gate_up: Linear::load(weights, &[&gate, &up], bias)?,
            down: Linear::load(weights, &[&down], bias)?,
        })
    }

    /// `[rows, width]` to `[rows, width]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let both = self.gate_up.forward(x);
        let [gate, up] = [0, 1].map(|half| both.narrow(-1, half * both.size()[1] / 2, both.size()[1] / 2));
        self.down.forward(&(gate.silu() * up))
    }
}

/// Rotates the pairs (i, i + width/2) of the last axis: the reference's `rotate_half` form. `cos` and `sin` are
/// `[rows, 1, width]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = x.size().last().copied().unwrap_or_default() / 2;
    let [first, second] = [0, half].map(|start| x.narrow(-1, start, half));
    x * cos + Tensor::cat(&[second.neg(), first], -1) * sin
}
