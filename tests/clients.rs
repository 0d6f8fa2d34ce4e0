//! Clients that we did not write: grpcurl, and gRPC for Python.
//!
//! They come from a virtual environment, `.venv` or what SPATIALSCORE_TEST_VENV names; it is made by
//! `python3 scripts/python_env.py .venv tests/requirements.txt`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::*;
use serde_json::{Value, json};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A program of the virtual environment.
fn program(name: &str) -> Command {
    let venv = std::env::var_os("SPATIALSCORE_TEST_VENV")
        .map_or_else(|| Path::new(ROOT).join(".venv"), PathBuf::from);
    let path = venv.join("bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: python3 scripts/python_env.py .venv tests/requirements.txt",
        path.display()
    );
    Command::new(path)
}

/// What a program prints; it must succeed.
async fn output(mut command: Command) -> String {
    let Output { status, stdout, stderr } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

async fn grpcurl(server: &TestServer, before: &[&str], after: &[&str]) -> String {
    let mut command = program("grpcurl");
    command.arg("-plaintext").args(before).arg(server.address.to_string()).args(after);
    output(command).await
}

/// grpcurl 1.8 speaks only the older reflection, v1alpha.
#[tokio::test(flavor = "multi_thread")]
async fn grpcurl_lists_describes_and_scores() {
    let server = TestServer::start(&[]).await;
    let services = grpcurl(&server, &[], &["list"]).await;
    for service in [
        "spatialscore.v1.SpatialScoreService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ] {
        assert!(services.lines().any(|line| line == service), "{service} is not in {services}");
    }
    let described = grpcurl(&server, &[], &["describe", "spatialscore.v1.ScoreResult"]).await;
    assert!(described.contains(".google.rpc.Status error = 2;"), "{described}");

    let message = json!({
        "prompt": "a cup to the left of a plate",
        "items": [{ "image": { "encoded": base64(&png(42)) } }, { "image": {} }],
    });
    let message = message.to_string();
    let answer = grpcurl(&server, &["-d", &message], &["spatialscore.v1.SpatialScoreService/Score"]).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["results"][0]["score"]["mean"], json!(42));
    assert_eq!(answer["results"][1]["error"]["code"], json!(3));

    let health = grpcurl(&server, &[], &["grpc.health.v1.Health/Check"]).await;
    assert!(health.contains("\"SERVING\""), "{health}");
}

#[tokio::test(flavor = "multi_thread")]
async fn python_calls_and_streams() {
    let server = TestServer::start(&[]).await;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut protoc = program("python");
    protoc.current_dir(ROOT).args(["-m", "grpc_tools.protoc", "-I", "proto"]);
    for kind in ["--python_out", "--grpc_python_out"] {
        protoc.arg(format!("{kind}={}", folder.path().display()));
    }
    protoc.args(["google/rpc/status.proto", "spatialscore/v1/spatialscore.proto"]);
    output(protoc).await;

    let mut pictures = Vec::new();
    for (name, bytes) in [("a.png", png(11)), ("bad.png", b"no picture".to_vec()), ("b.png", png(12))] {
        pictures.push(folder.path().join(name));
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let mut python = program("python");
    python.arg(Path::new(ROOT).join("tests/clients/score.py")).arg(folder.path());
    python.arg(server.address.to_string()).args(pictures);
    let got: Value = serde_json::from_str(&output(python).await).unwrap();
    let wanted = json!([11.0, "INVALID_ARGUMENT", 12.0]);
    assert_eq!(got, json!({ "unary": wanted, "stream": wanted, "empty": "INVALID_ARGUMENT" }));
}

/// Standard base64, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let bits = (0..3).fold(0, |bits, i| bits << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        let digit = move |i: usize| match i <= chunk.len() {
            true => char::from(ALPHABET[(bits >> (18 - 6 * i) & 63) as usize]),
            false => '=',
        };
        (0..4).map(digit).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}
