//! The `spatialscore` program. What it does stands in [`spatialscore::cli`].

use std::process::ExitCode;

use clap::Parser;
use spatialscore::cli::{Cli, USAGE};

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => cli.run(),
        Err(error) => {
            // Nothing can be done where even the message cannot be written.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
        }
    }
}
