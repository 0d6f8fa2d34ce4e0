//! A batch of samples as the tensors that the towers read.

use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::rope::{grid_taps, mrope_positions, vision_positions, windows};
use super::varlen_attention::{Branches, Segments, permutation};
use crate::model::layers::upload;
use crate::model::profile::Positions;
use crate::model::{ModelError, Patches, Sample};

/// The pictures of a batch, laid end to end.
///
/// Patches lie window by window, since most blocks attend within windows, and windows of one size together.
#[derive(Debug)]
pub struct VisionBatch {
    /// `[patches, channels × patch × patch]`, bytes.
    pub pixels: Tensor,
    /// Row and column of each patch, `[patches, 2]`.
    pub positions: Tensor,
    /// Where each patch falls in the square of learnt positions, where the tower has one.
    pub taps: Option<Taps>,
    /// The patches of each window.
    pub windows: Segments,
    /// The patches of each picture.
    pub pictures: Segments,
    /// The place of each patch in the order of the samples and of the processor, `[patches]`.
    pub natural: Vec<i64>,
}

/// The four places of the square of learnt positions around each patch, and how much each counts.
#[derive(Debug)]
pub struct Taps {
    /// `[patches × 4]`.
    pub indices: Tensor,
    /// `[patches × 4]`, fp32.
    pub weights: Tensor,
    /// Where each patch's begin, `[patches]`.
    pub offsets: Tensor,
}

/// The texts of a batch, laid end to end, the longest first.
#[derive(Debug)]
pub struct TextBatch {
    /// Token ids, `[tokens]`.
    pub input_ids: Tensor,
    /// Where each visual token goes, in the order of [`VisionBatch`], `[visual tokens]`.
    pub visual_rows: Tensor,
    /// Time, height and width position of each token, `[3, tokens]`.
    pub positions: Tensor,
    /// The tokens of each sample, without those of branches.
    samples: Segments,
    /// The tokens of branches, where any sample has them.
    branches: Option<Branches>,
    /// Puts one row per reading into the order of the samples and their branches. `None` where they are in it.
    given_order: Option<Tensor>,
}

impl TextBatch {
    /// Causal attention within each text, as [`Segments::attend`] gives it.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        match &self.branches {
            None => self.samples.attend(q, k, v, true),
            Some(branches) => branches.attend(&self.samples, q, k, v),
        }
    }

    /// As [`Segments::attend_last`], of each text that is read.
    pub fn attend_last(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        match &self.branches {
            None => self.samples.attend_last(q, k, v),
            Some(branches) => branches.attend_last(q, k, v),
        }
    }

    /// The last row of each text that is read, in the order in which [`TextBatch::attend_last`] works.
    pub fn last_rows(&self, rows: &Tensor) -> Tensor {
        match &self.branches {
            None => self.samples.last_rows(rows),
            Some(branches) => branches.last_rows(rows),
        }
    }

    /// Puts one row per reading into the order in which the samples and their branches were given.
    pub fn in_given_order(&self, rows: Tensor) -> Tensor {
        match &self.given_order {
            Some(order) => rows.index_select(0, order),
            None => rows,
        }
    }
}

