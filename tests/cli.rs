//! The program as its users meet it: processes, signals, exit codes, output.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs::read_to_string;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use common::process::{Server, get, program, run, say};
use common::*;
use futures::future::join_all;
use futures::{StreamExt, stream};
use regex::Regex;
use serde_json::Value;
use spatialscore::config::{Settings, Sources};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

#[test]
fn help_is_a_page_for_strangers() {
    for (command, words) in [
        (
            "serve",
            [
                "Examples:",
                "Exit codes:",
                "SPATIALSCORE__SECTION__KEY",
                "[server.listen; default: 127.0.0.1:50051]",
            ],
        ),
        ("score", ["Examples:", "Exit codes:", "prompt,image,id", "[default: 127.0.0.1:50051]"]),
        ("replay", ["Examples:", "Exit codes:", "audit.pictures=true", "[default: 0.0001]"]),
        ("explain", ["Examples:", "Exit codes:", "turned", "[default: 127.0.0.1:50051]"]),
    ] {
        let (code, page, _) = run(&[command, "--help"]);
        assert_eq!(code, 0);
        for word in words {
            assert!(page.contains(word), "{word:?} is not in\n{page}");
        }
        assert!(page.lines().all(|line| line.chars().count() <= 110), "{page}");
    }
    let (code, page, _) = run(&["--help"]);
    assert!(
        code == 0 && page.contains("serve") && page.contains("score") && page.contains("inspect"),
        "{page}"
    );
}

#[test]
fn wrong_settings_end_with_64_and_name_everything() {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(file.path(), "[queue]\nmax_items = 0\n[nonsense]\na = 1\n").unwrap();
    let config = file.path().to_str().unwrap();
    let Output { status, stderr, .. } = program(&["serve", "--listen=0.0.0.0:0", "--config", config])
        .args(["--device=gpu", "--set", "limits.max_prompt_bytes=many"])
        .env("SPATIALSCORE__BATCH__MAX_TOKENS", "-1")
        .output()
        .unwrap();
    assert_eq!(status.code(), Some(64));
    let said = String::from_utf8(stderr).unwrap();
    for fault in [
        "server.listen = \"0.0.0.0:0\" (from a flag): other machines can reach this address",
        "model.device = \"gpu\" (from a flag): must be auto, cpu, or cuda:N",
        &format!("queue.max_items = \"0\" (from {config}): must be 1 to 1048576"),
        "batch.max_tokens = \"-1\" (from the environment): must be 1 to 1073741824",
        "limits.max_prompt_bytes = \"many\" (from a flag): must be 1 to 1048576",
        &format!("nonsense.a = \"1\" (from {config}): there is no such setting"),
    ] {
        assert!(said.contains(fault), "{fault:?} is not in\n{said}");
    }
    for wrong in [&["serve", "--nonsense"][..], &["serve", "--set", "x"], &["score"], &["nonsense"]] {
        assert_eq!(run(wrong).0, 64, "{wrong:?}");
    }
}

#[test]
fn a_checkpoint_that_cannot_be_served_ends_with_1() {
    let (code, _, said) =
        run(&["serve", "--listen=127.0.0.1:0", "--metrics-listen=", "--checkpoint=/nowhere/at/all"]);
    assert_eq!(code, 1);
    assert!(said.contains("no checkpoint \"/nowhere/at/all\""), "{said}");
}

#[test]
fn the_example_file_is_written_out_and_read_back() {
    let (code, page, _) = run(&["serve", "--print-settings"]);
    assert_eq!((code, page.as_str()), (0, spatialscore::config::EXAMPLE));
}

