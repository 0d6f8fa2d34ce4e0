//! The tensors of a checkpoint: which there are, whether they are those that the model needs, and their values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata};
use tch::{Device, Kind, Tensor};

use super::files::no_weights;
use super::folder::{Folder, Opened, refuse_pointer};
use super::shards::{INDEX, WEIGHTS, weight_files};
use super::{CheckpointError, CheckpointFiles};
use crate::model::libtorch_shim::{bytes_of, pinned};

/// Bytes read at a time: what loading needs of the host's memory beside the weights. Small enough that the allocator
/// keeps the buffers from one chunk to the next.
const CHUNK: usize = 8 << 20;

/// The longest header that is read: a 72B checkpoint's is under 200 kB.
const MAX_HEADER: u64 = 8 << 20;

/// The tensors of a checkpoint's files, by canonical name. Only headers have been read.
#[derive(Debug, Default)]
pub struct Inventory {
    tensors: BTreeMap<String, Entry>,
    /// The file in which a tensor is missing that is nowhere.
    home: String,
    /// Tensors that are never needed, such as `lm_head`, by the names that they have on disk.
    pub skipped: Vec<String>,
}

/// One tensor on disk.
#[derive(Debug, Clone)]
struct Entry {
    /// The file's name.
    file: String,
    /// The tensor's name on disk.
    key: String,
    bytes: Bytes,
    offset: u64,
    shape: Vec<i64>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Bytes {
    File(Arc<File>),
    Static(&'static [u8]),
    /// Nowhere: values are drawn where they are needed.
    Random,
}

/// What is wrong with one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The file that holds the tensor, or should.
    pub file: String,
    /// The tensor's name.
    pub key: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What can be wrong with a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Problem {
    /// The model needs it and no file has it.
    Missing {
        /// The shape that it should have.
        shape: Vec<i64>,
    },
    /// A file has it and the model has no place for it.
    Unexpected {
        /// The shape that it has.
        shape: Vec<i64>,
    },
    /// Its shape is not the one that the configuration promises.
    Misshapen {
        /// The shape that it has.
        found: Vec<i64>,
        /// The shape that it should have.
        expected: Vec<i64>,
    },
    /// It holds a NaN or an infinity.
    NonFinite,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ", self.file, self.key)?;
        match &self.problem {
            Problem::Missing { shape } => write!(f, "is missing, should be {shape:?}"),
            Problem::Unexpected { shape } => {
                write!(f, "{shape:?} is unexpected: the model has no such tensor")
            }
            Problem::Misshapen { found, expected } => write!(f, "is {found:?}, should be {expected:?}"),
            Problem::NonFinite => write!(f, "holds a NaN or an infinity"),
        }
    }
}

impl Inventory {
    /// Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.
    /// `canonical` gives each key the name under which the model asks for it, or `None` for what is never needed.
    ///
    /// # Errors
    /// A file is missing, truncated or no safetensors file.
    pub fn open(
        files: &CheckpointFiles,
        canonical: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CheckpointError> {
        let folder = files.base();
        let mut inventory = Self::default();
        let weights = weight_files(folder)?;
        if weights.is_empty() {
            return Err(no_weights(folder));
        }
        for file in &weights {
            inventory.add(folder, file, &canonical)?;
        }
        if !folder.exists(WEIGHTS) && folder.exists(INDEX) {
            inventory.home = folder.label(INDEX);
        }
        Ok(inventory)
    }

    /// Tensors that are on no disk: norms of ones, and elsewhere random values, as wide as keeps a layer's output as
    /// wide as its input.
    pub(in crate::model) fn random(tensors: Vec<(String, Vec<i64>)>) -> Self {
        let entry = |(name, shape): (String, Vec<i64>)| {
            let (file, kind) = ("random weights".to_owned(), Kind::Float);
            (name.clone(), Entry { file, key: name, bytes: Bytes::Random, offset: 0, shape, kind })
        };
        Self { tensors: tensors.into_iter().map(entry).collect(), ..Self::default() }
    }

    /// Adds the tensors of one file.
    pub(super) fn add(
        &mut self,
        folder: &Folder,
        file: &str,
        canonical: impl Fn(&str) -> Option<String>,
    ) -> Result<(), CheckpointError> {
        let label = folder.label(file);
        let bytes = match folder.open(file)? {
            Some(Opened::File(file)) => Bytes::File(Arc::new(file)),
            Some(Opened::Static(data)) => Bytes::Static(data),
            None => return Err(CheckpointError::MissingFile(label)),
        };
        for (key, offset, shape, kind) in read_header(&bytes, &label)? {
            let Some(name) = canonical(&key) else {
                self.skipped.push(key);
                continue;
            };
            let entry = Entry { file: label.clone(), key, bytes: bytes.clone(), offset, shape, kind };
            if let Some(twin) = self.tensors.get(&name)
                && !entry.is_same(twin)?
            {
                let reason = if entry.key == twin.key {
                    format!("{} stands in {} too", twin.key, twin.file)
                } else {
                    format!("{} and {} are one tensor to the model, and differ", twin.key, entry.key)
                };
                return Err(CheckpointError::invalid(&label, reason));
            }
            self.tensors.insert(name, entry);
        }
        self.home = label;
        Ok(())
    }

    /// How many tensors the model reads.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The file that holds the tensors, or is to.
    pub(super) fn home(&self) -> &str {
        &self.home
    }

    /// The name that a tensor has on disk.
    pub(super) fn key(&self, name: &str) -> Option<&str> {
        self.tensors.get(name).map(|entry| entry.key.as_str())
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.tensors.get(name).map(|e| e.shape.as_slice())
    }

    /// The canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes on disk of the tensors that the model reads.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(Entry::len).sum()
    }

