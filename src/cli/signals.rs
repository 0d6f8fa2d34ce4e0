//! The signals that end a server, from the first moment of its process to the last.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::ffi::CString;
use std::future::{Future, pending};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, ptr};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

/// Signals that come so soon after the first one are the same word once more: `timeout` sends its own to the process and
/// to its group.
const SAME_WORD: Duration = Duration::from_secs(1);

/// The signals that tell to stop.
const STOPS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Has the signals that tell to stop wait. The system drops what the first process of a container has no handler for,
/// unless it waits. This may run before anything else in a process.
pub extern "C" fn hold() {
    mask(libc::SIG_BLOCK);
}

/// Lets them come, those too that have waited.
pub fn release() {
    mask(libc::SIG_UNBLOCK);
}

fn mask(how: i32) {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the set is made before it is used, and the old mask is not asked for.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in STOPS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(how, set.as_ptr(), ptr::null_mut());
    }
}

/// Makes a write beyond the size that files may have an error like any other.
pub fn ignore_file_size() {
    // SAFETY: no handler is set, and nobody else sets this signal's.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Starts a program in place of this one, with one more variable in its environment, and with what is held still held:
/// the standard library's own way lets it go. Comes back only where that failed.
pub fn replace_process(program: PathBuf, variable: (&str, &str)) -> Option<Infallible> {
    let text = |bytes: Vec<u8>| CString::new(bytes).ok();
    let program = text(program.into_os_string().into_vec())?;
    let arguments: Vec<CString> =
        env::args_os().map(|argument| text(argument.into_vec())).collect::<Option<_>>()?;
    let own = (variable.0.into(), variable.1.into());
    let environment: Vec<CString> = env::vars_os()
        .chain([own])
        .map(|(name, value)| text([name.into_vec(), value.into_vec()].join(&b'=')))
        .collect::<Option<_>>()?;
    let pointers =
        |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
    let (arguments, environment) = (pointers(&arguments), pointers(&environment));
    // SAFETY: all are texts that end with a zero, in lists that end with a null, and outlive the call.
    unsafe {
        libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    None
}

/// Ends the process at once. What libtorch does at an orderly end must not be done under a forward that runs.
pub fn leave(code: u8) -> ! {
    let _ = io::stdout().flush();
    // SAFETY: it does not come back, and asks for nothing.
    unsafe { libc::_exit(code.into()) }
}

/// Whether whoever started the process has it live on when its terminal goes, as `nohup` does.
fn outlives_its_terminal() -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set; what is there now is written to `action`, which is whole in any case.
    unsafe {
        libc::sigaction(libc::SIGHUP, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// What tells to stop.
struct Signals(Vec<Signal>);

impl Signals {
    fn new(hangup: bool) -> io::Result<Self> {
        let mut kinds = vec![SignalKind::terminate(), SignalKind::interrupt()];
        kinds.extend(hangup.then(SignalKind::hangup));
        kinds.into_iter().map(signal).collect::<io::Result<_>>().map(Self)
    }

    async fn next(&mut self) {
        let each = self.0.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures::future::select_all(each).await;
    }
}

/// Ends at the first signal that tells to stop. What it gives ends at another one, which tells to stop at once.
#[expect(
    clippy::async_yields_async,
    reason = "whoever heard the first signal waits for another beside its work"
)]
pub fn stops() -> io::Result<impl Future<Output = impl Future<Output = ()>>> {
    let hangup = !outlives_its_terminal();
    let mut signals = Signals::new(hangup)?;
    release();
    Ok(async move {
        signals.next().await;
        another(hangup)
    })
}

/// Ends at a signal that is not of the same word as the first.
async fn another(hangup: bool) {
    sleep(SAME_WORD).await;
    // New ones know nothing of what came meanwhile.
    match Signals::new(hangup) {
        Ok(mut signals) => signals.next().await,
        Err(_) => pending().await,
    }
}