/// Calls and a stream are under way when the signal comes. Each call is answered whole or refused as UNAVAILABLE;
/// what the stream was promised it gets.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_answers_what_was_accepted_and_exits_0() {
    let server = tokio::task::block_in_place(Server::serving);
    let client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let (items, outgoing) = tokio::sync::mpsc::channel(4);
    let sender = tokio::spawn(async move {
        // Endless: the server ends it.
        for index in 0_u64.. {
            if items.send(stream_item(&index.to_string(), index as u8)).await.is_err() {
                return;
            }
        }
    });
    let mut answers = client.clone().score_stream(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().is_ok());
    let calls = join_all((0..200).map(|_| {
        let mut client = client.clone();
        async move { client.score(request(0..8)).await }
    }));
    let (calls, streamed) = tokio::join!(calls, async {
        let mut streamed = 1;
        loop {
            match answers.next().await.unwrap() {
                Ok(answer) => assert!(outcome(&answer.result.unwrap()).is_ok()),
                Err(status) => return (streamed, status),
            }
            streamed += 1;
            if streamed == 10 {
                server.signal("TERM");
            }
        }
    });
    assert!(streamed.0 >= 10);
    assert_eq!(streamed.1.code(), Code::Unavailable, "{}", streamed.1);
    for call in calls {
        match call {
            Ok(response) => assert!(outcomes(&response.into_inner()).iter().all(Result::is_ok)),
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
        }
    }
    sender.abort();
    drop((client, answers));
    assert_eq!(tokio::task::block_in_place(|| server.code()), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigint_ends_it_too_and_so_does_a_signal_while_loading() {
    let server = tokio::task::block_in_place(Server::serving);
    server.signal("INT");
    assert_eq!(tokio::task::block_in_place(|| server.code()), Some(0));
    let server = tokio::task::block_in_place(Server::start);
    server.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| server.code()), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    let mut server = tokio::task::block_in_place(Server::serving);
    let _held = held_up(&server).await;
    server.signal("TERM");
    // As `timeout` does it.
    server.signal("TERM");
    tokio::task::block_in_place(|| server.logged("draining", "limit"));
    // Sooner it would be the same word once more.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    server.signal("TERM");
    let (code, log) = tokio::task::block_in_place(|| server.end());
    assert_eq!(code, Some(143));
    assert!(log.contains("a second signal: ending at once"), "{log}");
}