/// Lays out the pictures of a batch.
pub fn vision_batch(config: &Config, samples: &[&Sample], device: Device) -> VisionBatch {
    let (merge, unit) = (config.vision.spatial_merge_size as usize, config.vision.merge_unit());
    let size = config.vision.patch_bytes();
    let pictures: Vec<Picture> = pictures(config, samples);
    let mut all_windows: Vec<(usize, Vec<usize>)> = Vec::new();
    for (n, picture) in pictures.iter().enumerate() {
        let (rows, columns) = (picture.image.rows / merge, picture.image.columns / merge);
        // Without a block that attends within windows, the whole picture is one.
        let side =
            if config.vision.has_windows() { config.vision.window_tokens() } else { rows.max(columns) };
        all_windows.extend(windows(rows, columns, side).into_iter().map(|window| (n, window)));
    }
    all_windows.sort_by_key(|(_, window)| std::cmp::Reverse(window.len()));

    let (mut natural, mut positions, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
    let (mut indices, mut weights) = (Vec::new(), Vec::new());
    let side = config.vision.position_side();
    let (mut window_rows, mut picture_rows) = (Vec::new(), vec![Vec::new(); pictures.len()]);
    for (n, window) in all_windows {
        let Picture { image, places, first } = &pictures[n];
        let start = natural.len() as i64;
        for patch in window.into_iter().flat_map(|token| token * unit..(token + 1) * unit) {
            natural.push((first + patch) as i64);
            positions.extend(places[patch]);
            let [row, column] = places[patch].map(|place| place as usize);
            if let Some(side) = side {
                let across = grid_taps(column, image.columns, side);
                for (down, weight) in grid_taps(row, image.rows, side) {
                    indices.extend(across.map(|(tap, _)| down * side + tap));
                    weights.extend(across.map(|(_, factor)| weight * factor));
                }
            }
            pixels.extend_from_slice(&image.pixels[patch * size..(patch + 1) * size]);
        }
        let rows = start..natural.len() as i64;
        picture_rows[n].extend(rows.clone());
        window_rows.push(rows.collect());
    }
    let patches = natural.len() as i64;
    VisionBatch {
        pixels: upload(&Tensor::from_data_size(&pixels, &[patches, size as i64], Kind::Uint8), device),
        positions: upload(&Tensor::from_slice(&positions).view([patches, 2]), device),
        taps: side.map(|_| Taps {
            indices: upload(&Tensor::from_slice(&indices), device),
            weights: upload(&Tensor::from_slice(&weights), device),
            offsets: Tensor::arange_start_step(0, 4 * patches, 4, (Kind::Int64, device)),
        }),
        windows: Segments::new(&window_rows, device),
        pictures: Segments::new(&picture_rows, device),
        natural,
    }
}

/// A picture of a batch.
struct Picture<'a> {
    image: &'a Patches,
    /// Row and column of each patch.
    places: Vec<[i64; 2]>,
    /// The patches of the pictures before it.
    first: usize,
}

fn pictures<'a>(config: &Config, samples: &[&'a Sample]) -> Vec<Picture<'a>> {
    let merge = config.vision.spatial_merge_size as usize;
    let mut patches = 0;
    let picture = |image: &'a Patches| {
        let places = vision_positions(image.rows, image.columns, merge);
        let first = patches;
        patches += places.len();
        Picture { image, places, first }
    };
    samples.iter().flat_map(|sample| &sample.pictures).map(picture).collect()
}

/// Lays out the texts of a batch.
///
/// # Errors
/// A sample's placeholders do not match its pictures, or an id is not in the vocabulary of `vocabulary` rows.
pub fn text_batch(
    config: &Config,
    scheme: Positions,
    vocabulary: i64,
    samples: &[&Sample],
    natural: &[i64],
    device: Device,
) -> Result<TextBatch, ModelError> {
    let unit = config.vision.merge_unit() as i64;
    // Samples of one length together, so that attention moves nothing.
    let mut order: Vec<i64> = (0..samples.len() as i64).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(samples[n as usize].input_ids.len()));

    let mut layout = Layout::default();
    let place =
        |ids: &[u32], pictures: &[Patches]| token_positions(config, scheme, vocabulary, ids, pictures);
    // By sample: pictures lie in the order of the samples, and within one in the order of their placeholders.
    let (mut rows, mut placeholders) = (vec![Vec::new(); samples.len()], vec![Vec::new(); samples.len()]);
    for n in order.iter().map(|&n| n as usize) {
        let Sample { input_ids, pictures, .. } = samples[n];
        let positions = place(input_ids, pictures)?;
        rows[n] = layout.append(input_ids, positions.each_ref().map(Vec::as_slice));
        let tokens = rows[n].iter().zip(input_ids);
        placeholders[n] =
            tokens.filter(|(_, id)| **id == config.image_token_id).map(|(&row, _)| row).collect();
    }
    let in_order: Vec<Vec<i64>> = order.iter().map(|&n| rows[n as usize].clone()).collect();
    let branched = samples.iter().any(|sample| !sample.branches.is_empty());
    let (branches, order) = if branched {
        let (branches, order) = lay_branches(&mut layout, samples, &rows, place, device)?;
        (Some(branches), order)
    } else {
        (None, order)
    };
    // The first patch of each visual token tells which token of the natural order it is.
    let placeholders = placeholders.concat();
    let visual_rows: Vec<i64> =
        natural.iter().step_by(unit as usize).map(|&patch| placeholders[(patch / unit) as usize]).collect();
    Ok(TextBatch {
        input_ids: upload(&Tensor::from_slice(&layout.input_ids), device),
        visual_rows: upload(&Tensor::from_slice(&visual_rows), device),
        positions: upload(&Tensor::from_slice(&layout.axes.concat()).view([3, -1]), device),
        samples: Segments::new(&in_order, device),
        branches,
        given_order: permutation(&order, device).map(|(_, inverse)| inverse),
    })
}

