//! The fixtures that `tests/reference/make_fixtures.py` makes with transformers.

#![allow(dead_code, reason = "each test reads its own part")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use spatialscore::model::{Patches, Sample};
use tch::{Kind, Tensor};

/// Where the fixtures are: those of the repository, or fresh ones that `make parity` made.
pub fn fixtures() -> PathBuf {
    std::env::var_os("SPATIALSCORE_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

/// A checkpoint with items and what the reference made of them.
pub struct Case {
    pub name: String,
    pub directory: PathBuf,
    pub items: Vec<Item>,
    golden: Vec<u8>,
}

#[derive(Deserialize)]
pub struct Item {
    pub prompt: String,
    /// The judged picture's path, relative to the case's directory.
    pub image: PathBuf,
    /// Those of the pictures before it.
    #[serde(default)]
    pub references: Vec<PathBuf>,
}

impl Item {
    /// The files of all its pictures, in order.
    pub fn files(&self, case: &Path) -> Vec<Vec<u8>> {
        let paths = self.references.iter().chain([&self.image]);
        paths.map(|path| std::fs::read(case.join(path)).unwrap()).collect()
    }
}

impl Case {
    pub fn open(name: &str) -> Self {
        let directory = fixtures().join(name);
        let items = serde_json::from_slice(&std::fs::read(directory.join("items.json")).unwrap()).unwrap();
        let golden = std::fs::read(directory.join("golden.safetensors")).unwrap();
        Self { name: name.to_owned(), directory, items, golden }
    }

    /// Every case there is, sorted by name.
    pub fn all() -> Vec<Self> {
        let mut names: Vec<String> = std::fs::read_dir(fixtures())
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().join("golden.safetensors").exists())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no fixtures in {}", fixtures().display());
        names.iter().map(|name| Self::open(name)).collect()
    }

    pub fn checkpoint(&self) -> String {
        self.directory.join("checkpoint").to_str().unwrap().to_owned()
    }

    /// A golden number, such as an item's `mean`.
    pub fn score(&self, item: usize, stage: &str) -> Option<f32> {
        self.golden(item, stage).map(|number| f32::try_from(number).unwrap())
    }

    /// A golden tensor, `{item}/{stage}`.
    pub fn golden(&self, item: usize, stage: &str) -> Option<Tensor> {
        let file = SafeTensors::deserialize(&self.golden).unwrap();
        let view = file.tensor(&format!("{item}/{stage}")).ok()?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => Kind::Float,
            safetensors::Dtype::I64 => Kind::Int64,
            safetensors::Dtype::U8 => Kind::Uint8,
            other => panic!("{other:?} in {}", self.name),
        };
        Some(Tensor::from_data_size(view.data(), &shape, kind))
    }

    /// The sample as the reference's processor made it, so that the model is held to account alone.
    pub fn sample(&self, item: usize) -> Option<Sample> {
        let grids = Vec::<i64>::try_from(self.golden(item, "grid")?.flatten(0, -1)).unwrap();
        let ids = Vec::<i64>::try_from(self.golden(item, "input_ids")?).unwrap();
        let pixels = Vec::<u8>::try_from(self.golden(item, "pixels")?.flatten(0, -1)).unwrap();
        Some(Sample {
            input_ids: ids.into_iter().map(|id| id as u32).collect(),
            pictures: cut(&grids, &pixels),
            ..Sample::default()
        })
    }
}

/// The patches of pictures that lie end to end, of these rows and columns.
fn cut(grids: &[i64], pixels: &[u8]) -> Vec<Patches> {
    let patches: i64 = grids.chunks(2).map(|grid| grid[0] * grid[1]).sum();
    let size = pixels.len() / patches as usize;
    let mut rest = pixels;
    let pictures = grids.chunks(2).map(|grid| {
        let (rows, columns) = (grid[0] as usize, grid[1] as usize);
        let pixels = rest.split_off(..rows * columns * size).unwrap().to_vec();
        Patches { rows, columns, pixels }
    });
    pictures.collect()
}
