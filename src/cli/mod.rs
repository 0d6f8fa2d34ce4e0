//! The command line: thin, for whatever it does stands in a module of its own.

mod admin;
mod bench;
mod connection;
mod explain;
mod inspect;
mod load;
mod replay;
mod score;
mod serve;
mod signals;

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use signals::hold as hold_signals;

/// What a process ends with when it was called wrongly: `EX_USAGE` of sysexits.h.
pub const USAGE: u8 = 64;

/// Rewards for text-to-image training: how well a picture keeps the spatial relations that its prompt states.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_long_help = "\
A first try, with the checkpoint that the program carries:
  spatialscore serve       # in one shell; in another:
  spatialscore score --prompt \"a panda is partly hidden by an umbrella\" samples/panda.*.png

That checkpoint knows drawings of 245 kinds of things and sentences about their places, and nothing of photographs.

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
    Explain(explain::Arguments),
    Inspect(inspect::Arguments),
    Bench(bench::Arguments),
    Load(load::Arguments),
    Replay(replay::Arguments),
    Admin(admin::Arguments),
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> ExitCode {
        signals::ignore_file_size();
        if !matches!(self.command, Command::Serve(_)) {
            signals::release();
        }
        match self.command {
            Command::Serve(arguments) => {
                restart_with_short_spins();
                serve::run(arguments)
            }
            Command::Score(arguments) => score::run(arguments),
            Command::Explain(arguments) => explain::run(arguments),
            Command::Load(arguments) => load::run(arguments),
            Command::Replay(arguments) => {
                restart_with_short_spins();
                replay::run(arguments)
            }
            Command::Admin(arguments) => admin::run(arguments),
            Command::Inspect(arguments) => inspect::run(arguments),
            Command::Bench(arguments) => {
                restart_with_short_spins();
                bench::run(arguments)
            }
        }
    }
}

/// Starts the process anew, as itself, with OpenMP's threads told to sleep soon where there is nothing to do.
///
/// By default they spin for milliseconds at the end of each operation. Where anything else wants the cores, if only
/// the threads that decode pictures, each operation then waits until the system takes the core from whoever spins:
/// with two threads on two busy cores a forward took 30 times as long. OpenMP reads this when libtorch is loaded,
/// before `main`. A setting of the user's own is left as it is.
fn restart_with_short_spins() {
    const SPINS: (&str, &str) = ("GOMP_SPINCOUNT", "10000");
    if [SPINS.0, "OMP_WAIT_POLICY"].iter().any(|name| env::var_os(name).is_some()) {
        return;
    }
    if let Ok(program) = env::current_exe() {
        // This comes back only where it failed, and then the process goes on as it is.
        let _ = signals::replace_process(program, SPINS);
    }
}

/// Says why a command ends, and how.
fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    // Nothing can be done where even this cannot be written.
    let _ = writeln!(io::stderr(), "error: {error}");
    ExitCode::from(code)
}
