//! The settings: defaults < file < environment < flags, checked once at start.
//!
//! The defaults are `spatialscore.example.toml` itself, so the documentation of a setting cannot drift from it.

mod fault;
pub mod models;
mod reader;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::device::{Devices, Dtype};

pub use fault::{Fault, InvalidSettings};
use reader::Reader;

/// The example file, which holds the default of every setting.
pub const EXAMPLE: &str = include_str!("../../spatialscore.example.toml");

/// A token count that no setting may exceed.
const MOST_TOKENS: usize = 1 << 30;

/// The settings of a server, checked. Each is described in `spatialscore.example.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The gRPC server.
    pub server: ServerSettings,
    /// The model and where it runs; where there are several, what they have in common.
    pub model: ModelSettings,
    /// All models that are served, the default one first: at least one.
    pub models: Vec<ModelSettings>,
    /// Threads that decode, resize and tokenise; `None`: one per core.
    pub processor_threads: Option<usize>,
    /// What may wait.
    pub queue: Capacity,
    /// What one forward may hold.
    pub batch: BatchBudget,
    /// How many scores are remembered; 0 for none.
    pub cache_items: usize,
    /// What a caller must keep.
    pub limits: Limits,
    /// The file of the tokens that callers must show; `None`: nobody is asked.
    pub tokens_file: Option<PathBuf>,
    /// TLS; `None`: plain text.
    pub tls: Option<TlsSettings>,
    /// The log.
    pub log: LogSettings,
    /// Where traces go.
    pub trace: TraceSettings,
    /// Where trainers' own reward clients call over HTTP; `None`: nowhere.
    pub http_listen: Option<SocketAddr>,
    /// How long their calls wait in line at most, where the queue is full.
    pub http_patience: Duration,
    /// Whether there is a page to look with.
    pub http_page: bool,
    /// The most cells of an explanation's map.
    pub http_explain_cells: usize,
    /// Where metrics are read; `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// How models come and go.
    pub admin: AdminSettings,
    /// How models are tested while they serve.
    pub self_test: SelfTestSettings,
    /// The log of what judged which item; `None`: there is none.
    pub audit: Option<AuditSettings>,
    /// A second model that scores a part of the traffic; `None`: there is none.
    pub shadow: Option<ShadowSettings>,
    /// What is kept of what was scored of late; `None`: nothing.
    pub recent: Option<RecentSettings>,
}

/// Section `[recent]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentSettings {
    /// For how long.
    pub keep: Duration,
    /// The bytes that all of it may take.
    pub max_bytes: usize,
    /// Whether prompts are kept.
    pub prompts: bool,
    /// Whether small pictures are kept.
    pub thumbnails: bool,
}

/// Section `[shadow]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ShadowSettings {
    /// The second model.
    pub model: String,
    /// The model that it is held against; the default one where this is empty.
    pub of: String,
    /// The share of its items, above 0 and up to 1.
    pub share: f64,
    /// How many of them may wait.
    pub max_items: usize,
}

/// Section `[audit]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditSettings {
    /// The file that is written.
    pub path: PathBuf,
    /// The bytes after which another begins.
    pub max_file_bytes: u64,
    /// How many there are at most.
    pub max_files: usize,
    /// Whether prompts and questions are recorded.
    pub prompts: bool,
    /// Whether pictures are recorded.
    pub pictures: bool,
}

/// Section `[selftest]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestSettings {
    /// How often each model scores the items of its self-test again; `None`: never.
    pub interval: Option<Duration>,
    /// How far a number of theirs may be from the first one.
    pub tolerance: f32,
}

/// Section `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminSettings {
    /// Where models are loaded, replaced, put to sleep and woken; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// The file of the tokens that whoever does so must show; `None`: nobody is asked.
    pub tokens_file: Option<PathBuf>,
    /// Whether a call for a sleeping model wakes it.
    pub wake_on_call: bool,
}

