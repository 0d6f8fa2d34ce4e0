//! The table: pictures per second by their side and by the batch, beside the device's rate of matrix products.

use std::io::Write;
use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

use super::{Arguments, PROMPT, Subject, median, noise};
use crate::device;
use crate::model::backbone::{Config, forward_flops};
use crate::model::{Patches, Sample};
use crate::processor::{Picture, smart_resize};

/// Text tokens of a sample without a tokenizer: about those of a prompt of 80 words with its template.
const TEXT_TOKENS: usize = 128;
/// What the reference's own defaults resize pictures to, in pixels.
const PIXELS: (u64, u64) = (3136, 12_845_056);
/// Forwards of each line, at least.
const FEWEST: usize = 3;

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    side: u32,
    tokens: usize,
    batch: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ms_per_batch: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pictures_per_second: Option<f64>,
    gflop_per_picture: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tflop_per_second: Option<f64>,
    matrix_tflop_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Measures every line.
///
/// # Errors
/// The output is closed, or no line could be measured.
pub(super) fn run(
    mut subject: Subject,
    arguments: &Arguments,
    output: &mut impl Write,
) -> Result<(), String> {
    let time = Duration::try_from_secs_f64(arguments.seconds).map_err(|e| format!("--seconds: {e}"))?;
    let rate = matrix_rate(subject.device, subject.kind);
    let io = |e: std::io::Error| e.to_string();
    if !arguments.json {
        writeln!(
            output,
            "{}, {}, {} threads; large matrix products: {:.2} TFLOP/s\n",
            device::name(subject.device),
            device::kind_name(subject.kind),
            tch::get_num_threads(),
            rate / 1e12
        )
        .map_err(io)?;
        writeln!(output, "| side | tokens | batch | ms/batch | pictures/s | GFLOP | TFLOP/s | share |")
            .and_then(|()| writeln!(output, "|---:|---:|---:|---:|---:|---:|---:|---:|"))
            .map_err(io)?;
    }
    let mut failed = None;
    for &side in &arguments.side {
        let (sample, flops) = subject.sample(side)?;
        for &batch in &arguments.batch {
            let samples = vec![&sample; batch.into()];
            let row = measure(&mut subject, &samples, side, flops, rate, time);
            failed = row.error.clone().or(failed);
            let line = if arguments.json {
                serde_json::to_string(&row).map_err(|e| e.to_string())?
            } else {
                row.markdown()
            };
            writeln!(output, "{line}").and_then(|()| output.flush()).map_err(io)?;
        }
    }
    failed.map_or(Ok(()), Err)
}

fn measure(
    subject: &mut Subject,
    samples: &[&Sample],
    side: u32,
    flops: f64,
    rate: f64,
    time: Duration,
) -> Row {
    let tokens = samples.first().map_or(0, |sample| sample.tokens());
    let batch = samples.len();
    let timed = forwards(subject, samples, time);
    let per_second = |seconds: f64| batch as f64 / seconds;
    let seconds = timed.as_ref().ok().copied();
    Row {
        side,
        tokens,
        batch,
        ms_per_batch: seconds.map(|s| s * 1e3),
        pictures_per_second: seconds.map(per_second),
        gflop_per_picture: flops / 1e9,
        tflop_per_second: seconds.map(|s| per_second(s) * flops / 1e12),
        matrix_tflop_per_second: rate / 1e12,
        share: seconds.map(|s| per_second(s) * flops / rate),
        error: timed.err(),
    }
}

/// The median seconds of a forward, after one that warms up.
fn forwards(subject: &mut Subject, samples: &[&Sample], time: Duration) -> Result<f64, String> {
    subject.forward(samples)?;
    let (start, mut all) = (Instant::now(), Vec::new());
    while all.len() < FEWEST || start.elapsed() < time {
        all.push(subject.forward(samples)?.0);
    }
    Ok(median(all))
}

impl Row {
    fn markdown(&self) -> String {
        let Self { side, tokens, batch, .. } = self;
        let (Some(ms), Some(pictures), Some(tflop), Some(share)) =
            (self.ms_per_batch, self.pictures_per_second, self.tflop_per_second, self.share)
        else {
            let reason = self.error.as_deref().and_then(|e| e.lines().next()).unwrap_or_default();
            return format!("| {side} | {tokens} | {batch} | {reason} | | | | |");
        };
        let gflop = self.gflop_per_picture;
        format!(
            "| {side} | {tokens} | {batch} | {ms:.2} | {pictures:.1} | {gflop:.2} | {tflop:.3} | {:.1} % |",
            share * 100.0
        )
    }
}

impl Subject {
    /// A sample of a square picture, and its operations.
    fn sample(&self, side: u32) -> Result<(Sample, f64), String> {
        let rgb8 = noise((side * side * 3) as usize);
        let sample = match &self.processor {
            Some(processor) => processor
                .admit_all(PROMPT, {
                    let picture = Picture::Raw { width: side, height: side, rgb8: rgb8.into() };
                    vec![picture; processor.pictures()]
                })
                .and_then(|draft| processor.prepare(draft))
                .map_err(|e| e.to_string())?,
            None => synthetic(&self.config, side)?,
        };
        let pictures: Vec<_> = sample.pictures.iter().map(|p| (p.rows, p.columns)).collect();
        let flops = forward_flops(&self.config, &pictures, sample.tokens());
        Ok((sample, flops))
    }
}

/// A sample of the right shape and of no meaning, for a model without a tokenizer.
fn synthetic(config: &Config, side: u32) -> Result<Sample, String> {
    let (patch, merge) = (config.vision.patch_size as u64, config.vision.spatial_merge_size as u64);
    let (width, height) =
        smart_resize((side, side), patch * merge, PIXELS.0, PIXELS.1).map_err(|e| e.to_string())?;
    let (rows, columns) = ((height / patch) as usize, (width / patch) as usize);
    let picture = rows * columns / config.vision.merge_unit();
    let word = u32::from(config.image_token_id == 0);
    let mut input_ids = vec![word; TEXT_TOKENS / 4];
    input_ids.extend(std::iter::repeat_n(config.image_token_id, picture));
    input_ids.extend(std::iter::repeat_n(word, TEXT_TOKENS - TEXT_TOKENS / 4));
    let pixels = noise(rows * columns * config.vision.patch_bytes());
    Ok(Sample { input_ids, pictures: vec![Patches { rows, columns, pixels }], ..Sample::default() })
}

/// The device's operations per second in a product of two large square matrices of the model's number format: the
/// best of several runs, since this is what shares are taken of.
fn matrix_rate(device: Device, kind: Kind) -> f64 {
    let (side, products) = if device.is_cuda() { (8192_i64, 10) } else { (1024, 4) };
    let _no_grad = tch::no_grad_guard();
    let [a, b] = [(); 2].map(|()| Tensor::randn([side, side], (Kind::Float, device)).to_kind(kind));
    let mut c = a.matmul(&b);
    synchronise(device);
    let operations = 2.0 * (side as f64).powi(3) * f64::from(products);
    let run = |_| {
        let start = Instant::now();
        for _ in 0..products {
            c = a.matmul_out(&c, &b);
        }
        synchronise(device);
        operations / start.elapsed().as_secs_f64()
    };
    (0..5).map(run).fold(0.0, f64::max)
}

fn synchronise(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}
