//! `spatialscore inspect`: what a checkpoint is, what it costs, what is wrong with it.

use std::io::{self, Write};
use std::process::ExitCode;

use bytes::Bytes;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::fail;
use crate::config::{Settings, Sources};
use crate::engine::{Examination, LoadError};
use crate::model::backbone::{Config, Family};
use crate::model::checkpoint::{BUILT_IN_NAME, CheckpointError};
use crate::model::profile::{self, Output, Positions, RewardToken};
use crate::processor::{Picture, Processor, ProcessorLimits};

/// What a forward needs beside the model.
const SPARE_MIB: i64 = 1024;
/// Sides of the pictures whose cost is told.
const SIDES: [u32; 4] = [224, 512, 1024, 2048];
/// A prompt of the paper's usual length, for telling what an item costs.
const PROMPT: &str = "A kitchen with a wooden table in the middle. A red kettle stands on the table, to the left of a \
    white bowl, and three spoons lie in a row in front of the bowl. A window is centered on the back wall, a clock \
    hangs above it, and a green plant stands in the far right corner, behind a chair.";

/// Read a checkpoint, and try what `serve` would.
///
/// Says what it is, what it costs in memory and tokens, and everything that is wrong with it: tensors that are
/// missing, unexpected or misshapen, values that are not finite, a template or tokenizer that cannot be served. Then,
/// where memory suffices, it loads the model and tests its scores on the CPU, as `serve` does before it serves.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  spatialscore inspect                        the checkpoint that the program carries
  spatialscore inspect ./my-reward-model      a directory that save_pretrained wrote
  spatialscore inspect owner/model --json     a checkpoint of the hub, for a script

Exit codes:
  0   it can be served
  1   it cannot; the last lines say why")]
