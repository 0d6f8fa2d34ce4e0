//! A PEFT LoRA adapter: what it does to which weights, as PEFT does it when it merges.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Device, TchError, Tensor};

use super::adapter_config::{AdapterConfig, Names, Size, Start};
use super::folder::Folder;
use super::tensors::Inventory;
use super::{CheckpointError, Fault};

/// What an adapter says of itself.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What an adapter holds.
pub(super) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Where the name of a module's first factor begins, of one of its factors, and of its trained rows.
const FACTOR: &str = ".lora_";
const TOKENS: &str = ".token_adapter.";
const TRAINED_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// In the name of what `modules_to_save` has replaced: with `bias` other than none PEFT saves its biases, and never
/// runs them.
const UNUSED: &str = ".original_module.";

/// What an adapter does to a checkpoint's weights.
#[derive(Debug)]
pub(super) struct Adapter {
    /// By the canonical name of the weight.
    changes: BTreeMap<String, Change>,
    /// What the changes are made of.
    factors: Inventory,
}

/// What happens to one weight. The strings name tensors of the adapter.
#[derive(Debug)]
enum Change {
    /// `scale · up · down` is added, its transpose for a table of embeddings; first PEFT takes out what the factors
    /// started from.
    Product { down: String, up: String, transposed: bool, size: Size, start: Start },
    /// `scale · bias` is added.
    Bias { bias: String, scale: f64 },
    /// Rows are put in place of those of these tokens.
    Rows { rows: String, tokens: Vec<i64> },
}

impl Adapter {
    /// Reads the adapter of a folder. Weights that it holds whole, as PEFT's `modules_to_save` does, take the place of
    /// those in `base`, and of what `earlier` adapters do to them.
    ///
    /// # Errors
    /// It cannot be merged, or its factors do not fit the weights in `base`.
    pub fn open(
        folder: &Folder,
        base: &mut Inventory,
        earlier: &mut [Self],
        canonical: impl Fn(&str) -> Option<String>,
        tied: bool,
    ) -> Result<Self, CheckpointError> {
        let config = AdapterConfig::read(folder)?;
        let refuse = |reason: String| CheckpointError::invalid(&folder.label(ADAPTER_CONFIG), reason);
        let mut factors = Inventory::default();
        factors.add(folder, ADAPTER_WEIGHTS, |key| match key.contains(UNUSED) {
            true => None,
            false => canonical(&plain_name(key)),
        })?;
        let is_factor = |name: &str| name.contains(FACTOR) || name.contains(TOKENS);
        if let Some(key) = factors.skipped.iter().find(|key| tied && is_factor(key)) {
            return Err(refuse(format!(
                "{key}: the base ties lm_head to its embeddings, which would change with it when merged, and did not \
                 when trained; merge it with PEFT as it is meant and serve the result"
            )));
        }
        if factors.is_empty() && factors.skipped.is_empty() {
            return Err(CheckpointError::invalid(&folder.label(ADAPTER_WEIGHTS), "it holds no tensors"));
        }
        let whole = factors.split_off(|name| !is_factor(name));
        let mut faults = unsaved(&config, base, &whole, &factors);
        for name in whole.names() {
            for adapter in &mut *earlier {
                adapter.changes.remove(name);
            }
        }
        base.replace_with(whole);

        let modules: BTreeSet<String> =
            factors.names().filter_map(|name| Some(name.split_once(FACTOR)?.0.to_owned())).collect();
        let names: Vec<Names> = modules.iter().map(|module| factors.names_of(module, FACTOR)).collect();
        let sizes = config.sizes(&names).map_err(refuse)?;
        let start = config.start().map_err(refuse)?;
        let mut changes = BTreeMap::new();
        let mut expected = Vec::new();
        for (module, size) in modules.iter().zip(sizes) {
            let weight = format!("{module}.weight");
            let Some(shape) = base.shape(&weight) else {
                let of_it = |name: &&str| name.starts_with(&format!("{module}{FACTOR}"));
                faults.extend(factors.names().find(of_it).and_then(|name| factors.unexpected(name)));
                expected.extend(factors.with_prefix(&format!("{module}{FACTOR}")));
                continue;
            };
            let (change, mut shapes) = product(&factors, module, shape, size, start).map_err(refuse)?;
            if config.has_bias() {
                let bias = format!("{module}.bias");
                let (Some(shape), false) = (base.shape(&bias), shapes.is_empty()) else {
                    return Err(refuse(format!("lora_bias is true, but {module} has no bias to add to")));
                };
                let key = format!("{module}.lora_B.bias");
                shapes.push((key.clone(), shape.to_vec()));
                changes.insert(bias, Change::Bias { bias: key, scale: size.scale });
            }
            expected.extend(shapes);
            changes.insert(weight, change);
        }
        for rows in factors.names().filter(|name| name.ends_with(TRAINED_ROWS)) {
            let module = rows.trim_end_matches(TRAINED_ROWS);
            let weight = format!("{module}.weight");
            let names = factors.names_of(module, TOKENS);
            let tokens = config.trainable_token_indices.as_ref().and_then(|tokens| tokens.of(&names));
            let tokens = tokens.ok_or_else(|| {
                refuse(format!("trainable_token_indices does not say which rows of {module} {rows} holds"))
            })?;
            let Some([count, width]) = base.shape(&weight) else { continue };
            check_tokens(tokens, *count).map_err(refuse)?;
            expected.push((rows.to_owned(), vec![tokens.len() as i64, *width]));
            let change = Change::Rows { rows: rows.to_owned(), tokens: tokens.to_vec() };
            if changes.insert(weight, change).is_some() {
                return Err(refuse(format!("trainable_token_indices and a LoRA are both on {module}")));
            }
        }
        let has_rows = factors.names().any(|name| name.ends_with(TRAINED_ROWS));
        if config.trainable_token_indices.is_some() && !has_rows {
            let name = format!("embed_tokens{TRAINED_ROWS}");
            faults.push(factors.missing(&name, &[]));
        }
        faults.extend(factors.compare(&expected));
        if faults.is_empty() { Ok(Self { changes, factors }) } else { Err(CheckpointError::Tensors(faults)) }
    }

