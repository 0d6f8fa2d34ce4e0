//! A whole server whose device alone is played: a forward is a wait of so long for each picture. Sockets, queue, processor and
//! answers are the real ones, so that a machine of a few cores can hold a fleet: `fleet.py` does.
//!
//!     cargo bench --bench simulated_device -- --listen 127.0.0.1:50051 --pictures-per-second 8
//!
//! A picture's score tells which one it was: its first sample and 256 times its last. Twice a second a line says how many were
//! computed: seconds since 1970, and their number.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use spatialscore::config::{Settings, Sources};
use spatialscore::engine::{LoadError, Loaded, MakeScorer, ModelInfo, Terms};
use spatialscore::model::checkpoint::{BUILT_IN_NAME, CheckpointFiles};
use spatialscore::model::profile::{Output, RewardConfig};
use spatialscore::model::{ModelError, Sample, Score, Scorer};
use spatialscore::processor::{Processor, ProcessorLimits};
use spatialscore::server;
use tokio::net::TcpListener;

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long, default_value_t = 8.0)]
    pictures_per_second: f64,
    /// A setting of the server, NAME=VALUE.
    #[arg(long)]
    set: Vec<String>,
    /// What cargo passes on.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A device that computes by itself, one picture after the other.
struct Played {
    picture: Duration,
    /// When it is done with what it has.
    done: Instant,
    computed: Arc<AtomicU64>,
}

impl Scorer for Played {
    type Staged = Vec<f32>;
    type Running = (Instant, Vec<f32>);

    fn stage(&mut self, samples: &[&Sample]) -> Result<Vec<f32>, ModelError> {
        let mean = |sample: &&Sample| {
            let pixels = sample.pictures.first().map_or(&[][..], |picture| &picture.pixels);
            let [Some(first), Some(last)] = [pixels.first(), pixels.last()] else {
                return Err(ModelError::Sample("there is no picture".into()));
            };
            Ok(f32::from(*first) + 256.0 * f32::from(*last))
        };
        samples.iter().map(mean).collect()
    }

    fn launch(&mut self, means: Vec<f32>) -> Result<Self::Running, ModelError> {
        self.done = self.done.max(Instant::now()) + self.picture * means.len() as u32;
        Ok((self.done, means))
    }

    fn collect(&mut self, (done, means): Self::Running) -> Result<Vec<Score>, ModelError> {
        std::thread::sleep(done.saturating_duration_since(Instant::now()));
        self.computed.fetch_add(means.len() as u64, Ordering::Relaxed);
        Ok(means.into_iter().map(|mean| Score { mean, stddev: Some(1.0), ..Score::default() }).collect())
    }
}

/// The built-in checkpoint's processor, and the device that is played.
fn loaded(
    settings: &Settings,
    picture: Duration,
    computed: Arc<AtomicU64>,
) -> Result<Loaded<Played>, LoadError> {
    let files = CheckpointFiles::open(BUILT_IN_NAME, None, None).unwrap();
    let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    let info = ModelInfo {
        name: "simulated".into(),
        architecture: "qwen2_5_vl".into(),
        revision: "none".into(),
        dtype: "float32".into(),
        devices: vec!["simulated".into()],
        output: Output::Gaussian,
        profile: "simulated".into(),
        pictures: reward.pictures,
        components: reward.components(),
        takes_questions: reward.takes_questions(),
        notice: "A device that is played.".into(),
    };
    let processor = Processor::load(&files, &reward, ProcessorLimits::from(&settings.limits)).unwrap();
    let make = move || Ok(Played { picture, done: Instant::now(), computed: Arc::clone(&computed) });
    Ok(Loaded {
        info,
        terms: Terms::default(),
        processor,
        workers: vec![Box::new(make) as MakeScorer<Played>],
    })
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    let flags = arguments.set.iter().map(|set| set.split_once('=').unwrap());
    let flags = flags.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let settings = Settings::load(&Sources { flags, ..Sources::default() }).unwrap();
    let listener = TcpListener::bind(arguments.listen).await.unwrap();
    let picture = Duration::from_secs_f64(1.0 / arguments.pictures_per_second);
    let computed = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&computed);
    std::thread::spawn(move || {
        loop {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
            println!("{now} {}", count.load(Ordering::Relaxed));
            std::io::stdout().flush().unwrap();
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    let load = move |settings: &Settings| loaded(settings, picture, computed);
    // It is ended from outside.
    let never = std::future::pending::<std::future::Pending<()>>();
    server::serve(settings, listener, None, load, never).await.unwrap();
}
