//! From hidden states to a score: the columns of a head, or the probability of answers, of one reading or of several.

mod probability;
pub mod regression;

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::checkpoint::{CheckpointError, Inventory, Weights};
use super::layers::upload;
use super::profile::{Average, Columns, Fusion, Norm, Output, RewardConfig};
use super::sample::{AnswerIds, Component};
use super::{Sample, Score};
use probability::{Own, Probability};
use regression::RewardHead;

/// [`Weights::tile`] of the products that read hidden states, of which a batch has few.
const READINGS_TILE: i64 = 32;

fn readings_tile(weights: &Weights) -> Option<i64> {
    weights.tile.map(|_| READINGS_TILE)
}

/// The output layer.
pub const LM_HEAD: &str = "lm_head.weight";

/// How the hidden states of a sample's readings become its score.
#[derive(Debug)]
pub struct Readout {
    reader: Reader,
    output: Output,
    fusion: Option<Fusion>,
    questions: Average,
}

#[derive(Debug)]
enum Reader {
    Heads { heads: Vec<RewardHead>, passes: Vec<Pass> },
    Answers(Probability),
}

/// What one of several readings takes of which head.
#[derive(Debug)]
struct Pass {
    head: usize,
    columns: Columns,
    norm: Norm,
}

/// What a batch's readings need beside their hidden states.
#[derive(Debug)]
pub struct Reads {
    /// For each pass the readings that are its, and the place of each reading among those; `None` where there is one pass.
    passes: Option<(Vec<Tensor>, Tensor)>,
    /// What is each reading's own of answers.
    own: Own,
}

/// How many columns a head has at least for what is read.
fn width(columns: Option<Columns>, output: Output) -> Option<i64> {
    match (columns, output) {
        (Some(_), _) => None,
        (None, Output::Gaussian) => Some(2),
        (None, _) => Some(1),
    }
}

/// The tensors of heads and output layer that a profile reads, with the shapes that they must have.
///
/// # Errors
/// What stands under a head's names is no head that is known, or lacks a column.
pub fn expected_tensors(
    inventory: &Inventory,
    reward: &RewardConfig,
    hidden_size: i64,
    vocabulary: i64,
    ties_embeddings: bool,
) -> Result<Vec<(String, Vec<i64>)>, String> {
    if reward.reads_answers() {
        let own = (!ties_embeddings).then(|| (LM_HEAD.to_owned(), vec![vocabulary, hidden_size]));
        return Ok(own.into_iter().collect());
    }
    let mut expected = BTreeMap::new();
    for pass in reward.passes() {
        let columns = width(pass.columns, reward.output);
        expected.extend(regression::expected_tensors(inventory, pass.head, hidden_size, columns)?);
    }
    Ok(expected.into_iter().collect())
}

impl Readout {
    /// Takes the weights, which [`expected_tensors`] has been held against. `embeddings` are a tied model's output layer.
    pub fn load(
        weights: &mut Weights,
        reward: &RewardConfig,
        answers: Option<&AnswerIds>,
        embeddings: Option<&Tensor>,
    ) -> Result<Self, CheckpointError> {
        let reader = if reward.reads_answers() {
            let answers = answers.ok_or_else(|| {
                CheckpointError::invalid("reward_config.json", "its answers were not tokenised")
            })?;
            let layer = match embeddings {
                Some(embeddings) => embeddings.shallow_clone(),
                None => weights.take(LM_HEAD)?,
            };
            Reader::Answers(Probability::new(layer, readings_tile(weights), answers, reward))
        } else {
            Self::heads(weights, reward)?
        };
        let questions = reward.questions.unwrap_or(Average::Mean);
        Ok(Self { reader, output: reward.output, fusion: reward.fusion, questions })
    }