/// What runs on the device is not waited for, and nothing is said of it but that it was not scored. Without an end in
/// order: libtorch would be taken down under it.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_under_load_leaves_nothing_to_crash() {
    let rounds = std::env::var("ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let flags = ["--set=model.checkpoint=spatialscore-mini", "--set=cache.max_items=0"];
        let mut server = tokio::task::block_in_place(|| Server::serving_with(&flags));
        let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
        let items = stream::iter((0_u64..).map(|index| stream_item(&index.to_string(), index as u8)));
        let mut answers = client.score_stream(items).await.unwrap().into_inner();
        assert!(answers.next().await.unwrap().is_ok());
        let calls: Vec<_> = (0..12_u8)
            .map(|call| {
                let mut client = client.clone();
                tokio::spawn(async move { client.score(request((0..64).map(|shade| shade + call))).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.signal("TERM");
        tokio::task::block_in_place(|| server.logged("draining", "limit"));
        tokio::time::sleep(Duration::from_millis(1050 + 37 * (round % 10))).await;
        server.signal("TERM");
        let (mut scored, mut unavailable) = (0, 0);
        for call in calls {
            match call.await.unwrap() {
                Ok(response) => {
                    scored += 1;
                    assert!(outcomes(response.get_ref()).iter().all(Result::is_ok));
                }
                Err(status) => {
                    unavailable += 1;
                    // Or the queue was full.
                    let codes = [Code::Unavailable, Code::ResourceExhausted];
                    assert!(codes.contains(&status.code()), "{status}");
                }
            }
        }
        while let Some(Ok(answer)) = answers.next().await {
            let code = outcome(&answer.result.unwrap()).err().map(|(code, _)| code);
            assert!(code.is_none_or(|code| code == Code::Unavailable), "{code:?}");
        }
        let (code, log) = tokio::task::block_in_place(|| server.end());
        println!("round {round}: {scored} calls scored, {unavailable} not");
        assert_eq!(code, Some(143), "{log}");
        assert!(!log.contains("\"ERROR\""), "{log}");
    }
}

/// `timeout` sends its signal to the process and then to its group.
#[tokio::test(flavor = "multi_thread")]
async fn two_signals_at_once_are_one_and_a_hangup_is_one_too() {
    // Under `nohup` the program has it ignored too, as it should.
    let status = read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let ignores_hangup = u64::from_str_radix(ignored, 16).unwrap() & 1 == 1;
    for signals in [&["TERM", "TERM"][..], &["INT", "TERM", "HUP"], &["HUP"]] {
        if signals == ["HUP"] && ignores_hangup {
            continue;
        }
        let mut server = tokio::task::block_in_place(Server::serving);
        let held = held_up(&server).await;
        for signal in signals {
            server.signal(signal);
        }
        tokio::task::block_in_place(|| server.logged("draining", "limit"));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(server.process.try_wait().unwrap().is_none(), "{signals:?} ended it at once");
        drop(held);
        let (code, log) = tokio::task::block_in_place(|| server.end());
        assert_eq!(code, Some(0), "{signals:?}: {log}");
    }
}

/// A caller that takes its answers byte by byte, and none of them, and so holds up a drain until what this gives is dropped.
async fn held_up(server: &Server) -> impl Sized + use<> {
    let endpoint =
        tonic::transport::Endpoint::from_shared(server.url()).unwrap().initial_stream_window_size(1);
    // A client's connection stays while a call's items have not ended.
    let (hold, ended) = tokio::sync::oneshot::channel::<()>();
    // So many that they are never all answered at once: answers that are ready together go as one.
    let items = stream::iter((0..48).map(|shade| stream_item("x", shade)));
    let items = items.chain(stream::once(ended).filter_map(async |_| None));
    let mut client = SpatialScoreServiceClient::new(endpoint.connect().await.unwrap());
    let answers = client.score_stream(items).await.unwrap();
    let metrics = server.metrics_address();
    let scored = || get(metrics, "/metrics").contains("\nspatialscore_items_total{outcome=\"OK\"} ");
    tokio::task::block_in_place(|| while !scored() {});
    (client, answers, hold)
}

/// Runs the program in a shell, to which it is `$0`, on a free port that is told to both.
fn in_shell(script: &str) -> (std::process::Child, String) {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script, env!("CARGO_BIN_EXE_spatialscore")]);
    command.args(["serve", "--device=cpu", "--log-format=json", "--set=server.drain_grace_seconds=0"]);
    command.args(["--listen=127.0.0.1:0", "--metrics-listen", &address]);
    command.args(["--checkpoint", checkpoint().to_str().unwrap()]).stdin(std::process::Stdio::null());
    (command.env_remove("RUST_LOG").spawn().unwrap(), address)
}

/// Waits until the metrics say that the server serves.
fn until_serving(metrics: &str) {
    let serves = || {
        std::net::TcpStream::connect(metrics).is_ok()
            && get(metrics, "/metrics").contains("\nspatialscore_serving 1\n")
    };
    let start = std::time::Instant::now();
    while !serves() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never serves");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(child: &std::process::Child, name: &str) {
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
}

/// The first process of a container: the system drops what it has no handler for, unless it is held.
#[test]
fn as_process_one_it_hears_a_signal_before_libtorch_is_there() {
    let unshare = "unshare --user --map-root-user --pid --fork --mount-proc";
    let probe = std::process::Command::new("bash").args(["-c", &format!("{unshare} true")]).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("this system lets nobody make a namespace");
        return;
    }
    // From the moment in which its first code has run; and from before, while its libraries are loaded, where it is
    // started as the Dockerfile does.
    let ours = r#"[ "$(readlink /proc/$inner/exe)" = "$(readlink -f "$0")" ]"#;
    let held = "env --block-signal=TERM,INT,HUP";
    let cases =
        (0..8).map(|n| ("", ours, 0.08 * f64::from(n))).chain([(held, "true", 0.0), (held, "true", 0.02)]);
    for (starter, begun, pause) in cases {
        let script = format!(
            r#"{unshare} bash -c 'exec {starter} "$0" "$@" 2>/dev/null' "$0" "$@" & outer=$!
               until inner=$(pgrep -P $outer) && {begun} &&
                   grep -q '^SigBlk:.*[4567cdef]...$' /proc/$inner/status; do :; done
               sleep {pause}; kill -TERM $inner
               (sleep 60; kill -KILL $inner) & guard=$!
               wait $outer; code=$?; kill $guard; exit $code"#
        );
        let start = std::time::Instant::now();
        let code = in_shell(&script).0.wait().unwrap().code();
        assert_eq!(code, Some(0), "{starter} after {pause} s, in {:?}", start.elapsed());
    }
}

