//! Files that are read again when they change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};

use super::FileFault;
use crate::files;
use crate::telemetry::RELOAD_FAILURES;

/// How often the files are looked at. They are small, and by content a change is seen on every file system, whether
/// the file was written over, replaced, or a link to it moved.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What some files last said that made sense.
pub type Followed<T> = watch::Receiver<Arc<T>>;

type Contents = Result<Vec<Vec<u8>>, FileFault>;

/// The contents of the files, in their order.
///
/// # Errors
/// The first that cannot be read.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, FileFault> {
    let read = |path: &PathBuf| files::read(path).map_err(|error| FileFault::new(path, error));
    paths.iter().map(read).collect()
}

/// Reads files and follows their changes until nobody holds the receiver any more. A change that cannot be used
/// leaves what was there, and is told as an error of the log and in the metrics, under the name `what`.
///
/// # Errors
/// The files cannot be used now.
pub fn follow<T: Send + Sync + 'static>(
    what: &'static str,
    paths: Vec<PathBuf>,
    parse: impl Fn(&[Vec<u8>]) -> Result<T, FileFault> + Send + 'static,
) -> Result<Followed<T>, FileFault> {
    let paths = Arc::<[PathBuf]>::from(paths);
    let contents = read(&paths);
    let mut known = digest(&contents);
    let (sender, followed) = watch::channel(Arc::new(parse(&contents?)?));
    tokio::spawn(async move {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = known;
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = sender.closed() => return,
            }
            let reading = spawn_blocking({
                let paths = Arc::clone(&paths);
                move || read(&paths)
            });
            // There is no other end than the runtime's.
            let Ok(contents) = reading.await else { return };
            let now = digest(&contents);
            // Twice the same: not in the middle of being written.
            let settled = std::mem::replace(&mut seen, now) == now;
            if !settled || now == known {
                continue;
            }
            known = now;
            match contents.and_then(|contents| parse(&contents)) {
                Ok(value) => {
                    sender.send_replace(Arc::new(value));
                    tracing::info!(what, files = ?names(&paths), "read again after a change");
                }
                Err(error) => {
                    counter!(RELOAD_FAILURES, "what" => what).increment(1);
                    tracing::error!(what, %error, "a change cannot be used: what was read before stays in force");
                }
            }
        }
    });
    Ok(followed)
}

/// One for each state that the files can be in, unreadable ones included.
fn digest(contents: &Contents) -> [u8; 32] {
    let mut digest = Sha256::new();
    match contents {
        Ok(files) => {
            for file in files {
                digest.update((file.len() as u64).to_le_bytes());
                digest.update(file);
            }
        }
        Err(fault) => digest.update(fault.to_string()),
    }
    digest.finalize().into()
}

fn names(paths: &[PathBuf]) -> Vec<std::path::Display<'_>> {
    paths.iter().map(PathBuf::as_path).map(Path::display).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    /// A pipe would hang whoever opens it, and zeros would fill the memory of whoever reads them.
    #[tokio::test]
    async fn a_file_that_becomes_something_else_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, "a").unwrap();
        let mut followed = follow("test", vec![path.clone()], |read| Ok(read.concat())).unwrap();
        let turned_into = async |make: &dyn Fn()| {
            std::fs::remove_file(&path).unwrap();
            make();
            tokio::time::sleep(3 * LOOK_EVERY).await;
        };
        turned_into(&|| assert!(Command::new("mkfifo").arg(&path).status().unwrap().success())).await;
        turned_into(&|| symlink("/dev/zero", &path).unwrap()).await;
        assert!(!followed.has_changed().unwrap());
        turned_into(&|| std::fs::write(&path, "b").unwrap()).await;
        assert_eq!(**followed.borrow_and_update(), b"b");
    }
}
