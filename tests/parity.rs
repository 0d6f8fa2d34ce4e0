//! The model against the Hugging Face reference, stage by stage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use golden::{Case, Item};
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::model::{Blueprint, RewardModel, Sample, Scorer};
use spatialscore::processor::{Picture, Processor, ProcessorLimits};
use tch::{Device, Kind};

/// A stage may differ from the reference by this share of its norm.
const STAGE_BOUND: f64 = 1e-4;

fn load(case: &Case, kind: Kind) -> (Processor, RewardModel) {
    let files = CheckpointFiles::open(&case.checkpoint(), None, None).unwrap();
    let processor = processor(case, None);
    let model = RewardModel::load(&files, processor.normalisation(), Device::Cpu, kind).unwrap();
    (processor, model)
}

/// A case's processor, for items of so many pictures, or of as many as it says itself.
fn processor(case: &Case, pictures: Option<usize>) -> Processor {
    let files = CheckpointFiles::open(&case.checkpoint(), None, None).unwrap();
    let mut reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    reward.pictures = pictures.unwrap_or(reward.pictures);
    let limits = ProcessorLimits {
        max_prompt_bytes: 8192,
        max_image_pixels: 1 << 24,
        max_item_tokens: 1 << 14,
        ..ProcessorLimits::NONE
    };
    Processor::load(&files, &reward, limits).unwrap()
}

/// An item from its files and its prompt, through the processor.
fn prepare(case: &Case, given: &Processor, item: usize) -> Sample {
    let files = case.items[item].files(&case.directory);
    let other = (files.len() != given.pictures()).then(|| processor(case, Some(files.len())));
    let processor = other.as_ref().unwrap_or(given);
    let pictures = files.into_iter().map(|bytes| Picture::Encoded(bytes.into())).collect();
    processor.prepare(processor.admit_all(&case.items[item].prompt, pictures).unwrap()).unwrap()
}

fn means(model: &mut RewardModel, samples: &[Sample]) -> Vec<f32> {
    let batches = samples.chunks(32).map(|batch| batch.iter().collect::<Vec<_>>());
    batches.flat_map(|batch| model.score(&batch).unwrap()).map(|score| score.mean).collect()
}

#[test]
fn every_stage_is_the_references() {
    let mut worst: BTreeMap<String, (f64, String)> = BTreeMap::new();
    let mut compared = 0;
    for case in Case::all() {
        let (_, model) = load(&case, Kind::Float);
        for item in 0..case.items.len() {
            let Some(sample) = case.sample(item) else { continue };
            for (stage, ours) in model.trace(&sample).unwrap() {
                let theirs = case.golden(item, &stage).unwrap_or_else(|| panic!("{}: no {stage}", case.name));
                let [ours, theirs] = [&ours, &theirs].map(|t| t.to_kind(Kind::Double).squeeze());
                assert_eq!(ours.size(), theirs.size(), "{} {item} {stage}", case.name);
                let difference = f64::try_from((&ours - &theirs).norm() / theirs.norm()).unwrap();
                let place = worst.entry(stage).or_default();
                if difference > place.0 || difference.is_nan() {
                    *place = (difference, format!("{} item {item}", case.name));
                }
                compared += 1;
            }
        }
    }
    println!("{:<24} {:>12}  where", "stage", "worst");
    for (stage, (difference, place)) in &worst {
        println!("{stage:<24} {difference:>12.2e}  {place}");
    }
    assert!(compared > 100, "only {compared} stages compared");
    for (stage, (difference, place)) in worst {
        assert!(difference <= STAGE_BOUND, "{stage} differs by {difference:.2e} of its norm in {place}");
    }
}

/// The samples of all cases of one checkpoint, repeated to `count`, in an order of no rhyme.
fn mixed(case: &Case, count: usize) -> Vec<Sample> {
    let samples: Vec<Sample> = (0..case.items.len()).filter_map(|item| case.sample(item)).collect();
    (0..count).map(|n| samples[n * 7 % samples.len()].clone()).collect()
}

#[test]
fn a_score_does_not_depend_on_its_neighbours() {
    let mut batches = 0;
    for case in Case::all() {
        if case.sample(0).is_none() {
            continue; // This one has final scores only.
        }
        let (_, mut model) = load(&case, Kind::Float);
        let samples = mixed(&case, 32);
        let alone: Vec<_> = samples.iter().map(|s| model.score(&[s]).unwrap()[0].clone()).collect();
        let forward: Vec<&Sample> = samples.iter().collect();
        let backward: Vec<&Sample> = samples.iter().rev().collect();
        let together = model.score(&forward).unwrap();
        let mut reversed = model.score(&backward).unwrap();
        reversed.reverse();
        for (n, alone) in alone.iter().enumerate() {
            for other in [&together[n], &reversed[n]] {
                let places =
                    [(alone.mean, other.mean), (alone.stddev.unwrap_or(0.0), other.stddev.unwrap_or(0.0))];
                for (a, b) in places {
                    assert!((a - b).abs() <= 1e-5, "{} item {n}: {a} alone, {b} among others", case.name);
                }
            }
        }
        batches += 1;
    }
    assert!(batches >= 6, "only {batches} checkpoints");
}