/// Section `[server]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerSettings {
    /// Where the service listens.
    pub listen: SocketAddr,
    /// From the word to stop, and health's `NOT_SERVING`, to the first call that is turned away.
    pub drain_grace: Duration,
    /// The time for answering what was accepted once calls are turned away.
    pub drain_timeout: Duration,
    /// The time without a worker after which the server ends.
    pub recovery_timeout: Duration,
    /// Connections at once.
    pub max_connections: usize,
    /// Those of one address.
    pub max_connections_per_address: usize,
    /// Those of one address that have not shown who they are.
    pub max_stranger_connections: usize,
    /// Bytes of a call's headers.
    pub max_header_bytes: u32,
    /// Whether clients must show certificates.
    pub asks_for_certificates: bool,
    /// Calls at once on one connection.
    pub max_streams: u32,
    /// The silence after which a connection's other end is asked for a sign of life; `None`: never.
    pub keepalive: Option<Duration>,
    /// The time without a call after which a connection is closed; `None`: never.
    pub idle_timeout: Option<Duration>,
}

/// Section `[tls]`: PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// The server's certificate, and those between it and its root.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The authorities that sign clients' certificates; `None`: clients show none.
    pub client_ca: Option<PathBuf>,
}

impl TlsSettings {
    /// All of its files: certificate, key, and the clients' authorities where there are any.
    pub fn files(&self) -> Vec<PathBuf> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca).cloned().collect()
    }
}

/// Section `[trace]`.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceSettings {
    /// The OTLP collector's gRPC endpoint; `None`: traces are not exported.
    pub otlp_endpoint: Option<String>,
    /// The share of the traces begun here that is exported, from 0 to 1.
    pub sample_ratio: f64,
}

/// Section `[model]`, and each of `[[models]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSettings {
    /// The name that its operator gives it; `None`: the checkpoint's, of a model that is alone.
    pub name: Option<String>,
    /// Built in, a directory or a hub id.
    pub checkpoint: String,
    /// The revision of a hub id.
    pub revision: Option<String>,
    /// What its reward is read by, in place of its own `reward_config.json`: a profile that ships, or a file.
    pub profile: Option<String>,
    /// Where it runs.
    pub device: Devices,
    /// Its number format.
    pub dtype: Dtype,
    /// Whether a score is the same to the last bit in any batch.
    pub batch_invariant: bool,
    /// Threads of a forward on the CPU; `None`: one per core.
    pub threads: Option<usize>,
    /// The bytes that all models may take on one device; `None`: what is free there when they are loaded.
    pub max_memory: Option<u64>,
}

/// Section `[limits]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Items of one request.
    pub max_items_per_request: usize,
    /// Items of one stream that are read and not yet answered.
    pub max_stream_items: usize,
    /// Bytes of one message, compressed or not.
    pub max_message_bytes: usize,
    /// Bytes of all messages that are on their way in, until their pictures are decoded.
    pub max_bytes_in_flight: usize,
    /// Bytes of a prompt.
    pub max_prompt_bytes: usize,
    /// Bytes that pictures may take while they are decoded and resized.
    pub max_decode_bytes: usize,
    /// Pixels of a picture before it is resized.
    pub max_image_pixels: u64,
    /// Tokens of one item.
    pub max_item_tokens: usize,
    /// Tokens of one item's text.
    pub max_prompt_tokens: usize,
    /// Bytes of an encoded picture.
    pub max_image_bytes: usize,
    /// Calls of one caller at once.
    pub max_calls_per_caller: usize,
    /// Questions of one item.
    pub max_questions_per_item: usize,
    /// Calls at once on a connection that has not shown whose it is.
    pub max_stranger_calls: usize,
    /// Refusals of one caller in a second.
    pub max_refusals_per_second: u32,
    /// The time in which a message must arrive that was begun.
    pub message_timeout: Duration,
}

/// Section `[queue]`: what may wait, items that are still being prepared included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Text and visual tokens.
    pub tokens: usize,
    /// Items.
    pub items: usize,
}

/// Section `[batch]`: what one forward may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchBudget {
    /// Text and visual tokens. A single item that is larger still makes a batch of its own.
    pub tokens: usize,
    /// Items.
    pub items: usize,
}

/// Section `[log]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogSettings {
    /// The least grave lines that are logged.
    pub level: tracing::Level,
    /// How lines are written.
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the settings are read from, beside the defaults.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// The environment, of which `SPATIALSCORE__SECTION__KEY` count.
    pub environment: HashMap<String, String>,
    /// `section.key` and its value, from the flags.
    pub flags: Vec<(String, String)>,
    /// Models, from the flags: they stand in place of the file's. Each as `NAME=CHECKPOINT[,key=value…]`.
    pub models: Vec<String>,
}

impl Settings {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// Every fault at once, so that one start shows them all.
    pub fn load(sources: &Sources) -> Result<Self, InvalidSettings> {
        Self::load_with(sources, |_| Vec::new())
    }

