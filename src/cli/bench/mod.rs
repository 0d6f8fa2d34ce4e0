//! `spatialscore bench`: how fast a model is on a device, in this process and without a server.

mod commands;
mod table;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use tch::{Device, Kind};

use super::{USAGE, fail};
use crate::device::{Devices, Dtype};
use crate::model::backbone::{Config, Shape};
use crate::model::checkpoint::{BUILT_IN_NAME, CheckpointError};
use crate::model::{Blueprint, Normalisation, RewardModel, Sample, Score, Scorer, profile};
use crate::processor::{Processor, ProcessorLimits};

/// The prompt of a measurement, of about the paper's length.
pub(super) const PROMPT: &str = "A kitchen with a wooden table in the middle. A red kettle stands on the table, to the left of a \
    white bowl, and three spoons lie in a row in front of the bowl.";

/// Measure how fast a model scores pictures on a device, without a server.
///
/// Beside the pictures per second stands the share of the device's own rate of large matrix products, measured in the
/// same run, that the forward makes of its operations.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  spatialscore bench
      The built-in checkpoint, on CUDA where there is a device.
  spatialscore bench --checkpoint ./my-reward-model --side 512 --batch 1,16
      A directory that save_pretrained wrote, pictures of 512×512.
  spatialscore bench --device cuda:0 --random-weights qwen2.5-vl-7b
      A device without a checkpoint: a model of that shape with random weights.

Columns:
  side      the pictures' side in pixels, before they are resized to whole visual tokens
  tokens    of a sample, text and picture together
  batch     samples of a forward
  ms/batch  the median over the forwards of `--seconds`, the copy to the device and the scores back included
  GFLOP     operations of a sample that the answer needs: matrix products, a multiplication and an addition each
            counted, nothing behind the last layer's keys and values but the reward token's row, no logits
  share     those operations per second, of the device's rate in a product of two large matrices

Exit codes:
  0   measured
  1   the checkpoint cannot be loaded, or a forward failed
  64  the command line is wrong")]
pub struct Arguments {
    /// spatialscore-mini (built in), a directory, or a hub id (owner/model).
    #[arg(long, value_name = "NAME", default_value = BUILT_IN_NAME, conflicts_with = "random_weights")]
    checkpoint: String,
    /// The branch, tag or commit of a hub id.
    #[arg(long, value_name = "REVISION", conflicts_with = "random_weights")]
    revision: Option<String>,
    /// How its reward is read: a profile that ships, or a file, in place of the checkpoint's own.
    #[arg(
        long,
        visible_alias = "reward-config",
        value_name = "NAME|FILE",
        conflicts_with = "random_weights"
    )]
    profile: Option<String>,
    /// A model of this shape with random weights, made on the device, in place of a checkpoint.
    #[arg(long, value_name = "SHAPE", value_enum)]
    random_weights: Option<RandomWeights>,
    /// auto, cpu or cuda:N; auto is the first CUDA device, or the CPU where there is none.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = devices)]
    device: Devices,
    /// auto, float32, bfloat16 or float16; auto is bfloat16 on CUDA and float32 on the CPU.
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = dtype)]
    dtype: Dtype,
    /// Threads of a forward on the CPU, 0 for one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: u16,
    /// Compute so that a score is the same to the last bit whatever its batch.
    #[arg(long)]
    batch_invariant: bool,
    /// Sides of the square pictures, in pixels.
    #[arg(long, value_name = "PIXELS", value_delimiter = ',', default_values_t = [448, 1024],
        value_parser = clap::value_parser!(u32).range(1..=8192))]
    side: Vec<u32>,
    /// Samples of a forward.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_values_t = [1, 8, 32],
        value_parser = clap::value_parser!(u16).range(1..))]
    batch: Vec<u16>,
    /// How long each line of the table is measured for, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// Write one JSON object for each line of the table.
    #[arg(long)]
    json: bool,
    /// Measure what each line of standard input asks for, for a program that alternates with another. The lines are
    /// described in src/cli/bench/commands.rs.
    #[arg(long, hide = true, conflicts_with = "random_weights")]
    commands: bool,
}

