//! Logs and metrics: the names of all metrics, in one place, and how both are set up.

pub mod trace;

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use metrics::{Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{Level, Metadata};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogFormat, LogSettings};
use crate::telemetry::trace::Export;

/// Calls by `rpc` and `code`.
pub const REQUESTS: &str = "spatialscore_requests_total";
/// Seconds from a call's headers to its last byte, by `rpc`.
pub const REQUEST_DURATION: &str = "spatialscore_request_duration_seconds";
/// Items by `outcome`: `OK` or the code of their error.
pub const ITEMS: &str = "spatialscore_items_total";
/// Items that were dropped before they cost a forward, by `reason`: `cancelled` or `late`.
pub const ITEMS_DROPPED: &str = "spatialscore_items_dropped_total";
/// Seconds of processor work on an item: once for its admission, once for its pixels.
pub const PREPARATION: &str = "spatialscore_preparation_seconds";
/// Items that hold a place in the queue, those still being prepared included, by `priority`.
pub const QUEUE_ITEMS: &str = "spatialscore_queue_items";
/// Tokens of those items, by `priority`.
pub const QUEUE_TOKENS: &str = "spatialscore_queue_tokens";
/// Seconds from an item's admission to the start of its forward.
pub const QUEUE_WAIT: &str = "spatialscore_queue_wait_seconds";
/// Seconds of a forward, by `device`. Forwards of a device do not overlap, so that the rate of the sum is the share of
/// time in which the device was busy.
pub const FORWARD: &str = "spatialscore_forward_seconds";
/// Items of a batch.
pub const BATCH_ITEMS: &str = "spatialscore_batch_items";
/// Tokens of a batch.
pub const BATCH_TOKENS: &str = "spatialscore_batch_tokens";
/// Tokens of a batch as a share of what it may hold. Nothing is padded: every token is a sample's.
pub const BATCH_FILL: &str = "spatialscore_batch_fill_ratio";
/// Different sample lengths in a batch.
pub const BATCH_LENGTHS: &str = "spatialscore_batch_lengths";
/// Forwards that failed and were tried again with fewer items.
pub const FORWARD_FAILURES: &str = "spatialscore_forward_failures_total";
/// Workers that were lost and made anew, by `device`.
pub const WORKER_RESTARTS: &str = "spatialscore_worker_restarts_total";
/// Workers that are up.
pub const WORKERS: &str = "spatialscore_workers";
/// Items that cost no forward, `from` the `memory` of earlier scores or another's `flight`.
pub const CACHE_HITS: &str = "spatialscore_cache_hits_total";
/// Items whose score was neither known nor being computed.
pub const CACHE_MISSES: &str = "spatialscore_cache_misses_total";
/// The scores themselves: an operator sees reward hacking as a drift of this distribution.
pub const SCORE_MEAN: &str = "spatialscore_score_mean";
/// 1, with the server's `version`.
pub const BUILD_INFO: &str = "spatialscore_build_info";
/// 1, with the model's `name`, `revision`, `dtype` and `devices`.
pub const MODEL_INFO: &str = "spatialscore_model_info";
/// 1 where the self-test at load found that the scores do not differ with the picture, or with the prompt.
pub const CONSTANT_SCORES: &str = "spatialscore_constant_scores";
/// Self-tests of models that serve, by `device` and `outcome`: `passed`, `failed` (the model is out of service) or `error`
/// (the forward failed, which says nothing of the scores).
pub const SELF_TESTS: &str = "spatialscore_self_tests_total";
/// Lines of the audit log, by `outcome`: `written`, `dropped` (there was no room for more that wait) or `failed`.
pub const AUDIT_LINES: &str = "spatialscore_audit_lines_total";
/// Items for the second `model`, by `outcome`: `scored`, `dropped` (there was no room) or `failed`.
pub const SHADOW_ITEMS: &str = "spatialscore_shadow_items_total";
/// How much higher the second `model` scores than that it is held against (`of`), in the mean of the newest items.
pub const SHADOW_SHIFT: &str = "spatialscore_shadow_mean_shift";
/// Spearman's rank correlation of the two, over the same items.
pub const SHADOW_RANK_CORRELATION: &str = "spatialscore_shadow_rank_correlation";
/// The standard deviation of what training was scored of late, by `model` (`recent.keep`).
pub const RECENT_SPREAD: &str = "spatialscore_recent_score_stddev";
/// Groups of several pictures of one prompt and caller of training's among them.
pub const RECENT_GROUPS: &str = "spatialscore_recent_groups";
/// Those whose scores have no spread: they teach a policy nothing.
pub const RECENT_FLAT_GROUPS: &str = "spatialscore_recent_groups_without_spread";
/// 1 while the model serves; 0 while it loads or drains, or has no worker, or a model is out of service.
pub const SERVING: &str = "spatialscore_serving";
/// Connections that are open.
pub const CONNECTIONS: &str = "spatialscore_connections";
/// Connections that were closed at once, since there were as many as there may be.
pub const CONNECTIONS_REFUSED: &str = "spatialscore_connections_refused_total";
/// Connections that were closed since another needed their place.
pub const CONNECTIONS_DISPLACED: &str = "spatialscore_connections_displaced_total";
/// Bytes of the messages on their way in, from their beginning until their pictures are decoded.
pub const MESSAGE_BYTES: &str = "spatialscore_messages_in_flight_bytes";
/// Calls that were refused since something was full, by `reason`: `queue`, `deadline`, `bytes` or `calls`.
pub const CALLS_REFUSED: &str = "spatialscore_calls_refused_total";
/// Changes of files that could not be used, by `what`: `tokens` or `certificates`.
pub const RELOAD_FAILURES: &str = "spatialscore_reload_failures_total";
/// Lines that the log had no room for, since whoever reads it was too slow, or the disk was full.
pub const LOG_LINES_DROPPED: &str = "spatialscore_log_lines_dropped_total";
/// Resident memory of the process.
pub const PROCESS_MEMORY: &str = "process_resident_memory_bytes";
/// When the process started.
pub const PROCESS_START: &str = "process_start_time_seconds";

