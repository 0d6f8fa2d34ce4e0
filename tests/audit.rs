//! The audit log says what judged which item, stands in nobody's way, and is scored again by `spatialscore replay`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::process::{Server, get, run};
use common::{PROMPT, SIDE, TestServer, encoded, image, item, outcomes, png, request, soon, until};
use golden::Case;
use spatialscore::audit::{self, Entry, Read};
use spatialscore::edge::proto;
use spatialscore::edge::proto::image::Source;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tonic::transport::Channel;

type Client = SpatialScoreServiceClient<Channel>;

/// The lines of a log, all of them whole.
#[track_caller]
fn lines(path: &Path) -> Vec<Entry> {
    let line = |(place, read)| match read {
        Ok(Read::Entry(entry)) => *entry,
        other => panic!("{place:?}: {other:?}"),
    };
    audit::read(path).unwrap().map(line).collect()
}

/// The lines of a log, once there are so many.
async fn lines_of(path: &Path, count: usize) -> Vec<Entry> {
    until(|| fs::read_to_string(path).unwrap().lines().count() >= count).await;
    let lines = lines(path);
    assert_eq!(lines.len(), count);
    lines
}

fn bytes(image: &proto::Image) -> (Vec<u8>, Option<u32>, Option<u32>) {
    match image.source.clone().unwrap() {
        Source::Encoded(file) => (file.to_vec(), None, None),
        Source::Raw(proto::RawImage { width, height, rgb8 }) => (rgb8.to_vec(), Some(width), Some(height)),
    }
}

fn hash(bytes: &[u8]) -> Option<String> {
    Some(blake3::hash(bytes).to_hex().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_says_who_asked_what_judged_and_what_came_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let server = TestServer::of_models(&["a", "b"], &[("audit.path", path.to_str().unwrap())]).await;
    let mut client = server.client_from("127.0.0.3").await;
    let (file, raw) = (encoded(png(5)), image(6));
    let mut items = vec![item(file.clone()), item(raw.clone()), item(encoded(b"no picture".to_vec()))];
    items.push(proto::ScoreItem { image: None, ..item(raw.clone()) });
    let call = proto::ScoreRequest {
        prompt: Some(PROMPT.into()),
        items,
        models: vec!["b".into(), "a".into()],
        priority: proto::Priority::Evaluation.into(),
        ..Default::default()
    };
    soon(client.score(call)).await.unwrap();
    let lines = lines_of(&path, 8).await;
    let of = |model: &str, image_hash: Option<String>| {
        let mut found = lines.iter().filter(|line| line.model == model && line.image_hash == image_hash);
        let line = found.next().unwrap_or_else(|| panic!("none of {model} in {lines:?}"));
        assert_eq!(found.next(), None);
        line
    };
    let (width, height) = (SIDE.to_le_bytes(), SIDE.to_le_bytes());
    let raw_hash = hash(&[&width[..], &height, &bytes(&raw).0].concat());
    for model in ["a", "b"] {
        let scored = of(model, hash(&bytes(&file).0));
        assert_eq!((scored.mean, scored.stddev, scored.error.as_deref()), (Some(5.0), Some(0.5), None));
        assert_eq!(scored.prompt_hash, hash(PROMPT.as_bytes()));
        assert_eq!((&*scored.caller, &*scored.priority), ("127.0.0.3", "evaluation"));
        assert_eq!((&*scored.revision, &*scored.dtype), ("none", "float32"));
        assert_eq!(scored.server_version, env!("CARGO_PKG_VERSION"));
        assert!(scored.time.starts_with("20") && scored.time.ends_with('Z'), "{scored:?}");
        assert_eq!(of(model, raw_hash.clone()).mean, Some(6.0));
        let refused = of(model, hash(b"no picture"));
        assert_eq!((refused.mean, refused.error.as_deref()), (None, Some("INVALID_ARGUMENT")));
        // What is no item at all has nothing to be known by.
        assert_eq!(of(model, None).error.as_deref(), Some("INVALID_ARGUMENT"));
    }
    let mut stream = client
        .score_stream(futures::stream::iter([
            common::stream_item("x", 9),
            proto::ScoreStreamRequest { id: "y".into(), ..Default::default() },
        ]))
        .await
        .unwrap()
        .into_inner();
    while soon(stream.message()).await.unwrap().is_some() {}
    let mut streamed = lines_of(&path, 10).await.split_off(8);
    streamed.sort_by(|a, b| a.error.cmp(&b.error));
    assert_eq!((streamed[0].mean, &*streamed[0].model, &*streamed[0].priority), (Some(9.0), "a", "training"));
    assert_eq!(streamed[1].error.as_deref(), Some("INVALID_ARGUMENT"));
    // Nothing of what was sent.
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(PROMPT) && !text.contains("\"image\"") && !text.contains("\"prompt\""), "{text}");
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_pictures_are_recorded_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let flags =
        [("audit.path", path.to_str().unwrap()), ("audit.prompts", "true"), ("audit.pictures", "true")];
    let server = TestServer::start(&flags).await;
    let mut client = server.client().await;
    let pictures = [encoded(png(5)), image(6)];
    let items = pictures.iter().cloned().map(item).collect();
    let call = proto::ScoreRequest { prompt: Some(PROMPT.into()), items, ..Default::default() };
    soon(client.score(call)).await.unwrap();
    let lines = lines_of(&path, 2).await;
    for (picture, mean) in pictures.iter().zip([5.0, 6.0]) {
        let line = lines.iter().find(|line| line.mean == Some(mean)).unwrap();
        assert_eq!(line.prompt.as_deref(), Some(PROMPT));
        let recorded = line.image.clone().unwrap();
        assert_eq!((recorded.bytes.to_vec(), recorded.width, recorded.height), bytes(picture));
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "others can read it");
    server.shut_down().end().await;
}

