//! `spatialscore inspect`, as a process of its own; and checkpoints from a hub, which here is a server on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/golden.rs"]
mod golden;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use golden::Case;
use serde_json::{Value, json};

fn inspect(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
    for name in ["HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.arg("inspect").args(arguments).envs(environment.iter().copied()).output().unwrap()
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn it_says_what_a_checkpoint_is_and_costs() {
    let case = Case::open("lora");
    let report = report(&inspect(&[&case.checkpoint(), "--json"], &[]));
    assert_eq!(report["faults"], json!([]));
    assert_eq!(report["skipped"], json!(["lm_head.weight"]));
    assert!(report["adapted_weights"].as_u64().unwrap() > 10);
    assert_eq!(report["formats_on_disk"], json!(["BFloat16", "Float"]));
    // 12,544 pixels at most: 4 by 4 visual tokens, whatever the picture.
    assert_eq!(report["pictures"][3]["visual_tokens"], json!(16));
    let parameters = report["parameters"].as_i64().unwrap();
    assert_eq!(report["memory_bytes"][0], json!(["float32", 4 * parameters]));
}

#[test]
fn each_family_is_told_by_its_name_and_what_is_its_own() {
    for (case, says) in [
        (
            "several",
            "qwen2_5_vl: vision 2 blocks of 16 (2 heads, windows of 56 px, whole pictures in [1]), decoder 2 ",
        ),
        ("qwen2", "qwen2_vl: vision 3 blocks of 16 (2 heads), decoder 3 layers of 16 (2 heads on 1)"),
        (
            "qwen3",
            "qwen3_vl: vision 3 blocks of 16 (2 heads, features of [0, 1] for the decoder), decoder 3 ",
        ),
    ] {
        let report = report(&inspect(&[&Case::open(case).checkpoint(), "--json"], &[]));
        assert!(report["architecture"].as_str().unwrap().starts_with(says), "{report}");
        assert_eq!(report["faults"], json!([]));
        assert!(report["pictures"][0]["visual_tokens"].as_u64().unwrap() > 0);
    }
}

#[test]
fn the_built_in_checkpoint_can_be_served() {
    let output = inspect(&[], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("spatialscore-mini") && text.contains("can be served"),
        "{text}"
    );
}

/// A copy of a case's checkpoint.
fn copy(case: &str, to: &Path) {
    for entry in fs::read_dir(Case::open(case).checkpoint()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn everything_that_is_wrong_is_listed() {
    let directory = tempfile::tempdir().unwrap();
    copy("mlp", directory.path());
    // The last number of the file becomes a NaN, and the preprocessor cuts other patches than the model reads.
    let weights = directory.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let preprocessor = directory.path().join("preprocessor_config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&preprocessor).unwrap()).unwrap();
    json["patch_size"] = json!(16);
    fs::write(&preprocessor, json.to_string()).unwrap();

    let path = directory.path().to_str().unwrap();
    let output = inspect(&[path], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("2 faults") && text.contains("NaN") && text.contains("patch_size is 16"), "{text}");

    let output = inspect(&[path, "--headers-only"], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("NaN") && text.contains("patch_size is 16"), "{text}");

    let output = inspect(&["/no/such/place"], &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("nor a hub id"), "{text}");
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub that has one repository, `lab/judge`, private to `token`, with a branch `v2`.
struct Hub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &seen);
            }
        });
        Self { address, requests }
    }
}