    /// The weights that the adapter changes, by name.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        self.changes.keys().map(String::as_str)
    }

    /// Whether the adapter changes a weight.
    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }

    /// A weight, in fp32 on `device`, as it is with the adapter.
    ///
    /// # Errors
    /// A factor is not finite, or the result is not.
    pub fn apply(&self, name: &str, weight: Tensor, device: Device) -> Result<Tensor, CheckpointError> {
        let Some(change) = self.changes.get(name) else { return Ok(weight) };
        let read = |name: &str| self.factors.read(name, device);
        let failed = |e: TchError| CheckpointError::invalid(self.factors.home(), format!("{name}: {e}"));
        let changed = match change {
            Change::Product { down, up, transposed, size, start } => {
                let (down, up) = (read(down)?.flatten(1, -1), read(up)?.flatten(1, -1));
                let delta = up.f_matmul(&down).map_err(failed)? * size.scale;
                let delta = if *transposed { delta.tr() } else { delta };
                let rest = match start_of(&weight, *start, *size).map_err(failed)? {
                    Some(start) => weight - start,
                    None => weight,
                };
                let delta = delta.f_reshape(rest.size()).map_err(failed)?;
                rest.f_add(&delta).map_err(failed)?
            }
            Change::Bias { bias, scale } => weight + read(bias)? * *scale,
            Change::Rows { rows, tokens } => {
                let tokens = Tensor::from_slice(tokens).to_device(device);
                weight.f_index_copy(0, &tokens, &read(rows)?).map_err(failed)?
            }
        };
        // Finite factors and a finite weight may still add up to an infinity.
        if bool::try_from(changed.isfinite().all()).unwrap_or(false) {
            return Ok(changed);
        }
        let part = match change {
            Change::Product { down: part, .. }
            | Change::Bias { bias: part, .. }
            | Change::Rows { rows: part, .. } => part,
        };
        Err(CheckpointError::Tensors(self.factors.non_finite(part).into_iter().collect()))
    }
}

/// The update of a module whose weight has this shape, and the shapes that its factors must have.
type Update = (Change, Vec<(String, Vec<i64>)>);