    /// Numbers in the tensors that the model reads.
    pub fn parameters(&self) -> i64 {
        self.tensors.values().map(|e| e.shape.iter().product::<i64>()).sum()
    }

    /// The number formats on disk.
    pub fn kinds(&self) -> BTreeSet<String> {
        self.tensors.values().map(|e| format!("{:?}", e.kind)).collect()
    }

    /// Holds what is there against what should be there: every difference, in the order of the names.
    pub fn compare(&self, expected: &[(String, Vec<i64>)]) -> Vec<Fault> {
        let expected: BTreeMap<&str, &Vec<i64>> = expected.iter().map(|(n, s)| (n.as_str(), s)).collect();
        let mut faults = Vec::new();
        for (name, shape) in &expected {
            match self.tensors.get(*name) {
                None => faults.push(self.missing(name, shape)),
                Some(entry) if entry.shape != **shape => {
                    let (found, expected) = (entry.shape.clone(), (*shape).clone());
                    faults.push(entry.fault(Problem::Misshapen { found, expected }));
                }
                Some(_) => {}
            }
        }
        let unexpected = self.tensors.iter().filter(|(name, _)| !expected.contains_key(name.as_str()));
        faults.extend(unexpected.map(|(_, e)| e.fault(Problem::Unexpected { shape: e.shape.clone() })));
        faults
    }

    /// The fault that a tensor is missing.
    pub(super) fn missing(&self, name: &str, shape: &[i64]) -> Fault {
        let (file, key) = (self.home.clone(), name.to_owned());
        Fault { file, key, problem: Problem::Missing { shape: shape.to_vec() } }
    }

    /// The fault that the model has no place for a tensor that is here.
    pub(super) fn unexpected(&self, name: &str) -> Option<Fault> {
        self.tensors.get(name).map(|entry| entry.fault(Problem::Unexpected { shape: entry.shape.clone() }))
    }

    /// The fault that a tensor is not finite.
    pub(super) fn non_finite(&self, name: &str) -> Option<Fault> {
        self.tensors.get(name).map(|entry| entry.fault(Problem::NonFinite))
    }

    /// Bytes on disk of one tensor.
    pub(super) fn bytes_of(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, Entry::len)
    }

    /// Whether all values of a tensor are finite.
    pub(super) fn is_finite(&self, name: &str) -> Result<bool, CheckpointError> {
        let mut finite = true;
        if let Some(entry) = self.tensors.get(name) {
            entry.chunks(Device::Cpu, |chunk, _| finite &= is_finite(&chunk))?;
        }
        Ok(finite)
    }

