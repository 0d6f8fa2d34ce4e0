//! The layers that the vision tower and the decoder share.

use tch::{Device, Kind, Tensor};

use super::checkpoint::{CheckpointError, Weights};
use super::libtorch_shim::pinned;

/// Copies a tensor from the host's memory to a device without waiting for what the device still has to do.
///
/// A copy from pageable memory waits for all work that was queued before it; one from pinned memory is queued like a
/// kernel, and libtorch's allocator keeps the source until it is done.
pub fn upload(host: &Tensor, device: Device) -> Tensor {
    if !device.is_cuda() {
        return host.to_device(device);
    }
    let bytes = host.numel() * host.kind().elt_size_in_bytes();
    let source = match pinned(bytes) {
        Some(memory) => {
            let mut source = memory.view_dtype(host.kind()).view(host.size().as_slice());
            source.copy_(host);
            source
        }
        None => host.pin_memory(device),
    };
    source.to_device_(device, host.kind(), true, false)
}

/// `torch.nn.Linear`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// So many rows are computed at a time, always: see [`Weights::tile`].
    pub tile: Option<i64>,
}

impl Linear {
    /// The tensors of the layer `name`, with their shapes.
    pub fn tensors(name: &str, out: i64, input: i64, bias: bool) -> Vec<(String, Vec<i64>)> {
        let mut list = vec![(format!("{name}.weight"), vec![out, input])];
        if bias {
            list.push((format!("{name}.bias"), vec![out]));
        }
        list
    }

    /// Linear layers of one input, stacked into one: `names` without `.weight` and `.bias`.
    pub fn load(weights: &mut Weights, names: &[&str], bias: bool) -> Result<Self, CheckpointError> {
        let keys = |end: &str| names.iter().map(|n| format!("{n}.{end}")).collect::<Vec<_>>();
        let mut take = |end| weights.take_stacked(&keys(end).iter().map(String::as_str).collect::<Vec<_>>());
        let weight = take("weight")?;
        Ok(Self { weight, bias: if bias { Some(take("bias")?) } else { None }, tile: weights.tile })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self.tile {
            None => x.linear(&self.weight, self.bias.as_ref()),
            Some(tile) => self.forward_in_tiles(x, tile),
        }
    }

    /// The last tile is filled up with zeros. What a row gives depends neither on the others nor on its place among them;
    /// it can depend on how many there are, by which libraries choose how they compute.
    fn forward_in_tiles(&self, x: &Tensor, tile: i64) -> Tensor {
        let (rows, width) = (x.size()[0], x.size()[1]);
        let tiles = (rows + tile - 1) / tile;
        let output = Tensor::empty([tiles * tile, self.weight.size()[0]], (x.kind(), x.device()));
        let weight = self.weight.tr();
        for start in (0..tiles).map(|n| n * tile) {
            let count = tile.min(rows - start);
            let mut part = x.narrow(0, start, count);
            if count < tile {
                let filled = Tensor::zeros([tile, width], (x.kind(), x.device()));
                filled.narrow(0, 0, count).copy_(&part);
                part = filled;
            }
            let target = output.narrow(0, start, tile);
            let _ = match &self.bias {
                Some(bias) => bias.addmm_out(&target, &part, &weight),
                None => part.mm_out(&target, &weight),
            };
        }
        output.narrow(0, 0, rows)
    }

    /// `x` plus the layer's output for `y`, in the memory of `x`.
    pub fn add_to(&self, mut x: Tensor, y: &Tensor) -> Tensor {
        x += self.forward(y);
        x
    }

    /// The layer with the outputs of its first `heads` heads of `width` numbers reordered for [`rotate`]: the numbers
    /// i and i + width/2, which turn together, side by side. Products of queries and keys stay what they are.
    pub fn with_pairs_together(self, heads: i64, width: i64) -> Self {
        let reorder = |t: Tensor| {
            let turned = t.narrow(0, 0, heads * width).unflatten(0, [heads, 2, width / 2]);
            let rest = t.narrow(0, heads * width, t.size()[0] - heads * width);
            Tensor::cat(&[turned.transpose(1, 2).flatten(0, 2), rest], 0)
        };
        Self { weight: reorder(self.weight), bias: self.bias.map(reorder), ..self }
    }

    /// The layer that gives only `count` of the outputs, from `start` on. Shares its weights.
    pub fn narrow(&self, start: i64, count: i64) -> Self {
        let narrow = |t: &Tensor| t.narrow(0, start, count);
        Self { weight: narrow(&self.weight), bias: self.bias.as_ref().map(narrow), tile: self.tile }
    }

