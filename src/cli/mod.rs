//! The command line: thin, for whatever it does stands in a module of its own.

mod bench;
mod inspect;
mod manifest;
mod report;
mod score;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What a process ends with when it was called wrongly: `EX_USAGE` of sysexits.h.
pub const USAGE: u8 = 64;

/// Rewards for text-to-image training: how well a picture keeps the spatial relations that its prompt states.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_long_help = "\
A first try, with the checkpoint that the program carries:
  spatialscore serve                                  # in one shell
  spatialscore score --prompt \"a cup left of a plate\" cup.png    # in another

`spatialscore COMMAND --help` is a page on each command."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
// There is one of it in a process: its size costs nothing.
#[allow(clippy::large_enum_variant)]
enum Command {
    Serve(serve::Arguments),
    Score(score::Arguments),
    Inspect(inspect::Arguments),
    Bench(bench::Arguments),
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> ExitCode {
        match self.command {
            Command::Serve(arguments) => serve::run(arguments),
            Command::Score(arguments) => score::run(arguments),
            Command::Inspect(arguments) => inspect::run(arguments),
            Command::Bench(arguments) => bench::run(arguments),
        }
    }
}

/// Says why a command ends, and how.
fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(code)
}
