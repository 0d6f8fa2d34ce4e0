//! The head that turns a hidden state into a reward.

use tch::Tensor;

use crate::model::checkpoint::{CheckpointError, Inventory, Weights};
use crate::model::layers::Linear;
use crate::model::readout::readings_tile;

/// The forms that a head may have, for messages.
const FORMS: &str = "a head is NAME.weight (one linear layer), NAME.N.weight (the layers of a Sequential, with ReLU \
    where it has a place between two of them), or NAME.0, NAME.layer_1.0 and so on, NAME.output_layer (HPSv3's, with \
    ReLU between)";
/// What the keys of all heads begin with.
const ANY_HEAD: &str = "rm_head";

/// A head, such as `rm_head`: one linear layer, or several. Always fp32.
#[derive(Debug)]
pub struct RewardHead {
    /// Each with whether a ReLU stands before it.
    layers: Vec<(Linear, bool)>,
}

/// Where a layer stands in a head, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// The head is this layer.
    Whole,
    /// A slot of a `Sequential`.
    Slot(u32),
    /// A block that HPSv3 appends to it, a `Sequential` of a linear layer, ReLU and dropout.
    Block(u32),
    /// The layer that it appends last.
    Output,
}

impl Place {
    /// Of the layer of this name, if it is the head's.
    fn of(head: &str, name: &str) -> Option<Self> {
        // As Python writes a number: no sign, no zeros in front.
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| n.to_string() == text);
        let rest = name.strip_prefix(head)?;
        if rest.is_empty() {
            return Some(Self::Whole);
        }
        match rest.strip_prefix('.')? {
            "output_layer" => Some(Self::Output),
            rest => match rest.strip_prefix("layer_").and_then(|rest| rest.strip_suffix(".0")) {
                Some(block) => number(block).map(Self::Block),
                None => number(rest).map(Self::Slot),
            },
        }
    }

    /// Whether a ReLU stands between this layer and the next, or `None` where the two cannot follow each other.
    fn relu_before(self, next: Self) -> Option<bool> {
        match (self, next) {
            // A slot that holds no weights is the activation; dropout, if any, has one more.
            (Self::Slot(one), Self::Slot(other)) => Some(other > one + 1),
            (Self::Slot(0), Self::Block(1)) | (Self::Slot(0) | Self::Block(_), Self::Output) => Some(true),
            (Self::Block(one), Self::Block(other)) if other == one + 1 => Some(true),
            _ => None,
        }
    }
}

/// A layer's name, without `.weight`, and whether a ReLU stands before it.
type Step = (String, bool);

/// The layers of a head in order, as its keys tell.
///
/// # Errors
/// They are the keys of no head that is known.
fn steps(inventory: &Inventory, head: &str) -> Result<Vec<Step>, String> {
    let is_head = |name: &&str| name.starts_with(ANY_HEAD) || name.starts_with(head);
    let keys: Vec<&str> = inventory.names().filter(is_head).collect();
    let names = keys.iter().filter_map(|key| key.strip_suffix(".weight"));
    let mut layers: Vec<(Place, &str)> =
        names.filter_map(|name| Some((Place::of(head, name)?, name))).collect();
    layers.sort_unstable();
    let unknown = || format!("{} are the keys of no head that is known, as {head}: {FORMS}", keys.join(", "));
    let Some(((first, name), rest)) = layers.split_first() else {
        return if keys.is_empty() { Ok(Vec::new()) } else { Err(unknown()) };
    };
    if matches!(first, Place::Block(_) | Place::Output) {
        return Err(unknown());
    }
    let (mut steps, mut last) = (vec![((*name).to_owned(), false)], *first);
    for (place, name) in rest {
        steps.push(((*name).to_owned(), last.relu_before(*place).ok_or_else(unknown)?));
        last = *place;
    }
    // Blocks without the layer behind them are the half of a head.
    if matches!(last, Place::Block(_)) { Err(unknown()) } else { Ok(steps) }
}