    /// The layer with `count` outputs more, all zero.
    fn with_more_outputs(self, count: i64) -> Self {
        let more = |t: Tensor| {
            let shape = [&[count], &t.size()[1..]].concat();
            Tensor::cat(&[&t, &Tensor::zeros(shape, (t.kind(), t.device()))], 0)
        };
        Self { weight: more(self.weight), bias: self.bias.map(more), ..self }
    }

    /// The layer with `count` inputs more, which change nothing.
    fn with_more_inputs(self, count: i64) -> Self {
        Self { weight: self.weight.constant_pad_nd([0, count]), ..self }
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

    /// Normalises the last axis in fp32 and multiplies by the weight, as the reference does.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if x.device().is_cuda() {
            // One kernel in place of seven.
            return x.rms_norm(self.weight.size(), Some(&self.weight), self.eps);
        }
        let mut normed = normed(x, self.eps);
        normed *= &self.weight;
        normed
    }
}

/// The last axis over the root of its mean square, in fp32, in the number format of `x`.
fn normed(x: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let mut scale = wide.square().mean_dim(-1, true, Kind::Float);
    scale += eps;
    (wide * scale.rsqrt_()).to_kind(x.kind())
}

/// The norms of each head's query and key, which Qwen3-VL's decoder has: one RMSNorm for all heads of the queries and
/// one for those of the keys, computed together.
#[derive(Debug)]
pub struct HeadNorm {
    /// `[heads, width]`, the numbers in the order of [`Linear::with_pairs_together`].
    weight: Tensor,
    eps: f64,
}

impl HeadNorm {
    /// Takes the weights of norms: each by its name, and how many heads it is for.
    pub fn load(weights: &mut Weights, norms: &[(String, i64)], eps: f64) -> Result<Self, CheckpointError> {
        let mut rows = Vec::new();
        for (name, heads) in norms {
            let weight = weights.take(&format!("{name}.weight"))?;
            let together = weight.unflatten(0, [2, -1]).transpose(0, 1).flatten(0, 1);
            rows.push(together.unsqueeze(0).expand([*heads, -1], false));
        }
        Ok(Self { weight: Tensor::cat(&rows, 0), eps })
    }

    /// The norms of only `count` heads, from `start` on. Shares its weights.
    pub fn narrow(&self, start: i64, count: i64) -> Self {
        Self { weight: self.weight.narrow(0, start, count), eps: self.eps }
    }

    /// `[rows, heads, width]` to the same. What the order of a head's numbers is changes no mean.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if x.device().is_cuda() {
            let unweighted = None::<&Tensor>;
            return x.rms_norm(&x.size()[2..], unweighted, self.eps) * &self.weight;
        }
        normed(x, self.eps) * &self.weight
    }
}

/// `torch.nn.LayerNorm`.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Takes weight and bias of the norm `name`.
    pub fn load(weights: &mut Weights, name: &str, eps: f64) -> Result<Self, CheckpointError> {
        let mut take = |end| weights.take(&format!("{name}.{end}"));
        Ok(Self { weight: take("weight")?, bias: take("bias")?, eps })
    }

    /// Normalises the last axis.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// What stands between the two layers of a [`PlainMlp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `x · sigmoid(1.702 x)`.
    Quick,
    /// By the error function.
    Exact,
    /// By the hyperbolic tangent.
    Tanh,
}

/// An MLP without a gate: `down(gelu(up(x)))`.
#[derive(Debug)]
pub struct PlainMlp {
    up: Linear,
    down: Linear,
    gelu: Gelu,
}

impl PlainMlp {
    /// Takes the weights of two layers with biases.
    pub fn load(weights: &mut Weights, [up, down]: [&str; 2], gelu: Gelu) -> Result<Self, CheckpointError> {
        Ok(Self {
            up: Linear::load(weights, &[up], true)?,
            down: Linear::load(weights, &[down], true)?,
            gelu,
        })
    }

    fn inner(&self, x: &Tensor) -> Tensor {
        let mut inner = self.up.forward(x);
        match self.gelu {
            Gelu::Quick => {
                let gate = (&inner * 1.702).sigmoid_();
                inner *= gate;
                inner
            }
            Gelu::Exact => inner.gelu_("none"),
            Gelu::Tanh => inner.gelu_("tanh"),
        }
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.down.forward(&self.inner(x))
    }

