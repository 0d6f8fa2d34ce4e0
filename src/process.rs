//! What the process asks of the system: to open enough files, and to take back memory that is free.

use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::ServerSettings;

/// Descriptors that are no connections': the log, libraries, checkpoints that load, devices, scrapers, and connections that
/// give way and have not ended.
const OTHERS: u64 = 256;
/// How often free memory is given back.
const GIVEN_BACK: Duration = Duration::from_secs(10);

/// Lets the process open as many files as the system lets it at all, and has `server` take no more connections than that.
///
/// # Errors
/// There are too few for anything.
pub fn fit_descriptors(server: &mut ServerSettings) -> Result<(), String> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let limit = if raised.is_ok() { maximum } else { current };
    // Without a limit there is none to keep.
    let Some(limit) = limit else { return Ok(()) };
    let most = usize::try_from(limit.saturating_sub(OTHERS.min(limit / 2))).unwrap_or(usize::MAX);
    let asked = server.max_connections;
    if most < 8 {
        return Err(format!(
            "server.max_connections = {asked}: the process may open {limit} files (ulimit -n), too few for any; \
             allow {} or more",
            asked as u64 + OTHERS
        ));
    }
    if asked > most {
        tracing::warn!(
            asked,
            taken = most,
            limit,
            needed = asked as u64 + OTHERS,
            "server.max_connections is lowered: the process may not open so many files (ulimit -n)"
        );
        server.max_connections = most;
    }
    Ok(())
}

/// Gives free memory back to the system from time to time: glibc keeps what many small pieces have left, gigabytes after a
/// storm.
///
/// # Errors
/// The system gave no thread.
pub fn give_memory_back() -> io::Result<()> {
    std::thread::Builder::new().name("memory".to_owned()).spawn(|| {
        loop {
            std::thread::sleep(GIVEN_BACK);
            trim();
        }
    })?;
    Ok(())
}

/// Gives free memory back to the system now.
#[allow(unsafe_code)]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn trim() {
    // SAFETY: it may be called from any thread at any time, and touches nothing that is in use.
    unsafe { libc::malloc_trim(0) };
}

/// Gives free memory back to the system now, where that can be asked.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim() {}
