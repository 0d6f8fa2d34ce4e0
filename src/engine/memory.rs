//! The memory that models take on a device, planned before any weights are read.

use tch::{Device, Kind};

use super::LoadError;
use crate::config::BatchBudget;
use crate::device;
use crate::model::Blueprint;

/// What a model takes on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Where.
    pub device: Device,
    /// Bytes of its weights, for as long as it is there.
    pub weights: u64,
    /// Bytes of a forward of the largest batch. A device computes one at a time.
    pub forward: u64,
}

impl Memory {
    /// Of a model in this number format, whose batches are of this size.
    pub(super) fn of(blueprint: &Blueprint, device: Device, kind: Kind, batch: BatchBudget) -> Self {
        let parameters = u64::try_from(blueprint.weights.inventory().parameters()).unwrap_or_default();
        let (size, tokens) = (kind.elt_size_in_bytes() as u64, batch.tokens as u64);
        let (text, vision) = (&blueprint.config.text, &blueprint.config.vision);
        let wide = |n: i64| u64::try_from(n).unwrap_or_default();
        // What stands at once in the widest place of a layer: the residual stream, its norm and what attention or the MLP
        // makes of it. The pictures are through the vision tower before the decoder begins.
        let decoder = tokens * (6 * wide(text.hidden_size) + 3 * wide(text.intermediate_size));
        let patches = tokens * vision.merge_unit() as u64;
        let tower = patches * (6 * wide(vision.hidden_size) + 3 * wide(vision.intermediate_size));
        Self { device, weights: parameters * size, forward: decoder.max(tower) * size }
    }
}

/// Whether models fit their devices together, beside what is there already.
///
/// # Errors
/// They do not; with all figures.
pub(super) fn plan<'a>(
    models: impl Iterator<Item = (&'a str, &'a [Memory])> + Clone,
    most: Option<u64>,
) -> Result<(), LoadError> {
    let mut devices: Vec<Device> = Vec::new();
    for memory in models.clone().flat_map(|(_, memory)| memory) {
        if !devices.contains(&memory.device) {
            devices.push(memory.device);
        }
    }
    let mut faults = Vec::new();
    for device in devices {
        let here = || {
            models.clone().flat_map(move |(name, all)| {
                all.iter().filter(move |memory| memory.device == device).map(move |memory| (name, memory))
            })
        };
        let weights: u64 = here().map(|(_, memory)| memory.weights).sum();
        let forward = here().map(|(_, memory)| memory.forward).max().unwrap_or_default();
        let (said, limit) = match most {
            Some(most) => ("model.max_memory_bytes allows", Some(most)),
            None => ("there are free", device::free_memory(device)),
        };
        if let Some(limit) = limit.filter(|&limit| weights.saturating_add(forward) > limit) {
            let each: Vec<String> =
                here().map(|(name, memory)| format!("{name} {}", mib(memory.weights))).collect();
            faults.push(format!(
                "the models do not fit {}: weights {} ({}) and a forward of batch.max_tokens {} are {}, and {said} {}",
                device::name(device),
                mib(weights),
                each.join(", "),
                mib(forward),
                mib(weights + forward),
                mib(limit),
            ));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(LoadError::Memory(faults.join("\n"))) }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_fit_a_device_together_or_are_refused_with_the_figures() {
        let on = |device, weights: u64, forward: u64| Memory {
            device,
            weights: weights << 20,
            forward: forward << 20,
        };
        let (cpu, card) = (Device::Cpu, Device::Cuda(0));
        let (a, b, c) = ([on(cpu, 10, 4)], [on(cpu, 20, 6)], [on(card, 30, 1), on(cpu, 1, 1)]);
        let all = [("a", a.as_slice()), ("b", b.as_slice()), ("c", c.as_slice())];
        assert!(plan(all.into_iter(), Some(37 << 20)).is_ok());
        let said = plan(all.into_iter(), Some((37 << 20) - 1)).unwrap_err().to_string();
        let figures = "weights 31.0 MiB (a 10.0 MiB, b 20.0 MiB, c 1.0 MiB) and a forward of batch.max_tokens 6.0 MiB are \
                       37.0 MiB, and model.max_memory_bytes allows 37.0 MiB";
        assert_eq!(said, format!("the models do not fit cpu: {figures}"));
        let said = plan(all.into_iter(), Some(30 << 20)).unwrap_err().to_string();
        assert!(said.contains("cuda:0: weights 30.0 MiB (c 30.0 MiB)") && said.contains("cpu: "), "{said}");
        // A machine that runs tests has some, and no machine has so much.
        assert!(device::free_memory(cpu).is_some_and(|free| free > 1 << 20));
        assert!(plan([("x", [on(cpu, 1 << 40, 0)].as_slice())].into_iter(), None).is_err());
    }
}