    fn heads(weights: &mut Weights, reward: &RewardConfig) -> Result<Reader, CheckpointError> {
        let (mut names, mut heads, mut passes) = (Vec::new(), Vec::new(), Vec::new());
        for pass in reward.passes() {
            let head = match names.iter().position(|name| *name == pass.head) {
                Some(known) => known,
                None => {
                    names.push(pass.head);
                    heads.push(RewardHead::load(weights, pass.head)?);
                    heads.len() - 1
                }
            };
            let log_sigma = (reward.output == Output::Gaussian).then_some(1);
            let columns = pass.columns.unwrap_or(Columns { mean: 0, log_sigma });
            if let Some(most) = Some(columns.mean).max(columns.log_sigma)
                && i64::from(most) >= heads[head].columns()
            {
                let has = heads[head].columns();
                return Err(CheckpointError::invalid(
                    "reward_config.json",
                    format!("columns says {most}, and {} has {has}, from 0", pass.head),
                ));
            }
            passes.push(Pass { head, columns, norm: pass.norm });
        }
        Ok(Reader::Heads { heads, passes })
    }

    /// Lays out what the readings of these samples need, in the order of the samples and their branches.
    pub fn stage(&self, samples: &[&Sample], device: Device) -> Reads {
        match &self.reader {
            Reader::Answers(probability) => Reads { passes: None, own: probability.stage(samples, device) },
            Reader::Heads { passes, .. } => {
                let of_pass = |pass: usize| {
                    let count = passes.len();
                    let rows = (0..samples.len()).map(|sample| (sample * count + pass) as i64);
                    rows.collect::<Vec<_>>()
                };
                let passes = (passes.len() > 1).then(|| {
                    let rows: Vec<Vec<i64>> = (0..passes.len()).map(of_pass).collect();
                    let mut inverse = vec![0; samples.len() * passes.len()];
                    for (place, &row) in (0..).zip(rows.iter().flatten()) {
                        inverse[row as usize] = place;
                    }
                    let to_device = |rows: &[i64]| upload(&Tensor::from_slice(rows), device);
                    (rows.iter().map(|rows| to_device(rows)).collect(), to_device(&inverse))
                });
                Reads { passes, own: Own::default() }
            }
        }
    }

    /// What is read of hidden states `[readings, width]`: `[readings, 2]` of mean and log sigma, or `[readings, 1]`. fp32.
    pub fn forward(&self, hidden: &Tensor, reads: &Reads) -> Tensor {
        match (&self.reader, &reads.passes) {
            (Reader::Answers(probability), _) => probability.forward(hidden, &reads.own),
            (Reader::Heads { heads, passes }, None) => passes[0].forward(heads, hidden),
            (Reader::Heads { heads, passes }, Some((rows, inverse))) => {
                let of_passes = passes.iter().zip(rows);
                let parts: Vec<Tensor> = of_passes
                    .map(|(pass, rows)| pass.forward(heads, &hidden.index_select(0, rows)))
                    .collect();
                Tensor::cat(&parts, 0).index_select(0, inverse)
            }
        }
    }

    /// The scores of samples of so many branches each.
    ///
    /// # Errors
    /// The device failed to hand the numbers over.
    pub fn scores(&self, columns: &Tensor, branches: &[usize]) -> Result<Vec<Score>, tch::TchError> {
        let column = |n| Vec::<f32>::try_from(columns.f_select(1, n)?.f_contiguous()?);
        let means = column(0)?;
        let logs = if self.output == Output::Gaussian {
            column(1)?.into_iter().map(Some).collect()
        } else {
            vec![None; means.len()]
        };
        let mut read = means.into_iter().zip(logs);
        let score = |&count: &usize| {
            let readings: Vec<_> = read.by_ref().take(count.max(1)).collect();
            self.score(&readings, count > 0)
        };
        Ok(branches.iter().map(score).collect())
    }

    /// The score of one sample, of the mean and log sigma of each of its readings.
    fn score(&self, readings: &[(f32, Option<f32>)], branched: bool) -> Score {
        let part = |&(mean, log): &(f32, Option<f32>)| Component { mean, stddev: log.map(f32::exp) };
        if let ([only], false) = (readings, branched) {
            let Component { mean, stddev } = part(only);
            return Score { mean, stddev, components: Vec::new() };
        }
        let (mean, stddev) = match self.fusion {
            Some(fusion) => fused(fusion, readings),
            None => (averaged(self.questions, readings), None),
        };
        Score { mean, stddev, components: readings.iter().map(part).collect() }
    }
}