    /// Reads and checks the settings, with a check of those whose files others read: it gives names and what is wrong.
    ///
    /// # Errors
    /// Every fault at once, so that one start shows them all.
    pub fn load_with(
        sources: &Sources,
        check: impl FnOnce(&Self) -> Vec<(&'static str, String)>,
    ) -> Result<Self, InvalidSettings> {
        let mut reader = Reader::default();
        reader.collect(sources);
        let settings = Self::read(&mut reader);
        for (name, problem) in check(&settings) {
            reader.fault(name, problem);
        }
        reader.refuse_unknown();
        if reader.faults.is_empty() { Ok(settings) } else { Err(InvalidSettings(reader.faults)) }
    }

    fn read(r: &mut Reader) -> Self {
        let mut settings = Self {
            server: ServerSettings {
                listen: r.address("server.listen", 50051),
                drain_grace: Duration::from_secs(r.number("server.drain_grace_seconds", 0..=3600)),
                drain_timeout: Duration::from_secs(r.number("server.drain_timeout_seconds", 0..=86400)),
                recovery_timeout: Duration::from_secs(r.number("server.recovery_timeout_seconds", 1..=86400)),
                max_connections: r.number("server.max_connections", 1..=1 << 20),
                max_connections_per_address: r.number("server.max_connections_per_address", 1..=1 << 20),
                max_stranger_connections: r.number("server.max_stranger_connections", 1..=1 << 20),
                max_header_bytes: r.number("server.max_header_bytes", 1024..=1 << 20),
                asks_for_certificates: false,
                max_streams: r.number("server.max_streams_per_connection", 1..=1 << 20),
                keepalive: r.seconds("server.keepalive_seconds", 0..=86400),
                idle_timeout: r.seconds("server.idle_timeout_seconds", 0..=604_800),
            },
            models: Vec::new(),
            model: ModelSettings {
                name: None,
                checkpoint: r.text("model.checkpoint"),
                revision: Some(r.text("model.revision")).filter(|s| !s.is_empty()),
                profile: Some(r.text("model.reward_config")).filter(|s| !s.is_empty()),
                device: r.parse("model.device", Devices::FORMS, Devices::Auto),
                dtype: r.parse("model.dtype", Dtype::FORMS, Dtype::Auto),
                batch_invariant: r.parse("model.batch_invariant", "true or false", false),
                threads: r.threads("model.threads"),
                max_memory: Some(r.number("model.max_memory_bytes", 0..=1 << 50)).filter(|&bytes| bytes > 0),
            },
            processor_threads: r.threads("processor.threads"),
            queue: Capacity {
                tokens: r.number("queue.max_tokens", 1..=MOST_TOKENS),
                items: r.number("queue.max_items", 1..=1 << 20),
            },
            batch: BatchBudget {
                tokens: r.number("batch.max_tokens", 1..=MOST_TOKENS),
                items: r.number("batch.max_items", 1..=1 << 16),
            },
            cache_items: r.number("cache.max_items", 0..=1 << 24),
            limits: Limits {
                max_items_per_request: r.number("limits.max_items_per_request", 1..=1 << 16),
                max_stream_items: r.number("limits.max_stream_items", 1..=1 << 16),
                max_message_bytes: r.number("limits.max_message_bytes", 1024..=1 << 30),
                max_bytes_in_flight: r.number("limits.max_bytes_in_flight", 1024..=1 << 40),
                max_decode_bytes: r.number("limits.max_decode_bytes", 1024..=1 << 40),
                max_prompt_bytes: r.number("limits.max_prompt_bytes", 1..=1 << 20),
                max_image_pixels: r.number("limits.max_image_pixels", 1..=1 << 32),
                max_item_tokens: r.number("limits.max_item_tokens", 1..=MOST_TOKENS),
                max_prompt_tokens: r.number("limits.max_prompt_tokens", 1..=MOST_TOKENS),
                max_image_bytes: r.number("limits.max_image_bytes", 1..=1 << 30),
                max_calls_per_caller: r.number("limits.max_calls_per_caller", 1..=1 << 20),
                max_questions_per_item: r.number("limits.max_questions_per_item", 1..=1 << 16),
                max_stranger_calls: r.number("limits.max_stranger_calls", 1..=1 << 20),
                max_refusals_per_second: r.number("limits.max_refusals_per_second", 1..=1 << 20),
                message_timeout: Duration::from_secs(r.number("limits.message_timeout_seconds", 1..=86400)),
            },
            tokens_file: r.path("auth.tokens_file"),
            tls: r.tls(),
            log: LogSettings {
                level: r.parse("log.level", "error, warn, info, debug or trace", tracing::Level::INFO),
                format: r.parse("log.format", "text or json", LogFormat::Text),
            },
            trace: TraceSettings {
                otlp_endpoint: r.endpoint("trace.otlp_endpoint"),
                sample_ratio: r.number("trace.sample_ratio", 0.0..=1.0),
            },
            http_listen: r.optional_address("http.listen", 8080),
            http_patience: Duration::from_secs(r.number("http.queue_wait_seconds", 0..=3600)),
            http_explain_cells: r.number("http.explain_cells", 1..=4096) as usize,
            http_page: r.parse("http.page", "true or false", true),
            metrics_listen: r.optional_address("metrics.listen", 9464),
            admin: AdminSettings {
                listen: r.optional_address("admin.listen", 50052),
                tokens_file: r.path("admin.tokens_file"),
                wake_on_call: r.parse("admin.wake_on_call", "true or false", false),
            },
            self_test: SelfTestSettings {
                interval: r.seconds("selftest.interval_seconds", 0..=604_800),
                tolerance: r.number("selftest.tolerance", 0.0..=1_000_000.0),
            },
            audit: r.audit(),
            shadow: r.shadow(),
            recent: r.recent(),
        };
        let certificates = settings.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        settings.server.asks_for_certificates = certificates;
        settings.models = r.models(&settings.model);
        settings.check_together(r);
        settings
    }

    /// What no setting can be wrong in alone.
    fn check_together(&self, r: &mut Reader) {
        r.at_most("batch.max_tokens", self.batch.tokens, "queue.max_tokens", self.queue.tokens);
        r.at_most("batch.max_items", self.batch.items, "queue.max_items", self.queue.items);
        let limits = &self.limits;
        let per_request = "limits.max_items_per_request";
        r.at_most(per_request, limits.max_items_per_request, "queue.max_items", self.queue.items);
        r.at_most("limits.max_item_tokens", limits.max_item_tokens, "queue.max_tokens", self.queue.tokens);
        let in_flight = "limits.max_bytes_in_flight";
        r.at_most(
            "limits.max_message_bytes",
            limits.max_message_bytes,
            in_flight,
            limits.max_bytes_in_flight,
        );
        let admin = &self.admin;
        if admin.listen.is_some_and(|address| !address.ip().is_loopback()) && admin.tokens_file.is_none() {
            r.fault(
                "admin.listen",
                "other machines can reach this address, and nobody is asked who they are: give admin.tokens_file, or \
                 take a loopback address such as 127.0.0.1",
            );
        }
        if let Some(ShadowSettings { model, of, .. }) = &self.shadow {
            let there = |name: &str| self.models.iter().any(|model| model.name.as_deref() == Some(name));
            let first = self.models.first().and_then(|model| model.name.as_deref()).unwrap_or_default();
            for (setting, name) in [("shadow.model", model), ("shadow.of", of)] {
                // One that is not there yet may be loaded.
                if !name.is_empty() && !there(name) && admin.listen.is_none() {
                    r.fault(setting, "is the name of no model; those of --model and [[models]] have names");
                }
            }
            if model == if of.is_empty() { first } else { of } {
                r.fault("shadow.model", "is the model that it would be held against");
            }
        }
        let anonymous: bool = r.parse("server.allow_anonymous", "true or false", false);
        let asked =
            self.tokens_file.is_some() || self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let addresses = [("server.listen", Some(self.server.listen)), ("http.listen", self.http_listen)];
        for (name, address) in addresses {
            if address.is_some_and(|address| !address.ip().is_loopback()) && !anonymous && !asked {
                r.fault(
                    name,
                    "other machines can reach this address, and nobody is asked who they are: give callers tokens \
                     (auth.tokens_file) or certificates (tls.client_ca), take a loopback address such as 127.0.0.1, \
                     or say --allow-anonymous (server.allow_anonymous = true)",
                );
            }
        }
    }
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use config::{Config, File, FileFormat, Source};

    use super::reader::flatten;
    use super::*;

    fn load(flags: &[(&str, &str)]) -> Result<Settings, InvalidSettings> {
        let flags = flags.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Settings::load(&Sources { flags, ..Sources::default() })
    }

    fn names() -> Vec<&'static str> {
        let mut reader = Reader::default();
        reader.collect(&Sources::default());
        Settings::read(&mut reader);
        assert_eq!(reader.faults, []);
        reader.known
    }

