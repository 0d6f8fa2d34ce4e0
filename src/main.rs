//! The `spatialscore` program. What it does stands in [`spatialscore::cli`].

use std::process::ExitCode;

use clap::Parser;
use spatialscore::cli::{Cli, USAGE, hold_signals};

/// Runs first in the process, before libtorch is made ready, which takes a good part of a second: a signal that comes
/// meanwhile waits.
#[used]
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
// SAFETY: the loader calls what stands here once the program and its libraries are in place. It calls into the system and
// touches nothing that is made ready later.
#[unsafe(link_section = ".preinit_array")]
static HOLD_SIGNALS: extern "C" fn() = hold_signals;

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
