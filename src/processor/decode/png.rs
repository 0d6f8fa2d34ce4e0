//! PNG, by the `png` crate, with Pillow's ways of making RGB of each form.

use std::io::{Cursor, ErrorKind};

use ::png::{self as png, BitDepth, DecodingError, InterlaceInfo, Transformations};

use super::orientation::Metadata;
use super::{Decoded, drop_alpha, text, to_rgb};

/// The longest text that is unpacked in search of an orientation.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// Where each of Adam7's passes starts and how far it steps: x, y, dx, dy.
const PASSES: [[u32; 4]; 7] =
    [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];

type Reader<'a> = png::Reader<Cursor<&'a [u8]>>;

/// The size, and the most bytes that decoding holds beside the RGB: the samples as they stand in the file.
pub(super) fn header(bytes: &[u8]) -> Result<((u32, u32), u64), String> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    let info = decoder.read_header_info().map_err(text)?;
    // Palettes and low depths are expanded, and what is declared clear becomes an alpha.
    let pixel = if info.bit_depth == BitDepth::Sixteen { 8 } else { 4 };
    Ok(((info.width, info.height), u64::from(info.width) * u64::from(info.height) * pixel))
}

pub(super) fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    check_header_sums(bytes)?;
    let mut options = png::DecodeOptions::default();
    options.set_ignore_crc(true);
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
    let (color, depth) = reader.output_color_type();
    let samples = read_samples(&mut reader)?;
    // Metadata may follow the pixels.
    let _ = reader.finish();
    let info = reader.info();
    let grey16 = (info.color_type, info.bit_depth) == (png::ColorType::Grayscale, BitDepth::Sixteen);
    let mut rgb =
        if grey16 { grey16_to_rgb(&samples, color) } else { samples_to_rgb(samples, color, depth)? };
    if let Some(clear) = clear_colour(info) {
        let pixels = rgb.as_chunks_mut::<3>().0.iter_mut();
        pixels.filter(|pixel| **pixel == clear).for_each(|pixel| *pixel = [u8::MAX; 3]);
    }
    Ok(Decoded { rgb, metadata: metadata(info) })
}

/// Checks the sums of the chunks before the pixels, as PIL does. It looks at none of those behind: the pixels have
/// zlib's own sum.
fn check_header_sums(bytes: &[u8]) -> Result<(), String> {
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some(length) = rest.first_chunk() {
        let length = u32::from_be_bytes(*length) as usize;
        if rest[4..].starts_with(b"IDAT") {
            break;
        }
        let chunk = rest.get(4..8 + length).unwrap_or_default();
        let sum = rest.get(8 + length..).and_then(|behind| behind.first_chunk());
        if sum.map(|sum| u32::from_be_bytes(*sum)) != Some(crc32fast::hash(chunk)) {
            return Err("a chunk of its header is damaged".into());
        }
        rest = &rest[12 + length..];
    }
    Ok(())
}

/// All rows. PIL takes a file whose end is missing if all pixels are there, so the rows are counted.
fn read_samples(reader: &mut Reader<'_>) -> Result<Vec<u8>, String> {
    let mut samples = vec![0; reader.output_buffer_size().ok_or("it is too large")?];
    let info = reader.info();
    let (width, height, interlaced) = (info.width, info.height, info.interlaced);
    let stride = reader.output_line_size(width).ok_or("it is too large")?;
    if interlaced {
        let (color, depth) = reader.output_color_type();
        let bits = color.samples() as u8 * depth as u8;
        let passes = PASSES.into_iter().filter(|[x, ..]| *x < width);
        let rows = passes.map(|[_, y, _, dy]| height.saturating_sub(y).div_ceil(dy)).sum::<u32>();
        for _ in 0..rows {
            let row = reader.next_interlaced_row().map_err(text)?.ok_or("it has too few rows")?;
            let InterlaceInfo::Adam7(pass) = row.interlace() else {
                return Err("it has too few rows".into());
            };
            png::expand_interlaced_row(&mut samples, stride, row.data(), pass, bits);
        }
    } else {
        for row in samples.chunks_exact_mut(stride) {
            reader.read_row(row).map_err(text)?.ok_or("it has too few rows")?;
        }
    }
    match reader.next_row() {
        Err(DecodingError::IoError(end)) if end.kind() == ErrorKind::UnexpectedEof => Ok(samples),
        Err(fault) => Err(text(fault)),
        Ok(_) => Ok(samples),
    }
}

/// EXIF stands in a chunk of its own, or as text in the forms that ImageMagick wrote before there was one.
fn metadata(info: &png::Info) -> Metadata {
    let chunk = info.exif_metadata.as_ref().map(|exif| exif.to_vec());
    let exif = chunk
        .or_else(|| Some(plain_text(info, "exif")?.chars().map(|c| c as u8).collect()))
        .or_else(|| raw_profile(&any_text(info, "Raw profile type exif")?));
    Metadata { exif, xmp: any_text(info, "XML:com.adobe.xmp").map(String::into_bytes) }
}

fn plain_text<'a>(info: &'a png::Info, keyword: &str) -> Option<&'a str> {
    info.uncompressed_latin1_text.iter().rfind(|text| text.keyword == keyword).map(|text| &*text.text)
}

/// A text of this keyword, of whatever kind.
fn any_text(info: &png::Info, keyword: &str) -> Option<String> {
    if let Some(mut text) = info.utf8_text.iter().rfind(|text| text.keyword == keyword).cloned() {
        text.decompress_text_with_limit(MAX_TEXT_BYTES).ok()?;
        return text.get_text().ok();
    }
    if let Some(mut text) = info.compressed_latin1_text.iter().rfind(|text| text.keyword == keyword).cloned()
    {
        text.decompress_text_with_limit(MAX_TEXT_BYTES).ok()?;
        return text.get_text().ok();
    }
    plain_text(info, keyword).map(str::to_owned)
}

/// Hexadecimal digits behind three lines: an empty one, the profile's name, its length.
fn raw_profile(profile: &str) -> Option<Vec<u8>> {
    let digits = profile.split('\n').skip(3).flat_map(str::chars).filter(|c| !c.is_ascii_whitespace());
    let digits = digits.map(|digit| digit.to_digit(16)).collect::<Option<Vec<u32>>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    Some(pairs.iter().map(|[high, low]| (high * 16 + low) as u8).collect())
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
fn samples_to_rgb(samples: Vec<u8>, color: png::ColorType, depth: BitDepth) -> Result<Vec<u8>, String> {
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
