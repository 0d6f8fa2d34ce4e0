//! A file of whole lines that is bounded: once it is full it becomes `NAME.1`, that before it `NAME.2`, and the oldest goes.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The file and those before it.
#[derive(Debug)]
pub(super) struct Rotating {
    path: PathBuf,
    /// `None` where it was lost, and is to be opened again.
    file: Option<(File, u64)>,
    most_bytes: u64,
    most_files: usize,
}

/// The file of this age: the newest has none.
pub(super) fn aged(path: &Path, age: usize) -> PathBuf {
    if age == 0 {
        return path.to_owned();
    }
    let mut name = OsString::from(path);
    name.push(format!(".{age}"));
    name.into()
}

impl Rotating {
    /// Goes on with the file that is there, or begins one.
    pub fn open(path: &Path, most_bytes: u64, most_files: usize) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: Some(open(path)?), most_bytes, most_files })
    }

    /// Writes a line with its end, whole or not at all.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        let (mut file, mut length) = match self.file.take() {
            Some(open) => open,
            None => open(&self.path)?,
        };
        if length > 0 && length + line.len() as u64 > self.most_bytes {
            drop(file);
            self.age()?;
            (file, length) = open(&self.path)?;
        }
        let written = file.write_all(line);
        if written.is_ok() {
            length += line.len() as u64;
        }
        // What is half written goes; where not even that can be, it ends as a line of its own when the file is opened again.
        if written.is_ok() || file.set_len(length).is_ok() {
            self.file = Some((file, length));
        }
        written
    }

    /// Makes place for a new file.
    fn age(&self) -> io::Result<()> {
        if self.most_files == 1 {
            return fs::remove_file(&self.path);
        }
        for age in (0..self.most_files - 1).rev() {
            match fs::rename(aged(&self.path, age), aged(&self.path, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Opens a file to go on with it, and its length. Only its owner may read it, for what callers sent may stand in it.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is no regular file"));
    }
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| io::Error::other("another process writes it"))?;
    let mut length = file.metadata()?.len();
    let mut last = [0];
    if length > 0 && file.read_at(&mut last, length - 1)? == 1 && last != *b"\n" {
        // Whoever wrote it before died over a line.
        file.write_all(b"\n")?;
        length += 1;
    }
    Ok((file, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path, age: usize) -> Option<String> {
        fs::read_to_string(aged(path, age)).ok()
    }

    #[test]
    fn a_full_file_grows_old_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = Rotating::open(&path, 8, 3).unwrap();
        for line in ["a\n", "bb\n", "ccc\n", "a line that is longer than a file\n", "d\n", "e\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        let texts = [0, 1, 2, 3].map(|age| text(&path, age));
        let wanted = [Some("d\ne\n"), Some("a line that is longer than a file\n"), Some("ccc\n"), None];
        assert_eq!(texts, wanted.map(|text| text.map(str::to_owned)));
        // One who comes later goes on with it.
        drop(log);
        let mut log = Rotating::open(&path, 8, 1).unwrap();
        log.write_line(b"f\n").unwrap();
        log.write_line(b"gggg\n").unwrap();
        assert_eq!(text(&path, 0).as_deref(), Some("gggg\n"));
        assert!(text(&path, 1).is_some(), "it is not this one's");
    }

    #[test]
    fn who_died_over_a_line_leaves_it_alone_on_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "a\nhalf of").unwrap();
        Rotating::open(&path, 100, 1).unwrap().write_line(b"b\n").unwrap();
        assert_eq!(text(&path, 0).as_deref(), Some("a\nhalf of\nb\n"));
    }

    #[test]
    fn a_file_is_one_process_s() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let _log = Rotating::open(&path, 8, 3).unwrap();
        let error = Rotating::open(&path, 8, 3).unwrap_err();
        assert_eq!(error.to_string(), "another process writes it");
        assert_eq!(Rotating::open(folder.path(), 8, 3).unwrap_err().kind(), io::ErrorKind::IsADirectory);
        assert!(Rotating::open(Path::new("/dev/null"), 8, 3).is_err());
    }

    #[test]
    fn what_was_lost_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let path = inner.join("log");
        let mut log = Rotating::open(&path, 4, 2).unwrap();
        log.write_line(b"aaa\n").unwrap();
        fs::remove_dir_all(&inner).unwrap();
        // The next one is to begin a file, for which there is no folder.
        assert!(log.write_line(b"bbb\n").is_err());
        assert!(log.write_line(b"ccc\n").is_err());
        fs::create_dir(&inner).unwrap();
        log.write_line(b"ddd\n").unwrap();
        assert_eq!(text(&path, 0).as_deref(), Some("ddd\n"));
    }
}
