//! The memory that a picture takes while it is decoded and resized, known from its header.

/// What resizing takes at most, for each pixel of the larger of the two pictures: the picture between its two steps, the
/// resized one, and its patches.
const RESIZE: u64 = 9;

/// The most bytes that a picture of so many pixels takes, whose decoding takes `decoding` bytes, resized to so many
/// pixels. `tests/decode_memory.rs` measures it on the costliest kinds.
pub(super) fn footprint(decoding: u64, pixels: u64, resized: u64) -> usize {
    let resizing = pixels.max(resized).saturating_mul(RESIZE);
    usize::try_from(decoding.max(resizing)).unwrap_or(usize::MAX)
}
