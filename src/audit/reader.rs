//! Reads an audit log, the oldest of its files first.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::entry::Entry;
use super::rotating::aged;

/// What stands on a line.
#[derive(Debug)]
pub enum Read {
    /// An entry.
    Entry(Box<Entry>),
    /// A line that was never written to its end.
    Torn,
}

/// Why a line cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}:{line}: {reason}", path.display())]
pub struct Fault {
    path: PathBuf,
    line: usize,
    reason: String,
}

impl Fault {
    /// Something else that is wrong with the line.
    pub fn new((path, line): &Place, reason: impl ToString) -> Self {
        Self { path: path.clone(), line: *line, reason: reason.to_string() }
    }
}

/// A file and the number of a line in it.
pub type Place = (PathBuf, usize);

/// The lines of a log and of the files that came before it, each with its place.
///
/// # Errors
/// A file cannot be opened. All are opened at once, so that it may grow old meanwhile.
pub fn read(path: &Path) -> io::Result<impl Iterator<Item = (Place, Result<Read, Fault>)> + use<>> {
    let mut files = vec![(path.to_owned(), File::open(path)?)];
    for age in 1.. {
        let path = aged(path, age);
        match File::open(&path) {
            Ok(file) => files.push((path, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        }
    }
    Ok(files.into_iter().rev().flat_map(|(path, file)| {
        let mut lines = BufReader::new(file);
        let mut number = 0;
        std::iter::from_fn(move || {
            number += 1;
            let place = (path.clone(), number);
            let mut line = Vec::new();
            let read = lines.read_until(b'\n', &mut line);
            match read {
                Ok(0) => None,
                Ok(_) => {
                    let read = parse(&line).map_err(|reason| Fault::new(&place, reason));
                    Some((place, read))
                }
                Err(error) => {
                    let fault = Fault::new(&place, error);
                    Some((place, Err(fault)))
                }
            }
        })
    }))
}

fn parse(line: &[u8]) -> Result<Read, String> {
    let whole = line.strip_suffix(b"\n");
    match serde_json::from_slice(whole.unwrap_or(line)) {
        Ok(entry) => Ok(Read::Entry(entry)),
        Err(error) if error.is_eof() || whole.is_none() => Ok(Read::Torn),
        Err(error) => Err(format!("this is no line of an audit log: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_are_read_from_the_oldest_and_what_is_torn_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let line = |model: &str| format!("{{\"model\":\"{model}\",\"mean\":1}}\n");
        fs::write(aged(&path, 2), line("a") + "{\"model\":\"half of\n" + &line("b")).unwrap();
        fs::write(aged(&path, 1), line("c")).unwrap();
        fs::write(&path, line("d") + "{\"model\":\"e\"").unwrap();
        // The log that this one is not.
        fs::write(aged(&path, 4), line("z")).unwrap();
        let read_all = || -> Vec<String> {
            let told = |(_, read): (Place, Result<Read, Fault>)| match read {
                Ok(Read::Entry(entry)) => entry.model,
                Ok(Read::Torn) => "torn".into(),
                Err(fault) => fault.to_string(),
            };
            read(&path).unwrap().map(told).collect()
        };
        assert_eq!(read_all(), ["a", "torn", "b", "c", "d", "torn"]);
        fs::write(&path, "\n7\n".to_owned() + &line("d")).unwrap();
        let read = read_all();
        assert_eq!(read[4], "torn");
        assert!(read[5].starts_with(&format!("{}:2: this is no line of an audit log: ", path.display())));
        assert_eq!(read[6], "d");
        assert!(super::read(&folder.path().join("none")).is_err());
    }
}