/// The tensors of the head with the shapes that they must have: each layer reads what the one before it gives, the
/// first a hidden state, and the last gives `columns`, where that is said.
///
/// # Errors
/// What stands under the head's names is no head that is known.
pub fn expected_tensors(
    inventory: &Inventory,
    head: &str,
    hidden_size: i64,
    columns: Option<i64>,
) -> Result<Vec<(String, Vec<i64>)>, String> {
    let steps = steps(inventory, head)?;
    if steps.is_empty() {
        return Ok(vec![(format!("{head}.weight"), vec![columns.unwrap_or(1), hidden_size])]);
    }
    let mut width = hidden_size;
    let mut expected = Vec::new();
    for (place, (name, _)) in steps.iter().enumerate() {
        let weight = format!("{name}.weight");
        let rows = inventory.shape(&weight).and_then(|s| s.first().copied()).unwrap_or(1);
        let out = columns.filter(|_| place + 1 == steps.len()).unwrap_or(rows);
        let bias = format!("{name}.bias");
        if inventory.shape(&bias).is_some() {
            expected.push((bias, vec![out]));
        }
        expected.push((weight, vec![out, width]));
        width = out;
    }
    Ok(expected)
}

impl RewardHead {
    /// Takes the head's weights, which [`expected_tensors`] has been held against.
    pub fn load(weights: &mut Weights, head: &str) -> Result<Self, CheckpointError> {
        let refuse = |reason| CheckpointError::invalid("model.safetensors", reason);
        let mut layers = Vec::new();
        for (name, relu) in steps(weights.inventory(), head).map_err(refuse)? {
            let bias = format!("{name}.bias");
            let bias = match weights.inventory().shape(&bias) {
                Some(_) => Some(weights.take_fp32(&bias)?),
                None => None,
            };
            let weight = weights.take_fp32(&format!("{name}.weight"))?;
            layers.push((Linear { weight, bias, tile: readings_tile(weights) }, relu));
        }
        Ok(Self { layers })
    }

    /// How many numbers it gives.
    pub fn columns(&self) -> i64 {
        self.layers.last().map_or(0, |(layer, _)| layer.weight.size()[0])
    }

    /// The head's columns, `[samples, columns]`, of hidden states `[samples, width]` in any number format.
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        let mut x = hidden.to_kind(tch::Kind::Float);
        for (layer, relu) in &self.layers {
            if *relu {
                x = x.relu();
            }
            x = layer.forward(&x);
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps_of(names: &[&str]) -> Result<Vec<bool>, String> {
        let tensors = names.iter().map(|name| ((*name).to_owned(), vec![1, 1])).collect();
        Ok(steps(&Inventory::random(tensors), "rm_head")?.into_iter().map(|(_, relu)| relu).collect())
    }

    #[test]
    fn a_relu_stands_where_a_slot_is_free() {
        assert_eq!(steps_of(&["rm_head.weight", "rm_head.bias"]).unwrap(), [false]);
        assert_eq!(
            steps_of(&["rm_head.0.weight", "rm_head.2.weight", "rm_head.10.weight"]).unwrap(),
            [false, true, true]
        );
        assert_eq!(
            steps_of(&["rm_head.0.weight", "rm_head.1.weight", "rm_head.4.weight"]).unwrap(),
            [false, false, true]
        );
        let blocks = [
            "rm_head.0.weight",
            "rm_head.layer_1.0.weight",
            "rm_head.layer_2.0.weight",
            "rm_head.output_layer.weight",
        ];
        assert_eq!(steps_of(&blocks).unwrap(), [false, true, true, true]);
        assert_eq!(steps_of(&["rm_head.0.weight", "rm_head.output_layer.weight"]).unwrap(), [false, true]);
        assert!(steps_of(&["lm_head.weight"]).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_head_is_refused_by_its_keys() {
        for names in [
            &["rm_head.weight", "rm_head.0.weight"][..],
            &["rm_head.+1.weight"],
            &["rm_head.mlp.0.weight", "rm_head.mlp.2.weight"],
            &["rm_heads.head_0.0.weight", "rm_heads.head_1.0.weight"],
            &["rm_head.0.weight", "rm_head.layer_2.0.weight", "rm_head.output_layer.weight"],
            &["rm_head.0.weight", "rm_head.layer_1.0.weight"],
            &["rm_head.0.weight", "rm_head.2.weight", "rm_head.output_layer.weight"],
            &["rm_head.output_layer.weight"],
        ] {
            let fault = steps_of(names).unwrap_err();
            assert!(names.iter().all(|name| fault.contains(name)) && fault.contains("layer_1"), "{fault}");
        }
        // A number is one only as Python writes it.
        assert_eq!(
            steps_of(&["rm_head.0.weight", "rm_head.+1.weight", "rm_head.02.weight"]).unwrap(),
            [false]
        );
    }
}