/// Scores pictures of which each has a line, and counts those that have their scores.
async fn score_some(client: &mut Client, calls: usize) -> usize {
    let mut scored = 0;
    for _ in 0..calls {
        let request = request((0..8).map(|shade| shade * 20));
        let answer = soon(client.score(request)).await.unwrap().into_inner();
        scored += outcomes(&answer).iter().filter(|outcome| outcome.is_ok()).count();
    }
    scored
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_lines_and_no_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let set = format!("--set=audit.path={}", path.display());
    let mut server = Server::serving_with(&[&set]);
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let limit = |bytes: &str| {
        let id = server.process.id().to_string();
        let limited = Command::new("prlimit").args(["--pid", &id, &format!("--fsize={bytes}:")]).status();
        assert!(limited.unwrap().success());
    };
    let count = |outcome: &str| {
        let page = get(server.metrics_address(), "/metrics");
        let name = format!("spatialscore_audit_lines_total{{outcome=\"{outcome}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&name)?.parse::<usize>().ok()).unwrap_or(0)
    };
    limit("3000");
    assert_eq!(score_some(&mut client, 4).await, 32);
    until(|| count("written") + count("failed") == 32).await;
    let (written, failed) = (count("written"), count("failed"));
    assert!(written > 1 && failed > 8, "{written} {failed}");
    // What is there is whole.
    assert_eq!(lines(&path).len(), written);
    limit("unlimited");
    assert_eq!(score_some(&mut client, 1).await, 8);
    until(|| count("written") == written + 8).await;
    assert_eq!(lines(&path).len(), written + 8);
    assert_eq!(server.logged("lines of the audit log are lost", "reason"), "File too large (os error 27)");
    server.signal("TERM");
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    // Once, and again only after ever longer times.
    assert!(log.matches("lines of the audit log are lost").count() < 8, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_bounded_and_written_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let set = ["path", "max_file_bytes=4096", "max_files=3"].map(|setting| format!("--set=audit.{setting}"));
    let at = format!("{}={}", set[0], path.display());
    let server = Server::serving_with(&[&at, &set[1], &set[2]]);
    // Nobody else may write there.
    let (code, _, said) = run(&["serve", "--listen=127.0.0.1:0", &at]);
    assert!(
        code == 64 && said.contains("audit.path = ") && said.contains("another process writes it"),
        "{said}"
    );
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    assert_eq!(score_some(&mut client, 12).await, 96);
    let last = png(77);
    let call = proto::ScoreRequest {
        prompt: Some(PROMPT.into()),
        items: vec![item(encoded(last.clone()))],
        ..Default::default()
    };
    soon(client.score(call)).await.unwrap();
    server.signal("TERM");
    assert_eq!(server.code(), Some(0));
    let sizes: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).collect();
    assert_eq!(sizes.len(), 3);
    assert!(sizes.iter().all(|&bytes| bytes <= 4096), "{sizes:?}");
    let lines = lines(&path);
    assert_eq!(lines.last().unwrap().image_hash, hash(&last));
    assert!(lines.len() > 12 && lines.is_sorted_by(|a, b| a.time <= b.time));
}

#[test]
fn a_log_that_cannot_be_is_refused_at_start() {
    for (path, words) in [("/nowhere/audit.jsonl", "No such file"), ("/dev/null", "is no regular file")] {
        let (code, _, said) = run(&["serve", "--listen=127.0.0.1:0", &format!("--set=audit.path={path}")]);
        assert!(code == 64 && said.contains("audit.path = ") && said.contains(words), "{said}");
    }
}

/// A log of this case's items as a server of `model` scored them, with all that is needed to score them again.
async fn recorded(case: &Case, model: &str, path: &Path) -> Vec<Entry> {
    let set = [
        format!("--set=audit.path={}", path.display()),
        "--set=audit.prompts=true".to_owned(),
        "--set=audit.pictures=true".to_owned(),
        // Many files.
        "--set=audit.max_file_bytes=4096".to_owned(),
        "--set=audit.max_files=100".to_owned(),
    ];
    let server = Server::of_models(&[model], &set.each_ref().map(String::as_str));
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let mut items: Vec<_> = (0..case.items.len())
        .map(|n| proto::ScoreItem {
            prompt: Some(case.items[n].prompt.clone()),
            ..item(encoded(case.items[n].files(&case.directory).pop().unwrap()))
        })
        .collect();
    // Pixels too, and what has no score.
    items.push(proto::ScoreItem { prompt: Some(PROMPT.into()), ..item(image(9)) });
    items.push(item(encoded(b"no picture".to_vec())));
    client.score(proto::ScoreRequest { items, ..Default::default() }).await.unwrap();
    server.signal("TERM");
    assert_eq!(server.code(), Some(0));
    assert!(path.with_extension("jsonl.1").exists(), "it was to have several files");
    let lines = lines(path);
    assert_eq!(lines.len(), case.items.len() + 2);
    lines
}

/// Writes a log anew, in one file.
fn rewrite(path: &Path, lines: &[Entry]) {
    for file in fs::read_dir(path.parent().unwrap()).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    let text: Vec<String> = lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect();
    fs::write(path, text.concat()).unwrap();
}

/// What `replay --json` says: of the log, and of each model.
#[track_caller]
fn replayed(path: &Path, more: &[&str]) -> (i32, Vec<serde_json::Value>, String) {
    let (code, out, said) = run(&[&["replay", path.to_str().unwrap(), "--json"], more].concat());
    (code, out.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_scored_again_and_what_differs_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let case = Case::open("mlp");
    let mut lines = recorded(&case, "m=mlp", &path).await;
    let scored = case.items.len() + 1;
    let checkpoint = case.checkpoint();
    let by = |name: &str| format!("{name}{checkpoint},device=cpu");

    // As it was, from all files.
    let (code, said, errors) = replayed(&path, &["--model", &by("")]);
    assert_eq!((code, said.len()), (0, 2), "{said:?} {errors}");
    assert_eq!(
        said[0],
        serde_json::json!({"lines": scored + 1, "without_score": 1, "torn": 0, "of_others": 0})
    );
    let model = &said[1];
    assert_eq!(
        (&model["model"], &model["compared"], &model["over"]),
        (&"m".into(), &scored.into(), &0.into())
    );
    assert!(model["largest_difference"].as_f64().unwrap() <= 1e-5, "{model}");
    assert!((model["rank_correlation"].as_f64().unwrap() - 1.0).abs() < 1e-12, "{model}");
    assert!(model["was"].as_str().unwrap().starts_with("sha256:") && model["was"] == model["now"], "{model}");

    // A score that was changed by hand, and one whose standard deviation was.
    let original = lines.clone();
    let changed = lines.iter().position(|line| line.mean.is_some()).unwrap();
    lines[changed].mean = lines[changed].mean.map(|mean| mean + 0.25);
    rewrite(&path, &lines);
    let (code, said, errors) = replayed(&path, &["--model", &by("m=")]);
    assert_eq!(code, 1, "{errors}");
    assert_eq!(said[1]["over"], 1);
    let worst = &said[1]["worst"][0];
    assert_eq!(worst["line"], format!("{}:{}", path.display(), changed + 1));
    assert!((worst["difference"].as_f64().unwrap() - 0.25).abs() < 1e-4, "{worst}");
    let shift = said[1]["mean_shift"].as_f64().unwrap();
    assert!((shift + 0.25 / scored as f64).abs() < 1e-4, "{shift}");
    assert_eq!(replayed(&path, &["--model", &by("m="), "--tolerance", "0.3"]).0, 0);
    let (code, page, _) = run(&["replay", path.to_str().unwrap(), "--model", &by("")]);
    assert!(code == 1 && page.contains("1 over 0.0001") && page.contains("jsonl:"), "{page}");
    let mut wider = original.clone();
    wider[changed].stddev = wider[changed].stddev.map(|stddev| stddev + 0.25);
    rewrite(&path, &wider);
    assert_eq!(replayed(&path, &["--model", &by("")]).1[1]["over"], 1);

    // Another checkpoint gives other scores.
    rewrite(&path, &original);
    let other = format!("{},device=cpu", Case::open("flat").checkpoint());
    let (code, said, _) = replayed(&path, &["--model", &other]);
    assert!(code == 1 && said[1]["was"] != said[1]["now"], "{said:?}");

    // A running server, by the name of the log and by another.
    let server = Server::of_models(&["m=mlp", "other=flat"], &[]);
    let (code, said, errors) = replayed(&path, &["--server", &server.address]);
    assert!(code == 0 && said[1]["compared"] == scored, "{said:?} {errors}");
    assert_eq!(replayed(&path, &["--server", &server.address, "--model", "m=other"]).0, 1);
    let (code, _, errors) = replayed(&path, &["--server", &server.address, "--model", "none"]);
    assert!(code == 1 && errors.contains("there is no model \"none\""), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_scored_again_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let case = Case::open("flat");
    let lines = recorded(&case, "m=flat", &path).await;
    let checkpoint = format!("{},device=cpu", case.checkpoint());
    let refused = |more: &[&str], words: &str| {
        let (code, _, said) = replayed(&path, more);
        assert!(code == 64 && said.contains(words), "{code} {said}");
    };
    let bare = |edit: fn(&mut Entry)| {
        let mut lines = lines.clone();
        lines.iter_mut().for_each(edit);
        rewrite(&path, &lines);
    };
    bare(|line| line.prompt = None);
    refused(
        &["--model", &checkpoint],
        "has no prompt and cannot be scored again: only with audit.prompts = true",
    );
    bare(|line| line.image = None);
    refused(
        &["--model", &checkpoint],
        "has no picture and cannot be scored again: only with audit.pictures = true",
    );
    bare(|line| line.mean = None);
    refused(&["--model", &checkpoint], "no line can be compared");
    let mut two = lines.clone();
    // What is answered first stands first.
    two.sort_by_key(|line| line.mean.is_none());
    two[1].model = "n".into();
    rewrite(&path, &two);
    refused(
        &["--model", &checkpoint],
        &format!(
            "the log has lines of \"m\" and of \"n\": say whose are wanted, as in --model m={checkpoint}"
        ),
    );
    refused(&["--model", &checkpoint, "--model", &checkpoint], "each must say whose lines");
    let own = format!("m={checkpoint}");
    let (code, said, errors) = replayed(&path, &["--model", &own]);
    assert!(code == 0 && said[0]["of_others"] == 1, "{said:?} {errors}");
    // One that the disk was full for, or whose server was killed; and what is no log.
    rewrite(&path, &lines);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 7]).unwrap();
    let (code, said, _) = replayed(&path, &["--model", &checkpoint]);
    assert!(code == 0 && said[0]["torn"] == 1, "{said:?}");
    fs::write(&path, "{\"model\": 7}\n").unwrap();
    refused(&["--model", &checkpoint], "audit.jsonl:1: this is no line of an audit log");
    // What has no score now.
    let mut lines = lines;
    lines.sort_by_key(|line| line.mean.is_none());
    lines[0].image.as_mut().unwrap().bytes = b"no picture"[..].into();
    rewrite(&path, &lines);
    let (code, said, _) = replayed(&path, &["--model", &checkpoint]);
    assert!(code == 1 && said[1]["failed"] == 1, "{said:?}");
    assert!(said[1]["errors"][0]["error"].as_str().unwrap().starts_with("INVALID_ARGUMENT: "), "{said:?}");
    fs::remove_file(&path).unwrap();
    refused(&["--model", &checkpoint], "No such file");
    let (code, _, said) = run(&["replay", "x", "--model", "./none"]);
    assert!(code == 64, "{said}");
}
