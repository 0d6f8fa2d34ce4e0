//! `spatialscore bench`, as a process of its own: what it prints, not how fast it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use serde_json::{Value, json};

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
    command.args(["bench", "--device", "cpu"]).args(arguments);
    command
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
        .stdout
        .split(|&b| b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect()
}

#[test]
fn random_weights_of_a_shape_are_measured() {
    let arguments = ["--random-weights", "tiny", "--side", "112,140", "--batch", "1,3", "--seconds", "0.05"];
    let rows = lines(&bench(&arguments).arg("--json").output().unwrap());
    let number = |row: &Value, key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
    let shape = |row: &Value| ["side", "tokens", "batch"].map(|key| row[key].as_u64().unwrap());
    let shapes: Vec<_> = rows.iter().map(shape).collect();
    // 128 tokens of text, and a token for each 28 × 28 pixels.
    assert_eq!(shapes, [[112, 144, 1], [112, 144, 3], [140, 153, 1], [140, 153, 3]]);
    for row in &rows {
        let rate = number(row, "batch") / number(row, "ms_per_batch") * 1e3;
        assert!((rate / number(row, "pictures_per_second") - 1.0).abs() < 1e-6, "{row}");
        let tflop = rate * number(row, "gflop_per_picture") / 1e3;
        assert!((tflop / number(row, "tflop_per_second") - 1.0).abs() < 1e-6, "{row}");
        let share = tflop / number(row, "matrix_tflop_per_second");
        assert!((share / number(row, "share") - 1.0).abs() < 1e-6 && share > 0.0, "{row}");
    }
    let table = bench(&arguments).output().unwrap();
    assert_eq!(String::from_utf8(table.stdout).unwrap().lines().filter(|l| l.starts_with("| 1")).count(), 4);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let wrong = bench(&["--random-weights", "tiny", "--side", "0"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(64));
    let nowhere = bench(&["--checkpoint", "/nowhere"]).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere"));
}

/// The process behind the benchmarks that alternate with another program.
struct Driven {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Driven {
    fn start(environment: &[(&str, &str)]) -> Self {
        let mut command = bench(&["--commands", "--threads", "2"]);
        command.env_remove("GOMP_SPINCOUNT").env_remove("OMP_WAIT_POLICY").envs(environment.iter().copied());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut driven = Self { input: child.stdin.take(), child, output };
        assert_eq!(driven.read()["threads"], json!(2));
        driven
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &Value) -> Value {
        writeln!(self.input.as_mut().unwrap(), "{command}").unwrap();
        self.read()
    }
}

#[test]
fn a_driver_gets_times_and_scores() {
    let sample = |name: &str| format!("{}/samples/{name}.png", env!("CARGO_MANIFEST_DIR"));
    let items: Vec<Value> = ["panda.right", "panda.twin", "apple.right"]
        .map(|name| json!({"prompt": "a panda is partly hidden by an umbrella", "image": sample(name)}))
        .into();
    let mut driven = Driven::start(&[]);
    assert_eq!(driven.ask(&json!({"load": items}))["tokens"].as_array().unwrap().len(), 3);
    let means = |answer: &Value| -> Vec<f64> {
        assert!(answer["seconds"].as_f64().unwrap() > 0.0, "{answer}");
        answer["means"].as_array().unwrap().iter().map(|mean| mean.as_f64().unwrap()).collect()
    };
    let together = means(&driven.ask(&json!({"forward": [2, 0, 1]})));
    let alone = [2, 0, 1].map(|n| means(&driven.ask(&json!({"score": [n]})))[0]);
    for (a, b) in together.iter().zip(alone) {
        assert!((a - b).abs() < 1e-4, "{together:?} {alone:?}");
    }
    assert!(together[0] != together[1] && together[1] != together[2]);
    assert!(driven.ask(&json!({"process": [0, 1, 2]}))["seconds"].as_f64().unwrap() > 0.0);

    writeln!(driven.input.as_mut().unwrap(), "{}", json!({"forward": [3]})).unwrap();
    drop(driven.input.take());
    let ended = driven.child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("no item 3"));
}

/// What libtorch's threads do while they wait is read when the library is loaded: the process starts itself anew.
#[test]
fn threads_do_not_spin_for_long_unless_told_to() {
    let environment = |driven: &Driven| {
        let bytes = std::fs::read(format!("/proc/{}/environ", driven.child.id())).unwrap();
        String::from_utf8(bytes).unwrap().split('\0').map(str::to_owned).collect::<Vec<_>>()
    };
    let plain = Driven::start(&[]);
    assert!(environment(&plain).contains(&"GOMP_SPINCOUNT=10000".to_owned()));
    let told = Driven::start(&[("OMP_WAIT_POLICY", "active")]);
    assert!(!environment(&told).iter().any(|line| line.starts_with("GOMP_SPINCOUNT=")));
}