impl Pass {
    fn forward(&self, heads: &[RewardHead], hidden: &Tensor) -> Tensor {
        let columns = heads[self.head].forward(hidden);
        let Norm { mean, std } = self.norm;
        let whole = columns.size()[1];
        let of = |n: u32| columns.narrow(1, i64::from(n), 1);
        // As it is, where that is what is asked for.
        match self.columns {
            Columns { mean: 0, log_sigma: None } if whole == 1 && self.norm == Norm::default() => columns,
            Columns { mean: 0, log_sigma: Some(1) } if whole == 2 && self.norm == Norm::default() => columns,
            Columns { mean: n, log_sigma } => {
                let mut parts = vec![(of(n) - mean) / std];
                parts.extend(log_sigma.map(|n| of(n) - std.ln()));
                Tensor::cat(&parts, 1).to_kind(Kind::Float)
            }
        }
    }
}

/// Several Gaussians, each a mean and a log sigma, as one: EditReward's `pooling_strategy`.
fn fused(fusion: Fusion, readings: &[(f32, Option<f32>)]) -> (f32, Option<f32>) {
    let means = readings.iter().map(|(mean, _)| f64::from(*mean));
    let logs: Option<Vec<f64>> = readings.iter().map(|(_, log)| log.map(f64::from)).collect();
    let count = readings.len() as f64;
    let (mean, log) = match fusion {
        Fusion::Mean => (means.sum::<f64>() / count, logs.map(|logs| logs.iter().sum::<f64>() / count)),
        Fusion::Min => {
            let least = |numbers: &mut dyn Iterator<Item = f64>| numbers.fold(f64::INFINITY, f64::min);
            let mut means = means;
            (least(&mut means), logs.map(|logs| least(&mut logs.into_iter())))
        }
        Fusion::Sum => {
            let variance = |logs: Vec<f64>| logs.into_iter().map(|log| (2.0 * log).exp()).sum::<f64>();
            (means.sum(), logs.map(|logs| variance(logs).sqrt().ln()))
        }
    };
    (mean as f32, log.map(|log| log.exp() as f32))
}

/// Several probabilities as one.
fn averaged(average: Average, readings: &[(f32, Option<f32>)]) -> f32 {
    let (numbers, count) = (readings.iter().map(|(p, _)| f64::from(*p)), readings.len() as f64);
    let mean = match average {
        Average::Mean => numbers.sum::<f64>() / count,
        Average::GeometricMean => (numbers.map(f64::ln).sum::<f64>() / count).exp(),
    };
    mean as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const READINGS: [(f32, Option<f32>); 2] = [(1.0, Some(0.0)), (-3.0, Some(-1.0))];

    /// By hand, from EditReward's `qwen2_5_vl_trainer.py`.
    #[test]
    fn passes_fuse_as_the_reference_pools_them() {
        let near = |got: (f32, Option<f32>), mean: f32, stddev: f32| {
            assert!((got.0 - mean).abs() < 1e-6 && (got.1.unwrap() - stddev).abs() < 1e-6, "{got:?}");
        };
        near(fused(Fusion::Mean, &READINGS), -1.0, (-0.5f32).exp());
        near(fused(Fusion::Min, &READINGS), -3.0, (-1.0f32).exp());
        near(fused(Fusion::Sum, &READINGS), -2.0, (1.0f32 + (-2.0f32).exp()).sqrt());
    }

    #[test]
    fn probabilities_are_averaged_as_asked() {
        let readings = [(0.5, None), (0.125, None)];
        assert_eq!(averaged(Average::Mean, &readings), 0.3125);
        assert!((averaged(Average::GeometricMean, &readings) - 0.25).abs() < 1e-7);
        assert_eq!(averaged(Average::GeometricMean, &[(0.5, None), (0.0, None)]), 0.0);
    }
}