/// A log that is as large as files may be costs lines, which are counted, and nothing else.
#[test]
fn a_log_that_cannot_be_written_ends_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    for script in
        [r#"exec "$0" "$@" 2>/dev/full"#, &format!(r#"ulimit -f 0; exec "$0" "$@" 2>{}"#, log.display())]
    {
        let (mut child, metrics) = in_shell(script);
        until_serving(&metrics);
        let page = get(&metrics, "/metrics");
        let dropped =
            page.lines().find_map(|line| line.strip_prefix("spatialscore_log_lines_dropped_total "));
        assert!(dropped.is_some_and(|count| count.parse::<u64>().unwrap() > 0), "{script}: {page}");
        signal(&child, "TERM");
        assert_eq!(child.wait().unwrap().code(), Some(0), "{script}");
    }
}

/// `nohup` has it live on when its terminal goes.
#[test]
fn a_hangup_that_is_to_be_ignored_is_ignored() {
    let (mut child, metrics) = in_shell(r#"trap '' HUP; exec "$0" "$@" 2>/dev/null"#);
    until_serving(&metrics);
    signal(&child, "HUP");
    std::thread::sleep(Duration::from_millis(1500));
    assert!(get(&metrics, "/metrics").contains("\nspatialscore_serving 1\n"));
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A control group with time for so many cores has as many lanes, and as many threads that prepare.
#[test]
fn threads_are_as_many_as_the_control_group_has_time_for() {
    use std::fs::{create_dir, read_dir, remove_dir, write};
    let cores = std::thread::available_parallelism().unwrap().get();
    let name = format!("spatialscore-test-{}", std::process::id());
    // Version 1 and version 2, whichever this system has and lets us write.
    let (one, two) = (format!("/sys/fs/cgroup/cpu/{name}"), format!("/sys/fs/cgroup/{name}"));
    let version_two = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let group = if version_two { two } else { one };
    if create_dir(&group).is_err() {
        println!("this system lets nobody make a control group");
        return;
    }
    for (quota, expected) in [(50_000, 1), (100_000, 1), (150_000, 1), (-1, cores), (100_000 * 64, cores)] {
        let limit = if version_two {
            let quota = if quota < 0 { "max".to_owned() } else { quota.to_string() };
            write(format!("{group}/cpu.max"), format!("{quota} 100000"))
        } else {
            write(format!("{group}/cpu.cfs_quota_us"), quota.to_string())
        };
        limit.unwrap();
        let (mut child, metrics) =
            in_shell(&format!(r#"echo $$ >{group}/cgroup.procs; exec "$0" "$@" 2>/dev/null"#));
        until_serving(&metrics);
        let threads = read_dir(format!("/proc/{}/task", child.id())).unwrap();
        // A thread that helped to start may end between its listing and its reading.
        let names: Vec<String> =
            threads.filter_map(|entry| read_to_string(entry.ok()?.path().join("comm")).ok()).collect();
        signal(&child, "TERM");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        for kind in ["lane ", "processor "] {
            let count = names.iter().filter(|name| name.starts_with(kind)).count();
            assert_eq!(count, expected, "quota {quota}: {names:?}");
        }
    }
    // The last of its processes may take a moment to leave.
    let removed = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        remove_dir(&group).is_ok()
    });
    assert!(removed, "{group} is still there");
}

#[test]
fn what_the_program_is_made_of_goes_into_the_image_and_the_crate() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().unwrap();
    // What rustc wrote of each build of the library: what was compiled, and what was built in. The newest is this one; what
    // clippy only looked at has no library beside it.
    let folder = Path::new(env!("CARGO_BIN_EXE_spatialscore")).with_file_name("deps");
    let written = std::fs::read_dir(folder).unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        let path = entry.path();
        let library = path.with_file_name(format!("lib{}.rlib", path.file_stem()?.to_str()?));
        let made_of =
            (path.extension()? == "d" && library.exists()).then(|| read_to_string(&path).ok())??;
        made_of.contains(" src/lib.rs").then_some((entry.metadata().ok()?.modified().ok()?, made_of))
    });
    let (_, made_of) = written.max().unwrap();
    // Its other lines are the environment's.
    let (_, files) = made_of.lines().next().unwrap().split_once(": ").unwrap();
    let files = files.split(' ').filter_map(|file| root.join(file).canonicalize().ok());
    let parts: BTreeSet<String> = files
        .filter_map(|file| Some(file.strip_prefix(&root).ok()?.iter().next()?.to_str()?.to_owned()))
        .filter(|part| part != "target")
        .collect();
    assert!(parts.contains("src") && parts.contains("samples"), "{parts:?}");
    let image = read_to_string(root.join(".dockerignore")).unwrap();
    let krate = read_to_string(root.join("Cargo.toml")).unwrap();
    for part in parts {
        assert!(image.lines().any(|line| line == format!("!{part}")), ".dockerignore leaves out {part}");
        assert!(krate.contains(&format!("\"/{part}\"")), "Cargo.toml's include leaves out {part}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_port_gives_metrics_and_nothing_else() {
    let server = tokio::task::block_in_place(Server::serving);
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    client.score(request([1, 2])).await.unwrap();
    client.score(proto::ScoreRequest::default()).await.unwrap_err();
    let address = server.metrics_address();
    let page = tokio::task::block_in_place(|| get(address, "/metrics"));
    assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
    for line in [
        "spatialscore_requests_total{rpc=\"Score\",code=\"OK\"} 1",
        "spatialscore_requests_total{rpc=\"Score\",code=\"INVALID_ARGUMENT\"} 1",
        "spatialscore_items_total{outcome=\"OK\"} 2",
        "spatialscore_score_mean_count 2",
        "spatialscore_serving 1",
        "# TYPE spatialscore_forward_seconds histogram",
        "# HELP spatialscore_queue_tokens Tokens of the items that hold a place in the queue.",
        &format!("spatialscore_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.lines().any(|l| l == line), "{line:?} is not in\n{page}");
    }
    for name in
        ["spatialscore_model_info{name=", "process_resident_memory_bytes ", "process_start_time_seconds "]
    {
        assert!(page.lines().any(|line| line.starts_with(name)), "{name:?} is not in\n{page}");
    }
    let posted = tokio::task::block_in_place(|| say(address, "POST /metrics HTTP/1.1", b"x"));
    assert!(posted.starts_with("HTTP/1.1 405 ") && posted.contains("allow: GET, HEAD"), "{posted}");
    let head = tokio::task::block_in_place(|| say(address, "HEAD /metrics HTTP/1.1", b""));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let other = tokio::task::block_in_place(|| get(address, "/"));
    assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
}

#[test]
fn score_writes_results_in_the_order_of_the_input() {
    let server = Server::serving();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut manifest = String::from("id,image,prompt\n");
    for index in 0..100 {
        std::fs::write(path(&format!("{index}.png")), png(index)).unwrap();
        manifest += &format!("n{index},{index}.png,\"a cup, number {index}\"\n");
    }
    std::fs::write(path("all.csv"), &manifest).unwrap();
    let url = server.url();
    let (code, out, said) =
        run(&["score", "--server", &url, "--manifest", &path("all.csv"), "--format", "json"]);
    assert_eq!((code, said.as_str()), (0, ""));
    let rows: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<&str> = rows.iter().map(|row| row["id"].as_str().unwrap()).collect();
    assert_eq!(ids, (0..100).map(|index| format!("n{index}")).collect::<Vec<_>>());
    assert!(rows.iter().all(|row| row["mean"].is_number() && row["error"].is_null()));

    std::fs::write(path("bad.png"), "no picture").unwrap();
    let images = [path("1.png"), path("bad.png"), path("missing.png"), path("2.png")];
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let arguments = ["score", "--server", &url, "--prompt", "a cup", "--format", "csv"];
    let (code, out, said) = run(&[&arguments[..], &images].concat());
    assert_eq!((code, said.as_str()), (1, "error: 2 without a score\n"));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "id,image,prompt,mean,stddev,error");
    assert!(lines[1].contains("1.png,a cup,") && lines[4].contains("2.png,a cup,"), "{out}");
    assert!(lines[2].contains("INVALID_ARGUMENT: item.image.encoded: "), "{out}");
    assert!(lines[3].contains("No such file"), "{out}");

    let evaluated =
        || get(server.metrics_address(), "/metrics").contains("queue_items{priority=\"evaluation\"}");
    assert!(!evaluated());
    let (code, _, _) = run(&[&arguments[..], &["--priority=evaluation", &path("3.png")]].concat());
    assert!(code == 0 && evaluated());

    let (code, out, _) = run(&["score", "--server", &server.address, "--prompt", "a cup", &path("1.png")]);
    assert!(code == 0 && out.contains("MEAN") && out.contains("a cup"), "{out}");
    server.signal("TERM");
    assert_eq!(server.code(), Some(0));
    let (code, _, said) = run(&["score", "--server", &url, "--prompt", "a cup", &path("1.png")]);
    assert!(code == 1 && said.starts_with("error: UNAVAILABLE: "), "{said}");
}

#[test]
fn score_reads_the_environment_that_the_python_client_reads() {
    const TOKEN: &str = "0123456789abcdef0123";
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, text) in [("tokens", format!("trainer:{TOKEN}\n")), ("token", format!("{TOKEN}\n"))] {
        std::fs::write(path(name), text).unwrap();
    }
    std::fs::write(path("cup.png"), png(1)).unwrap();
    let server = Server::start_with(&["--tokens-file", &path("tokens")]);
    let cup = path("cup.png");
    let score = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command =
            program(&[&["score", "--prompt", "a cup", "--wait", "60", &cup], arguments].concat());
        let output = command.envs(environment.iter().copied()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    // A port that nobody listens on, and then the server.
    let (address, targets) = (server.address.as_str(), format!("127.0.0.1:1, {}", server.address));
    let [tokens, token] = ["tokens", "token"].map(path);
    for environment in [
        [("SPATIALSCORE_TARGET", targets.as_str()), ("SPATIALSCORE_TOKEN", TOKEN)],
        [("SPATIALSCORE_TARGET", address), ("SPATIALSCORE_TOKEN_FILE", token.as_str())],
        [("SPATIALSCORE_TARGET", address), ("SPATIALSCORE_TOKEN_FILE", tokens.as_str())],
    ] {
        assert_eq!(score(&[], &environment), (0, String::new()), "{environment:?}");
    }
    // What is named counts more.
    let wrong = [("SPATIALSCORE_TARGET", "127.0.0.1:1"), ("SPATIALSCORE_TOKEN", "another-0123456789abcdef")];
    let named = ["--server", address, "--token-file", token.as_str()];
    assert_eq!(score(&named, &wrong), (0, String::new()));
    let (code, said) = score(&["--server", address], &wrong);
    assert!(code == 1 && said.starts_with("error: UNAUTHENTICATED"), "{said}");
    for (target, words) in [
        ("", "--server, or SPATIALSCORE_TARGET, is empty"),
        ("ftp://a", "\"ftp://a\" is no server; give host:port"),
        ("a:b", "\"a:b\" is no server"),
        ("a:0", "\"a:0\" is no server"),
    ] {
        let (code, said) = score(&["--server", target], &[]);
        assert!(code == 64 && said.contains(words), "{said}");
    }
    let (code, said) = score(&["--server", "a"], &[("SPATIALSCORE_TOKEN", "short")]);
    assert!(code == 64 && said.contains("SPATIALSCORE_TOKEN: the token must have at least 16"), "{said}");
}

#[test]
fn an_address_that_is_taken_is_told_with_its_setting() {
    let first = Server::serving();
    let metrics = first.metrics_address().to_owned();
    let (code, _, said) = run(&["serve", "--listen=127.0.0.1:0", "--metrics-listen", &metrics]);
    assert!(code == 1 && said.contains(&format!("metrics.listen = \"{metrics}\": ")), "{said}");
}

/// The smallest limits that there can be leave something to score, or say that they do not.
#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_limits_start_where_anything_can_keep_them() {
    let smallest = ["max_image_pixels", "max_image_bytes", "max_prompt_bytes", "max_items_per_request"];
    let smallest = smallest.map(|name| format!("--set=limits.{name}=1"));
    let server =
        tokio::task::block_in_place(|| Server::serving_with(&smallest.each_ref().map(String::as_str)));
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let raw = proto::RawImage { width: 1, height: 1, rgb8: vec![7; 3].into() };
    let mut request = request([]);
    request.prompt = Some("a".into());
    request.items.push(item(proto::Image { source: Some(proto::image::Source::Raw(raw)) }));
    assert!(outcomes(&client.score(request).await.unwrap().into_inner())[0].is_ok());
    for (name, words) in [("max_item_tokens", "than the 1 tokens"), ("max_prompt_tokens", "may have 1")] {
        let limit = format!("--set=limits.{name}=1");
        let (code, _, said) = tokio::task::block_in_place(|| {
            let checkpoint = checkpoint();
            run(&[
                "serve",
                "--listen=127.0.0.1:0",
                "--metrics-listen=",
                &limit,
                "--checkpoint",
                checkpoint.to_str().unwrap(),
            ])
        });
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("nothing could ever be scored") && said.contains(words), "{said}");
    }
}

