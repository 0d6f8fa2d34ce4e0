//! What the fuzz targets do with their bytes. Any panic is a finding, caught or not: libFuzzer's hook ends the process
//! before anybody could catch it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bytes::Bytes;
use prost::Message;
use spatialscore::edge::proto;
use spatialscore::model::Blueprint;
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::RewardConfig;
use spatialscore::processor::{Picture, Processor, ProcessorLimits};
use tch::{Device, Kind};

/// Small, so that an input costs little, and every one of them can be met.
const LIMITS: ProcessorLimits = ProcessorLimits {
    max_prompt_bytes: 4096,
    max_image_pixels: 1 << 18,
    max_item_tokens: 4096,
    max_prompt_tokens: 2048,
    max_image_bytes: 1 << 16,
    max_questions: 64,
};

static PROCESSOR: LazyLock<Processor> = LazyLock::new(|| {
    let files =
        CheckpointFiles::open(fixture("flat").to_str().expect("UTF-8"), None, None).expect("a fixture");
    let reward: RewardConfig = files.require_json("reward_config.json").expect("a fixture");
    Processor::load(&files, &reward, LIMITS).expect("a fixture")
});

/// A checkpoint of the tests.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name).join("checkpoint")
}

/// An item all the way to its sample, which must cost what was said before it was decoded.
fn process(prompt: &str, picture: Picture) {
    let Ok(draft) = PROCESSOR.admit(prompt, picture) else { return };
    let tokens = draft.tokens();
    assert!(tokens <= LIMITS.max_item_tokens);
    if let Ok(sample) = PROCESSOR.prepare(draft) {
        assert_eq!(sample.tokens(), tokens);
        assert_eq!(sample.pictures.len(), 1);
        assert_eq!(sample.pictures[0].pixels.len() % sample.patches(), 0);
    }
}

/// The decoders: a file as a caller sends it.
pub fn picture(data: &[u8]) {
    process("a cup to the left of a plate", Picture::Encoded(Bytes::copy_from_slice(data)));
}

/// The processor's other half: a prompt.
pub fn prompt(data: &[u8]) {
    let Ok(prompt) = std::str::from_utf8(data) else { return };
    let rgb8 = Bytes::from_static(&[7; 28 * 28 * 3]);
    process(prompt, Picture::Raw { width: 28, height: 28, rgb8 });
}

/// The messages that a caller sends, and what is in them.
pub fn message(data: &[u8]) {
    if let Ok(request) = proto::ScoreRequest::decode(data) {
        let again =
            proto::ScoreRequest::decode(&*request.encode_to_vec()).expect("what was read can be written");
        assert_eq!(again, request);
        for item in request.items.into_iter().take(8) {
            score_item(item, request.prompt.as_deref());
        }
    }
    if let Ok(proto::ScoreStreamRequest { item: Some(item), .. }) = proto::ScoreStreamRequest::decode(data) {
        score_item(item, None);
    }
}

fn score_item(item: proto::ScoreItem, shared: Option<&str>) {
    use proto::image::Source;
    let prompt = item.prompt.or_else(|| shared.map(str::to_owned)).unwrap_or_default();
    match item.image.and_then(|image| image.source) {
        Some(Source::Encoded(bytes)) => process(&prompt, Picture::Encoded(bytes)),
        Some(Source::Raw(proto::RawImage { width, height, rgb8 })) => {
            process(&prompt, Picture::Raw { width, height, rgb8 });
        }
        None => {}
    }
}

/// The files of a checkpoint that are read with care, each of which the first byte of an input may stand for.
pub const FILES: [&str; 7] = [
    "model.safetensors",
    "config.json",
    "reward_config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
];

/// A checkpoint with one file of the input's making. A safetensors file is its header; its tensors are zeros behind.
pub fn checkpoint(data: &[u8]) {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let shared = Path::new("/dev/shm");
        let parent = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let folder = parent.join(format!("spatialscore-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    });
    let Some((&choice, content)) = data.split_first() else { return };
    let name = FILES[usize::from(choice) % FILES.len()];
    let source = fixture(if name.starts_with("adapter") { "lora" } else { "flat" });
    for entry in fs::read_dir(&*FOLDER).expect("a folder") {
        fs::remove_file(entry.expect("an entry").path()).expect("removed");
    }
    for entry in fs::read_dir(&source).expect("a fixture") {
        let entry = entry.expect("an entry");
        if entry.file_name() != name {
            symlink(entry.path(), FOLDER.join(entry.file_name())).expect("a link");
        }
    }
    let bytes = if name.ends_with(".safetensors") {
        let whole = fs::metadata(source.join(name)).map_or(0, |data| data.len() as usize);
        let mut bytes = [&(content.len() as u64).to_le_bytes()[..], content].concat();
        bytes.resize(whole.max(bytes.len()), 0);
        bytes
    } else {
        content.to_vec()
    };
    fs::write(FOLDER.join(name), bytes).expect("written");

    let Ok(files) = CheckpointFiles::open(FOLDER.to_str().expect("UTF-8"), None, None) else { return };
    if let Ok(blueprint) = Blueprint::open(&files, Device::Cpu, Kind::Float) {
        let _ = blueprint.weights.non_finite(|_| {});
    }
    // The tokenizer takes long to read, and is read the same for the other files.
    let told = ["preprocessor_config.json", "reward_config.json"].contains(&name);
    if let Ok(Some(reward)) = files.json::<RewardConfig>("reward_config.json")
        && told
    {
        let _ = Processor::load(&files, &reward, LIMITS);
    }
}
