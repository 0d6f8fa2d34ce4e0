//! Files that settings name, which are small and lie on a disk.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The most bytes of such a file.
const MOST: u64 = 16 << 20;

/// The bytes of a regular file, or of one that links lead to. A device or a pipe is refused at once, whoever is at its
/// other end, and so is what is too large.
///
/// # Errors
/// It cannot be opened, or is no such file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is no regular file"));
    }
    let mut bytes = Vec::new();
    // One more, which shows that there are too many. Not by its length: there are files that have none and never end.
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::other(format!("has more than {MOST} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn only_regular_files_of_some_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let [file, pipe, large, link] =
            ["file", "pipe", "large", "link"].map(|name| folder.path().join(name));
        fs::write(&file, "text").unwrap();
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        File::create(&large).unwrap().set_len(1 << 40).unwrap();
        // As Kubernetes projects a volume: a link to a file in a folder that is a link too.
        symlink(folder.path(), folder.path().join("..data")).unwrap();
        symlink("..data/file", &link).unwrap();
        assert_eq!(read(&file).unwrap(), b"text");
        assert_eq!(read(&link).unwrap(), b"text");
        let fault = |path: &Path| read(path).unwrap_err().to_string();
        assert_eq!(fault(Path::new("/dev/zero")), "is no regular file");
        assert_eq!(fault(&pipe), "is no regular file");
        assert_eq!(fault(folder.path()), "is no regular file");
        assert_eq!(fault(&large), "has more than 16777216 bytes");
        assert!(fault(&folder.path().join("none")).starts_with("No such file"));
    }
}
