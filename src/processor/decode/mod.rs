//! Bytes to pixels, as the reference's loader does it: PIL's `Image.open`, `exif_transpose`, `convert("RGB")`.

mod jpeg;
mod libjpeg;
mod orientation;
mod png;
mod webp;

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ::image::{DynamicImage, ImageFormat, RgbImage};
use bytes::Bytes;

use self::orientation::Metadata;
use super::resample::Rgb;

/// The formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Png,
    Jpeg,
    WebP,
}

/// What a file says before its pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// In pixels, before any turning.
    pub width: u32,
    /// In pixels, before any turning.
    pub height: u32,
    /// The most bytes that [`Format::decode`] holds at once, its result included.
    pub memory: u64,
}

/// Pixels as they stand in the file, and how they are to be turned.
struct Decoded {
    rgb: Vec<u8>,
    metadata: Metadata,
}

impl Format {
    /// The format, by the first bytes alone.
    pub fn detect(bytes: &[u8]) -> Result<Self, String> {
        match ::image::guess_format(bytes) {
            Ok(ImageFormat::Png) => Ok(Self::Png),
            Ok(ImageFormat::Jpeg) => Ok(Self::Jpeg),
            Ok(ImageFormat::WebP) => Ok(Self::WebP),
            Ok(other) => {
                Err(format!("the picture is {}; send PNG, JPEG or WebP", format!("{other:?}").to_uppercase()))
            }
            Err(_) if bytes.is_empty() => Err("there are no bytes; send PNG, JPEG or WebP".into()),
            Err(_) => Err("the first bytes are those of no known picture; send PNG, JPEG or WebP".into()),
        }
    }

    /// What the header states. No pixel is decoded.
    pub fn header(self, bytes: &[u8]) -> Result<Header, String> {
        let ((width, height), beside) = self.guarded(|| match self {
            Self::Png => png::header(bytes),
            Self::Jpeg => jpeg::header(bytes),
            Self::WebP => webp::header(bytes),
        })?;
        // RGB, and once more where it is turned, when what the file holds has been let go.
        let rgb = 3 * u64::from(width) * u64::from(height);
        Ok(Header { width, height, memory: rgb + beside.max(rgb) })
    }

    /// The pixels, turned upright. `size` is what the header states.
    pub fn decode(self, bytes: &[u8], size: (u32, u32)) -> Result<Rgb, String> {
        let decoded = self.guarded(|| match self {
            Self::Png => png::decode(bytes),
            Self::Jpeg => jpeg::decode(bytes),
            Self::WebP => webp::decode(bytes),
        })?;
        let stored = RgbImage::from_raw(size.0, size.1, decoded.rgb)
            .ok_or_else(|| self.refusal("its pixels do not fill the size that its header states"))?;
        let mut upright = DynamicImage::ImageRgb8(stored);
        upright.apply_orientation(decoded.metadata.orientation());
        let upright = upright.into_rgb8();
        Ok(Rgb { width: upright.width(), height: upright.height(), pixels: Bytes::from(upright.into_raw()) })
    }

    fn refusal(self, reason: impl Display) -> String {
        format!("the {self:?} file cannot be decoded: {reason}; send a whole, valid file")
    }

    /// Runs a decoder on bytes that nobody has checked: should it panic, then the file is refused and the
    /// server goes on.
    fn guarded<T>(self, decode: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        catch_unwind(AssertUnwindSafe(decode))
            .unwrap_or_else(|_| Err("the decoder gave up".into()))
            .map_err(|reason| self.refusal(reason))
    }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

fn drop_alpha(samples: &[u8]) -> Vec<u8> {
    to_rgb(samples, |[r, g, b, _]: [u8; 4]| [r, g, b])
}

fn to_rgb<const N: usize>(samples: &[u8], convert: impl Fn([u8; N]) -> [u8; 3]) -> Vec<u8> {
    let mut rgb = vec![0; samples.len() / N * 3];
    put_rgb(&mut rgb, samples, convert);
    rgb
}

fn put_rgb<const N: usize>(rgb: &mut [u8], samples: &[u8], convert: impl Fn([u8; N]) -> [u8; 3]) {
    for (out, &pixel) in rgb.as_chunks_mut::<3>().0.iter_mut().zip(samples.as_chunks::<N>().0) {
        *out = convert(pixel);
    }
}

/// PIL's `convert("RGB")` of mode CMYK: what black leaves, less the colour's share of it.
fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let light = u8::MAX - k;
    [c, m, y].map(|colour| {
        let product = u32::from(colour) * u32::from(light) + 128;
        let share = ((product >> 8) + product) >> 8;
        light.saturating_sub(share as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_colours_become_three_as_in_pil() {
        // Image.new("CMYK", (1, 1), …).convert("RGB")
        let cases = [
            ([0, 0, 0, 0], [255, 255, 255]),
            ([255, 0, 0, 0], [0, 255, 255]),
            ([10, 200, 30, 128], [122, 27, 112]),
            ([3, 4, 5, 250], [5, 5, 5]),
            ([77, 1, 254, 99], [109, 155, 1]),
        ];
        for (cmyk, rgb) in cases {
            assert_eq!(cmyk_to_rgb(cmyk), rgb);
        }
    }
}
