//! A batch of samples as the tensors that the towers read.

use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::rope::{grid_taps, mrope_positions, vision_positions, windows};
use super::varlen_attention::{Segments, permutation};
use crate::model::checkpoint::Positions;
use crate::model::layers::upload;
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
    /// The tokens of each sample.
    pub samples: Segments,
    /// Puts one row per sample into the order of the samples. `None` where they are in it.
    given_order: Option<Tensor>,
}

impl TextBatch {
    /// Puts one row per sample into the order in which the samples were given.
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
    order.sort_by_key(|&n| std::cmp::Reverse(samples[n as usize].tokens()));

    let mut input_ids = Vec::new();
    let mut axes: [Vec<i64>; 3] = Default::default();
    // By sample: pictures lie in the order of the samples, and within one in the order of their placeholders.
    let (mut rows, mut placeholders) = (Vec::new(), vec![Vec::new(); samples.len()]);
    for &n in &order {
        let sample = samples[n as usize];
        let positions = token_positions(config, scheme, vocabulary, sample)?;
        let start = input_ids.len() as i64;
        input_ids.extend(sample.input_ids.iter().map(|&id| i64::from(id)));
        let tokens = (start..).zip(&sample.input_ids);
        placeholders[n as usize] =
            tokens.filter(|(_, id)| **id == config.image_token_id).map(|(row, _)| row).collect();
        rows.push((start..input_ids.len() as i64).collect());
        for (axis, positions) in axes.iter_mut().zip(positions) {
            axis.extend(positions);
        }
    }
    // The first patch of each visual token tells which token of the natural order it is.
    let placeholders = placeholders.concat();
    let visual_rows: Vec<i64> =
        natural.iter().step_by(unit as usize).map(|&patch| placeholders[(patch / unit) as usize]).collect();
    Ok(TextBatch {
        input_ids: upload(&Tensor::from_slice(&input_ids), device),
        visual_rows: upload(&Tensor::from_slice(&visual_rows), device),
        positions: upload(&Tensor::from_slice(&axes.concat()).view([3, -1]), device),
        samples: Segments::new(&rows, device),
        given_order: permutation(&order, device).map(|(_, inverse)| inverse),
    })
}

/// Time, height and width position of a sample's tokens, if it fits the model.
fn token_positions(
    config: &Config,
    scheme: Positions,
    vocabulary: i64,
    sample: &Sample,
) -> Result<[Vec<i64>; 3], ModelError> {
    let (ids, merge) = (&sample.input_ids, config.vision.spatial_merge_size as usize);
    let grids: Vec<_> = sample.pictures.iter().map(|p| (p.rows / merge, p.columns / merge)).collect();
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
