//! The probability of answers under the output layer, exact over the whole vocabulary or between two answers.

use std::collections::BTreeSet;

use tch::{Device, Kind, Tensor};

use crate::model::Sample;
use crate::model::layers::{Linear, upload};
use crate::model::profile::{RewardConfig, Scale};
use crate::model::sample::AnswerIds;

/// The output layer, as far as it is read.
#[derive(Debug)]
pub struct Probability {
    /// `[rows, width]`: the whole vocabulary, or the positive answers and behind them the negative.
    layer: Linear,
    answers: Reading,
    logit: bool,
    penalty: f64,
}

#[derive(Debug)]
enum Reading {
    /// The answers' tokens among all.
    Any(Vec<u32>),
    /// How many of the rows are positive.
    Pair { positive: i64 },
}

/// What is each reading's own.
#[derive(Debug, Default)]
pub struct Own {
    /// The tokens of its answers, `[readings, most]`, and what is added to their logits: minus infinity where a reading has
    /// fewer.
    answers: Option<(Tensor, Tensor)>,
    /// The tokens that stand in its text, as places in the logits of all, `[readings × vocabulary]`.
    seen: Option<Tensor>,
}

impl Probability {
    /// Reads these answers under the output layer `[vocabulary, width]`.
    pub fn new(layer: Tensor, tile: Option<i64>, answers: &AnswerIds, reward: &RewardConfig) -> Self {
        let (weight, answers) = match answers {
            AnswerIds::Any(ids) => (layer, Reading::Any(ids.clone())),
            AnswerIds::Pair { positive, negative } => {
                let rows: Vec<i64> = positive.iter().chain(negative).map(|&id| i64::from(id)).collect();
                let rows = Tensor::from_slice(&rows).to_device(layer.device());
                (layer.index_select(0, &rows), Reading::Pair { positive: positive.len() as i64 })
            }
        };
        let logit = reward.scale == Some(Scale::Logit);
        let layer = Linear { weight, bias: None, tile };
        Self { layer, answers, logit, penalty: reward.repetition_penalty.unwrap_or(1.0) }
    }

    /// Lays out what the readings of these samples need.
    pub fn stage(&self, samples: &[&Sample], device: Device) -> Own {
        let Reading::Any(default) = &self.answers else { return Own::default() };
        let mut own: Vec<&[u32]> = Vec::new();
        for sample in samples {
            match sample.branches.as_slice() {
                [] => own.push(default),
                branches => own.extend(branches.iter().map(|branch| match branch.answers.as_slice() {
                    [] => default.as_slice(),
                    answers => answers,
                })),
            }
        }
        let most = own.iter().map(|ids| ids.len()).max().unwrap_or_default();
        let (mut ids, mut masks) = (Vec::new(), Vec::new());
        for answers in &own {
            // What fills up stands for the first once more, and counts nothing.
            let filled = answers.iter().chain(std::iter::repeat(&answers[0])).take(most);
            ids.extend(filled.map(|&id| i64::from(id)));
            masks.extend((0..most).map(|n| if n < answers.len() { 0.0 } else { f32::NEG_INFINITY }));
        }
        let shape = [own.len() as i64, most as i64];
        let answers = (
            upload(&Tensor::from_slice(&ids).view(shape), device),
            upload(&Tensor::from_slice(&masks).view(shape), device),
        );
        let seen = (self.penalty != 1.0).then(|| upload(&Tensor::from_slice(&self.seen(samples)), device));
        Own { answers: Some(answers), seen }
    }

    fn seen(&self, samples: &[&Sample]) -> Vec<i64> {
        let vocabulary = self.layer.weight.size()[0];
        let mut places = Vec::new();
        let mut row = 0;
        for sample in samples {
            let ends: Vec<&[u32]> = match sample.branches.as_slice() {
                [] => vec![&[]],
                branches => branches.iter().map(|branch| branch.input_ids.as_slice()).collect(),
            };
            for end in ends {
                let ids: BTreeSet<u32> = sample.input_ids.iter().chain(end).copied().collect();
                places.extend(ids.into_iter().map(|id| row * vocabulary + i64::from(id)));
                row += 1;
            }
        }
        places
    }

    /// The probability, or its logit, `[readings, 1]` in fp32, of hidden states `[readings, width]`.
    pub fn forward(&self, hidden: &Tensor, own: &Own) -> Tensor {
        let logits = self.layer.forward(hidden).to_kind(Kind::Float);
        let all = |logits: &Tensor| logits.logsumexp([1].as_slice(), true);
        match (&self.answers, &own.answers) {
            (Reading::Pair { positive }, _) => {
                let negative = logits.size()[1] - positive;
                let logit =
                    all(&logits.narrow(1, 0, *positive)) - all(&logits.narrow(1, *positive, negative));
                if self.logit { logit } else { logit.sigmoid() }
            }
            (Reading::Any(_), Some((ids, mask))) => {
                if let Some(seen) = &own.seen {
                    self.penalise(&logits, seen);
                }
                let answers = all(&(logits.gather(1, ids, false) + mask));
                if self.logit {
                    answers - all(&logits.scatter_value(1, ids, f64::NEG_INFINITY))
                } else {
                    (answers - all(&logits)).exp()
                }
            }
            (Reading::Any(_), None) => logits.narrow(1, 0, 1).full_like(f64::NAN),
        }
    }

    /// transformers' `RepetitionPenaltyLogitsProcessor`, in place.
    fn penalise(&self, logits: &Tensor, seen: &Tensor) {
        let mut flat = logits.view([-1]);
        let at = flat.index_select(0, seen);
        let penalised = (&at * self.penalty).where_self(&at.lt(0.0), &(&at / self.penalty));
        let _ = flat.index_copy_(0, seen, &penalised);
    }
}