/// The labels of what is measured of a model: its name, where the operator named it. Where there is one model without a
/// name, there is nothing to tell apart.
#[derive(Debug, Clone, Default)]
pub struct ModelLabels(Option<Label>);

impl ModelLabels {
    /// Of a model of this name.
    pub fn named(name: &str) -> Self {
        static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen.contains(name) || seen.len() < MOST_NAMES && seen.insert(name.to_owned());
        Self(Some(Label::new("model", if known { name.to_owned() } else { "other".to_owned() })))
    }

    /// With more of them.
    pub fn with<const N: usize>(&self, more: [(&'static str, String); N]) -> Vec<Label> {
        let more = more.into_iter().map(|(key, value)| Label::new(key, value));
        self.0.iter().cloned().chain(more).collect()
    }

    /// Alone.
    pub fn alone(&self) -> Vec<Label> {
        self.with([])
    }
}

/// How many names of models are labels in the life of a process. Models that come after have one label together.
const MOST_NAMES: usize = 128;

const SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const POWERS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
const TENTHS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const TOKENS: [f64; 10] = [128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0];
/// Scores have no canonical scale; most checkpoints stay within twenty of zero.
const SCORES: [f64; 17] =
    [-20.0, -15.0, -10.0, -7.5, -5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0];

/// Lines of the log that wait for whoever reads it.
const LOG_LINES: usize = 1 << 14;

/// The log's own thread, which alone waits for the reader, and the count of the lines that found no room.
static LOG: Mutex<Option<(WorkerGuard, ErrorCounter)>> = Mutex::new(None);

/// Lines that could not be written: the disk was full, or the file as large as it may be.
static UNWRITTEN: AtomicU64 = AtomicU64::new(0);

/// What the log is written to. The thread that writes says nothing of its failures: they are counted here.
struct Lines(io::Stderr);

impl Write for Lines {
    /// Takes a line, whether it can be written or not.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.write_all(line).is_err() {
            UNWRITTEN.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Sets up the log, and the export of traces where there is one. `RUST_LOG`, where it is set, wins over the level of
/// the settings. Nobody who logs waits: where the reader stalls and the buffer is full, lines are dropped and counted.
/// [`end_log`] writes out what is left.
///
/// # Errors
/// `RUST_LOG` cannot be read, or a log is set up already.
pub fn init_log(
    settings: &LogSettings,
    traces: Option<&Export>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) if !directives.is_empty() => EnvFilter::try_new(directives)?,
        _ => EnvFilter::new(settings.level.to_string()),
    };
    // A panic that is caught fails one item. It is a line like any other: whoever panics never waits for who reads it.
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a panic")));
    let (writer, thread) =
        NonBlockingBuilder::default().buffered_lines_limit(LOG_LINES).finish(Lines(io::stderr()));
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = Some((thread, writer.error_counter()));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(io::stderr().is_terminal());
    let lines = match settings.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let spans = traces.map(|traces| {
        tracing_opentelemetry::layer().with_tracer(traces.tracer()).with_filter(filter_fn(exported))
    });
    tracing_subscriber::registry().with(spans).with(lines.with_filter(filter)).try_init()?;
    Ok(())
}

/// Writes out what is left of the log, for a second at most; what is logged from then on is lost.
pub fn end_log() {
    drop(LOG.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Spans of ours, and of what happens in them no more than a log at its default level shows.
fn exported(what: &Metadata<'_>) -> bool {
    let most = if what.is_span() { Level::DEBUG } else { Level::INFO };
    what.target().starts_with(env!("CARGO_PKG_NAME")) && *what.level() <= most
}

/// Sets up the process's metrics.
///
/// # Errors
/// They are set up already.
pub fn init_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Full(BATCH_ITEMS.into()), &POWERS)?
        .set_buckets_for_metric(Matcher::Full(BATCH_TOKENS.into()), &TOKENS)?
        .set_buckets_for_metric(Matcher::Full(BATCH_LENGTHS.into()), &POWERS)?
        .set_buckets_for_metric(Matcher::Full(BATCH_FILL.into()), &TENTHS)?
        .set_buckets_for_metric(Matcher::Full(SCORE_MEAN.into()), &SCORES)?
        .install_recorder()?;
    describe();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(SERVING).set(0.0);
    gauge!(WORKERS).set(0.0);
    gauge!(MESSAGE_BYTES).set(0.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!(PROCESS_START).set(now.as_secs_f64());
    Ok(handle)
}

/// The help texts.
fn describe() {
    describe_counter!(REQUESTS, "Calls by rpc and gRPC code.");
    describe_histogram!(REQUEST_DURATION, Unit::Seconds, "From a call's headers to its last byte.");
    describe_counter!(ITEMS, "Items answered, by outcome: OK or the code of their error.");
    describe_counter!(
        ITEMS_DROPPED,
        "Items dropped before they cost a forward, by reason: cancelled or late."
    );
    describe_histogram!(PREPARATION, Unit::Seconds, "Processor work: an item's admission, or its pixels.");
    describe_gauge!(QUEUE_ITEMS, "Items that hold a place in the queue, those in preparation included.");
    describe_gauge!(QUEUE_TOKENS, "Tokens of the items that hold a place in the queue.");
    describe_histogram!(QUEUE_WAIT, Unit::Seconds, "From an item's entry into the queue to its forward.");
    describe_histogram!(
        FORWARD,
        Unit::Seconds,
        "A forward pass, by device; the rate of its sum is the device's busy ratio."
    );
    describe_histogram!(BATCH_ITEMS, "Items of a batch.");
    describe_histogram!(BATCH_TOKENS, "Tokens of a batch.");
    describe_histogram!(BATCH_FILL, "Tokens of a batch as a share of what it may hold; nothing is padded.");
    describe_histogram!(BATCH_LENGTHS, "Different sample lengths in a batch.");
    describe_counter!(WORKER_RESTARTS, "Workers that were lost and made anew, by device.");
    describe_gauge!(WORKERS, "Workers that are up.");
    describe_counter!(
        CACHE_HITS,
        "Items that cost no forward, from the memory of earlier scores or from another's flight."
    );
    describe_counter!(CACHE_MISSES, "Items whose score was neither known nor being computed.");
    describe_counter!(FORWARD_FAILURES, "Forwards that failed; batches are halved and tried again.");
    describe_histogram!(SCORE_MEAN, "The scores themselves; a drift may be reward hacking.");
    describe_gauge!(BUILD_INFO, "1, with the server's version.");
    describe_gauge!(MODEL_INFO, "1, with what is served.");
    describe_gauge!(CONSTANT_SCORES, "1 where the scores of the self-test at load did not differ.");
    describe_counter!(SELF_TESTS, "Self-tests of models that serve, by outcome: passed, failed or error.");
    describe_counter!(AUDIT_LINES, "Lines of the audit log, by outcome: written, dropped or failed.");
    describe_counter!(SHADOW_ITEMS, "Items for the second model, by outcome: scored, dropped or failed.");
    describe_gauge!(
        SHADOW_SHIFT,
        "How much higher the second model scores in the mean, of the newest items."
    );
    describe_gauge!(SHADOW_RANK_CORRELATION, "Spearman's rank correlation of both models' newest scores.");
    describe_gauge!(RECENT_SPREAD, "The standard deviation of training's scores of late (recent.keep).");
    describe_gauge!(
        RECENT_GROUPS,
        "Groups of several pictures of one prompt among training's scores of late."
    );
    describe_gauge!(RECENT_FLAT_GROUPS, "Those of the groups whose scores have no spread.");
    describe_gauge!(
        SERVING,
        "1 while the model serves; 0 while it loads or drains, has no worker, or one is out of service."
    );
    describe_gauge!(CONNECTIONS, "Connections that are open.");
    describe_counter!(CONNECTIONS_REFUSED, "Connections closed at once: there were as many as there may be.");
    describe_counter!(
        CONNECTIONS_DISPLACED,
        "Strangers' and idle connections closed since another needed their place."
    );
    describe_gauge!(
        MESSAGE_BYTES,
        Unit::Bytes,
        "Messages on their way in, from their beginning until their pictures are decoded."
    );
    describe_counter!(
        CALLS_REFUSED,
        "Calls refused for want of room, by reason: queue, deadline (it would be over by then), bytes or calls."
    );
    describe_counter!(RELOAD_FAILURES, "Changes of token or certificate files that could not be used.");
    describe_counter!(
        LOG_LINES_DROPPED,
        "Lines the log had no room for: whoever reads it is too slow, or the disk is full."
    );
    describe_gauge!(PROCESS_MEMORY, Unit::Bytes, "Resident memory of the process.");
    describe_gauge!(PROCESS_START, Unit::Seconds, "When the process started, since the epoch.");
}

/// The page of metrics, as it is now.
pub fn page(handle: &PrometheusHandle) -> String {
    if let Some(bytes) = resident_memory() {
        gauge!(PROCESS_MEMORY).set(bytes);
    }
    if let Some((_, dropped)) = &*LOG.lock().unwrap_or_else(PoisonError::into_inner) {
        let unwritten = UNWRITTEN.load(Ordering::Relaxed);
        counter!(LOG_LINES_DROPPED).absolute(dropped.dropped_lines() as u64 + unwritten);
    }
    handle.render()
}

/// `VmRSS` of this process, where the system says it.
fn resident_memory() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kilobytes| kilobytes * 1024.0)
}
