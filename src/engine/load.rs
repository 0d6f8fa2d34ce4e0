//! From a checkpoint's files to what an engine is made of, and all that stands in the way: one judgement, for `serve`
//! and for `inspect`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use super::{LoadError, Loaded, Loader, MakeScorer, Memory, ModelInfo, SelfTest, Terms, memory, models};
use crate::config::{ModelSettings, Settings};
use crate::device;
use crate::model::backbone::{Config, forward_flops};
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};
use crate::model::profile::{self, RewardConfig};
use crate::model::{Blueprint, Reading, RewardModel};
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
        let run = || Ok(test.run(&mut RewardModel::build(blueprint, processor.reading())?)?.remark);
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

/// Finds the checkpoint of the settings, its processor, and the devices that it shall run on; of several models the
/// default one.
///
/// # Errors
/// The checkpoint cannot be served, or a device is not there.
pub fn load(settings: &Settings) -> Result<Loaded<RewardModel>, LoadError> {
    Found::of(settings, settings.models.first().unwrap_or(&settings.model))?.read()
}

/// The same of all models of the settings, which fit their devices together.
///
/// # Errors
/// All that is wrong with any of them.
pub fn load_all(settings: &Settings) -> Result<Vec<Loaded<RewardModel>>, LoadError> {
    let (found, errors) = split(
        settings
            .models
            .iter()
            .map(|model| Found::of(settings, model).map_err(|error| of_model(model, error))),
    );
    if let Some(error) = LoadError::all(errors) {
        return Err(error);
    }
    models::distinct(found.iter().map(Found::name))?;
    memory::plan(
        found.iter().map(|found| (found.name(), found.memory.as_slice())),
        settings.model.max_memory,
    )?;
    let (loaded, errors) = split(found.into_iter().map(|found| {
        let model = found.settings.clone();
        found.read().map_err(|error| of_model(&model, error))
    }));
    LoadError::all(errors).map_or(Ok(loaded), Err)
}

/// What loads more models.
pub fn loader() -> Loader<RewardModel> {
    Loader {
        load: Box::new(|settings, model, others| {
            let found = Found::of(settings, model)?;
            // Where nothing says how much there may be, the others are there already, beside what is free.
            let others = if settings.model.max_memory.is_some() { others } else { &[] };
            let others = others.iter().map(|(name, memory)| (name.as_str(), memory.as_slice()));
            let all = others.chain([(found.name(), found.memory.as_slice())]);
            memory::plan(all, settings.model.max_memory)?;
            found.read()
        }),
        revision: Box::new(|model| {
            let files =
                profile::open(&model.checkpoint, model.revision.as_deref(), model.profile.as_deref())?;
            Ok(files.revision()?)
        }),
    }
}

/// An error of a model that has a name.
fn of_model(model: &ModelSettings, error: LoadError) -> LoadError {
    match &model.name {
        Some(name) => LoadError::Of(name.clone(), Box::new(error)),
        None => error,
    }
}

fn split<T>(results: impl Iterator<Item = Result<T, LoadError>>) -> (Vec<T>, Vec<LoadError>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    results.for_each(|result| match result {
        Ok(value) => good.push(value),
        Err(error) => bad.push(error),
    });
    (good, bad)
}

/// A checkpoint whose headers are sound, of which no weights are read yet.
pub(super) struct Found {
    pub settings: ModelSettings,
    files: CheckpointFiles,
    config: Config,
    reward: RewardConfig,
    processor: Processor,
    devices: Vec<Device>,
    /// What it takes on each of them.
    pub memory: Vec<Memory>,
}

impl Found {
    /// Finds a model's checkpoint and judges it.
    pub fn of(settings: &Settings, model: &ModelSettings) -> Result<Self, LoadError> {
        let files = profile::open(&model.checkpoint, model.revision.as_deref(), model.profile.as_deref())?;
        let (blueprint, processor) =
            Examination::of(&files, ProcessorLimits::from(&settings.limits))?.accept()?;
        let devices = model.device.resolve()?;
        let memory =
            |&device: &Device| Memory::of(&blueprint, device, model.dtype.on(device), settings.batch);
        let memory = devices.iter().map(memory).collect();
        let Blueprint { config, reward, .. } = blueprint;
        Ok(Self { settings: model.clone(), files, config, reward, processor, devices, memory })
    }

    /// The name that it is served by.
    pub fn name(&self) -> &str {
        self.settings.name.as_deref().unwrap_or_else(|| self.files.name())
    }

    /// What an engine needs of it. Reads all files, for their digest.
    pub fn read(self) -> Result<Loaded<RewardModel>, LoadError> {
        #[derive(Deserialize)]
        struct Architecture {
            model_type: String,
        }
        let name = self.name().to_owned();
        let Self { settings: model, files, config, reward, processor, devices, memory } = self;
        let mut kinds: Vec<&str> = devices.iter().map(|&d| device::kind_name(model.dtype.on(d))).collect();
        kinds.dedup();
        let profile_text = files.read(profile::FILE)?.unwrap_or_default();
        let terms = Terms {
            named: model.name.is_some(),
            checkpoint: files.name().to_owned(),
            profile_digest: format!("sha256:{:x}", Sha256::digest(&profile_text)),
            token_flops: Some(token_flops(&config)),
            memory,
        };
        let info = ModelInfo {
            name,
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
            make_model(Arc::clone(&files), processor.reading(), device, kind, &model)
        };
        let workers = devices.into_iter().map(make).collect();
        Ok(Loaded { info, terms, processor, workers })
    }
}

/// What a token of a usual item costs: a picture of 512 × 512 and a hundred tokens of text.
fn token_flops(config: &Config) -> f64 {
    const TEXT: usize = 100;
    let side = (512 / config.vision.patch_size.max(1)) as usize;
    let merge = (config.vision.spatial_merge_size.max(1)) as usize;
    let side = (side / merge).max(1) * merge;
    let tokens = TEXT + (side / merge).pow(2);
    forward_flops(config, &[(side, side)], tokens) / tokens as f64
}

fn make_model(
    files: Arc<CheckpointFiles>,
    reading: Reading,
    device: Device,
    kind: Kind,
    &ModelSettings { threads, batch_invariant, .. }: &ModelSettings,
) -> MakeScorer<RewardModel> {
    Box::new(move || {
        if let Some(threads) = threads.or_else(device::cores).and_then(|threads| i32::try_from(threads).ok())
        {
            // OpenMP keeps the number per thread, so it is set on the thread that will compute.
            tch::set_num_threads(threads);
        }
        let blueprint = Blueprint::open(&files, device, kind)?;
        let blueprint = if batch_invariant { blueprint.batch_invariant() } else { blueprint };
        Ok(RewardModel::build(blueprint, reading.clone())?)
    })
}
