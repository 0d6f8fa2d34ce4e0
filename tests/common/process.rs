//! The program as a process: `spatialscore serve` on free ports, and what it logs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use serde_json::Value;

use super::checkpoint;

pub fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
    command.args(arguments).env_remove("RUST_LOG").env_remove("SPATIALSCORE_CONFIG");
    for name in ["TARGET", "TOKEN", "TOKEN_FILE", "CA"] {
        command.env_remove(format!("SPATIALSCORE_{name}"));
    }
    command
}

/// Exit code, output and errors of a command that ends by itself.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = program(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().expect("no signal"), text(stdout), text(stderr))
}

/// `spatialscore serve` on free ports.
pub struct Server {
    pub process: Child,
    log: BufReader<ChildStderr>,
    pub address: String,
    /// The URL of the HTTP port, where there is one.
    pub http: Option<String>,
    /// The URL of the metrics.
    pub metrics: String,
    /// All that was read of the log.
    pub lines: String,
}

impl Server {
    /// Started, and listening; perhaps not yet serving.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with more arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        let checkpoint = checkpoint();
        let alone = [&["--checkpoint", checkpoint.to_str().unwrap()], arguments].concat();
        Self::start_of(&alone)
    }

    /// Serving these models, each `NAME=CASE` with more of what `--model` takes, with more arguments.
    pub fn of_models(models: &[&str], arguments: &[&str]) -> Self {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
        let model = |text: &&str| {
            let (name, rest) = text.split_once('=').unwrap();
            let (case, more) =
                rest.split_once(',').map_or((rest, String::new()), |(c, m)| (c, format!(",{m}")));
            format!("--model={name}={fixtures}/{case}/checkpoint{more}")
        };
        let models: Vec<String> = models.iter().map(model).collect();
        let all: Vec<&str> = models.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
        let mut server = Self::start_of(&all);
        server.logged("serving", "model");
        server
    }

    fn start_of(arguments: &[&str]) -> Self {
        let mut process = program(&["serve", "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"])
            // Time enough for what was accepted, also on a machine that is busy with other things.
            .args(["--drain-timeout=300", "--set=server.drain_grace_seconds=0"])
            .args(["--log-format=json", "--device=cpu"])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(process.stderr.take().unwrap());
        let (address, metrics, lines) = Default::default();
        let mut server = Self { process, log, address, http: None, metrics, lines };
        server.address = server.logged("gRPC listens", "address");
        server.metrics = server.logged("metrics", "url");
        let logged =
            |line: &str| serde_json::from_str::<Value>(line).ok()?["http"].as_str().map(str::to_owned);
        server.http = server.lines.lines().find_map(logged);
        server
    }

    /// Started and serving.
    pub fn serving() -> Self {
        Self::serving_with(&[])
    }

    /// The same with more arguments.
    pub fn serving_with(arguments: &[&str]) -> Self {
        let mut server = Self::start_with(arguments);
        server.logged("serving", "model");
        server
    }

    /// Waits for a line of the log and gives one of its fields.
    pub fn logged(&mut self, message: &str, field: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "{message:?} was never logged");
            self.lines += &line;
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == message {
                return line[field].as_str().unwrap().to_owned();
            }
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where the metrics are read, as host and port.
    pub fn metrics_address(&self) -> &str {
        self.metrics.strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap()
    }

    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// A field of /proc/PID/status that is counted in memory, in bytes.
    pub fn memory(&self, field: &str) -> u64 {
        memory_of(self.process.id(), field)
    }

    /// Has the peak of its memory (`VmHWM`) counted anew, and gives what it has now.
    pub fn reset_peak(&self) -> u64 {
        std::fs::write(format!("/proc/{}/clear_refs", self.process.id()), "5").unwrap();
        self.memory("VmRSS")
    }

    /// The exit code.
    pub fn code(self) -> Option<i32> {
        self.end().0
    }

    /// The exit code, and all that it logged.
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut lines = std::mem::take(&mut self.lines);
        self.log.read_to_string(&mut lines).unwrap();
        (self.process.wait().unwrap().code(), lines)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed half way leaves nothing behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A plain HTTP GET; the answer with its head.
pub fn get(address: &str, path: &str) -> String {
    say(address, &format!("GET {path} HTTP/1.1"), b"")
}

/// A plain HTTP request of this head and body; the answer with its head.
pub fn say(address: &str, head: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(stream, "{head}\r\nHost: {address}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
        .unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A field of /proc/PID/status that is counted in memory, in bytes.
pub fn memory_of(process: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// The same of this process.
pub fn own_memory(field: &str) -> u64 {
    memory_of(std::process::id(), field)
}
