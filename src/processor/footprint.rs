//! The memory that a picture takes while it is decoded and resized, known from its header.

use super::decode::Format;

/// The most bytes a pixel that a decoder and what turns its picture upright allocate together, as
/// `tests/decode_memory.rs` has measured them on the costliest kinds: 16-bit PNG with alpha, progressive JPEG of four
/// colours, animated WebP. Pixels that came raw are there already.
fn per_pixel(format: Option<Format>) -> u64 {
    match format {
        Some(Format::Png) => 12,
        Some(Format::Jpeg) => 16,
        Some(Format::WebP) => 16,
        None => 0,
    }
}

/// What resizing takes at most, for each pixel of the larger of the two pictures: the picture between its two steps, the
/// resized one, and its patches.
const RESIZE: u64 = 9;

/// The most bytes that a picture of so many pixels takes, resized to so many.
pub(super) fn footprint(format: Option<Format>, pixels: u64, resized: u64) -> usize {
    let decoded = pixels.saturating_mul(per_pixel(format));
    let resized = pixels.max(resized).saturating_mul(RESIZE);
    usize::try_from(decoded.max(resized)).unwrap_or(usize::MAX)
}