    /// `x` plus the MLP's output for `y`, in the memory of `x`; all are `[rows, width]`.
    pub fn add_to(&self, x: Tensor, y: &Tensor) -> Tensor {
        self.down.add_to(x, &self.inner(y))
    }
}

/// The gated MLP of the decoder and of Qwen2.5-VL's vision tower: `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub struct GatedMlp {
    gate_up: GateUp,
    down: Linear,
}

/// The two layers that read the MLP's input.
#[derive(Debug)]
enum GateUp {
    /// In one product: on the CPU.
    Stacked(Linear),
    /// In two, each of whose outputs lies in one piece: a GPU's elementwise kernels read that several times as fast as
    /// the halves of a row.
    Apart { gate: Linear, up: Linear },
}

/// A GPU's matrix products are fast where a row is a multiple of 16 bytes. Where the inner width is not one of this many
/// numbers, it is filled up to a multiple of [`INNER_TILE`], the largest tile's side.
const INNER_ALIGNMENT: i64 = 8;
const INNER_TILE: i64 = 128;

impl GatedMlp {
    /// Takes the weights of the MLP `name`.
    pub fn load(weights: &mut Weights, name: &str, bias: bool) -> Result<Self, CheckpointError> {
        let [gate, up, down] = ["gate", "up", "down"].map(|part| format!("{name}.{part}_proj"));
        if weights.device.is_cuda() {
            let mut load = |name: &str| Linear::load(weights, &[name], bias);
            return Ok(Self::apart([load(&gate)?, load(&up)?, load(&down)?]));
        }
        Ok(Self {
            gate_up: GateUp::Stacked(Linear::load(weights, &[&gate, &up], bias)?),
            down: Linear::load(weights, &[&down], bias)?,
        })
    }

    fn apart([gate, up, down]: [Linear; 3]) -> Self {
        let inner = gate.weight.size()[0];
        let missing = if inner % INNER_ALIGNMENT == 0 { 0 } else { INNER_TILE - inner % INNER_TILE };
        if missing == 0 {
            return Self { gate_up: GateUp::Apart { gate, up }, down };
        }
        // silu(0) · 0 = 0, whatever `down` makes of it.
        let [gate, up] = [gate, up].map(|layer| layer.with_more_outputs(missing));
        Self { gate_up: GateUp::Apart { gate, up }, down: down.with_more_inputs(missing) }
    }

    /// `x` plus the MLP's output for `y`, in the memory of `x`; all are `[rows, width]`.
    pub fn add_to(&self, x: Tensor, y: &Tensor) -> Tensor {
        let mut inner;
        match &self.gate_up {
            GateUp::Stacked(both) => {
                let both = both.forward(y);
                let half = both.size()[1] / 2;
                inner = both.narrow(-1, 0, half).silu();
                inner *= both.narrow(-1, half, half);
            }
            GateUp::Apart { gate, up } => {
                inner = gate.forward(y).silu_();
                inner *= up.forward(y);
            }
        }
        self.down.add_to(x, &inner)
    }
}

/// Turns the pairs of neighbouring numbers (2i, 2i + 1) of `[rows, heads, width]` by the angles behind `turns`, which
/// [`turns`] makes: the reference's `rotate_half` form, once [`Linear::with_pairs_together`] has brought the pairs
/// together. In fp32, whatever the number format.
pub fn rotate(x: &Tensor, turns: &Tensor) -> Tensor {
    let pairs = x.to_kind(Kind::Float).unflatten(-1, [-1, 2]).view_as_complex();
    (pairs * turns).view_as_real().flatten(-2, -1).to_kind(x.kind())
}