    /// Reads a tensor into `target`, which has its shape, on any device and of any kind. The host holds no more
    /// of it than a chunk.
    pub(super) fn read_into(&self, name: &str, target: &Tensor) -> Result<(), CheckpointError> {
        let missing = || CheckpointError::Tensors(vec![self.missing(name, &target.size())]);
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        if matches!(entry.bytes, Bytes::Random) {
            entry.draw_into(target);
            return Ok(());
        }
        let (flat, device) = (target.view([-1]), target.device());
        let mut finite = true;
        // Of each chunk on the device, which is asked once, behind the last: until then chunks follow one another there
        // while the next is read.
        let mut finite_there: Option<Tensor> = None;
        entry.chunks(device, |chunk, start| {
            let chunk = chunk.to_device_(device, chunk.kind(), true, false);
            if device.is_cuda() {
                let all = chunk.isfinite().all();
                finite_there =
                    Some(finite_there.take().map_or_else(|| all.shallow_clone(), |f| f.logical_and(&all)));
            } else {
                finite &= is_finite(&chunk);
            }
            flat.narrow(0, start, chunk.size()[0]).copy_(&chunk);
        })?;
        finite &= finite_there.is_none_or(|finite| bool::try_from(finite).unwrap_or(false));
        if finite { Ok(()) } else { Err(CheckpointError::Tensors(vec![entry.fault(Problem::NonFinite)])) }
    }

    /// A tensor as fp32 on `device`.
    pub(super) fn read(&self, name: &str, device: Device) -> Result<Tensor, CheckpointError> {
        let shape = self.shape(name).unwrap_or_default();
        let target = Tensor::empty(shape, (Kind::Float, device));
        self.read_into(name, &target)?;
        Ok(target)
    }

    /// Takes all of `other`'s tensors, in place of those of the same names.
    pub(super) fn replace_with(&mut self, other: Self) {
        self.tensors.extend(other.tensors);
    }

    /// Splits off the tensors whose names `wanted` holds of.
    pub(super) fn split_off(&mut self, wanted: impl Fn(&str) -> bool) -> Self {
        let (taken, kept) = std::mem::take(&mut self.tensors).into_iter().partition(|(name, _)| wanted(name));
        self.tensors = kept;
        Self { tensors: taken, home: self.home.clone(), skipped: Vec::new() }
    }
}

impl Entry {
    fn len(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }

    fn fault(&self, problem: Problem) -> Fault {
        Fault { file: self.file.clone(), key: self.key.clone(), problem }
    }

    /// Whether another entry is this tensor once more, as where one tensor has two names. Only for short ones.
    fn is_same(&self, other: &Self) -> Result<bool, CheckpointError> {
        if self.key == other.key || (&self.shape, self.kind) != (&other.shape, other.kind) {
            return Ok(false);
        }
        let length = self.len();
        if length > CHUNK as u64 {
            return Ok(false);
        }
        let read = |entry: &Self| {
            let mut bytes = vec![0; length as usize];
            entry.bytes.read(entry.offset, &mut bytes).map_err(|e| CheckpointError::io(&self.file, e))?;
            Ok(bytes)
        };
        Ok(read(self)? == read(other)?)
    }

    fn draw_into(&self, target: &Tensor) {
        let mut target = target.shallow_clone();
        let _ = match self.shape.split_first() {
            Some((_, inputs @ [_, ..])) => {
                target.normal_(0.0, (inputs.iter().product::<i64>() as f64).sqrt().recip())
            }
            _ if self.key.ends_with(".bias") => target.zero_(),
            _ => target.fill_(1.0),
        };
    }

    /// Hands over the values in flat pieces, each with its place in the tensor.
    fn chunks(&self, device: Device, mut take: impl FnMut(Tensor, i64)) -> Result<(), CheckpointError> {
        let size = self.kind.elt_size_in_bytes();
        let mut done = 0;
        while done < self.len() {
            let length = (self.len() - done).min(CHUNK as u64) as usize;
            let mut chunk = host_memory(length, device);
            let io = |e| CheckpointError::io(&self.file, e);
            let memory = bytes_of(&mut chunk).ok_or_else(|| io(std::io::ErrorKind::OutOfMemory.into()))?;
            self.bytes.read(self.offset + done, memory).map_err(io)?;
            take(chunk.view_dtype(self.kind), (done / size as u64) as i64);
            done += length as u64;
        }
        Ok(())
    }
}

