//! A manifest: many prompts and pictures in one file, read row by row.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A prompt and the path of its picture, and what belongs to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The caller's name for it.
    #[serde(default)]
    pub id: Option<String>,
    /// The prompt; may be empty where there are questions.
    #[serde(default)]
    pub prompt: String,
    /// The picture.
    pub image: PathBuf,
    /// The pictures that the model reads before it.
    #[serde(default)]
    pub references: Vec<PathBuf>,
    /// What is asked about it.
    #[serde(default)]
    pub questions: Vec<String>,
}

/// Rows in order. One that cannot be read says why, with its line; the rest follow.
pub type Rows = Box<dyn Iterator<Item = Result<Entry, String>> + Send>;

/// Opens a manifest; its name says whether it is CSV or JSON lines. Pictures are found from the manifest's folder.
///
/// # Errors
/// The file cannot be opened, or is of neither kind, or lacks a column.
pub fn open(path: &Path) -> io::Result<Rows> {
    let with_path = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(with_path)?;
    let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
    let rows = match path.extension().and_then(|extension| extension.to_str()) {
        Some("csv") => csv_rows(file).map_err(with_path)?,
        Some("jsonl") => json_rows(file),
        _ => return Err(with_path(io::Error::other("a manifest ends in .csv or .jsonl"))),
    };
    let from_folder = move |entry: Entry| Entry {
        image: folder.join(&entry.image),
        references: entry.references.iter().map(|path| folder.join(path)).collect(),
        ..entry
    };
    Ok(Box::new(rows.map(move |row| row.map(&from_folder))))
}

fn csv_rows(file: File) -> io::Result<Rows> {
    let mut reader = csv::Reader::from_reader(file);
    let columns: Vec<String> = reader.headers()?.iter().map(str::to_owned).collect();
    for needed in ["prompt", "image"] {
        if !columns.iter().any(|column| column == needed) {
            return Err(io::Error::other(format!(
                "has the columns {}; prompt and image are needed",
                columns.join(", ")
            )));
        }
    }
    Ok(Box::new(reader.into_deserialize().map(|row| row.map_err(|error| error.to_string()))))
}

fn json_rows(file: File) -> Rows {
    let lines = BufReader::new(file).lines().enumerate();
    let filled = lines.filter(|(_, line)| line.as_ref().map_or(true, |line| !line.trim().is_empty()));
    Box::new(filled.map(|(index, line)| {
        let error = |reason: String| format!("line {}: {reason}", index + 1);
        let line = line.map_err(|e| error(e.to_string()))?;
        serde_json::from_str(&line).map_err(|e| error(e.to_string()))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> io::Result<Vec<Result<Entry, String>>> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join(name), text)?;
        let rows = open(&folder.path().join(name))?.collect::<Vec<_>>();
        let relative = |e: Entry| Entry { image: e.image.strip_prefix(folder.path()).unwrap().into(), ..e };
        Ok(rows.into_iter().map(|row| row.map(relative)).collect())
    }

    fn entry(id: Option<&str>, prompt: &str) -> Entry {
        Entry { id: id.map(str::to_owned), prompt: prompt.into(), image: "a.png".into(), ..Entry::default() }
    }

    #[test]
    fn both_formats_give_the_same_rows() {
        let csv = "image,prompt,id\na.png,\"a cup, left\",x\na.png,b,\n";
        let json = "{\"prompt\":\"a cup, left\",\"image\":\"a.png\",\"id\":\"x\"}\n\n{\"prompt\":\"b\",\"image\":\"a.png\"}\n";
        let wanted = [Ok(entry(Some("x"), "a cup, left")), Ok(entry(None, "b"))];
        assert_eq!(read("m.csv", csv).unwrap(), wanted);
        assert_eq!(read("m.jsonl", json).unwrap(), wanted);
    }

    #[test]
    fn a_bad_row_names_its_line_and_the_rest_follow() {
        let rows = read("m.jsonl", "{\"prompt\":1}\n{\"prompt\":\"b\",\"image\":\"a.png\"}\n").unwrap();
        assert!(rows[0].as_ref().unwrap_err().starts_with("line 1: "), "{rows:?}");
        assert_eq!(rows[1], Ok(entry(None, "b")));
        let rows = read("m.csv", "prompt,image\nonly\nb,a.png\n").unwrap();
        assert!(rows[0].as_ref().unwrap_err().contains("line: 2"), "{rows:?}");
        assert_eq!(rows[1], Ok(entry(None, "b")));
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        assert!(read("m.txt", "").unwrap_err().to_string().contains(".csv or .jsonl"));
        assert!(
            read("m.csv", "prompt,picture\n")
                .unwrap_err()
                .to_string()
                .contains("prompt and image are needed")
        );
    }
}
