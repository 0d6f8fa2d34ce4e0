//! What a model must show before callers may ask it: that it scores, and that its scores tell pictures and prompts
//! apart.

use crate::engine::LoadError;
use crate::error::ScoreError;
use crate::model::{Sample, Scorer};
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

    /// Whether a model passes, and what callers must know of it.
    ///
    /// # Errors
    /// It cannot score, or gives no finite number.
    pub fn run(&self, scorer: &mut impl Scorer) -> Result<Option<String>, LoadError> {
        let refuse = |error: String| LoadError::Probe(error);
        let scores = scorer.score(&[&self.cheapest]).map_err(|e| refuse(e.to_string()))?;
        match scores.first() {
            None => return Err(refuse("it gave no score".into())),
            Some(score) if !score.is_finite() => {
                return Err(refuse(format!("its score is not finite: {score}")));
            }
            Some(_) => {}
        }
        match &self.crossed {
            Some(samples) => scorer.self_test(samples).map_err(|e| refuse(e.to_string())),
            None => Ok(None),
        }
    }
}

/// Two squares in two colours: a half each, and in a chequered pattern.
fn pictures() -> [Vec<u8>; 2] {
    let draw = |first: fn(u32, u32) -> bool| {
        let color = |n| if first(n % SIDE, n / SIDE) { [200, 40, 30] } else { [30, 60, 220] };
        (0..SIDE * SIDE).flat_map(color).collect()
    };
    [draw(|x, _| x < SIDE / 2), draw(|x, y| (x / 8 + y / 8) % 2 == 0)]
}
