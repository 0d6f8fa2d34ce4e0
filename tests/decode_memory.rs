//! A picture takes no more memory while it is made ready than was said of it by its header.
//!
//! The only test of its process, so that the process's peak is its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;

use common::checkpoint;
use common::large::{jpeg, png, webp};
use common::process::own_memory;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::processor::{Picture, Processor, ProcessorLimits};

#[test]
fn no_picture_takes_more_than_its_header_lets_expect() {
    const SIDE: u32 = 4000;
    const HALF: u16 = SIDE as u16;
    let files = CheckpointFiles::open(checkpoint().to_str().unwrap(), None, None).unwrap();
    let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    let processor = Processor::load(&files, &reward, ProcessorLimits::NONE).unwrap();
    let mut pictures = vec![
        ("webp, lossless".to_owned(), webp(SIDE, SIDE)),
        ("jpeg, baseline, 4:2:0".to_owned(), jpeg(HALF, HALF, 3, false, true)),
        ("png, rgb".to_owned(), png(SIDE, SIDE, png::ColorType::Rgb, png::BitDepth::Eight)),
        ("png, grey".to_owned(), png(SIDE, SIDE, png::ColorType::Grayscale, png::BitDepth::Eight)),
        ("png, rgba of 16 bits".to_owned(), png(SIDE, SIDE, png::ColorType::Rgba, png::BitDepth::Sixteen)),
    ];
    for colours in [1, 3, 4] {
        for progressive in [false, true] {
            let name = format!("jpeg, {colours} colours, progressive: {progressive}");
            pictures.push((name, jpeg(HALF, HALF, colours, progressive, false)));
        }
    }
    for path in std::env::var("PICTURES").iter().flat_map(|paths| paths.split(',')) {
        pictures.push((path.to_owned(), fs::read(path).unwrap()));
    }
    let mut most = HashMap::new();
    for (name, file) in pictures {
        let draft = processor.admit("a cup", Picture::Encoded(file.into())).unwrap();
        let said = draft.memory() as u64;
        // Memory that is free is given back, so that none is used again unseen; from here on the peak is counted anew.
        #[allow(unsafe_code)]
        // SAFETY: it gives back what nobody holds.
        unsafe {
            libc::malloc_trim(0);
        }
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = own_memory("VmRSS");
        processor.prepare(draft).unwrap();
        let took = own_memory("VmHWM") - before;
        let pixels = f64::from(SIDE * SIDE);
        println!("{name}: {:.1} bytes a pixel of {:.1}", took as f64 / pixels, said as f64 / pixels);
        assert!(took <= said + (4 << 20), "{name}: {took} bytes, and {said} were said");
        let of_format = most.entry(name.split(',').next().unwrap().to_owned()).or_insert(0.0_f64);
        *of_format = of_format.max(took as f64 / said as f64);
    }
    // What is said and not taken nobody else can use.
    assert!(most.values().all(|share| *share > 0.4), "{most:?}");
}