impl Bytes {
    fn len(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Static(data) => Ok(data.len() as u64),
            Self::Random => Ok(0),
        }
    }

    /// Fills `into` with what lies from `offset` on.
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let end = || std::io::ErrorKind::UnexpectedEof.into();
        match self {
            Self::File(file) => file.read_exact_at(into, offset),
            Self::Static(data) => {
                let start = usize::try_from(offset).map_err(|_| end())?;
                let part = start.checked_add(into.len()).and_then(|stop| data.get(start..stop));
                into.copy_from_slice(part.ok_or_else(end)?);
                Ok(())
            }
            Self::Random => Err(end()),
        }
    }
}

type Header = Vec<(String, u64, Vec<i64>, Kind)>;

/// Name, place, shape and kind of each tensor of a safetensors file.
fn read_header(bytes: &Bytes, file: &str) -> Result<Header, CheckpointError> {
    let io = |e| CheckpointError::io(file, e);
    let truncated = |what: &str| CheckpointError::invalid(file, format!("truncated: {what}"));
    let size = bytes.len().map_err(io)?;
    if size < 8 {
        return Err(truncated("a safetensors file has at least 8 bytes"));
    }
    let mut prefix = [0; 8];
    bytes.read(0, &mut prefix).map_err(io)?;
    let header = u64::from_le_bytes(prefix);
    let mut start = vec![0; size.min(64) as usize];
    bytes.read(0, &mut start).map_err(io)?;
    refuse_pointer(&start, file)?;
    if header > MAX_HEADER {
        return Err(CheckpointError::invalid(
            file,
            format!("a header of {header} bytes: not a safetensors file"),
        ));
    }
    if size < 8 + header {
        return Err(truncated(&format!("{size} bytes, the header alone takes {}", 8 + header)));
    }
    let mut json = vec![0; header as usize];
    bytes.read(8, &mut json).map_err(io)?;
    let metadata: Metadata = serde_json::from_slice(&json)
        .map_err(|e| CheckpointError::invalid(file, format!("its header: {e}")))?;
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);

    let mut end = 0;
    let mut list = Vec::with_capacity(tensors.len());
    for (key, info) in tensors {
        let kind = match info.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => {
                let reason = format!("{key} is {other:?}, must be F32, F16 or BF16");
                return Err(CheckpointError::invalid(file, reason));
            }
        };
        let (start, stop) = info.data_offsets;
        let size = info.shape.iter().try_fold(kind.elt_size_in_bytes(), |size, &n| size.checked_mul(n));
        let sides = info.shape.iter().map(|&n| i64::try_from(n)).collect::<Result<Vec<_>, _>>();
        // Gaps, overlaps and wrong sizes all show as an offset that is not where the last tensor ended.
        let fits = start == end && size.is_some_and(|size| start.checked_add(size) == Some(stop));
        let Some(shape) = sides.ok().filter(|_| fits) else {
            let reason =
                format!("{key}, {:?} {:?}, cannot lie at bytes {start} to {stop}", info.dtype, info.shape);
            return Err(CheckpointError::invalid(file, reason));
        };
        end = stop;
        list.push((key, 8 + header + start as u64, shape, kind));
    }
    let needed = 8 + header + end as u64;
    if size != needed {
        return Err(CheckpointError::invalid(
            file,
            format!("{size} bytes, its header promises {needed}: truncated?"),
        ));
    }
    Ok(list)
}

/// Bytes of the host, from where `device` can copy them while the host goes on.
fn host_memory(bytes: usize, device: Device) -> Tensor {
    let pinned = device.is_cuda().then(|| pinned(bytes)).flatten();
    pinned.unwrap_or_else(|| Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu)))
}

fn is_finite(values: &Tensor) -> bool {
    // In half precision `isfinite` is slow on the CPU; the sum of an infinity or a NaN is never finite, and fp32
    // sums of a chunk of finite half-precision values do not overflow.
    let sum = match values.kind() {
        Kind::Float => return bool::try_from(values.isfinite().all()).unwrap_or(false),
        _ => values.sum(Kind::Float),
    };
    f64::try_from(sum).is_ok_and(f64::is_finite) || bool::try_from(values.isfinite().all()).unwrap_or(false)
}
