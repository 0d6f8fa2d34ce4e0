//! PIL's bicubic resize of 8-bit pictures, bit for bit.
//!
//! The weights are those of Catmull-Rom, widened when shrinking, in PIL's 22 fractional bits; each axis is done
//! for itself and rounded to bytes in between. Faster resizers work with 16-bit weights or in another order, and
//! then a few values in a thousand are off by more than one.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;

/// How far the kernel reaches, in pixels of the coarser of the two pictures.
const SUPPORT: f64 = 2.0;

/// The fractional bits of a weight: what 32 bits leave beside a byte and two bits for sums beyond it.
const PRECISION: u32 = 22;

/// The lines that are convolved together.
const BAND: usize = 16;

/// A half, so that shifting the fraction away rounds.
const HALF: i32 = 1 << (PRECISION - 1);

/// A picture of 8-bit RGB.
#[derive(Clone)]
pub struct Rgb {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// `[height, width, 3]`.
    pub pixels: Bytes,
}

impl Rgb {
    /// As a PNG file, made quickly.
    ///
    /// # Errors
    ///
    /// The pixels are not those of its sides.
    pub fn png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(file)
    }
}

/// Without what the caller sent, so that it never reaches a log.
impl fmt::Debug for Rgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a picture of {} x {}", self.width, self.height)
    }
}

/// The stretch of source pixels that make one pixel.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

/// Which neighbours a pixel is made from.
enum Axis {
    Horizontal,
    Vertical,
}

/// The picture's `[height, width, 3]` bytes at another size.
pub(super) fn resample(picture: &Rgb, width: usize, height: usize) -> Cow<'_, [u8]> {
    let mut pixels = Cow::Borrowed(&picture.pixels[..]);
    let (mut now_width, mut now_height) = (picture.width as usize, picture.height as usize);
    let vertical_first = goes_vertically_first((now_width, now_height), (width, height));
    for vertical in [vertical_first, !vertical_first] {
        if vertical && height != now_height {
            let windows = windows(now_height, height);
            pixels = Cow::Owned(convolve(Axis::Vertical, &pixels, now_width, &windows));
            now_height = height;
        } else if !vertical && width != now_width {
            let windows = windows(now_width, width);
            pixels = Cow::Owned(convolve(Axis::Horizontal, &pixels, now_width, &windows));
            now_width = width;
        }
    }
    pixels
}

/// Which axis comes first shows in the result, since bytes are clipped in between. Found by trial on Pillow 13,
/// which takes the vertical one if the height shrinks by more than twice what the width does; Pillow before 13
/// always began with the horizontal one.
fn goes_vertically_first(from: (usize, usize), to: (usize, usize)) -> bool {
    to.1 < from.1 && from.1 - to.1 + 2 * to.0 > 2 * from.0
}

/// For each of `to` pixels, the window over the `from` pixels.
fn windows(from: usize, to: usize) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let widening = scale.max(1.0);
    let reach = SUPPORT * widening;
    let window = |index: usize| {
        let centre = (index as f64 + 0.5) * scale;
        let start = (centre - reach + 0.5).max(0.0) as usize;
        let end = ((centre + reach + 0.5) as usize).min(from);
        let weights: Vec<f64> =
            (start..end).map(|at| catmull_rom((at as f64 - centre + 0.5) * (1.0 / widening))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| (weight / sum * f64::from(1 << PRECISION)).round() as i32;
        Window { start, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(window).collect()
}

/// Keys' cubic convolution with a = −1/2.
fn catmull_rom(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < SUPPORT {
        (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    } else {
        0.0
    }
}

/// Convolves `[_, width, 3]` bytes along an axis, with the instructions that multiply eight weights at a time where
/// the processor has them. The result is the same without.
#[allow(unsafe_code)]
fn convolve(axis: Axis, pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which is the one thing that `convolve_avx2` asks for.
        return unsafe { convolve_avx2(axis, pixels, width, windows) };
    }
    convolve_plain(axis, pixels, width, windows)
}

/// What is called here is compiled with AVX2 only as far as it is inlined, which a closure would not be.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn convolve_avx2(axis: Axis, pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    convolve_plain(axis, pixels, width, windows)
}

#[inline(always)]
fn convolve_plain(axis: Axis, pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    match axis {
        Axis::Horizontal => horizontally(pixels, width, windows),
        Axis::Vertical => vertically(pixels, 3 * width, windows),
    }
}

#[inline(always)]
fn to_bytes(bytes: &mut [u8], sums: &[i32]) {
    for (byte, &sum) in bytes.iter_mut().zip(sums) {
        *byte = (sum >> PRECISION).clamp(0, 255) as u8;
    }
}

/// Convolves each line. A band of lines is first laid column by column, so that equal weights meet neighbouring
/// bytes.
#[inline(always)]
fn horizontally(pixels: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    let (line, new_line) = (3 * width, 3 * windows.len());
    let mut out = vec![0; pixels.len() / line * new_line];
    let mut columns = vec![[0_u8; 3 * BAND]; width];
    for (out, band) in out.chunks_mut(BAND * new_line).zip(pixels.chunks(BAND * line)) {
        for (row, line) in band.chunks_exact(line).enumerate() {
            for (column, pixel) in columns.iter_mut().zip(line.as_chunks::<3>().0) {
                column[3 * row..3 * row + 3].copy_from_slice(pixel);
            }
        }
        for (x, window) in windows.iter().enumerate() {
            let mut sums = [HALF; 3 * BAND];
            for (&weight, column) in window.weights.iter().zip(&columns[window.start..]) {
                add(&mut sums, weight, column);
            }
            let mut bytes = [0; 3 * BAND];
            to_bytes(&mut bytes, &sums);
            for (line, pixel) in out.chunks_exact_mut(new_line).zip(bytes.as_chunks::<3>().0) {
                line[3 * x..3 * x + 3].copy_from_slice(pixel);
            }
        }
    }
    out
}

/// Convolves lines of so many bytes with those above and below.
#[inline(always)]
fn vertically(pixels: &[u8], line: usize, windows: &[Window]) -> Vec<u8> {
    let mut out = vec![0; line * windows.len()];
    let mut sums = vec![0; line];
    for (out, window) in out.chunks_exact_mut(line).zip(windows) {
        sums.fill(HALF);
        let lines = pixels.chunks_exact(line).skip(window.start);
        for (&weight, source) in window.weights.iter().zip(lines) {
            add(&mut sums, weight, source);
        }
        to_bytes(out, &sums);
    }
    out
}

#[inline(always)]
fn add(sums: &mut [i32], weight: i32, values: &[u8]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += weight * i32::from(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_avx2_gives_the_same_bytes() {
        let pixels: Vec<u8> =
            (0..61 * 47 * 3_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for to in [1, 20, 47, 90] {
            let (across, down) = (windows(61, to), windows(47, to));
            let plain = convolve_plain(Axis::Horizontal, &pixels, 61, &across);
            assert_eq!(convolve(Axis::Horizontal, &pixels, 61, &across), plain);
            let plain = convolve_plain(Axis::Vertical, &pixels, 61, &down);
            assert_eq!(convolve(Axis::Vertical, &pixels, 61, &down), plain);
        }
    }
}