    #[test]
    fn example_file_is_the_defaults_and_names_every_setting() {
        let defaults = load(&[]).unwrap();
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(file.path(), EXAMPLE).unwrap();
        let sources = Sources { file: Some(file.path().to_owned()), ..Sources::default() };
        assert_eq!(Settings::load(&sources).unwrap(), defaults);

        assert_eq!(defaults.server.listen, "127.0.0.1:50051".parse().unwrap());
        assert_eq!((defaults.http_listen, defaults.http_patience), (None, Duration::from_secs(30)));
        assert!(defaults.http_page);
        assert_eq!(defaults.http_explain_cells, 256);
        assert_eq!(defaults.metrics_listen, Some("127.0.0.1:9464".parse().unwrap()));
        assert_eq!(defaults.model.checkpoint, "spatialscore-mini");
        assert_eq!(defaults.limits.max_prompt_bytes, 8192);
        assert_eq!(defaults.limits.max_message_bytes, 64 << 20);

        let mut in_file = BTreeMap::new();
        let values = Config::builder().add_source(File::from_str(EXAMPLE, FileFormat::Toml)).build().unwrap();
        flatten("", values.collect().unwrap(), &mut in_file);
        let mut known = names();
        known.sort_unstable();
        assert_eq!(in_file.keys().map(String::as_str).collect::<Vec<_>>(), known);
    }

