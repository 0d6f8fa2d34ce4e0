//! Bytes to pixels, as the reference's loader does it: PIL's `Image.open`, `exif_transpose`, `convert("RGB")`.

use std::fmt::Display;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, RgbImage};
use jpeg_decoder::{ImageInfo, PixelFormat};
use png::{BitDepth, Transformations};

use super::resample::Rgb;

/// The longest XMP text that is unpacked in search of an orientation.
const MAX_XMP_BYTES: usize = 1 << 20;

/// The most scans of a progressive JPEG. Encoders write about ten; each costs a pass over all coefficients, however
/// few bytes it has.
const MAX_SCANS: usize = 64;

/// The formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Png,
    Jpeg,
    WebP,
}

/// Pixels as they stand in the file, and how they are to be turned.
struct Decoded {
    rgb: Vec<u8>,
    exif: Option<Vec<u8>>,
    xmp: Option<Vec<u8>>,
}

impl Format {
    /// The format, by the first bytes alone.
    pub fn detect(bytes: &[u8]) -> Result<Self, String> {
        match image::guess_format(bytes) {
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

    /// The width and height in pixels that the header states, before any turning. No pixel is decoded.
    pub fn dimensions(self, bytes: &[u8]) -> Result<(u32, u32), String> {
        self.guarded(|| match self {
            Self::Png => {
                let mut decoder = png::Decoder::new(Cursor::new(bytes));
                let info = decoder.read_header_info().map_err(text)?;
                Ok((info.width, info.height))
            }
            Self::Jpeg => {
                let (_, info) = jpeg_header(bytes)?;
                Ok((info.width.into(), info.height.into()))
            }
            Self::WebP => Ok(WebPDecoder::new(Cursor::new(bytes)).map_err(text)?.dimensions()),
        })
    }

    /// The pixels, turned upright. `size` is what [`Format::dimensions`] gave.
    pub fn decode(self, bytes: &[u8], size: (u32, u32)) -> Result<Rgb, String> {
        let decoded = self.guarded(|| match self {
            Self::Png => decode_png(bytes),
            Self::Jpeg => decode_jpeg(bytes),
            Self::WebP => decode_webp(bytes),
        })?;
        let turn = orientation(decoded.exif.as_deref(), decoded.xmp.as_deref());
        let stored = RgbImage::from_raw(size.0, size.1, decoded.rgb)
            .ok_or_else(|| self.refusal("its pixels do not fill the size that its header states"))?;
        let mut upright = DynamicImage::ImageRgb8(stored);
        upright.apply_orientation(turn);
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

fn decode_png(bytes: &[u8]) -> Result<Decoded, String> {
    let mut options = png::DecodeOptions::default();
    options.set_ignore_adler32(false);
    let mut decoder = png::Decoder::new_with_options(Cursor::new(bytes), options);
    decoder.set_transformations(Transformations::EXPAND);
    // It changes no pixel here, and could unpack to far more than the picture.
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info().map_err(text)?;
    // Up to 0.18.1 the decoder panics at it.
    if reader.info().palette.as_ref().is_some_and(|palette| palette.len() % 3 != 0) {
        return Err("its palette ends within a colour".into());
    }
    let mut samples = vec![0; reader.output_buffer_size().ok_or("it is too large")?];
    let frame = reader.next_frame(&mut samples).map_err(text)?;
    samples.truncate(frame.buffer_size());
    // Metadata may follow the pixels. PIL takes a file whose end is missing if all pixels are there.
    let _ = reader.finish();
    let info = reader.info();
    let grey16 = (info.color_type, info.bit_depth) == (png::ColorType::Grayscale, BitDepth::Sixteen);
    let mut rgb = if grey16 {
        grey16_to_rgb(&samples, frame.color_type)
    } else {
        png_to_rgb(samples, frame.color_type, frame.bit_depth)?
    };
    if let Some(clear) = clear_colour(info) {
        let pixels = rgb.as_chunks_mut::<3>().0.iter_mut();
        pixels.filter(|pixel| **pixel == clear).for_each(|pixel| *pixel = [u8::MAX; 3]);
    }
    let xmp = info.utf8_text.iter().find(|t| t.keyword == "XML:com.adobe.xmp").cloned();
    Ok(Decoded {
        rgb,
        exif: info.exif_metadata.as_ref().map(|e| e.to_vec()),
        xmp: xmp.and_then(|mut text| {
            text.decompress_text_with_limit(MAX_XMP_BYTES).ok()?;
            text.get_text().ok().map(String::into_bytes)
        }),
    })
}

/// The one colour that a file without alpha declares transparent, as it is after the conversion to RGB.
///
/// PIL's `convert("RGB")` keeps it beside the pixels, and the reference's `convert_to_rgb` then lays the picture
/// on white. Where PIL's way of carrying the colour over is odd (grey of 1 and 16 bits, colours of 16 bits), the
/// reference's pixels are what counts. A palette with degrees of transparency keeps its colours.
fn clear_colour(info: &png::Info) -> Option<[u8; 3]> {
    let declared = info.trns.as_deref()?;
    // The decoder keeps two bytes of a 16-bit sample and one of any other.
    let bytes = if info.bit_depth == BitDepth::Sixteen { 2 } else { 1 };
    let low_byte = |sample: usize| declared.get((sample + 1) * bytes - 1).copied();
    match (info.color_type, info.bit_depth) {
        (png::ColorType::Grayscale, BitDepth::One) => Some([if low_byte(0)? > 0 { 255 } else { 0 }, 0, 0]),
        (png::ColorType::Grayscale, BitDepth::Sixteen) => Some([low_byte(0)?, 0, 0]),
        (png::ColorType::Grayscale, _) => Some([low_byte(0)?; 3]),
        (png::ColorType::Rgb, _) => Some([low_byte(0)?, low_byte(1)?, low_byte(2)?]),
        (png::ColorType::Indexed, _) => {
            let index = declared.iter().position(|&alpha| alpha == 0)?;
            let others = declared.iter().filter(|&&alpha| alpha == u8::MAX).count();
            let colour = info.palette.as_deref()?.as_chunks::<3>().0.get(index).copied();
            (others + 1 == declared.len()).then_some(colour.unwrap_or_default())
        }
        _ => None,
    }
}

/// PIL holds 16-bit grey as numbers and clips them at 255 on the way to RGB; every other 16-bit form loses its
/// low byte.
fn grey16_to_rgb(samples: &[u8], color: png::ColorType) -> Vec<u8> {
    let clip = |high: u8, low: u8| [if high > 0 { u8::MAX } else { low }; 3];
    match color {
        png::ColorType::GrayscaleAlpha => to_rgb(samples, |[high, low, ..]: [u8; 4]| clip(high, low)),
        _ => to_rgb(samples, |[high, low]: [u8; 2]| clip(high, low)),
    }
}

/// Alpha is dropped, not blended.
fn png_to_rgb(samples: Vec<u8>, color: png::ColorType, depth: BitDepth) -> Result<Vec<u8>, String> {
    use png::ColorType::{Grayscale, GrayscaleAlpha, Rgb, Rgba};
    Ok(match (color, depth) {
        (Rgb, BitDepth::Eight) => samples,
        (Rgba, BitDepth::Eight) => drop_alpha(&samples),
        (Grayscale, BitDepth::Eight) => to_rgb(&samples, |[grey]: [u8; 1]| [grey; 3]),
        (GrayscaleAlpha, BitDepth::Eight) => to_rgb(&samples, |[grey, _]: [u8; 2]| [grey; 3]),
        (Rgb, BitDepth::Sixteen) => to_rgb(&samples, |[r, _, g, _, b, _]: [u8; 6]| [r, g, b]),
        (Rgba, BitDepth::Sixteen) => to_rgb(&samples, |[r, _, g, _, b, ..]: [u8; 8]| [r, g, b]),
        (GrayscaleAlpha, BitDepth::Sixteen) => to_rgb(&samples, |[grey, ..]: [u8; 4]| [grey; 3]),
        (color, depth) => return Err(format!("{color:?} of {depth:?} bits is not supported")),
    })
}

/// Reads up to the first scan: sizes and metadata, no pixels.
fn jpeg_header(bytes: &[u8]) -> Result<(jpeg_decoder::Decoder<&[u8]>, ImageInfo), String> {
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    decoder.read_info().map_err(text)?;
    let info = decoder.info().ok_or("it has no frame")?;
    Ok((decoder, info))
}

/// Of the decoders in Rust this one spreads the halved chroma most nearly as libjpeg does.
fn decode_jpeg(bytes: &[u8]) -> Result<Decoded, String> {
    let (mut decoder, info) = jpeg_header(bytes)?;
    // Within a scan this pair of bytes cannot stand.
    let scans = bytes.windows(2).filter(|pair| *pair == [0xff, 0xda]).count();
    if scans > MAX_SCANS {
        return Err(format!("it has {scans} scans, and at most {MAX_SCANS} are decoded"));
    }
    // What it allocates grows with the size that the header states, which is within the caller's limit.
    let samples = decoder.decode().map_err(text)?;
    let rgb = match info.pixel_format {
        PixelFormat::RGB24 => samples,
        PixelFormat::L8 => to_rgb(&samples, |[grey]: [u8; 1]| [grey; 3]),
        PixelFormat::CMYK32 => to_rgb(&samples, cmyk_to_rgb),
        PixelFormat::L16 => return Err("samples of 16 bits are not supported".into()),
    };
    Ok(Decoded {
        rgb,
        exif: decoder.exif_data().map(<[u8]>::to_vec),
        xmp: decoder.xmp_data().map(<[u8]>::to_vec),
    })
}

fn decode_webp(bytes: &[u8]) -> Result<Decoded, String> {
    // Behind `RIFF` stands the length of the rest. The decoder reads zeros where the pixels' data ends early.
    let stated = bytes.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if stated.is_none_or(|rest| (bytes.len() as u64) < 8 + u64::from(rest)) {
        return Err("it is shorter than its header states".into());
    }
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(text)?;
    let (exif, xmp) = (decoder.exif_metadata().map_err(text)?, decoder.xmp_metadata().map_err(text)?);
    let color = decoder.color_type();
    let mut samples = vec![0; usize::try_from(decoder.total_bytes()).map_err(text)?];
    decoder.read_image(&mut samples).map_err(text)?;
    let rgb = if color == ColorType::Rgba8 { drop_alpha(&samples) } else { samples };
    Ok(Decoded { rgb, exif, xmp })
}

fn drop_alpha(samples: &[u8]) -> Vec<u8> {
    to_rgb(samples, |[r, g, b, _]: [u8; 4]| [r, g, b])
}

fn to_rgb<const N: usize>(samples: &[u8], convert: impl Fn([u8; N]) -> [u8; 3]) -> Vec<u8> {
    let pixels = samples.as_chunks::<N>().0;
    let mut rgb = vec![0; pixels.len() * 3];
    for (out, &pixel) in rgb.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
        *out = convert(pixel);
    }
    rgb
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

/// How the picture is to be turned: the EXIF tag, else XMP's, as PIL's `Image.getexif` looks for it.
fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    let exif = exif.map(|chunk| chunk.strip_prefix(b"Exif\0\0").unwrap_or(chunk));
    exif.and_then(Orientation::from_exif_chunk)
        .or_else(|| xmp.and_then(xmp_orientation))
        .unwrap_or(Orientation::NoTransforms)
}

/// `tiff:Orientation="6"` or `<tiff:Orientation>6`, wherever it first stands.
fn xmp_orientation(xmp: &[u8]) -> Option<Orientation> {
    const TAG: &[u8] = b"tiff:Orientation";
    let value = xmp.windows(TAG.len()).enumerate().find_map(|(at, window)| {
        let rest = (window == TAG).then(|| &xmp[at + TAG.len()..])?;
        let rest = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?;
        rest.first().filter(|digit| digit.is_ascii_digit())
    })?;
    Orientation::from_exif(value - b'0')
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

    #[test]
    fn xmp_turns_a_picture_where_exif_does_not() {
        let little_endian = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0";
        let prefixed = [b"Exif\0\0", &little_endian[..]].concat();
        let attribute: &[u8] = b"<x tiff:Orientation='6' tiff:Orientation=\"6\"/>";
        let element: &[u8] = b"<tiff:Orientation>8</tiff:Orientation>";
        let cases = [
            (None, None, Orientation::NoTransforms),
            (None, Some(attribute), Orientation::Rotate90),
            (None, Some(element), Orientation::Rotate270),
            (Some(&little_endian[..]), Some(element), Orientation::Rotate180),
            (Some(&prefixed[..]), None, Orientation::Rotate180),
            (Some(b"nothing"), Some(element), Orientation::Rotate270),
        ];
        for (exif, xmp, expected) in cases {
            assert_eq!(orientation(exif, xmp), expected);
        }
    }
}
