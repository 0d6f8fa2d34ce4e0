//! From a checkpoint's files to what an engine is made of, and all that stands in the way: one judgement, for `serve`
//! and for `inspect`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::Deserialize;
use tch::{Device, Kind};

use super::{LoadError, Loaded, MakeScorer, ModelInfo, SelfTest};
use crate::config::Settings;
use crate::device;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};
use crate::model::{Blueprint, Reading, RewardModel, profile};
use crate::processor::{Processor, ProcessorLimits};

/// What a checkpoint's settings and the headers of its weights show.
pub struct Examination {
    /// The model to be.
    pub blueprint: Blueprint,
    /// The processor, if there can be one.
    pub processor: Option<Processor>,
    /// Why it cannot be served: all that was found.
    pub faults: Vec<LoadError>,
}

impl Examination {
    /// Reads what a checkpoint says of itself, and no weights.
    ///
    /// # Errors
    /// What makes it useless to look on, such as a configuration that is missing.
    pub fn of(files: &CheckpointFiles, limits: ProcessorLimits) -> Result<Self, CheckpointError> {
        let blueprint = Blueprint::open(files, Device::Cpu, Kind::Float)?;
        let mut faults = Vec::new();
        if !blueprint.faults.is_empty() {
            faults.push(CheckpointError::Tensors(blueprint.faults.clone()).into());
            let pickles = files.pickles();
            if !pickles.is_empty() {
                faults.push(CheckpointError::Pickles(pickles).into());
            }
        }
        // Where tensors are wrong, the embeddings may be among them.
        let rows = blueprint.vocabulary().filter(|_| blueprint.faults.is_empty());
        let processor = Processor::load(files, &blueprint.reward, limits);
        let processor = match processor.and_then(|processor| processor.with_vocabulary(rows)) {
            Ok(processor) => {
                faults.extend(
                    SelfTest::new(&processor).err().map(|error| LoadError::Limits(error.to_string())),
                );
                Some(processor)
            }
            Err(error) => {
                faults.push(error.into());
                None
            }
        };
        Ok(Self { blueprint, processor, faults })
    }

    /// Reads every weight, merged, and keeps none: those that are not finite. `progress` is told the bytes of each.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn non_finite(&self, progress: impl FnMut(u64)) -> Result<Option<LoadError>, CheckpointError> {
        let bad = self.blueprint.weights.non_finite(progress)?;
        Ok((!bad.is_empty()).then(|| CheckpointError::Tensors(bad).into()))
    }

    /// Loads the weights onto the CPU, in fp32, and tests the model as `serve` does before it serves. Gives what callers
    /// must know of its scores.
    ///
    /// # Errors
    /// As `serve` would say it.
    pub fn rehearse(self) -> Result<Option<String>, LoadError> {
        let (blueprint, processor) = self.accept()?;
        let test = SelfTest::new(&processor).map_err(|error| LoadError::Limits(error.to_string()))?;
        let run = || test.run(&mut RewardModel::build(blueprint, processor.reading())?);
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(LoadError::Probe("it panicked".into())))
    }

    /// The blueprint and the processor, where nothing is wrong with them.
    fn accept(self) -> Result<(Blueprint, Processor), LoadError> {
        match (LoadError::all(self.faults), self.processor) {
            (None, Some(processor)) => Ok((self.blueprint, processor)),
            (Some(error), _) => Err(error),
            (None, None) => Err(LoadError::Probe("there is no processor".into())),
        }
    }
}

/// Finds the checkpoint of the settings, its processor, and the devices that it shall run on.
///
/// # Errors
/// The checkpoint cannot be served, or a device is not there.
pub fn load(settings: &Settings) -> Result<Loaded<RewardModel>, LoadError> {
    #[derive(Deserialize)]
    struct Architecture {
        model_type: String,
    }
    let model = &settings.model;
    let files = profile::open(&model.checkpoint, model.revision.as_deref(), model.profile.as_deref())?;
    let (blueprint, processor) =
        Examination::of(&files, ProcessorLimits::from(&settings.limits))?.accept()?;
    let reward = blueprint.reward;
    let devices = model.device.resolve()?;
    let mut kinds: Vec<&str> = devices.iter().map(|&d| device::kind_name(model.dtype.on(d))).collect();
    kinds.dedup();
    let info = ModelInfo {
        name: files.name().to_owned(),
        architecture: files.require_json::<Architecture>("config.json")?.model_type,
        revision: files.revision()?,
        dtype: kinds.join(","),
        devices: devices.iter().copied().map(device::name).collect(),
        output: reward.output,
        profile: files.profile(),
        pictures: reward.pictures,
        components: reward.components(),
        takes_questions: reward.takes_questions(),
        notice: reward.notice.unwrap_or_default(),
    };
    let files = Arc::new(files);
    let make = |device| {
        let kind = model.dtype.on(device);
        make_model(Arc::clone(&files), processor.reading(), device, kind, model.threads)
    };
    let workers = devices.into_iter().map(make).collect();
    Ok(Loaded { info, processor, workers })
}

fn make_model(
    files: Arc<CheckpointFiles>,
    reading: Reading,
    device: Device,
    kind: Kind,
    threads: Option<usize>,
) -> MakeScorer<RewardModel> {
    Box::new(move || {
        if let Some(threads) = threads.or_else(device::cores).and_then(|threads| i32::try_from(threads).ok())
        {
            // OpenMP keeps the number per thread, so it is set on the thread that will compute.
            tch::set_num_threads(threads);
        }
        Ok(RewardModel::load(&files, reading.clone(), device, kind)?)
    })
}