pub struct Arguments {
    /// spatialscore-mini (built in), a directory, or a hub id (owner/model).
    #[arg(value_name = "NAME", default_value = BUILT_IN_NAME)]
    checkpoint: String,
    /// The branch, tag or commit of a hub id.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// How its reward is read: a profile that ships, such as hpsv3 or vqascore, or a file in place of the checkpoint's
    /// reward_config.json.
    #[arg(long, value_name = "NAME|FILE", visible_alias = "reward-config")]
    profile: Option<String>,
    /// Read the headers only: weights that are not finite, and scores that are not, go unseen.
    #[arg(long)]
    headers_only: bool,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

/// What there is to say of a checkpoint.
#[derive(Debug, Serialize)]
struct Report {
    name: String,
    revision: String,
    architecture: String,
    positions: Positions,
    reward_token: RewardToken,
    output: Output,
    /// What the reward is read by: a profile that ships, or a file.
    profile: String,
    /// Why that.
    profile_reason: &'static str,
    /// Where that is from.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    notice: Option<String>,
    parameters: i64,
    vocabulary: u32,
    bytes_on_disk: u64,
    formats_on_disk: Vec<String>,
    adapted_weights: usize,
    skipped: Vec<String>,
    memory_bytes: Vec<(&'static str, i64)>,
    /// What square pictures cost with a prompt of the paper's usual length.
    pictures: Vec<PictureCost>,
    /// What the self-test has to say of the scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    self_test: Option<String>,
    /// Why not all was tried that `serve` does, where nothing is wrong so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    untried: Option<String>,
    faults: Vec<String>,
}

#[derive(Debug, Serialize)]
struct PictureCost {
    side: u32,
    tokens: Option<usize>,
    visual_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let report = match examine(&arguments) {
        Ok(report) => report,
        Err(error) => return fail(1, &format!("{}: {error}", arguments.checkpoint)),
    };
    let written = if arguments.json {
        serde_json::to_writer_pretty(io::stdout(), &report).map_err(io::Error::from)
    } else {
        report.write(&mut io::stdout().lock())
    };
    match written {
        Err(error) => fail(1, &error),
        Ok(()) if report.faults.is_empty() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
    }
}

fn examine(arguments: &Arguments) -> Result<Report, LoadError> {
    let files =
        profile::open(&arguments.checkpoint, arguments.revision.as_deref(), arguments.profile.as_deref())?;
    let limits = Settings::load(&Sources::default()).map_err(|e| LoadError::Limits(e.to_string()))?.limits;
    let examination = Examination::of(&files, ProcessorLimits::from(&limits))?;
    let mut faults: Vec<String> = examination.faults.iter().map(ToString::to_string).collect();
    let Examination { blueprint, processor, .. } = &examination;
    let (inventory, reward) = (blueprint.weights.inventory(), blueprint.reward.clone());
    let parameters = inventory.parameters();
    let image_token_id = blueprint.config.image_token_id;
    let pictures = processor.iter().flat_map(|processor| costs(processor, image_token_id)).collect();
    let mut report = Report {
        name: files.name().to_owned(),
        revision: String::new(),
        architecture: architecture(&blueprint.config),
        positions: reward.positions,
        reward_token: reward.reward_token,
        output: reward.output,
        profile: files.profile(),
        profile_reason: files.profile_reason(),
        source: reward.source,
        notice: reward.notice,
        parameters,
        vocabulary: blueprint.vocabulary().unwrap_or_default(),
        bytes_on_disk: inventory.bytes(),
        formats_on_disk: inventory.kinds().into_iter().collect(),
        adapted_weights: blueprint.weights.adapted(),
        skipped: inventory.skipped.clone(),
        memory_bytes: vec![("float32", 4 * parameters), ("bfloat16 or float16", 2 * parameters)],
        pictures,
        self_test: None,
        untried: None,
        faults: Vec::new(),
    };
    if arguments.headers_only {
        report.untried = Some("only headers were read".into());
    } else if blueprint.faults.is_empty() {
        faults.extend(non_finite(&examination)?);
    }
    if faults.is_empty() && !arguments.headers_only {
        match too_large(4 * parameters) {
            Some(reason) => report.untried = Some(reason),
            None => match examination.rehearse() {
                Ok(found) => report.self_test = found,
                Err(error) => faults.push(error.to_string()),
            },
        }
    }
    report.revision = files.revision()?;
    report.faults = faults;
    Ok(report)
}

/// Reads all weights, merged, and shows how far it is.
fn non_finite(examination: &Examination) -> Result<Option<String>, CheckpointError> {
    let style = ProgressStyle::with_template("reading {bytes}/{total_bytes} {wide_bar} {eta}");
    let bar = ProgressBar::new(examination.blueprint.weights.inventory().bytes());
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let bad = examination.non_finite(|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    Ok(bad.map(|error| error.to_string()))
}

/// Why a model of so many bytes is not loaded here for a try.
fn too_large(bytes: i64) -> Option<String> {
    let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available: i64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    let (needed, available) = (bytes / (1 << 20) + SPARE_MIB, available / 1024);
    (needed > available).then(|| {
        format!("no forward was run: the model takes {needed} MiB in float32, and {available} MiB are free")
    })
}

/// What square pictures cost, through the real processor.
fn costs(processor: &Processor, image_token_id: u32) -> Vec<PictureCost> {
    let cost = |side: u32| {
        let rgb8 = Bytes::from(vec![0; (side * side * 3) as usize]);
        let pictures = vec![Picture::Raw { width: side, height: side, rgb8 }; processor.pictures()];
        match processor.admit_all(PROMPT, pictures) {
            Err(error) => {
                PictureCost { side, tokens: None, visual_tokens: None, refused: Some(error.to_string()) }
            }
            Ok(draft) => {
                let visual_tokens = Some(draft.count(image_token_id));
                PictureCost { side, tokens: Some(draft.tokens()), visual_tokens, refused: None }
            }
        }
    };
    SIDES.into_iter().map(cost).collect()
}

fn architecture(config: &Config) -> String {
    let (v, t) = (&config.vision, &config.text);
    let special = match config.family {
        Family::Qwen2Vl => String::new(),
        Family::Qwen25Vl => {
            format!(", windows of {} px, whole pictures in {:?}", v.window_size, v.fullatt_block_indexes)
        }
        Family::Qwen3Vl => format!(", features of {:?} for the decoder", v.deepstack_visual_indexes),
    };
    format!(
        "{}: vision {} blocks of {} ({} heads{special}), decoder {} layers of {} ({} heads on {})",
        config.family.model_type(),
        v.depth,
        v.hidden_size,
        v.num_heads,
        t.num_hidden_layers,
        t.hidden_size,
        t.num_attention_heads,
        t.key_value_heads(),
    )
}

impl Report {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
        writeln!(out, "{}  {}", self.name, self.revision)?;
        if let Some(notice) = &self.notice {
            writeln!(out, "  NOTE          {notice}")?;
        }
        writeln!(out, "  architecture  {}", self.architecture)?;
        writeln!(
            out,
            "  reward        {:?}, read at the {:?} token, positions {:?}",
            self.output, self.reward_token, self.positions
        )?;
        writeln!(out, "  profile       {}: {}", self.profile, self.profile_reason)?;
        if let Some(source) = &self.source {
            writeln!(out, "  its source    {source}")?;
        }
        writeln!(out, "  parameters    {}, vocabulary of {} rows", self.parameters, self.vocabulary)?;
        let formats = self.formats_on_disk.join(", ");
        writeln!(out, "  on disk       {} in {formats}", mib(self.bytes_on_disk as f64))?;
        if self.adapted_weights > 0 {
            writeln!(out, "  LoRA          merged into {} weights at load", self.adapted_weights)?;
        }
        if !self.skipped.is_empty() {
            writeln!(out, "  never needed  {}", self.skipped.join(", "))?;
        }
        for (format, bytes) in &self.memory_bytes {
            writeln!(out, "  in memory     {} in {format}", mib(*bytes as f64))?;
        }
        for PictureCost { side, tokens, visual_tokens, refused } in &self.pictures {
            let side = format!("{side}x{side}");
            match (tokens, visual_tokens) {
                (Some(tokens), Some(visual)) => {
                    writeln!(out, "  {side:<12}  {tokens} tokens, {visual} of them visual")?;
                }
                _ => writeln!(out, "  {side:<12}  refused: {}", refused.as_deref().unwrap_or_default())?,
            }
        }
        if let Some(found) = &self.self_test {
            writeln!(out, "  SELF-TEST     {found}")?;
        }
        match self.faults.len() {
            0 => match &self.untried {
                None => writeln!(out, "It can be served."),
                Some(why) => writeln!(out, "Nothing wrong was found, but not all was tried: {why}."),
            },
            count => {
                writeln!(out, "It cannot be served; {count} faults:")?;
                self.faults.iter().try_for_each(|fault| writeln!(out, "  {fault}"))
            }
        }
    }
}
