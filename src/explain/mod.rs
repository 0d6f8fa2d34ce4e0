//! Why a score is what it is: what is scored again, with what changed. Pure functions; who asks does the scoring.
//!
//! Each number is exact by definition, the score of another picture or of another prompt. What it says of the model is
//! only that: what a change costs, and not why.

mod cells;
mod clauses;

use crate::processor::Rgb;

pub use cells::{Cell, Grid, heat_map};
pub use clauses::{Clause, Turned, clauses, turned};

/// The most prompts of each sort that are scored again.
const MOST_PROMPTS: usize = 32;

/// One thing that is scored.
#[derive(Debug, Clone, PartialEq)]
pub enum Probe {
    /// The picture under the prompt.
    Whole,
    /// The picture, left and right changed over.
    Mirrored,
    /// A clause of the prompt left out.
    Dropped(Clause),
    /// A relation of the prompt turned round.
    Turned(Turned),
    /// A cell of the picture, and those in reach of it, covered with its mean colour.
    Covered(Cell),
}

/// What is scored to explain a picture's score under a prompt, in order.
#[derive(Debug)]
pub struct Plan {
    picture: Rgb,
    prompt: String,
    colour: [u8; 3],
    /// How the picture is divided; without rows where it is not.
    pub grid: Grid,
    /// All of it; the first is [`Probe::Whole`].
    pub probes: Vec<Probe>,
}

impl Plan {
    /// A plan with at most so many cells, as near to squares as they come.
    pub fn new(picture: Rgb, prompt: String, cells: usize) -> Self {
        let grid = Grid::of(&picture, cells);
        let probes = [Probe::Whole, Probe::Mirrored]
            .into_iter()
            .chain(clauses(&prompt).into_iter().take(MOST_PROMPTS).map(Probe::Dropped))
            .chain(turned(&prompt).into_iter().take(MOST_PROMPTS).map(Probe::Turned))
            .chain(grid.cells().map(Probe::Covered))
            .collect();
        Self { colour: cells::mean_colour(&picture), picture, prompt, grid, probes }
    }

    /// The picture and the prompt of a probe.
    pub fn item<'a>(&'a self, probe: &'a Probe) -> (Rgb, &'a str) {
        let picture = match probe {
            Probe::Whole | Probe::Dropped(_) | Probe::Turned(_) => self.picture.clone(),
            Probe::Mirrored => cells::mirrored(&self.picture),
            Probe::Covered(cell) => cells::covered(&self.picture, self.grid, *cell, self.colour),
        };
        let prompt = match probe {
            Probe::Dropped(clause) => &clause.without,
            Probe::Turned(turned) => &turned.prompt,
            Probe::Whole | Probe::Mirrored | Probe::Covered(_) => &self.prompt,
        };
        (picture, prompt)
    }

    /// The picture.
    pub fn picture(&self) -> &Rgb {
        &self.picture
    }

    /// The bytes of the picture.
    pub fn bytes(&self) -> usize {
        self.picture.pixels.len()
    }
}