/// Where that is asked for. Without it most of these differ in their last bits.
#[test]
fn a_batch_invariant_score_is_the_same_to_the_last_bit() {
    for case in Case::all().into_iter().filter(|case| case.sample(0).is_some()) {
        let files = CheckpointFiles::open(&case.checkpoint(), None, None).unwrap();
        let blueprint = Blueprint::open(&files, Device::Cpu, Kind::BFloat16).unwrap().batch_invariant();
        let mut model = RewardModel::build(blueprint, processor(&case, None).normalisation()).unwrap();
        let samples = mixed(&case, 24);
        let alone: Vec<_> = samples.iter().map(|s| model.score(&[s]).unwrap()[0].clone()).collect();
        assert_eq!(model.score(&samples.iter().collect::<Vec<_>>()).unwrap(), alone, "{}", case.name);
    }
}

#[test]
fn from_file_and_prompt_to_score_as_the_reference() {
    let (mut worst, mut compared) = (0.0_f32, 0);
    for case in Case::all() {
        let (processor, mut model) = load(&case, Kind::Float);
        // How large the case's scores are: one of many may be near zero, and then all of it is rounding.
        let scores: Vec<f32> = (0..case.items.len()).filter_map(|item| case.score(item, "mean")).collect();
        let scale = (scores.iter().map(|score| score * score).sum::<f32>() / scores.len() as f32).sqrt();
        for item in 0..case.items.len() {
            // JPEG and lossy WebP have decoders of their own; the pixels of PNG are the reference's.
            let Item { image, references, .. } = &case.items[item];
            if references.iter().chain([image]).any(|path| path.extension().is_none_or(|e| e != "png")) {
                continue;
            }
            let score = model.score(&[&prepare(&case, &processor, item)]).unwrap().remove(0);
            for (ours, stage) in [(Some(score.mean), "mean"), (score.stddev, "stddev")] {
                let theirs = case.score(item, stage);
                if stage == "stddev" && case.score(item, "mean").is_some() && case.sample(item).is_none() {
                    continue; // This case keeps means only.
                }
                assert_eq!(ours.is_some(), theirs.is_some(), "{} item {item} {stage}", case.name);
                let (Some(ours), Some(theirs)) = (ours, theirs) else { continue };
                // Sums of terms of order one are off by some 1e-6, however near zero all of a case's scores are.
                let difference = (ours - theirs).abs() / theirs.abs().max(0.1 * scale).max(1e-2);
                assert!(difference <= 1e-4, "{} item {item}: {stage} {ours}, reference {theirs}", case.name);
                worst = worst.max(difference);
                compared += 1;
            }
        }
    }
    println!("worst relative difference of {compared} numbers: {worst:.2e}");
    assert!(compared >= 20, "only {compared} numbers");
}

/// Spearman's rank correlation.
fn rank_correlation(a: &[f32], b: &[f32]) -> f64 {
    let ranks = |values: &[f32]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
        let mut ranks = vec![0.0; values.len()];
        for (rank, item) in order.into_iter().enumerate() {
            ranks[item] = rank as f64;
        }
        ranks
    };
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len() as f64;
    let squares: f64 = a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[test]
fn bfloat16_ranks_as_float32_does() {
    let case = Case::open("spread");
    let (processor, mut wide) = load(&case, Kind::Float);
    let (_, mut narrow) = load(&case, Kind::BFloat16);
    let samples: Vec<Sample> = (0..case.items.len()).map(|item| prepare(&case, &processor, item)).collect();
    let reference: Vec<f32> = (0..samples.len()).map(|item| case.score(item, "mean").unwrap()).collect();
    let [ours, rounded] = [&mut wide, &mut narrow].map(|model| means(model, &samples));
    let spread =
        reference.iter().fold(f32::MIN, |a, &b| a.max(b)) - reference.iter().fold(f32::MAX, |a, &b| a.min(b));
    let correlation = rank_correlation(&rounded, &reference);
    println!("{} items spread over {spread:.2}: rank correlation {correlation:.5}", samples.len());
    assert!(samples.len() >= 200 && spread > 0.5);
    assert!(rank_correlation(&ours, &reference) > 0.99999);
    assert!(correlation >= 0.995, "{correlation}");
}
