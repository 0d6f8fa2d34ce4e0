//! A batch of samples as the tensors that the towers read.

use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::rope::{mrope_positions, vision_positions, windows};
use super::segments::Segments;
use crate::model::checkpoint::Positions;
use crate::model::layers::upload;
use crate::model::{ModelError, Sample};

/// The pictures of a batch, laid end to end.
///
/// Patches lie window by window, since most blocks attend within windows.
#[derive(Debug)]
pub struct VisionBatch {
    /// `[patches, channels × patch × patch]`, bytes.
    pub pixels: Tensor,
    /// Row and column of each patch, `[patches, 2]`.
    pub positions: Tensor,
    /// The patches of each window.
    pub windows: Segments,
    /// The patches of each picture.
    pub pictures: Segments,
    /// The place of each patch in the order of the samples and of the processor, `[patches]`.
    pub natural: Vec<i64>,
}

/// The texts of a batch, laid end to end.
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
}

/// Lays out the pictures of a batch.
pub fn vision_batch(config: &Config, samples: &[&Sample], device: Device) -> VisionBatch {
    let (merge, unit) = (config.vision.spatial_merge_size as usize, config.vision.merge_unit());
    let (mut natural, mut positions, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
    let (mut window_rows, mut picture_rows) = (Vec::new(), Vec::new());
    let mut first = 0;
    for image in samples.iter().map(|s| &s.image) {
        let places = vision_positions(image.rows, image.columns, merge);
        let size = config.vision.patch_bytes();
        let start = natural.len() as i64;
        for window in windows(image.rows / merge, image.columns / merge, config.vision.window_tokens()) {
            let row = natural.len() as i64;
            for patch in window.into_iter().flat_map(|token| token * unit..(token + 1) * unit) {
                natural.push((first + patch) as i64);
                positions.extend(places[patch]);
                pixels.extend_from_slice(&image.pixels[patch * size..(patch + 1) * size]);
            }
            window_rows.push((row..natural.len() as i64).collect());
        }
        picture_rows.push((start..natural.len() as i64).collect());
        first += places.len();
    }
    let patches = natural.len() as i64;
    VisionBatch {
        pixels: upload(
            &Tensor::from_data_size(&pixels, &[patches, config.vision.patch_bytes() as i64], Kind::Uint8),
            device,
        ),
        positions: upload(&Tensor::from_slice(&positions).view([patches, 2]), device),
        windows: Segments::new(&window_rows, device),
        pictures: Segments::new(&picture_rows, device),
        natural,
    }
}

/// Lays out the texts of a batch.
///
/// # Errors
/// A sample's placeholders do not match its picture, or an id is not in the vocabulary of `vocabulary` rows.
pub fn text_batch(
    config: &Config,
    scheme: Positions,
    vocabulary: i64,
    samples: &[&Sample],
    natural: &[i64],
    device: Device,
) -> Result<TextBatch, ModelError> {
    let (merge, unit) = (config.vision.spatial_merge_size as usize, config.vision.merge_unit() as i64);
    let mut input_ids = Vec::new();
    let mut axes: [Vec<i64>; 3] = Default::default();
    let (mut rows, mut placeholders) = (Vec::new(), Vec::new());
    for sample in samples {
        let ids = &sample.input_ids;
        let grid = mrope_positions(
            ids,
            config.image_token_id,
            sample.image.rows / merge,
            sample.image.columns / merge,
        )
        .ok_or_else(|| ModelError::Sample("the placeholders do not match the picture's grid".into()))?;
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocabulary) {
            return Err(ModelError::Sample(format!(
                "token {id} is not among the {vocabulary} of the vocabulary"
            )));
        }
        let start = input_ids.len() as i64;
        input_ids.extend(ids.iter().map(|&id| i64::from(id)));
        placeholders
            .extend((start..).zip(ids).filter(|(_, id)| **id == config.image_token_id).map(|(row, _)| row));
        rows.push((start..input_ids.len() as i64).collect());
        for (axis, grid) in axes.iter_mut().zip(grid) {
            match scheme {
                Positions::Mrope => axis.extend(grid),
                Positions::Flat => axis.extend(0..ids.len() as i64),
            }
        }
    }
    // The first patch of each visual token tells which token of the natural order it is.
    let visual_rows: Vec<i64> =
        natural.iter().step_by(unit as usize).map(|&patch| placeholders[(patch / unit) as usize]).collect();
    Ok(TextBatch {
        input_ids: upload(&Tensor::from_slice(&input_ids), device),
        visual_rows: upload(&Tensor::from_slice(&visual_rows), device),
        positions: upload(&Tensor::from_slice(&axes.concat()).view([3, -1]), device),
        samples: Segments::new(&rows, device),
    })
}
