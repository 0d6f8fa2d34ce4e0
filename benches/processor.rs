//! How long one core takes to make a sample of a picture of 1024×1024 pixels, in milliseconds.
//!
//!     cargo bench --bench processor -- [FILE …]
//!
//! Without files: raw pixels and the same as PNG. Each at two sizes: 448×448 (what HPSv3's recipe reads) and the
//! largest that the reference's own defaults allow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::{Duration, Instant};

use bytes::Bytes;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::processor::{Picture, Processor, ProcessorLimits};

const SIDE: u32 = 1024;
const PROMPT: &str = "A red cup stands left of a blue bowl, in front of a lamp.";

fn main() {
    let files: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut pictures: Vec<(String, Picture)> = vec![("raw".into(), raw()), ("png".into(), png())];
    if !files.is_empty() {
        pictures.truncate(1);
        let read = |path: String| (path.clone(), Picture::Encoded(fs::read(path).unwrap().into()));
        pictures.extend(files.into_iter().map(read));
    }
    for pixels in [448 * 448, 1280 * 28 * 28] {
        let processor = processor(pixels);
        for (name, picture) in &pictures {
            let best = (0..20).map(|_| once(&processor, picture.clone())).min().unwrap_or_default();
            println!("{name} to at most {pixels} pixels: {:.1} ms", best.as_secs_f64() * 1e3);
        }
    }
}

fn once(processor: &Processor, picture: Picture) -> Duration {
    let start = Instant::now();
    let draft = processor.admit(PROMPT, picture).unwrap();
    let sample = processor.prepare(draft).unwrap();
    let took = start.elapsed();
    assert!(sample.tokens() > 0);
    took
}

fn processor(max_pixels: u64) -> Processor {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mlp/checkpoint");
    let files = CheckpointFiles::open(checkpoint, None, None).unwrap();
    let mut reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    (reward.min_pixels, reward.max_pixels) = (Some(3136), Some(max_pixels));
    let limits = ProcessorLimits {
        max_prompt_bytes: 4096,
        max_image_pixels: 1 << 24,
        max_item_tokens: 4096,
        ..ProcessorLimits::NONE
    };
    Processor::load(&files, &reward, limits).unwrap()
}

/// Waves with a little noise: neither trivial nor hopeless to compress.
fn pixels() -> Vec<u8> {
    let mut state = 1_u32;
    let noise = |at: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let wave = (f64::from(at % (3 * SIDE)) * 0.01).sin() + (f64::from(at / (3 * SIDE)) * 0.02).cos();
        (wave * 50.0 + 120.0) as u8 ^ (state >> 30) as u8
    };
    (0..SIDE * SIDE * 3).map(noise).collect()
}

fn raw() -> Picture {
    Picture::Raw { width: SIDE, height: SIDE, rgb8: Bytes::from(pixels()) }
}

fn png() -> Picture {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, SIDE, SIDE);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().unwrap().write_image_data(&pixels()).unwrap();
    Picture::Encoded(file.into())
}