    /// The range that a refusal names is the range that the file documents.
    #[test]
    fn example_file_documents_the_ranges() {
        for name in names() {
            let comment = comment_of(name);
            assert!(!comment.is_empty(), "{name} has no comment");
            // A file that is not there has no range.
            let files = [
                "auth.tokens_file",
                "admin.tokens_file",
                "audit.path",
                "tls.certificate",
                "tls.key",
                "tls.client_ca",
                "model.reward_config",
            ];
            if let Some(InvalidSettings(faults)) =
                load(&[(name, "?")]).err().filter(|_| !files.contains(&name))
            {
                let range = faults[0].problem.strip_prefix("must be ").unwrap();
                assert!(comment.contains(range), "{name}: {range:?} is not in {comment:?}");
            }
        }
    }

    /// The comment above a setting in the example file.
    fn comment_of(name: &str) -> String {
        let (section, key) = name.split_once('.').unwrap();
        let (_, body) = EXAMPLE.split_once(&format!("[{section}]\n")).unwrap();
        let mut comment = String::new();
        for line in body.lines() {
            match line.strip_prefix("# ") {
                Some(text) => comment += text,
                None if line.starts_with(&format!("{key} = ")) => return comment,
                None => comment.clear(),
            }
        }
        panic!("{name} is not in the file");
    }

    #[test]
    fn later_sources_win() {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(
            file.path(),
            "[queue]\nmax_items = 1000\n[batch]\nmax_items = 10\n[model]\nthreads = 3\n",
        )
        .unwrap();
        let environment =
            [("SPATIALSCORE__QUEUE__MAX_ITEMS", "2000"), ("SPATIALSCORE__BATCH__MAX_ITEMS", "20")];
        let settings = Settings::load(&Sources {
            file: Some(file.path().to_owned()),
            environment: environment.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            flags: vec![("batch.max_items".into(), "30".into())],
            ..Sources::default()
        })
        .unwrap();
        assert_eq!((settings.model.threads, settings.queue.items, settings.batch.items), (Some(3), 2000, 30));
    }