fn answer(mut stream: TcpStream, files: &Path, seen: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|l| l.to_lowercase()).collect();
    let path = request.split(' ').nth(1).unwrap().to_owned();
    seen.lock().unwrap().push(path.clone());
    let has = |text: &str| headers.iter().any(|header| header.contains(text));
    let (status, body) = if !has("authorization: bearer secret") {
        ("401 Unauthorized", Vec::new())
    } else if path == "/api/models/lab/judge/revision/v2" {
        let siblings: Vec<Value> = fs::read_dir(files)
            .unwrap()
            .map(|entry| json!({"rfilename": entry.unwrap().file_name().to_str().unwrap()}))
            .collect();
        ("200 OK", json!({"siblings": siblings, "sha": COMMIT}).to_string().into_bytes())
    } else {
        match path.strip_prefix("/lab/judge/resolve/v2/").map(|name| fs::read(files.join(name))) {
            Some(Ok(bytes)) => ("206 Partial Content", bytes),
            _ => ("404 Not Found", Vec::new()),
        }
    };
    let whole = body.len();
    let body = if has("range: bytes=0-0") { &body[..1.min(whole)] } else { &body[..] };
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nx-repo-commit: {COMMIT}\r\netag: \"{whole}-{}\"\r\ncontent-range: bytes \
         0-0/{whole}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        path.replace('/', "-"),
        body.len()
    );
    let _ = stream.write_all(body);
}

#[test]
fn a_hub_id_is_fetched_once_and_served_offline() {
    let repository = tempfile::tempdir().unwrap();
    copy("mlp", repository.path());
    fs::write(repository.path().join("pytorch_model.bin"), b"never fetched").unwrap();
    let hub = Hub::start(repository.path().to_path_buf());
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    let arguments = ["lab/judge", "--revision", "v2", "--json"];

    let output = inspect(&arguments, &[("HF_HOME", home), ("HF_ENDPOINT", &hub.address)]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && text.contains("lab/judge@v2 from the hub") && text.contains("401"),
        "{text}"
    );

    let online = [("HF_HOME", home), ("HF_ENDPOINT", &hub.address), ("HF_TOKEN", "secret")];
    let first = report(&inspect(&arguments, &online));
    assert_eq!(first["revision"], json!(COMMIT));
    assert_eq!(first["faults"], json!([]));
    let fetched = hub.requests.lock().unwrap().len();
    assert!(!hub.requests.lock().unwrap().iter().any(|path| path.contains("pytorch_model.bin")));

    let offline = [("HF_HOME", home), ("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_HUB_OFFLINE", "1")];
    assert_eq!(report(&inspect(&arguments, &offline)), first);
    let by_commit = report(&inspect(&["lab/judge", "--revision", COMMIT, "--json"], &offline));
    assert_eq!(by_commit["revision"], json!(COMMIT));
    assert_eq!(hub.requests.lock().unwrap().len(), fetched);

    let output = inspect(&["lab/other", "--json"], &offline);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("HF_HUB_OFFLINE is set"), "{text}");
}

/// An adapter on a hub's checkpoint stands on the revision that it names.
#[test]
fn an_adapter_names_the_revision_of_its_base() {
    let repository = tempfile::tempdir().unwrap();
    copy("mlp", repository.path());
    let hub = Hub::start(repository.path().to_path_buf());
    let home = tempfile::tempdir().unwrap();
    let adapter = tempfile::tempdir().unwrap();
    let fixture = golden::fixtures().join("adapters/plain");
    fs::copy(fixture.join("adapter_model.safetensors"), adapter.path().join("adapter_model.safetensors"))
        .unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(fixture.join("adapter_config.json")).unwrap()).unwrap();
    config["base_model_name_or_path"] = json!("lab/judge");
    config["revision"] = json!("v2");
    fs::write(adapter.path().join("adapter_config.json"), config.to_string()).unwrap();

    let home = home.path().to_str().unwrap();
    let online = [("HF_HOME", home), ("HF_ENDPOINT", &hub.address), ("HF_TOKEN", "secret")];
    let report = report(&inspect(&[adapter.path().to_str().unwrap(), "--json"], &online));
    // The adapter's own digest, and the base's commit.
    let revision = report["revision"].as_str().unwrap();
    assert!(revision.starts_with("sha256:") && revision.ends_with(&format!("+{COMMIT}")), "{revision}");
    assert_eq!(report["adapted_weights"], json!(4));
    let requests = hub.requests.lock().unwrap();
    assert!(requests.iter().all(|path| path.contains("v2")), "{requests:?}");
}
