//! What a log says and what is scored now, side by side.

use std::io::{self, Write};

use serde::Serialize;

use crate::audit::{Entry, Part};
use crate::edge::proto;
use crate::statistics::rank_correlation;

/// How many of the worst are listed.
const WORST: usize = 10;

/// One model's lines, and what is made of them now.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// What judged them then, and now.
    pub judges: [String; 2],
    pairs: Vec<(f32, f32)>,
    /// The difference of each, and its place.
    differences: Vec<(f32, String)>,
    /// Those that cannot be scored now, and why.
    pub failed: Vec<(String, String)>,
}

/// What is said of a model.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    model: &'a str,
    was: &'a str,
    now: &'a str,
    compared: usize,
    failed: usize,
    /// Those over the tolerance.
    over: usize,
    largest_difference: f32,
    mean_difference: f64,
    /// How much higher the means are now.
    mean_shift: f64,
    rank_correlation: Option<f64>,
    worst: Vec<Worst<'a>>,
    errors: Vec<Worst<'a>>,
}

#[derive(Debug, Serialize)]
struct Worst<'a> {
    line: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    was: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    now: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

/// The greatest difference of any number that both have: of the mean, the standard deviation, a component of the same name.
fn difference(was: &Entry, now: &proto::Score) -> f32 {
    let apart = |was: Option<f32>, now: Option<f32>| was.zip(now).map_or(0.0, |(was, now)| (was - now).abs());
    let part = |was: &Part| {
        let now = now.components.iter().find(|now| now.name == was.name);
        now.map_or(0.0, |now| apart(Some(was.mean), Some(now.mean)).max(apart(was.stddev, now.stddev)))
    };
    let parts = was.components.iter().map(part);
    let whole = [apart(was.mean, Some(now.mean)), apart(was.stddev, now.stddev)];
    parts.chain(whole).fold(0.0, f32::max)
}

impl Comparison {
    /// One more line, and its score now.
    pub fn add(&mut self, place: String, was: &Entry, now: &proto::Score) {
        self.pairs.push((was.mean.unwrap_or(f32::NAN), now.mean));
        self.differences.push((difference(was, now), place));
    }

    /// What there is to say.
    pub fn summary<'a>(&'a self, model: &'a str, tolerance: f32) -> Summary<'a> {
        let [was, now] = &self.judges;
        let count = self.pairs.len().max(1) as f64;
        let differences = || self.differences.iter().map(|(difference, _)| *difference);
        let mut order: Vec<usize> = (0..self.pairs.len()).filter(|&n| self.differences[n].0 > 0.0).collect();
        order.sort_by(|&a, &b| self.differences[b].0.total_cmp(&self.differences[a].0));
        let worst = |&n: &usize| {
            let ((was, now), (difference, line)) = (self.pairs[n], &self.differences[n]);
            Worst { line, was: Some(was), now: Some(now), difference: Some(*difference), error: None }
        };
        let error = |(line, error): &'a (String, String)| Worst {
            line,
            was: None,
            now: None,
            difference: None,
            error: Some(error),
        };
        Summary {
            model,
            was,
            now,
            compared: self.pairs.len(),
            failed: self.failed.len(),
            over: differences().filter(|&difference| difference > tolerance).count(),
            largest_difference: differences().fold(0.0, f32::max),
            mean_difference: differences().map(f64::from).sum::<f64>() / count,
            mean_shift: self.pairs.iter().map(|&(was, now)| f64::from(now) - f64::from(was)).sum::<f64>()
                / count,
            rank_correlation: rank_correlation(&self.pairs),
            worst: order.iter().take(WORST).map(worst).collect(),
            errors: self.failed.iter().take(WORST).map(error).collect(),
        }
    }
}

impl Summary<'_> {
    /// Whether all is as it was.
    pub fn is_same(&self) -> bool {
        self.over == 0 && self.failed == 0
    }

    /// Says it to people.
    pub fn write(&self, out: &mut impl Write, tolerance: f32) -> io::Result<()> {
        let rank = self.rank_correlation.map_or("- (the scores do not differ)".into(), |r| format!("{r:.6}"));
        writeln!(out, "MODEL         {}", self.model)?;
        writeln!(out, "  was         {}", self.was)?;
        writeln!(out, "  now         {}", self.now)?;
        writeln!(out, "COMPARED      {}", self.compared)?;
        writeln!(
            out,
            "DIFFERENCE    largest {}, mean {:.3e}; {} over {tolerance}",
            self.largest_difference, self.mean_difference, self.over
        )?;
        writeln!(out, "SHIFT         {:+.3e}", self.mean_shift)?;
        writeln!(out, "RANK          {rank}")?;
        if !self.worst.is_empty() {
            writeln!(out, "WORST         {:>12}  {:>12}  {:>12}  LINE", "WAS", "NOW", "DIFFERENCE")?;
        }
        for Worst { line, was, now, difference, .. } in &self.worst {
            let number =
                |number: &Option<f32>| number.map_or("-".to_owned(), |number| format!("{number:.6}"));
            let [was, now, difference] = [was, now, difference].map(number);
            writeln!(out, "{:14}{was:>12}  {now:>12}  {difference:>12}  {line}", "")?;
        }
        if self.failed > 0 {
            writeln!(out, "WITHOUT SCORE {}", self.failed)?;
        }
        for Worst { line, error, .. } in &self.errors {
            writeln!(out, "{:14}{line}: {}", "", error.unwrap_or_default())?;
        }
        Ok(())
    }
}
