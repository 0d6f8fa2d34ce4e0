//! Copies of the fixtures' checkpoints, to be changed and broken.

#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A folder that is gone with it.
pub struct Copy {
    directory: tempfile::TempDir,
}

impl Copy {
    /// A copy of all files of a folder.
    pub fn of(folder: &Path) -> Self {
        let copy = Self::empty();
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.path(entry.file_name().to_str().unwrap())).unwrap();
        }
        copy
    }

    pub fn empty() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// The folder's name.
    pub fn name(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(file), bytes).unwrap();
    }

    pub fn edit_tensors(&self, file: &str, edit: impl FnOnce(&mut Tensors)) {
        let bytes = fs::read(self.path(file)).unwrap();
        let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            .collect();
        edit(&mut tensors);
        let views = tensors.iter().map(|(name, (dtype, shape, data))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        self.write(file, safetensors::serialize(views, None).unwrap());
    }

    pub fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        edit(&mut json);
        self.write(file, json.to_string());
    }
}

/// The name on disk of the one tensor that ends so.
pub fn key(tensors: &Tensors, end: &str) -> String {
    tensors.keys().find(|name| name.ends_with(end)).unwrap_or_else(|| panic!("no {end}")).clone()
}