    #[test]
    fn every_fault_is_told_with_name_value_origin_and_range() {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(
            file.path(),
            "[queue]\nmax_items = 0\nmax_itmes = 5\n[limits]\nmax_item_tokens = 1.5\n",
        )
        .unwrap();
        let InvalidSettings(faults) = Settings::load(&Sources {
            file: Some(file.path().to_owned()),
            environment: [("SPATIALSCORE__LOG__FORMAT".to_owned(), "xml".to_owned())].into(),
            flags: vec![
                ("server.listen".into(), "0.0.0.0:1".into()),
                ("batch.max_tokens".into(), "300000".into()),
                ("nonsense".into(), "1".into()),
            ],
            ..Sources::default()
        })
        .unwrap_err();
        let path = file.path().display();
        let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            text[..4],
            [
                format!("queue.max_items = \"0\" (from {path}): must be 1 to 1048576"),
                format!("limits.max_item_tokens = \"1.5\" (from {path}): must be 1 to 1073741824"),
                "log.format = \"xml\" (from the environment): must be text or json".into(),
                "batch.max_tokens = \"300000\" (from a flag): must be at most queue.max_tokens, which is 262144".into(),
            ]
        );
        assert!(
            text[4].starts_with("server.listen = \"0.0.0.0:1\" (from a flag): other machines"),
            "{}",
            text[4]
        );
        assert!(
            text[5].starts_with("nonsense = \"1\" (from a flag): there is no such setting"),
            "{}",
            text[5]
        );
        assert!(text[6].ends_with("this section has queue.max_tokens, queue.max_items"), "{}", text[6]);
        assert_eq!(text.len(), 7);
    }

    #[test]
    fn a_file_that_cannot_be_read_does_not_hide_other_faults() {
        let InvalidSettings(faults) = Settings::load(&Sources {
            file: Some("/nowhere/at-all.toml".into()),
            flags: vec![("queue".into(), "5".into()), ("batch.max_items".into(), "-1".into())],
            ..Sources::default()
        })
        .unwrap_err();
        let names: Vec<&str> = faults.iter().map(|fault| fault.name.as_str()).collect();
        for name in ["/nowhere/at-all.toml", "queue.max_tokens", "batch.max_items", "queue"] {
            assert!(names.contains(&name), "{name} is not in {names:?}");
        }
    }

    #[test]
    fn a_public_address_needs_a_word() {
        assert!(load(&[("server.listen", "[::]:50051")]).is_err());
        assert!(load(&[("server.listen", "[::1]:50051")]).is_ok());
        assert!(load(&[("server.listen", "0.0.0.0:50051"), ("server.allow_anonymous", "true")]).is_ok());
        let InvalidSettings(faults) = load(&[("http.listen", "0.0.0.0:8080")]).unwrap_err();
        assert!(
            faults[0].to_string().starts_with("http.listen = \"0.0.0.0:8080\" (from a flag): other machines")
        );
        assert!(load(&[("http.listen", "127.0.0.1:8080")]).unwrap().http_listen.is_some());
        let local = load(&[("server.listen", "localhost:7"), ("http.listen", "localhost:0")]).unwrap();
        assert_eq!(local.server.listen, "127.0.0.1:7".parse().unwrap());
        assert_eq!(local.http_listen, Some("127.0.0.1:0".parse().unwrap()));
        for wrong in ["localhost", "localhost:", "localhost:65536", "localhost:-1", "example.org:80"] {
            assert!(load(&[("metrics.listen", wrong)]).is_err(), "{wrong}");
        }
        assert!(load(&[("http.listen", "0.0.0.0:8080"), ("server.allow_anonymous", "true")]).is_ok());
    }

    #[test]
    fn a_revision_of_digits_stays_text() {
        let environment = [("SPATIALSCORE__MODEL__REVISION".to_owned(), "0123456".to_owned())].into();
        let settings = Settings::load(&Sources { environment, ..Sources::default() }).unwrap();
        assert_eq!(settings.model.revision.as_deref(), Some("0123456"));
    }

    fn models(file: &str, flags: &[&str]) -> Result<Vec<ModelSettings>, String> {
        let at = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(at.path(), file).unwrap();
        let models = flags.iter().map(|&text| text.to_owned()).collect();
        let sources = Sources { file: Some(at.path().to_owned()), models, ..Sources::default() };
        Settings::load(&sources).map(|settings| settings.models).map_err(|faults| faults.to_string())
    }

    #[test]
    fn several_models_are_named_in_the_file_or_by_flags() {
        let alone = models("", &[]).unwrap();
        assert_eq!((alone.len(), &alone[0].name, &*alone[0].checkpoint), (1, &None, "spatialscore-mini"));

        let file = "[model]\ndevice = \"cpu\"\n[[models]]\nname = \"a\"\ncheckpoint = \"./x\"\n\
                    [[models]]\nname = \"b-2.5\"\ncheckpoint = \"o/m\"\nrevision = 7\nprofile = \"hpsv3\"\n\
                    device = \"cuda:0,cuda:1\"\ndtype = \"float16\"\n";
        let two = models(file, &[]).unwrap();
        let [a, b] = two.as_slice() else { panic!("{two:?}") };
        assert_eq!(
            (a.name.as_deref(), &*a.checkpoint, a.device.to_string()),
            (Some("a"), "./x", "cpu".into())
        );
        assert_eq!((b.revision.as_deref(), b.profile.as_deref()), (Some("7"), Some("hpsv3")));
        assert_eq!((b.device.to_string(), b.dtype), ("cuda:0,cuda:1".into(), Dtype::Float16));

        let flag = "c=./a=b,profile=vqascore,device=cuda:0,cuda:1,dtype=bfloat16";
        let one = models(file, &[flag]).unwrap();
        let [c] = one.as_slice() else { panic!("{one:?}") };
        assert_eq!(
            (c.name.as_deref(), &*c.checkpoint, c.profile.as_deref()),
            (Some("c"), "./a=b", Some("vqascore"))
        );
        assert_eq!((c.device.to_string(), c.dtype), ("cuda:0,cuda:1".into(), Dtype::Bfloat16));
    }

    #[test]
    fn a_second_model_is_another_one_that_is_there() {
        let shadow = |models: &[&str], flags: &[(&str, &str)]| {
            let flags = flags.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
            let models = models.iter().map(|&text| text.to_owned()).collect();
            let settings = Settings::load(&Sources { flags, models, ..Sources::default() });
            settings.map(|settings| settings.shadow).map_err(|faults| faults.to_string())
        };
        let (two, share) = (["a=x", "b=y"], ("shadow.share", "0.1"));
        let found = shadow(&two, &[("shadow.model", "b"), share]).unwrap().unwrap();
        assert_eq!((&*found.model, &*found.of, found.share), ("b", "", 0.1));
        assert_eq!(shadow(&two, &[("shadow.model", "b")]), Ok(None));
        assert!(shadow(&two, &[("shadow.model", "c"), share, ("admin.listen", "127.0.0.1:1")]).is_ok());
        for (flags, fault) in [
            (&[share][..], "shadow.share = \"0.1\" (from a flag): there is no shadow.model"),
            (&[share, ("shadow.model", "c")], "shadow.model = \"c\" (from a flag): is the name of no model"),
            (&[share, ("shadow.model", "a")], "shadow.model = \"a\" (from a flag): is the model that it"),
            (
                &[share, ("shadow.model", "b"), ("shadow.of", "b")],
                "shadow.model = \"b\" (from a flag): is the model",
            ),
            (
                &[share, ("shadow.model", "b"), ("shadow.of", "c")],
                "shadow.of = \"c\" (from a flag): is the name",
            ),
        ] {
            let said = shadow(&two, flags).unwrap_err();
            assert!(said.starts_with(fault), "{said}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_model_is_said_with_its_key() {
        for (file, flags, faults) in [
            ("", &["a"][..], "models[0] = \"a\" (from a flag): must be NAME=CHECKPOINT"),
            ("", &["=x"], "models[0].name = \"\" (from a flag): must be 1 to 64"),
            ("", &["a/b=x"], "models[0].name = \"a/b\" (from a flag): must be 1 to 64"),
            ("", &["a="], "models[0].checkpoint = \"\" (from a flag): must be a directory"),
            (
                "",
                &["a=x,device=gpu"],
                "models[0].device = \"gpu\" (from a flag): must be auto, cpu, or cuda:N",
            ),
            (
                "",
                &["a=x", "b=x,dtype=int8"],
                "models[1].dtype = \"int8\" (from a flag): must be auto, float32",
            ),
            ("", &["a=x,colour=red"], "models[0].colour = \"red\" (from a flag): there is no such key"),
            ("", &["a=x", "a=y"], "models[1].name = \"a\" (from a flag): another model has this name"),
            ("models = 3", &[], "models = \"3\" (from "),
            ("[[models]]\nname = \"a\"", &[], "models[0].checkpoint: is missing"),
            ("[[models]]\ncheckpoint = \"a\"", &[], "models[0].name: is missing"),
            (
                "[model]\ncheckpoint = \"x\"\n[[models]]\nname = \"a\"\ncheckpoint = \"y\"",
                &[],
                "model.checkpoint = \"x\" (from ",
            ),
        ] {
            let said = models(file, flags).unwrap_err();
            assert!(said.starts_with(faults), "{file} {flags:?}: {said}");
        }
    }
}
