//! How `score` writes its results: a table, JSON lines, or CSV, row by row.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::audit::Part;
use crate::edge::proto;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON object a line.
    Json,
    /// Comma-separated, with a header.
    Csv,
}

impl From<proto::Component> for Part {
    fn from(proto::Component { name, mean, stddev }: proto::Component) -> Self {
        Self { name, mean, stddev }
    }
}

/// One result.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// The caller's name for the item.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The picture.
    pub image: String,
    /// The prompt.
    pub prompt: String,
    /// The model that was asked by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<f32>,
    /// Its standard deviation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stddev: Option<f32>,
    /// What the score is made of, where it is made of several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<Part>,
    /// Why there is no score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Writes rows in a format.
#[derive(Debug)]
pub struct Report<W> {
    format: Format,
    out: W,
    /// Whether several models were asked.
    several: bool,
    /// For each model the prompt of the row before, and the mean of the first picture that had it: the table tells the
    /// distance.
    first: BTreeMap<Option<String>, (String, f32)>,
}

/// The most characters of a prompt in the table.
const PROMPT_WIDTH: usize = 60;

impl<W: Write> Report<W> {
    /// Begins a report of what these models give: what comes before the first row.
    pub fn begin(format: Format, mut out: W, models: &[proto::GetModelResponse]) -> io::Result<Self> {
        let several = models.len() > 1;
        match format {
            Format::Table => {
                for model in models {
                    if !model.notice.is_empty() {
                        writeln!(out, "NOTE: {}", model.notice)?;
                    }
                    let devices = model.devices.join(", ");
                    writeln!(out, "{} ({}) on {devices} in {}", model.name, model.revision, model.dtype)?;
                }
                writeln!(out)?;
                writeln!(
                    out,
                    "{:>9}  {:>8}  {:>9}  {:<width$}  IMAGE{}",
                    "MEAN",
                    "STDDEV",
                    "TO FIRST",
                    "PROMPT",
                    if several { "  MODEL" } else { "" },
                    width = PROMPT_WIDTH
                )?;
            }
            Format::Json => {}
            Format::Csv if several => writeln!(out, "id,image,prompt,model,mean,stddev,error")?,
            Format::Csv => writeln!(out, "id,image,prompt,mean,stddev,error")?,
        }
        Ok(Self { format, out, several, first: BTreeMap::new() })
    }

    /// Writes one result.
    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        match self.format {
            Format::Table => self.table_row(row)?,
            Format::Json => {
                serde_json::to_writer(&mut self.out, row)?;
                writeln!(self.out)?;
            }
            Format::Csv => {
                let number = |value: Option<f32>| value.map(|v| v.to_string()).unwrap_or_default();
                let id = row.id.as_deref().unwrap_or_default();
                let error = row.error.as_deref().unwrap_or_default();
                let (mean, stddev) = (number(row.mean), number(row.stddev));
                let mut writer = csv::Writer::from_writer(&mut self.out);
                let model = row.model.as_deref().filter(|_| self.several);
                let before = [id, &row.image, &row.prompt].into_iter().chain(model);
                writer.write_record(before.chain([mean.as_str(), &stddev, error]))?;
                writer.flush()?;
            }
        }
        self.out.flush()
    }

    /// How far a picture is above (+) or below (-) the first one of those with its prompt that stand together.
    fn apart(&mut self, row: &Row) -> String {
        match (self.first.get(&row.model), row.mean) {
            (Some((prompt, first)), Some(mean)) if *prompt == row.prompt => format!("{:+.4}", mean - first),
            (_, Some(mean)) => {
                self.first.insert(row.model.clone(), (row.prompt.clone(), mean));
                String::new()
            }
            (_, None) => String::new(),
        }
    }

    fn table_row(&mut self, row: &Row) -> io::Result<()> {
        let number = |value: Option<f32>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
        let mut prompt = row.prompt.replace('\n', " ");
        if prompt.chars().count() > PROMPT_WIDTH {
            prompt = prompt.chars().take(PROMPT_WIDTH - 1).chain(['…']).collect();
        }
        let (mean, stddev, apart) = (number(row.mean), number(row.stddev), self.apart(row));
        let model = row.model.as_deref().filter(|_| self.several);
        let image = [Some(row.image.as_str()), model].into_iter().flatten().collect::<Vec<_>>().join("  ");
        writeln!(self.out, "{mean:>9}  {stddev:>8}  {apart:>9}  {prompt:<PROMPT_WIDTH$}  {image}")?;
        for Part { name, mean, stddev } in &row.components {
            let stddev = number(*stddev);
            writeln!(self.out, "{mean:>9.4}  {stddev:>8}  {:>9}    {}", "", name.replace('\n', " "))?;
        }
        match &row.error {
            Some(error) => writeln!(self.out, "{:>9}  {error}", "ERROR"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(format: Format, rows: &[Row]) -> String {
        let model = proto::GetModelResponse { notice: "not trained".into(), ..Default::default() };
        let mut out = Vec::new();
        let mut report = Report::begin(format, &mut out, &[model]).unwrap();
        rows.iter().for_each(|row| report.row(row).unwrap());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_format_tells_scores_and_errors() {
        let good = Row {
            id: Some("x".into()),
            image: "a.png".into(),
            prompt: "a cup, left".into(),
            mean: Some(-1.5),
            stddev: Some(0.25),
            ..Row::default()
        };
        let bad =
            Row { id: None, mean: None, stddev: None, error: Some("is no picture".into()), ..good.clone() };
        let rows = [good, bad];
        assert_eq!(
            written(Format::Csv, &rows),
            "id,image,prompt,mean,stddev,error\nx,a.png,\"a cup, left\",-1.5,0.25,\n,a.png,\"a cup, left\",,,is no picture\n"
        );
        assert_eq!(
            written(Format::Json, &rows[1..]),
            "{\"image\":\"a.png\",\"prompt\":\"a cup, left\",\"error\":\"is no picture\"}\n"
        );
        let table = written(Format::Table, &rows);
        assert!(table.starts_with("NOTE: not trained\n"), "{table}");
        assert!(table.contains("  -1.5000    0.2500             a cup, left  "), "{table}");
        assert!(table.ends_with("ERROR  is no picture\n"), "{table}");
    }

    #[test]
    fn the_table_tells_how_far_pictures_of_one_prompt_are_apart() {
        let row = |prompt: &str, mean| Row {
            image: "a.png".into(),
            prompt: prompt.into(),
            mean: Some(mean),
            ..Row::default()
        };
        let table = written(Format::Table, &[row("a", 1.0), row("a", -0.5), row("b", -0.5), row("b", 1.0)]);
        let apart: Vec<_> = table.lines().filter_map(|line| line.get(21..30)).map(str::trim).collect();
        assert_eq!(apart, ["TO FIRST", "", "-1.5000", "", "+1.5000"], "{table}");
    }
}
