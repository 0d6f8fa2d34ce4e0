//! Writes the seed corpora, from the fixtures of the tests: seeds FOLDER.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use spatialscore::edge::proto;
use spatialscore_fuzz::{FILES, fixture};

/// Larger files only slow the mutations down.
const MOST: usize = 16_384;

fn main() {
    let folder = std::env::args().nth(1).expect("usage: seeds FOLDER");
    let write = |target: &str, index: usize, bytes: &[u8]| {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(format!("seed-{index:03}")), bytes).expect("written");
    };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/processor");
    let pictures = fs::read_dir(fixtures.join("images")).expect("pictures");
    let mut pictures: Vec<Vec<u8>> =
        pictures.map(|entry| fs::read(entry.expect("an entry").path()).expect("a picture")).collect();
    pictures.retain(|bytes| bytes.len() <= MOST);
    pictures.sort();
    let prompts: Vec<Value> =
        serde_json::from_slice(&fs::read(fixtures.join("tokens.json")).expect("prompts")).expect("JSON");
    let prompts: Vec<&str> = prompts.iter().filter_map(|entry| entry["prompt"].as_str()).collect();

    for (index, bytes) in pictures.iter().enumerate() {
        write("picture", index, bytes);
    }
    for (index, prompt) in prompts.iter().enumerate() {
        write("prompt", index, prompt.as_bytes());
    }
    for (index, (picture, prompt)) in pictures.iter().zip(&prompts).enumerate() {
        let image = |source| Some(proto::Image { source: Some(source) });
        let encoded = image(proto::image::Source::Encoded(picture.clone().into()));
        let rgb8 = Bytes::from_static(&[9; 48]);
        let raw = image(proto::image::Source::Raw(proto::RawImage { width: 4, height: 4, rgb8 }));
        let items = [encoded.clone(), raw].map(|image| proto::ScoreItem { image, ..Default::default() });
        let request =
            proto::ScoreRequest { prompt: Some((*prompt).into()), items: items.into(), ..Default::default() };
        write("message", 2 * index, &request.encode_to_vec());
        let item = proto::ScoreItem { prompt: Some((*prompt).into()), image: encoded, ..Default::default() };
        let item =
            proto::ScoreStreamRequest { id: index.to_string(), item: Some(item), ..Default::default() };
        write("message", 2 * index + 1, &item.encode_to_vec());
    }
    let mut index = 0;
    for (choice, name) in (0_u8..).zip(FILES) {
        for checkpoint in ["flat", "lora", "mlp", "shards", "half"] {
            let Ok(bytes) = fs::read(fixture(checkpoint).join(name)) else { continue };
            let content = if name.ends_with(".safetensors") {
                let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
                &bytes[8..8 + length]
            } else {
                &bytes[..]
            };
            write("checkpoint", index, &[&[choice], content].concat());
            index += 1;
        }
    }
}
