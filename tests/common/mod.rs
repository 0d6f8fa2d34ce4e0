//! A real server on a free port, with a device that a test can hold, look into, and let fail.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod process;
pub mod raw;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use spatialscore::config::{Settings, Sources};
use spatialscore::engine::{LoadError, Loaded, MakeScorer, ModelInfo};
use spatialscore::model::checkpoint::{CheckpointFiles, Output, RewardConfig};
use spatialscore::model::{ModelError, Sample, Score, Scorer};
use spatialscore::processor::{Processor, ProcessorLimits};
use spatialscore::proto;
use spatialscore::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::server::{self, ServerError};
use spatialscore::telemetry;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// A picture of this shade makes the forward fail.
pub const POISON: u8 = 250;
/// A picture of this shade makes the forward panic.
pub const PANIC: u8 = 251;
/// A picture of this shade scores NaN.
pub const NAN: u8 = 252;
/// Width and height of test pictures.
const SIDE: u32 = 56;

/// A small checkpoint in the layout that the server reads.
pub fn checkpoint() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/flat/checkpoint"].iter().collect()
}

/// The metrics of this process, which all its servers share.
pub static METRICS: LazyLock<PrometheusHandle> = LazyLock::new(|| telemetry::init_metrics().unwrap());

/// The value of a metric's line, such as `name{label="x"}`; 0 where there is none.
pub fn metric(line: &str) -> f64 {
    let page = METRICS.render();
    let value = page.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// What a future gives, if it does before a test must be called failed.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it takes too long")
}

/// Waits until the condition holds.
pub async fn until(mut holds: impl FnMut() -> bool) {
    soon(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// A device whose scores are the shades of the pictures.
#[derive(Debug)]
pub struct FakeDevice {
    held: Mutex<bool>,
    released: Condvar,
    /// The shades of each forward, from the moment it began.
    forwards: watch::Sender<Vec<Vec<u8>>>,
}

impl FakeDevice {
    fn new(held: bool) -> Arc<Self> {
        let forwards = watch::Sender::default();
        Arc::new(Self { held: Mutex::new(held), released: Condvar::new(), forwards })
    }

    /// From now on nothing passes.
    pub fn hold(&self) {
        *self.held.lock().unwrap() = true;
    }

    /// Everything passes again.
    pub fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    fn pass(&self) {
        drop(self.released.wait_while(self.held.lock().unwrap(), |held| *held).unwrap());
    }

    /// Waits until a picture of this shade has reached a forward.
    pub async fn reached(&self, shade: u8) {
        let mut forwards = self.forwards.subscribe();
        soon(forwards.wait_for(|seen| seen.iter().flatten().any(|&seen| seen == shade))).await.unwrap();
    }

    /// The shades of all that ever reached a forward.
    pub fn seen(&self) -> Vec<u8> {
        self.forwards.borrow().concat()
    }
}

/// Lets everything pass once a test is over, failed or not: a runtime does not end while a worker is held.
struct ReleaseOnDrop(Arc<FakeDevice>);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        self.0.release();
    }
}

struct FakeScorer(Arc<FakeDevice>);

impl Scorer for FakeScorer {
    fn score(&mut self, samples: &[&Sample]) -> Result<Vec<Score>, ModelError> {
        let shades: Vec<u8> = samples.iter().map(|sample| sample.image.pixels[0]).collect();
        self.0.forwards.send_modify(|seen| seen.push(shades.clone()));
        self.0.pass();
        assert!(!shades.contains(&PANIC), "a panic on purpose");
        if shades.contains(&POISON) {
            return Err(ModelError::Sample("a failure on purpose".into()));
        }
        let mean = |shade| if shade == NAN { f32::NAN } else { f32::from(shade) };
        Ok(shades.iter().map(|&shade| Score { mean: mean(shade), stddev: Some(0.5) }).collect())
    }
}

/// A running server.
pub struct TestServer {
    pub address: SocketAddr,
    pub device: Arc<FakeDevice>,
    shutdown: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServerError>>,
    release: ReleaseOnDrop,
}

impl TestServer {
    /// A server that serves.
    pub async fn start(flags: &[(&str, &str)]) -> Self {
        let server = Self::loading(flags).await;
        server.device.release();
        server.until_serving().await;
        server
    }

    /// A server whose model loads until the device is released.
    pub async fn loading(flags: &[(&str, &str)]) -> Self {
        let device = FakeDevice::new(true);
        let scorer = FakeScorer(Arc::clone(&device));
        Self::with(flags, device, move || Ok(scorer)).await
    }