/// Tokens that lie end to end.
#[derive(Default)]
struct Layout {
    input_ids: Vec<i64>,
    /// Positions on the axes of time, height and width.
    axes: [Vec<i64>; 3],
}

impl Layout {
    /// Appends tokens and tells their rows.
    fn append(&mut self, ids: &[u32], positions: [&[i64]; 3]) -> Vec<i64> {
        let start = self.input_ids.len() as i64;
        self.input_ids.extend(ids.iter().map(|&id| i64::from(id)));
        for (axis, positions) in self.axes.iter_mut().zip(positions) {
            axis.extend(positions);
        }
        (start..self.input_ids.len() as i64).collect()
    }
}

/// Lays out the samples' branches behind `rows`, those of each sample's `input_ids`: branches of one form together. Gives
/// them with the order in which their texts, and those of samples without branches, are read.
fn lay_branches(
    layout: &mut Layout,
    samples: &[&Sample],
    rows: &[Vec<i64>],
    place: impl Fn(&[u32], &[Patches]) -> Result<[Vec<i64>; 3], ModelError>,
    device: Device,
) -> Result<(Branches, Vec<i64>), ModelError> {
    let start = layout.input_ids.len() as i64;
    let of_sample =
        |(n, sample): (usize, &&Sample)| (0..sample.branches.len()).map(move |branch| (n, branch));
    let mut all: Vec<(usize, usize)> = samples.iter().enumerate().flat_map(of_sample).collect();
    let form = |&(n, branch): &(usize, usize)| (samples[n].branches[branch].input_ids.len(), rows[n].len());
    all.sort_by_key(|place| std::cmp::Reverse(form(place)));
    let mut texts: Vec<Vec<Vec<i64>>> = samples
        .iter()
        .zip(rows)
        .map(|(sample, rows)| vec![rows.clone(); sample.branches.len().max(1)])
        .collect();
    let mut laid = Vec::new();
    for (n, branch) in all {
        let Sample { input_ids, branches, pictures } = samples[n];
        let own = &branches[branch].input_ids;
        let positions = place(&[&input_ids[..], own].concat(), pictures)?;
        let text = &mut texts[n][branch];
        text.extend(layout.append(own, positions.each_ref().map(|axis| &axis[input_ids.len()..])));
        laid.push((own.len() as i64, text.clone()));
    }
    Ok(Branches::new(start, &laid, &texts.concat(), device))
}

/// Time, height and width position of a text's tokens, if it fits the model.
fn token_positions(
    config: &Config,
    scheme: Positions,
    vocabulary: i64,
    ids: &[u32],
    pictures: &[Patches],
) -> Result<[Vec<i64>; 3], ModelError> {
    let merge = config.vision.spatial_merge_size as usize;
    let grids: Vec<_> = pictures.iter().map(|p| (p.rows / merge, p.columns / merge)).collect();
    let grid = mrope_positions(ids, config.image_token_id, &grids)
        .ok_or_else(|| ModelError::Sample("the placeholders do not match the pictures' grids".into()))?;
    if ids.last() == Some(&config.image_token_id) {
        return Err(ModelError::Sample("the reward is to be read at a picture's placeholder".into()));
    }
    if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocabulary) {
        return Err(ModelError::Sample(format!(
            "token {id} is not among the {vocabulary} of the vocabulary"
        )));
    }
    Ok(match scheme {
        Positions::Mrope => grid,
        Positions::Flat => [(); 3].map(|()| (0..ids.len() as i64).collect()),
    })
}
