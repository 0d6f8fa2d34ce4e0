//! The head that turns a hidden state into a reward.

use tch::Tensor;

use super::checkpoint::{CheckpointError, Fault, Inventory, Output, Problem, Weights};
use super::layers::Linear;
use super::sample::Score;

/// `rm_head`: one linear layer, or several with ReLU between. Always fp32.
#[derive(Debug)]
pub struct RewardHead {
    layers: Vec<Linear>,
    output: Output,
}

/// The layers of a head, as its keys tell: names without `.weight`, in order.
fn layer_names(inventory: &Inventory) -> Vec<String> {
    let mut names: Vec<(u32, String)> = inventory
        .names()
        .filter_map(|name| name.strip_suffix(".weight"))
        .filter_map(|name| {
            let rest = name.strip_prefix("rm_head")?;
            // A single linear layer has no number; dropout and ReLU leave gaps between numbers.
            let number = if rest.is_empty() { 0 } else { rest.strip_prefix('.')?.parse().ok()? };
            Some((number, name.to_owned()))
        })
        .collect();
    names.sort_unstable();
    names.into_iter().map(|(_, name)| name).collect()
}

/// The tensors of the head with the shapes that they must have: each layer reads what the one before it gives, the
/// first a hidden state, and the last gives as many numbers as `output` needs.
pub fn expected_tensors(inventory: &Inventory, hidden_size: i64, output: Output) -> Vec<(String, Vec<i64>)> {
    let columns = match output {
        Output::Gaussian => 2,
        Output::Scalar => 1,
    };
    let names = layer_names(inventory);
    if names.is_empty() {
        return vec![("rm_head.weight".into(), vec![columns, hidden_size])];
    }
    let mut width = hidden_size;
    let mut expected = Vec::new();
    for (place, name) in names.iter().enumerate() {
        let weight = format!("{name}.weight");
        let rows = inventory.shape(&weight).and_then(|s| s.first().copied()).unwrap_or(columns);
        let out = if place + 1 == names.len() { columns } else { rows };
        let bias = format!("{name}.bias");
        if inventory.shape(&bias).is_some() {
            expected.push((bias, vec![out]));
        }
        expected.push((weight, vec![out, width]));
        width = out;
    }
    expected
}

impl RewardHead {
    /// Takes the head's weights, which [`expected_tensors`] has been held against.
    pub fn load(weights: &mut Weights, output: Output) -> Result<Self, CheckpointError> {
        let names = layer_names(weights.inventory());
        if names.is_empty() {
            return Err(CheckpointError::Tensors(vec![Fault {
                file: "model.safetensors".into(),
                key: "rm_head.weight".into(),
                problem: Problem::Missing { shape: Vec::new() },
            }]));
        }
        let mut layers = Vec::new();
        for name in names {
            let bias = format!("{name}.bias");
            let bias = match weights.inventory().shape(&bias) {
                Some(_) => Some(weights.take_fp32(&bias)?),
                None => None,
            };
            layers.push(Linear { weight: weights.take_fp32(&format!("{name}.weight"))?, bias });
        }
        Ok(Self { layers, output })
    }

    /// The head's columns, `[samples, columns]`, of hidden states `[samples, width]` in any number format.
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        let mut x = hidden.to_kind(tch::Kind::Float);
        for (place, layer) in self.layers.iter().enumerate() {
            if place > 0 {
                x = x.relu();
            }
            x = layer.forward(&x);
        }
        x
    }

    /// The rewards that the columns mean.
    ///
    /// # Errors
    /// The device failed to hand the numbers over.
    pub fn scores(&self, columns: &Tensor) -> Result<Vec<Score>, tch::TchError> {
        let column = |n| Vec::<f32>::try_from(columns.f_select(1, n)?.f_contiguous()?);
        let means = column(0)?;
        Ok(match self.output {
            Output::Scalar => means.into_iter().map(|mean| Score { mean, stddev: None }).collect(),
            Output::Gaussian => {
                let scores = means.into_iter().zip(column(1)?);
                scores.map(|(mean, log)| Score { mean, stddev: Some(log.exp()) }).collect()
            }
        })
    }
}