    /// A server whose model cannot be loaded.
    pub async fn failing() -> Self {
        let error = || Err::<FakeScorer, _>(LoadError::Probe("no model on purpose".into()));
        Self::with(&[], FakeDevice::new(false), error).await
    }

    async fn with<S: Scorer + 'static>(
        flags: &[(&str, &str)],
        device: Arc<FakeDevice>,
        make: impl FnOnce() -> Result<S, LoadError> + Send + 'static,
    ) -> Self {
        LazyLock::force(&METRICS);
        let flags = flags.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let settings = Settings::load(&Sources { flags, ..Sources::default() }).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, told) = oneshot::channel();
        let load = move |settings: &Settings| Ok(loaded(settings, Box::new(make)));
        let serving = tokio::spawn(server::serve(settings, listener, load, async {
            let _ = told.await;
        }));
        let release = ReleaseOnDrop(Arc::clone(&device));
        Self { address, device, shutdown, serving, release }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect().await.unwrap()
    }

    pub async fn client(&self) -> SpatialScoreServiceClient<Channel> {
        SpatialScoreServiceClient::new(self.channel().await)
    }

    async fn until_serving(&self) {
        let mut client = self.client().await;
        soon(async { while client.get_model(proto::GetModelRequest {}).await.is_err() {} }).await;
    }

    /// Tells the server to stop; the rest of it is what `end` gives.
    pub fn shut_down(self) -> Ending {
        let _ = self.shutdown.send(());
        Ending { serving: self.serving, _release: self.release }
    }

    /// How a server ends that nobody told to.
    pub async fn ended(self) -> Result<(), ServerError> {
        soon(self.serving).await.unwrap()
    }
}

/// A server that was told to stop.
pub struct Ending {
    serving: JoinHandle<Result<(), ServerError>>,
    _release: ReleaseOnDrop,
}

impl Ending {
    /// Waits for it.
    pub async fn end(self) {
        soon(self.serving).await.unwrap().unwrap();
    }
}

fn loaded<S: Scorer>(settings: &Settings, make: MakeScorer<S>) -> Loaded<S> {
    let files = CheckpointFiles::open(checkpoint().to_str().unwrap(), None, None).unwrap();
    let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    let info = ModelInfo {
        name: "fake".into(),
        architecture: "qwen2_5_vl".into(),
        revision: "none".into(),
        dtype: "float32".into(),
        devices: vec!["cpu".into()],
        output: Output::Gaussian,
        notice: "A fake.".into(),
    };
    let processor = Processor::load(&files, &reward, ProcessorLimits::from(&settings.limits)).unwrap();
    Loaded { info, processor, workers: vec![make] }
}

/// A picture of one shade of grey, as pixels.
pub fn image(shade: u8) -> proto::Image {
    let rgb8 = vec![shade; (SIDE * SIDE * 3) as usize].into();
    let raw = proto::RawImage { width: SIDE, height: SIDE, rgb8 };
    proto::Image { source: Some(proto::image::Source::Raw(raw)) }
}

/// The same as a PNG file.
pub fn png(shade: u8) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, SIDE, SIDE);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[shade; (SIDE * SIDE) as usize]).unwrap();
    writer.finish().unwrap();
    file
}

pub fn encoded(bytes: Vec<u8>) -> proto::Image {
    proto::Image { source: Some(proto::image::Source::Encoded(bytes.into())) }
}

/// An item without a prompt of its own.
pub fn item(image: proto::Image) -> proto::ScoreItem {
    proto::ScoreItem { prompt: None, image: Some(image) }
}

/// A request for pictures of these shades.
pub fn request(shades: impl IntoIterator<Item = u8>) -> proto::ScoreRequest {
    let items = shades.into_iter().map(|shade| item(image(shade))).collect();
    proto::ScoreRequest { prompt: Some("a cup to the left of a plate".into()), items }
}

pub fn stream_item(id: &str, shade: u8) -> proto::ScoreStreamRequest {
    let prompt = Some("a cup to the left of a plate".into());
    let item = Some(proto::ScoreItem { prompt, image: Some(image(shade)) });
    proto::ScoreStreamRequest { id: id.into(), item }
}

/// The score, or the code and text of the error.
pub fn outcome(result: &proto::ScoreResult) -> Result<f32, (tonic::Code, String)> {
    match result.outcome.as_ref().expect("an outcome") {
        proto::score_result::Outcome::Score(score) => Ok(score.mean),
        proto::score_result::Outcome::Error(error) => Err((error.code.into(), error.message.clone())),
    }
}

pub fn outcomes(response: &proto::ScoreResponse) -> Vec<Result<f32, (tonic::Code, String)>> {
    response.results.iter().map(outcome).collect()
}