/// The manifest's settings exist, and its pods are given the time to end in order.
#[test]
fn kubernetes_waits_until_a_pod_has_drained() {
    let manifest = include_str!("../deploy/kubernetes.yaml");
    let number = |pattern: &str| -> u64 {
        let found = Regex::new(pattern).unwrap().captures(manifest).unwrap_or_else(|| panic!("{pattern}"));
        found[1].parse().unwrap()
    };
    let variable = Regex::new(r#"name: (SPATIALSCORE__\w+), value: "?([^"}]+)"?\}"#).unwrap();
    let mut environment: HashMap<String, String> =
        variable.captures_iter(manifest).map(|found| (found[1].into(), found[2].into())).collect();
    assert!(environment.len() > 2, "{environment:?}");
    // It is there once the secret is mounted.
    environment.remove("SPATIALSCORE__AUTH__TOKENS_FILE").unwrap();
    let settings = Settings::load(&Sources { environment, ..Sources::default() }).unwrap().server;
    let patience = Duration::from_secs(number(r"\n +terminationGracePeriodSeconds: (\d+)\n"));
    // Seconds more, for connections to close.
    let needed = settings.drain_grace + settings.drain_timeout + Duration::from_secs(5);
    assert!(patience >= needed, "killed after {patience:?}; to end in order takes up to {needed:?}");
    let looked_at = Duration::from_secs(number(r"readinessProbe: \{grpc: .*periodSeconds: (\d+)"));
    assert!(settings.drain_grace > looked_at, "calls are refused before the pod is seen to be unready");
}

/// What `load` counted is what the server counted, and no item came from the cache.
#[test]
fn load_tells_what_each_step_of_callers_gets() {
    let server = Server::serving();
    let load = |more: &[&str]| {
        let command = ["load", "--server", &server.address, "--side=64", "--seconds=4", "--json"];
        run(&[&command, more].concat())
    };
    let (code, out, said) = load(&["--callers=3", "--group=1", "--sweep"]);
    assert_eq!(code, 0, "{said}");
    let steps: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(steps.iter().map(|step| step["callers"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    let mut pictures = 0.0;
    for step in &steps {
        let number =
            |path: &str| step.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}"));
        let calls = number("/calls");
        assert!(calls > 0.0 && number("/failed") == 0.0 && number("/refused") == 0.0, "{step}");
        let scored = number("/pictures_per_second") * number("/seconds");
        assert!((scored - calls).abs() < 1e-6, "{step}");
        assert!(number("/queue_seconds/p50") <= number("/call_seconds/p50"), "{step}");
        assert!(number("/call_seconds/p50") <= number("/call_seconds/p99"), "{step}");
        pictures += scored;
    }
    let page = get(server.metrics_address(), "/metrics");
    let metric = |name: &str| -> f64 {
        page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or_default()
    };
    assert!(metric("spatialscore_items_total{outcome=\"OK\"}") >= pictures, "{page}");
    assert_eq!(metric("spatialscore_cache_hits_total"), 0.0, "{page}");

    let (code, table, _) = run(&[
        "load",
        "--server",
        &server.address,
        "--side=64",
        "--seconds=4",
        "--group=1",
        "--callers=2",
        "--sweep",
    ]);
    assert_eq!(code, 0);
    assert!(
        table.contains("| callers | pictures/s |") && table.contains("callers on the rate is"),
        "{table}"
    );

    let (code, _, said) = load(&["--group=257"]);
    assert!(code == 1 && said.contains("--group 257: the server takes 256 items in a call"), "{said}");
    let (code, _, said) = run(&["load", "--server", &server.address, "nowhere.png"]);
    assert!(code == 64 && said.contains("nowhere.png: No such file"), "{said}");
}

/// A full queue is told as refusals, and costs no call.
#[test]
fn load_counts_refusals_apart_from_failures() {
    let small = ["queue.max_items=8", "batch.max_items=2", "limits.max_items_per_request=8"];
    let server = Server::serving_with(&small.map(|setting| ["--set", setting]).concat());
    let (code, out, said) = run(&[
        "load",
        "--server",
        &server.address,
        "--side=64",
        "--seconds=8",
        "--json",
        "--callers=16",
        "--group=2",
    ]);
    assert_eq!(code, 0, "{said}");
    let step: Value = serde_json::from_str(out.trim()).unwrap();
    assert!(step["refused"].as_u64().unwrap() > 0, "{step}");
    assert_eq!(step["failed"], 0, "{step}");
}

/// The numbers are those of `score`, and the map has a colour where a cell counts.
#[test]
fn explain_tells_what_each_change_costs() {
    let server = Server::serving_with(&["--set=model.checkpoint=spatialscore-mini"]);
    let root = env!("CARGO_MANIFEST_DIR");
    let image = format!("{root}/samples/banana.right.png");
    let folder = tempfile::tempdir().unwrap();
    let map = folder.path().join("map.png");
    let prompt = "Above a tree there is a banana. The tree stands along the bottom edge.";
    let (at, to) = (format!("--server={}", server.address), format!("--map={}", map.display()));
    let (code, table, errors) = run(&["explain", &at, "--prompt", prompt, "--cells=16", &to, &image]);
    assert_eq!(code, 0, "{errors}");
    let row = |what: &str| -> (f64, f64) {
        let line =
            table.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {table}"));
        let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    };
    let whole = row("  nothing").0;
    for (what, other) in [
        ("  nothing", prompt),
        ("left out: Above a tree", "The tree stands along the bottom edge."),
        ("turned: bottom to top", "Above a tree there is a banana. The tree stands along the top edge."),
    ] {
        let (_, scored, _) = run(&["score", &at, "--format=json", "--prompt", other, &image]);
        let mean = serde_json::from_str::<Value>(&scored).unwrap()["mean"].as_f64().unwrap();
        let (told, cost) = row(what);
        assert!(
            (told - mean).abs() < 2e-4 && (cost - (whole - mean)).abs() < 3e-4,
            "{what}: {mean}\n{table}"
        );
    }
    assert!(table.contains("the map: 4 rows of 4 cells"), "{table}");
    let mut reader =
        png::Decoder::new(std::io::Cursor::new(std::fs::read(map).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    assert!(pixels.chunks(3).any(|pixel| pixel[0] != pixel[2]), "the map is grey");

    let (code, _, errors) = run(&["explain", &at, "--prompt", prompt, "/dev/null"]);
    assert!(code == 64 && errors.contains("/dev/null: "), "{code} {errors}");
}