/// What [`rotate`] multiplies by, `[rows, 1, pairs]`, of angles `[rows, pairs]`: turning is a complex product.
pub fn turns(angles: &Tensor) -> Tensor {
    Tensor::complex(&angles.cos(), &angles.sin()).unsqueeze(1)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::{GateUp, GatedMlp, HeadNorm, Linear, rotate, turns};

    fn layer(out: i64, input: i64) -> Linear {
        let randn = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        Linear { weight: randn(&[out, input]), bias: Some(randn(&[out])), tile: None }
    }

    /// What a GPU computes: two products in place of one, filled up to whole tiles.
    #[test]
    fn an_mlp_of_parts_is_the_mlp() {
        let (x, y) = (Tensor::zeros([3, 7], (Kind::Float, Device::Cpu)), layer(3, 7).weight);
        for inner in [16, 20] {
            let [gate, up, down] = [layer(inner, 7), layer(inner, 7), layer(7, inner)];
            let stack = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0);
            let (gate_bias, up_bias) = (gate.bias.as_ref().unwrap(), up.bias.as_ref().unwrap());
            let stacked = Linear {
                weight: stack(&gate.weight, &up.weight),
                bias: Some(stack(gate_bias, up_bias)),
                tile: None,
            };
            let copy = Linear {
                weight: down.weight.copy(),
                bias: down.bias.as_ref().map(Tensor::shallow_clone),
                tile: None,
            };
            let whole = GatedMlp { gate_up: GateUp::Stacked(stacked), down: copy }.add_to(x.copy(), &y);
            let parts = GatedMlp::apart([gate, up, down]);
            assert_eq!(parts.down.weight.size()[1], if inner == 16 { 16 } else { 128 });
            assert!(parts.add_to(x.copy(), &y).allclose(&whole, 1e-5, 1e-5, false));
        }
    }

    /// To the last bit, wherever a row stands and whatever stands beside it.
    #[test]
    fn a_row_of_a_tile_is_the_same_among_any_others() {
        for bias in [true, false] {
            let mut layer = Linear { tile: Some(16), ..layer(33, 130) };
            if !bias {
                layer.bias = None;
            }
            let x = Tensor::randn([50, 130], (Kind::Float, Device::Cpu));
            let all = layer.forward(&x);
            assert_eq!(all.size(), [50, 33]);
            for row in [0, 15, 16, 49] {
                assert!(layer.forward(&x.narrow(0, row, 1)).equal(&all.narrow(0, row, 1)));
            }
            assert!(layer.forward(&x.narrow(0, 7, 40)).equal(&all.narrow(0, 7, 40)));
            let plain = Linear { tile: None, ..layer };
            assert!(plain.forward(&x).allclose(&all, 1e-5, 1e-5, false));
        }
    }

    /// The reference's own form, on the order of numbers that the checkpoint has.
    #[test]
    fn turning_neighbours_is_turning_halves() {
        let (rows, heads, width) = (5, 3, 8);
        let randn = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, Device::Cpu)).to_kind(Kind::Float);
        let (x, angles) = (randn(&[rows, 7]), randn(&[rows, width / 2]));
        let layer = layer((heads + 1) * width, 7);
        let plain = layer.forward(&x).unflatten(1, [heads + 1, width]);
        let halves = plain.narrow(1, 0, heads).unflatten(-1, [2, width / 2]);
        let [first, second] = [0, 1].map(|half| halves.select(2, half));
        let [cos, sin] = [angles.cos(), angles.sin()].map(|t| t.unsqueeze(1));
        let reference =
            Tensor::stack(&[&first * &cos - &second * &sin, second * cos + first * sin], -1).flatten(-2, -1);

        let ours = layer.with_pairs_together(heads, width).forward(&x).unflatten(1, [heads + 1, width]);
        let turned = rotate(&ours.narrow(1, 0, heads), &turns(&angles));
        assert!(turned.allclose(&reference, 1e-5, 1e-5, false));
        // What is not turned keeps its order.
        assert!(ours.select(1, heads).allclose(&plain.select(1, heads), 1e-6, 1e-6, false));
    }

    /// Queries and keys have norms of their own, whose numbers follow the order that turning wants.
    #[test]
    fn heads_are_normed_each_by_its_own_weights() {
        let randn = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (x, query, key) = (randn(&[5, 3, 8]), randn(&[8]), randn(&[8]));
        let together = |t: &Tensor| t.unflatten(-1, [2, 4]).transpose(-1, -2).flatten(-2, -1);
        let reference = |x: &Tensor, weight: &Tensor| {
            let mean = x.square().mean_dim(-1, true, Kind::Float);
            x * (mean + 1e-6).rsqrt() * weight
        };
        let expected =
            Tensor::cat(&[reference(&x.narrow(1, 0, 2), &query), reference(&x.narrow(1, 2, 1), &key)], 1);
        let weight = Tensor::stack(&[&query, &query, &key].map(together), 0);
        let norm = HeadNorm { weight, eps: 1e-6 };
        assert!(norm.forward(&together(&x)).allclose(&together(&expected), 1e-5, 1e-5, false));
        let keys = norm.narrow(2, 1).forward(&together(&x.narrow(1, 2, 1)));
        assert!(keys.allclose(&together(&expected.narrow(1, 2, 1)), 1e-5, 1e-5, false));
    }
}
