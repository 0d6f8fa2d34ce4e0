//! What a model must show before callers may ask it: that it scores, and that its scores tell pictures and prompts
//! apart.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::engine::LoadError;
use crate::error::ScoreError;
use crate::model::{ModelError, Sample, Score, Scorer, SelfTested};
use crate::processor::{Picture, Processor};

/// Two that have nothing to do with each other, and two that keep whatever limits can be kept.
const PROMPTS: [[&str; 2]; 2] =
    [["a red ball to the left of a blue box", "two dogs run through deep snow"], ["a", "b"]];
/// The side of a picture in pixels.
const SIDE: u32 = 64;

/// Items of our own.
#[derive(Clone)]
pub struct SelfTest {
    /// About the cheapest item that there can be, so that it keeps whatever limits can be kept.
    pub cheapest: Sample,
    /// Two pictures under two prompts, if the limits let them through.
    crossed: Option<[Sample; 4]>,
}

impl SelfTest {
    /// Prepares the items.
    ///
    /// # Errors
    /// Not even the cheapest item keeps the limits.
    pub fn new(processor: &Processor) -> Result<Self, ScoreError> {
        let item = |prompt: &str, side, rgb8: &[u8]| {
            let picture = Picture::Raw { width: side, height: side, rgb8: rgb8.to_vec().into() };
            processor.prepare(processor.admit_all(prompt, vec![picture; processor.pictures()])?)
        };
        let [halves, board] = pictures();
        let crossed = |[one, other]: [&str; 2]| {
            Ok::<_, ScoreError>([
                item(one, SIDE, &halves)?,
                item(one, SIDE, &board)?,
                item(other, SIDE, &halves)?,
                item(other, SIDE, &board)?,
            ])
        };
        Ok(Self {
            cheapest: item("a", 1, &[128; 3])?,
            crossed: PROMPTS.into_iter().find_map(|prompts| crossed(prompts).ok()),
        })
    }

    /// Whether a model passes, what callers must know of it, and what it scored: the same items together each time, so that
    /// the same model gives the same bits.
    ///
    /// # Errors
    /// It cannot score, or gives no finite number.
    pub fn run(&self, scorer: &mut impl Scorer) -> Result<SelfTested, LoadError> {
        let tested = self.score(scorer).map_err(|error| LoadError::Probe(error.to_string()))?;
        if tested.scores.is_empty() {
            return Err(LoadError::Probe("it gave no score".into()));
        }
        match tested.scores.iter().find(|score| !score.is_finite()) {
            Some(score) => Err(LoadError::Probe(format!("its score is not finite: {score}"))),
            None => Ok(tested),
        }
    }

    /// What a model scores now, whatever that is.
    ///
    /// # Errors
    /// Its forward fails.
    pub fn score(&self, scorer: &mut impl Scorer) -> Result<SelfTested, ModelError> {
        let mut scores = scorer.score(&[&self.cheapest])?;
        let Some(samples) = &self.crossed else { return Ok(SelfTested { remark: None, scores }) };
        let crossed = scorer.self_test(samples)?;
        scores.extend(crossed.scores);
        Ok(SelfTested { remark: crossed.remark, scores })
    }
}

/// What a model's self-test scored on each of its devices, when it first ran there.
#[derive(Debug, Default)]
pub(super) struct Proofs(Mutex<BTreeMap<String, Vec<Score>>>);

impl Proofs {
    /// Holds scores against the first ones of a device: no number is further off than `tolerance`, 0 being not a bit, or the
    /// model is not what it was.
    pub fn hold(&self, device: &str, scores: Vec<Score>, tolerance: f32) -> Result<(), LoadError> {
        let mut proofs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = proofs.entry(device.to_owned()).or_insert_with(|| scores.clone());
        let mut pairs = first.iter().zip(&scores);
        let changed = pairs.find(|(first, now)| !are_same(first, now, tolerance));
        match changed {
            None if first.len() == scores.len() => Ok(()),
            None => Err(LoadError::Changed(format!(
                "the self-test gives {} scores on {device}, and gave {}",
                scores.len(),
                first.len()
            ))),
            Some((first, now)) => Err(LoadError::Changed(format!(
                "an item of the self-test has the score {now} on {device}, and had {first}"
            ))),
        }
    }
}

/// Whether two scores are one, in all their numbers. What is no number is none of them.
fn are_same(first: &Score, now: &Score, tolerance: f32) -> bool {
    let number = |first: f32, now: f32| (first - now).abs() <= tolerance;
    let part = |(mean, stddev): (f32, Option<f32>), (now, now_stddev): (f32, Option<f32>)| {
        let stddev = match (stddev, now_stddev) {
            (Some(first), Some(now)) => number(first, now),
            (first, now) => first.is_none() && now.is_none(),
        };
        number(mean, now) && stddev
    };
    let mut parts = first.components.iter().zip(&now.components);
    part((first.mean, first.stddev), (now.mean, now.stddev))
        && first.components.len() == now.components.len()
        && parts.all(|(first, now)| part((first.mean, first.stddev), (now.mean, now.stddev)))
}

/// Two squares in two colours: a half each, and in a chequered pattern.
fn pictures() -> [Vec<u8>; 2] {
    let draw = |first: fn(u32, u32) -> bool| {
        let color = |n| if first(n % SIDE, n / SIDE) { [200, 40, 30] } else { [30, 60, 220] };
        (0..SIDE * SIDE).flat_map(color).collect()
    };
    [draw(|x, _| x < SIDE / 2), draw(|x, y| (x / 8 + y / 8) % 2 == 0)]
}
