//! Pixels to patches: the twin of the reference's `Qwen2VLImageProcessor`, up to rescaling.

use super::resample::{Rgb, resample};
use crate::model::Patches;
use crate::model::profile::FirstResize;

/// The greatest ratio of a picture's sides that the reference takes.
const MAX_ASPECT_RATIO: f64 = 200.0;

/// How pictures are resized and cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// The side of a patch in pixels.
    pub patch: usize,
    /// The side in patches of the block that becomes one visual token.
    pub merge: usize,
    /// The least number of pixels that a picture is resized to.
    pub min_pixels: u64,
    /// The greatest number of pixels that a picture is resized to.
    pub max_pixels: u64,
    /// A resize before it.
    pub first: Option<FirstResize>,
}

/// Why a picture cannot be resized to whole patches.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SizeError {
    /// A side is zero pixels long.
    #[error("the picture is {width} x {height} pixels; both sides must be above 0")]
    Empty {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
    /// One side is too long for the other.
    #[error("the picture is {width} x {height} pixels; one side may be at most 200 times the other")]
    AspectRatio {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
    /// The size that the limits lead to is no size.
    #[error("the picture of {width} x {height} pixels would be resized to nothing")]
    Vanishes {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
}

/// The width and height in pixels that a picture is resized to: multiples of `factor`, from `min_pixels` to
/// `max_pixels` in all, of about the same aspect ratio.
///
/// The reference's `smart_resize`, in its double precision and with its ties to even. As there, the result may
/// exceed `max_pixels` where a side would else be shorter than `factor`, or where a small picture is enlarged.
///
/// # Errors
///
/// A side of zero, and an aspect ratio above 200, which the reference refuses too.
pub fn smart_resize(
    (width, height): (u32, u32),
    factor: u64,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(u64, u64), SizeError> {
    if width == 0 || height == 0 {
        return Err(SizeError::Empty { width, height });
    }
    let (w, h, step) = (f64::from(width), f64::from(height), factor as f64);
    if w.max(h) / w.min(h) > MAX_ASPECT_RATIO {
        return Err(SizeError::AspectRatio { width, height });
    }
    let area = (u64::from(width) * u64::from(height)) as f64;
    let multiple = |steps: f64| steps as u64 * factor;
    let mut size = (multiple((w / step).round_ties_even()), multiple((h / step).round_ties_even()));
    if size.0 * size.1 > max_pixels {
        let beta = (area / max_pixels as f64).sqrt();
        let shrunk = |side: f64| multiple((side / beta / step).floor()).max(factor);
        size = (shrunk(w), shrunk(h));
    } else if size.0 * size.1 < min_pixels {
        let beta = (min_pixels as f64 / area).sqrt();
        let enlarged = |side: f64| multiple((side * beta / step).ceil());
        size = (enlarged(w), enlarged(h));
    }
    if size.0 == 0 || size.1 == 0 {
        return Err(SizeError::Vanishes { width, height });
    }
    Ok(size)
}

impl Geometry {
    /// The width and height in pixels that a picture of this size is resized to.
    pub fn resized(&self, size: (u32, u32)) -> Result<(u64, u64), SizeError> {
        let size = match self.first {
            None => size,
            Some(_) => {
                let (width, height) = self.first_resized(size)?;
                let side = |length: u64| u32::try_from(length).unwrap_or(u32::MAX);
                (side(width), side(height))
            }
        };
        smart_resize(size, (self.patch * self.merge) as u64, self.min_pixels, self.max_pixels)
    }

    /// What it is resized to before that; nothing where it is not.
    pub fn first_resized(&self, size: (u32, u32)) -> Result<(u64, u64), SizeError> {
        match self.first {
            None => Ok((0, 0)),
            Some(FirstResize { factor, min_pixels, max_pixels }) => {
                smart_resize(size, factor, min_pixels, max_pixels)
            }
        }
    }

    /// The visual tokens of a resized picture of this size.
    pub fn visual_tokens(&self, (width, height): (u64, u64)) -> u64 {
        let block = (self.patch * self.merge) as u64;
        (width / block) * (height / block)
    }

    /// Resizes a picture and cuts it into patches. Fails with what is wrong with its size.
    pub fn patches(&self, picture: &Rgb) -> Result<Patches, String> {
        let size = self.resized((picture.width, picture.height)).map_err(|e| e.to_string())?;
        let side = |length: u64| u32::try_from(length).map_err(|e| e.to_string());
        let (width, height) = (side(size.0)?, side(size.1)?);
        let first;
        let mut picture = picture;
        if self.first.is_some() {
            let size = self.first_resized((picture.width, picture.height)).map_err(|e| e.to_string())?;
            let (width, height) = (side(size.0)?, side(size.1)?);
            let pixels = resample(picture, width as usize, height as usize).into_owned().into();
            first = Rgb { width, height, pixels };
            picture = &first;
        }
        let pixels = resample(picture, width as usize, height as usize);
        Ok(self.cut(&pixels, width as usize, height as usize))
    }

    /// Cuts `[height, width, 3]` pixels into patches, merge block by merge block.
    ///
    /// The reference's `patchify`, without its repeated temporal axis.
    fn cut(&self, rgb: &[u8], width: usize, height: usize) -> Patches {
        let (patch, merge) = (self.patch, self.merge);
        let area = patch * patch;
        let (rows, columns, blocks_in_row) = (height / patch, width / patch, width / patch / merge);
        let mut pixels = vec![0; rows * columns * 3 * area];
        for (index, out) in pixels.chunks_exact_mut(3 * area).enumerate() {
            let (block, within) = (index / (merge * merge), index % (merge * merge));
            let row = block / blocks_in_row * merge + within / merge;
            let column = block % blocks_in_row * merge + within % merge;
            let (red, rest) = out.split_at_mut(area);
            let (green, blue) = rest.split_at_mut(area);
            for y in 0..patch {
                let start = ((row * patch + y) * width + column * patch) * 3;
                let line = rgb[start..start + 3 * patch].as_chunks::<3>().0;
                let lane = y * patch..(y + 1) * patch;
                let channels =
                    red[lane.clone()].iter_mut().zip(&mut green[lane.clone()]).zip(&mut blue[lane]);
                for (((r, g), b), pixel) in channels.zip(line) {
                    (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
                }
            }
        }
        Patches { rows, columns, pixels }
    }

    /// The picture that was cut into these patches.
    pub fn joined(&self, patches: &Patches) -> Rgb {
        let (patch, merge) = (self.patch, self.merge);
        let area = patch * patch;
        let (width, height) = (patches.columns * patch, patches.rows * patch);
        let blocks_in_row = patches.columns / merge;
        let mut rgb = vec![0; width * height * 3];
        for (index, from) in patches.pixels.chunks_exact(3 * area).enumerate() {
            let (block, within) = (index / (merge * merge), index % (merge * merge));
            let row = block / blocks_in_row * merge + within / merge;
            let column = block % blocks_in_row * merge + within % merge;
            for y in 0..patch {
                let start = ((row * patch + y) * width + column * patch) * 3;
                let line = rgb[start..start + 3 * patch].as_chunks_mut::<3>().0;
                for (x, pixel) in line.iter_mut().enumerate() {
                    *pixel = [0, 1, 2].map(|channel| from[channel * area + y * patch + x]);
                }
            }
        }
        // A side is one that a picture was resized to, which fits.
        Rgb { width: width as u32, height: height as u32, pixels: rgb.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HPSv3++'s code: qwen-vl-utils' `fetch_image` at 28, then Qwen3-VL's processor at 32.
    #[test]
    fn a_first_resize_is_made_before_the_processor_s_own() {
        let first = FirstResize { factor: 28, min_pixels: 200_704, max_pixels: 200_704 };
        let geometry =
            Geometry { patch: 16, merge: 2, min_pixels: 65_536, max_pixels: 16_777_216, first: Some(first) };
        assert_eq!(geometry.first_resized((400, 500)), Ok((420, 504)));
        assert_eq!(geometry.resized((400, 500)), Ok((416, 512)));
        assert_eq!(geometry.resized((448, 448)), Ok((448, 448)));
        // Twice resampled, which is not the same as once.
        let pixels: Vec<u8> = (0..3 * 400 * 500u32).map(|n| (n * 7919 % 251) as u8).collect();
        let picture = Rgb { width: 400, height: 500, pixels: pixels.into() };
        let between = resample(&picture, 420, 504).into_owned();
        let between = Rgb { width: 420, height: 504, pixels: between.into() };
        let twice = Geometry { first: None, ..geometry }.patches(&between).unwrap();
        let once = Geometry { first: None, ..geometry }.patches(&picture).unwrap();
        let both = geometry.patches(&picture).unwrap();
        assert_eq!(both, twice);
        assert_ne!(both, once);
    }

    #[test]
    fn patches_are_joined_to_the_picture_that_was_cut() {
        for (patch, merge, columns, rows) in [(14, 2, 4, 6), (16, 2, 2, 2), (3, 1, 5, 2), (2, 3, 9, 3)] {
            let geometry = Geometry { patch, merge, min_pixels: 1, max_pixels: u64::MAX, first: None };
            let (width, height) = (columns * patch, rows * patch);
            let pixels: Vec<u8> = (0..3 * width * height).map(|n| (n * 7919 % 251) as u8).collect();
            let joined = geometry.joined(&geometry.cut(&pixels, width, height));
            assert_eq!((joined.width as usize, joined.height as usize), (width, height));
            assert_eq!(joined.pixels, pixels);
        }
    }
}