fn product(
    factors: &Inventory,
    module: &str,
    weight: &[i64],
    size: Size,
    start: Start,
) -> Result<Update, String> {
    let rank = size.rank;
    let embedding = factors.has_prefix(&format!("{module}.lora_embedding_"));
    let [down, up] = if embedding {
        ["A", "B"].map(|factor| format!("{module}.lora_embedding_{factor}"))
    } else {
        ["A", "B"].map(|factor| format!("{module}.lora_{factor}.weight"))
    };
    let (Some((&out, inputs)), true) = (weight.split_first(), weight.len() > 1) else {
        return Err(format!("{module} is no layer that a LoRA can be on: its weight is {weight:?}"));
    };
    let shapes = if embedding {
        vec![(down.clone(), vec![rank, out]), (up.clone(), [inputs, &[rank]].concat())]
    } else {
        // A convolution's second factor has kernels of one.
        let ones = vec![1; inputs.len() - 1];
        vec![(down.clone(), [&[rank], inputs].concat()), (up.clone(), [&[out, rank][..], &ones].concat())]
    };
    // PEFT starts a table's factors otherwise, whatever `init_lora_weights` names.
    let start = if embedding { Start::Whole } else { start };
    if start != Start::Whole {
        let narrow = weight.len() > 2;
        if narrow || rank > out.min(inputs[0]) || size.scale <= 0.0 {
            return Err(format!(
                "init_lora_weights takes a part out of {module}, {weight:?}, which must be a linear layer of at \
                 least the rank {rank}, and the scale {} above 0",
                size.scale
            ));
        }
    }
    Ok((Change::Product { down, up, transposed: embedding, size, start }, shapes))
}

/// What PEFT takes out of a weight when it puts a LoRA of this size on it: the update by the factors that training
/// began with. Those of singular values are divided by the scale, so that it drops out.
fn start_of(weight: &Tensor, start: Start, Size { rank, scale }: Size) -> Result<Option<Tensor>, TchError> {
    Ok(match start {
        Start::Whole => None,
        Start::SingularValues => {
            let (left, values, right) = weight.f_svd(true, true)?;
            let left = left.f_narrow(1, 0, rank)? * values.f_narrow(0, 0, rank)?;
            Some(left.f_matmul(&right.f_narrow(1, 0, rank)?.tr())?)
        }
        Start::Columns => {
            // The first columns of Q are those of the first columns alone, and R's rows are the weight seen from them.
            let (columns, _) = Tensor::f_linalg_qr(&weight.f_narrow(1, 0, rank)?, "reduced")?;
            Some(columns.f_matmul(&columns.tr().f_matmul(weight)?)? * scale)
        }
    })
}

fn check_tokens(tokens: &[i64], rows: i64) -> Result<(), String> {
    if let Some(token) = tokens.iter().find(|&&token| token < 0 || token >= rows) {
        return Err(format!("trainable_token_indices has {token}; the table has {rows} rows"));
    }
    if tokens.iter().collect::<BTreeSet<_>>().len() != tokens.len() {
        return Err("trainable_token_indices names a token twice".into());
    }
    Ok(())
}

/// The tensors of modules that the adapter says it holds whole, and does not.
fn unsaved(config: &AdapterConfig, base: &Inventory, whole: &Inventory, factors: &Inventory) -> Vec<Fault> {
    let saved = config.modules_to_save.iter().flatten().map(String::as_str).filter(|name| !name.is_empty());
    let saved: Vec<&str> = saved.collect();
    let in_one = |name: &str| {
        let name = format!("model.{name}");
        let parents = name.match_indices('.').map(|(end, _)| &name[..end]);
        parents.into_iter().any(|module| saved.iter().any(|end| module.ends_with(end)))
    };
    let missing = base.names().filter(|name| in_one(name) && whole.shape(name).is_none());
    missing.map(|name| factors.missing(name, base.shape(name).unwrap_or_default())).collect()
}

/// A key without what PEFT's wrappers put into it.
fn plain_name(key: &str) -> String {
    let key = key.strip_prefix("base_model.model.").unwrap_or(key);
    // Trainers that save a model's state themselves leave the adapter's name in it.
    let key = key.strip_suffix(".default").unwrap_or(key).replace(".default.", ".");
    let key = key.replace(".modules_to_save.", ".").replace(".token_adapter.base_layer.", ".");
    key.replace(".base_layer.", ".")
}

impl Inventory {
    /// The names of a module, of whose tensors the names go on with `mark`.
    fn names_of(&self, module: &str, mark: &str) -> Names {
        let prefix = format!("{module}{mark}");
        let key = self.names().find(|name| name.starts_with(&prefix)).and_then(|name| self.key(name));
        let key = key.map(|key| key.strip_prefix("base_model.model.").unwrap_or(key)).unwrap_or_default();
        let on_disk = key.split_once(mark).map_or(key, |(module, _)| module);
        Names::new(on_disk, module)
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        self.names().any(|name| name.starts_with(prefix))
    }

    /// The tensors whose names begin so, with the shapes that they have.
    fn with_prefix(&self, prefix: &str) -> Vec<(String, Vec<i64>)> {
        let names = self.names().filter(|name| name.starts_with(prefix));
        names.map(|name| (name.to_owned(), self.shape(name).unwrap_or_default().to_vec())).collect()
    }
}