/// The shapes of `--random-weights`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RandomWeights {
    /// Qwen2.5-VL-7B, the base of the paper's reward model.
    #[value(name = "qwen2.5-vl-7b")]
    Qwen25Vl7b,
    /// A toy of the same architecture.
    Tiny,
}

impl From<RandomWeights> for Shape {
    fn from(shape: RandomWeights) -> Self {
        match shape {
            RandomWeights::Qwen25Vl7b => Self::Qwen25Vl7b,
            RandomWeights::Tiny => Self::Tiny,
        }
    }
}

fn devices(text: &str) -> Result<Devices, String> {
    text.parse().map_err(|()| "must be auto, cpu or cuda:N".into())
}

fn dtype(text: &str) -> Result<Dtype, String> {
    text.parse().map_err(|()| format!("must be {}", Dtype::FORMS))
}

/// A model on a device, and how to make samples for it.
struct Subject {
    model: RewardModel,
    config: Config,
    /// None for random weights, which come without a tokenizer.
    processor: Option<Processor>,
    device: Device,
    kind: Kind,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let device = match arguments.device.resolve().as_deref() {
        Ok([device, ..]) if arguments.device == Devices::Auto => *device,
        Ok([device]) => *device,
        Ok(_) => return fail(USAGE, &"--device: one device is measured at a time"),
        Err(error) => return fail(1, error),
    };
    if arguments.threads > 0 {
        tch::set_num_threads(arguments.threads.into());
    }
    let subject = match Subject::load(&arguments, device) {
        Ok(subject) => subject,
        Err(error) => return fail(1, &error),
    };
    let ended = if arguments.commands {
        commands::run(subject, std::io::stdin().lock(), &mut std::io::stdout().lock())
    } else {
        table::run(subject, &arguments, &mut std::io::stdout().lock())
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error),
    }
}

impl Subject {
    fn load(arguments: &Arguments, device: Device) -> Result<Self, CheckpointError> {
        let kind = arguments.dtype.on(device);
        let set_up = |blueprint: Blueprint| {
            if arguments.batch_invariant { blueprint.batch_invariant() } else { blueprint }
        };
        if let Some(shape) = arguments.random_weights {
            let blueprint = set_up(Blueprint::random(shape.into(), device, kind)?);
            let config = blueprint.config.clone();
            let normalisation = Normalisation { mean: [0.5; 3], std: [0.25; 3], rescale: 1.0 / 255.0 };
            let model = RewardModel::build(blueprint, normalisation)?;
            return Ok(Self { model, config, processor: None, device, kind });
        }
        let files = profile::open(
            &arguments.checkpoint,
            arguments.revision.as_deref(),
            arguments.profile.as_deref(),
        )?;
        let blueprint = set_up(Blueprint::open(&files, device, kind)?);
        let config = blueprint.config.clone();
        let limits = ProcessorLimits {
            max_prompt_bytes: 1 << 16,
            max_image_pixels: 1 << 28,
            max_item_tokens: config.text.max_position_embeddings,
            max_prompt_tokens: config.text.max_position_embeddings,
            max_image_bytes: 1 << 30,
            max_questions: 1 << 10,
        };
        let processor = Processor::load(&files, &blueprint.reward, limits)?;
        let model = RewardModel::build(blueprint, processor.reading())?;
        Ok(Self { model, config, processor: Some(processor), device, kind })
    }

    /// The scores of a forward, and the seconds that it took. Scores are on the host, so the device is done.
    fn forward(&mut self, samples: &[&Sample]) -> Result<(f64, Vec<Score>), String> {
        let start = Instant::now();
        // Plain operations of libtorch panic where memory is out.
        let scores = catch_unwind(AssertUnwindSafe(|| self.model.score(samples)));
        let seconds = start.elapsed().as_secs_f64();
        match scores {
            Ok(Ok(scores)) => Ok((seconds, scores)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the forward panicked; the reason stands above".into()),
        }
    }
}

/// The middle of some numbers; of an even count, the lower of the two.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// Bytes without a pattern, the same in each run.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(length)
    .collect()
}
