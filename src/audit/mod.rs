//! The audit log: what judged which item, and how, one JSON object a line.
//!
//! Whoever records never waits: a thread of its own writes, behind a bounded room, and what finds none or cannot be written is
//! counted, and said in the log at growing intervals.

mod entry;
mod lines;
mod reader;
mod rotating;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use metrics::counter;

pub use entry::{Entry, Image, Part, Question};
pub use reader::{Fault, Place, Read, read};

use crate::byte_room::{ByteRoom, Held};
use crate::config::AuditSettings;
use crate::error::ScoreError;
use crate::telemetry::AUDIT_LINES;
use lines::Complaints;
use rotating::Rotating;

/// The most lines that wait for the disk.
const MOST_LINES: usize = 1 << 14;
/// The most bytes of pictures that wait for their scores or for the disk.
const MOST_PICTURES: usize = 256 << 20;

/// Names the code of an error, as callers hear it.
pub type CodeName = fn(&ScoreError) -> &'static str;

/// Where lines are handed in.
#[derive(Clone)]
pub struct Audit {
    shared: Arc<Shared>,
    /// Whether prompts and questions are recorded.
    pub prompts: bool,
    /// Whether pictures are recorded.
    pub pictures: bool,
    /// Room for pictures until they are written.
    pub room: Arc<ByteRoom>,
    /// How errors are named.
    pub code: CodeName,
}

/// Who waits for the lines to be written, at the end.
pub struct Writer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Wakes who waits for lines, or for the end.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Line>,
    complaints: Complaints,
    /// Nothing more comes.
    closed: bool,
    /// All that came is written.
    ended: bool,
}

/// A line to be, and the room of its pictures.
struct Line {
    entry: Entry,
    _held: Option<Arc<Held>>,
}

impl Audit {
    /// Opens the log and starts the thread that writes it.
    ///
    /// # Errors
    /// The file cannot be written, or another process writes it; or there is no thread.
    pub fn open(settings: &AuditSettings, code: CodeName) -> io::Result<(Self, Writer)> {
        let file = Rotating::open(&settings.path, settings.max_file_bytes, settings.max_files)?;
        let shared = Arc::new(Shared::default());
        let writes = Arc::clone(&shared);
        thread::Builder::new().name("audit".into()).spawn(move || writes.write_all(file))?;
        let (prompts, pictures) = (settings.prompts, settings.pictures);
        let room = ByteRoom::new(MOST_PICTURES);
        Ok((Self { shared: Arc::clone(&shared), prompts, pictures, room, code }, Writer(shared)))
    }

    /// Hands in a line, with the room that its pictures hold until it is written.
    pub fn record(&self, entry: Entry, held: Option<Arc<Held>>) {
        let mut state = self.shared.lock();
        if state.closed || state.waiting.len() >= MOST_LINES {
            drop(state);
            return self.lose(1);
        }
        state.waiting.push_back(Line { entry, _held: held });
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Says that so many lines are lost, since there was no room for them.
    pub fn lose(&self, lines: u64) {
        counter!(AUDIT_LINES, "outcome" => "dropped").increment(lines);
        self.shared.complain(lines, &"the disk is too slow: there is no room for more lines");
    }
}

impl Writer {
    /// What is wrong with the settings of a log, if it cannot be written.
    pub fn fault(settings: &AuditSettings) -> Option<io::Error> {
        Rotating::open(&settings.path, settings.max_file_bytes, settings.max_files).err()
    }

    /// Waits until all that was handed in is written, at most so long.
    pub fn end(self, limit: Duration) {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.changed.notify_all();
        let waited = self.0.changed.wait_timeout_while(state, limit, |state| !state.ended);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            tracing::warn!(lines = state.waiting.len(), "the audit log could not be written to its end");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All lines that wait; none once there will be no more.
    fn next(&self) -> Option<VecDeque<Line>> {
        let waits = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let state = self.changed.wait_while(self.lock(), waits);
        let lines = std::mem::take(&mut state.unwrap_or_else(PoisonError::into_inner).waiting);
        (!lines.is_empty()).then_some(lines)
    }

    /// Writes what is handed in, until the end.
    fn write_all(&self, mut file: Rotating) {
        let mut text = Vec::new();
        while let Some(lines) = self.next() {
            for Line { entry, _held } in lines {
                text.clear();
                let written =
                    serde_json::to_writer(&mut text, &entry).map_err(io::Error::from).and_then(|()| {
                        text.push(b'\n');
                        file.write_line(&text)
                    });
                let outcome = if written.is_ok() { "written" } else { "failed" };
                counter!(AUDIT_LINES, "outcome" => outcome).increment(1);
                if let Err(error) = written {
                    self.complain(1, &error);
                }
            }
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Says that lines are lost, unless that was said a moment ago.
    fn complain(&self, lines: u64, why: &dyn std::fmt::Display) {
        let said = self.lock().complaints.add(lines, Instant::now());
        if let Some((lost, next)) = said {
            tracing::error!(lost, reason = %why, silent_for = ?next, "lines of the audit log are lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_records_never_waits_and_what_finds_no_room_is_lost() {
        let shared = Arc::new(Shared::default());
        let (prompts, pictures, code): (_, _, CodeName) = (false, false, |_| "");
        let audit = Audit { shared: Arc::clone(&shared), prompts, pictures, room: ByteRoom::new(0), code };
        // Nobody writes.
        for _ in 0..MOST_LINES + 3 {
            audit.record(Entry::default(), None);
        }
        assert_eq!(shared.lock().waiting.len(), MOST_LINES);
        let start = Instant::now();
        Writer(Arc::clone(&shared)).end(Duration::from_millis(50));
        assert!(start.elapsed() < Duration::from_secs(20));
        assert_eq!(shared.next().unwrap().len(), MOST_LINES);
        audit.record(Entry::default(), None);
        assert!(shared.next().is_none(), "it came after the end");
    }
}
