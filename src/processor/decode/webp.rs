//! WebP, by the `image-webp` crate.

use std::io::Cursor;

use image_webp::WebPDecoder;

use super::orientation::Metadata;
use super::{Decoded, drop_alpha, text};

/// Before a frame's own chunks: where it lies, its size, how long it is shown, how it is laid on the one before.
const FRAME_HEADER: usize = 16;

/// The size, and the most bytes that decoding holds beside the RGB.
pub(super) fn header(bytes: &[u8]) -> Result<((u32, u32), u64), String> {
    let (width, height) = WebPDecoder::new(Cursor::new(bytes)).map_err(text)?.dimensions();
    // Two copies in four colours of a lossless picture; less of another.
    Ok(((width, height), u64::from(width) * u64::from(height) * 8))
}

pub(super) fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    // Behind `RIFF` stands the length of the rest. The decoder reads zeros where the pixels' data ends early.
    let stated = bytes.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if stated.is_none_or(|rest| (bytes.len() as u64) < 8 + u64::from(rest)) {
        return Err("it is shorter than its header states".into());
    }
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(text)?;
    let exif = decoder.exif_metadata().map_err(text)?;
    let xmp = decoder.xmp_metadata().map_err(text)?;
    let rgb =
        if decoder.is_animated() { first_frame(bytes, decoder.dimensions())? } else { still(&mut decoder)? };
    Ok(Decoded { rgb, metadata: Metadata { exif, xmp } })
}

fn still(decoder: &mut WebPDecoder<Cursor<&[u8]>>) -> Result<Vec<u8>, String> {
    let mut samples = vec![0; decoder.output_buffer_size().ok_or("it is too large")?];
    decoder.read_image(&mut samples).map_err(text)?;
    Ok(if decoder.has_alpha() { drop_alpha(&samples) } else { samples })
}

/// The first frame of an animation on a black canvas. libwebp blends only the frames behind it, and the crate blends
/// this one too; so it is decoded as a file of its own.
fn first_frame(bytes: &[u8], (width, height): (u32, u32)) -> Result<Vec<u8>, String> {
    let frame = chunks(bytes.get(12..).unwrap_or_default()).find(|chunk| chunk.name == b"ANMF");
    let frame = frame.ok_or("it has no frame")?.content;
    let (header, parts) = frame.split_at_checked(FRAME_HEADER).ok_or("its first frame is cut short")?;
    let field = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], 0]);
    let (left, top, across, down) = (2 * field(0), 2 * field(3), field(6) + 1, field(9) + 1);
    if left + across > width || top + down > height {
        return Err("its first frame lies outside the picture".into());
    }
    let file = still_file(parts, header);
    let mut decoder = WebPDecoder::new(Cursor::new(&*file)).map_err(text)?;
    if decoder.dimensions() != (across, down) {
        return Err("its first frame has two sizes".into());
    }
    let pixels = still(&mut decoder)?;
    let mut canvas = vec![0; width as usize * height as usize * 3];
    let rows = canvas.chunks_exact_mut(width as usize * 3).skip(top as usize);
    for (row, line) in rows.zip(pixels.chunks_exact(across as usize * 3)) {
        row[left as usize * 3..][..line.len()].copy_from_slice(line);
    }
    Ok(canvas)
}

/// A frame's chunks as a file with nothing but them. `header` states the size.
fn still_file(parts: &[u8], header: &[u8]) -> Vec<u8> {
    const ALPHA: u8 = 0x10;
    let mut content = b"WEBP".to_vec();
    for chunk in chunks(parts).filter(|chunk| [b"ALPH", b"VP8 ", b"VP8L"].contains(&chunk.name)) {
        if chunk.name == b"ALPH" {
            content.extend(b"VP8X\x0a\0\0\0");
            content.extend([ALPHA, 0, 0, 0]);
            content.extend(&header[6..12]);
        }
        content.extend(chunk.whole);
    }
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    [b"RIFF", &length.to_le_bytes()[..], &content].concat()
}

struct Chunk<'a> {
    name: &'a [u8; 4],
    content: &'a [u8],
    /// Name, length and padding included.
    whole: &'a [u8],
}

/// One chunk after the other, as far as they are whole.
fn chunks(mut bytes: &[u8]) -> impl Iterator<Item = Chunk<'_>> {
    std::iter::from_fn(move || {
        let (name, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let content = rest.get(..length)?;
        let (whole, behind) = bytes.split_at((8 + length.next_multiple_of(2)).min(bytes.len()));
        bytes = behind;
        Some(Chunk { name, content, whole })
    })
}
