//! A real server on a free port, with a device that a test can hold, look into, and let fail.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod large;
pub mod process;
pub mod raw;
pub mod web;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::{Duration, Instant};

use futures::FutureExt;
use metrics_exporter_prometheus::PrometheusHandle;
use spatialscore::config::{Settings, Sources};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::engine::{
    Engine, IntoLoaded, LoadError, Loaded, MakeScorer, ModelInfo, Onlookers, Started, Terms,
};
use spatialscore::model::checkpoint::CheckpointFiles;
use spatialscore::model::profile::{Output, RewardConfig};
use spatialscore::model::{ModelError, Sample, Score, Scorer};
use spatialscore::processor::{Picture, Processor, ProcessorLimits};
use spatialscore::server::{self, ServerError};
use spatialscore::telemetry;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// A picture of this shade scores an infinity.
pub const INFINITE: u8 = 247;
/// A picture of this shade scores a number whose standard deviation is NaN.
pub const NAN_STDDEV: u8 = 248;
/// A picture of this shade scores a number whose standard deviation is an infinity.
pub const INFINITE_STDDEV: u8 = 249;
/// A picture of this shade makes the forward fail.
pub const POISON: u8 = 250;
/// A picture of this shade makes the forward panic.
pub const PANIC: u8 = 251;
/// A picture of this shade scores NaN.
pub const NAN: u8 = 252;
/// A picture of this shade leaves the device unable to compute anything.
pub const LOST: u8 = 253;
/// A picture of this shade ends the worker's thread.
pub const DEATH: u8 = 254;
/// Stands in the text of every fault that a fake makes, and nowhere in the program.
pub const FAULT: &str = "on purpose";
/// Width and height of test pictures.
pub const SIDE: u32 = 56;
/// The prompt of test pictures.
pub const PROMPT: &str = "a cup to the left of a plate";

/// A small checkpoint in the layout that the server reads.
pub fn checkpoint() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/flat/checkpoint"].iter().collect()
}

/// The metrics of this process, which all its servers share.
pub static METRICS: LazyLock<PrometheusHandle> = LazyLock::new(|| telemetry::init_metrics().unwrap());

/// The value of a metric's line, such as `name{label="x"}`; 0 where there is none.
pub fn metric(line: &str) -> f64 {
    read_metric(&METRICS.render(), line)
}

fn read_metric(page: &str, line: &str) -> f64 {
    let value = page.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// Tells how much a metric has grown since now.
pub fn growth() -> impl Fn(&str) -> f64 {
    let page = METRICS.render();
    move |line| metric(line) - read_metric(&page, line)
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
    /// How many forwards had begun when it was held.
    before: AtomicUsize,
    /// How long it computes an item.
    pace: Mutex<Duration>,
    /// The most items that fit its memory.
    memory: AtomicUsize,
    /// How many models were made for it.
    made: AtomicUsize,
    /// Whether no more can be made.
    refuses: AtomicBool,
    /// What its scores are off by.
    drift: Mutex<f32>,
    /// What its scores are multiplied by.
    scale: Mutex<f32>,
}

impl FakeDevice {
    fn new(held: bool) -> Arc<Self> {
        Arc::new(Self {
            held: Mutex::new(held),
            released: Condvar::new(),
            forwards: watch::Sender::default(),
            before: AtomicUsize::new(0),
            pace: Mutex::default(),
            memory: AtomicUsize::new(usize::MAX),
            made: AtomicUsize::new(0),
            refuses: AtomicBool::new(false),
            drift: Mutex::default(),
            scale: Mutex::new(1.0),
        })
    }

    /// From now on nothing passes.
    pub fn hold(&self) {
        self.before.store(self.forwards.borrow().len(), Ordering::SeqCst);
        *self.held.lock().unwrap() = true;
    }

    /// Everything passes again.
    pub fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    /// Takes so long for an item from now on.
    pub fn pace(&self, per_item: Duration) {
        *self.pace.lock().unwrap() = per_item;
    }

    /// Has memory for so many items at once from now on.
    pub fn memory(&self, items: usize) {
        self.memory.store(items, Ordering::SeqCst);
    }

    /// Whether no model can be made for it from now on.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Computes scores that are off by so much from now on.
    pub fn drift(&self, by: f32) {
        *self.drift.lock().unwrap() = by;
    }

    /// Computes scores that are so many times the shades from now on.
    pub fn scale(&self, by: f32) {
        *self.scale.lock().unwrap() = by;
    }

    /// How many models were made for it.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }

    fn make(self: &Arc<Self>) -> Result<FakeScorer, LoadError> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(LoadError::Probe(format!("no model {FAULT}")));
        }
        self.made.fetch_add(1, Ordering::SeqCst);
        Ok(FakeScorer { device: Arc::clone(self), done: None, lost: false, dying: false })
    }

    fn pass(&self) {
        drop(self.released.wait_while(self.held.lock().unwrap(), |held| *held).unwrap());
    }

    /// Waits until a forward has begun since it was held; the shades of it. Of several pictures any may be the first:
    /// they are prepared side by side.
    pub async fn occupied(&self) -> Vec<u8> {
        let (mut forwards, before) = (self.forwards.subscribe(), self.before.load(Ordering::SeqCst));
        soon(forwards.wait_for(|seen| seen.len() > before)).await.unwrap()[before].clone()
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

    /// The same, forward by forward.
    pub fn forwards(&self) -> Vec<Vec<u8>> {
        self.forwards.borrow().clone()
    }
}

/// Lets everything pass once a test is over, failed or not: a runtime does not end while a worker is held.
struct ReleaseOnDrop(Vec<Arc<FakeDevice>>);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        self.0.iter().for_each(|device| device.release());
    }
}

/// A model on a fake device. The device computes by itself: a forward is done when its time has passed.
pub struct FakeScorer {
    device: Arc<FakeDevice>,
    /// When the device is done with what it has.
    done: Option<Instant>,
    lost: bool,
    dying: bool,
}

impl Scorer for FakeScorer {
    type Staged = Vec<u8>;
    type Running = (Instant, Vec<u8>);

    fn stage(&mut self, samples: &[&Sample]) -> Result<Vec<u8>, ModelError> {
        Ok(samples.iter().map(|sample| sample.pictures[0].pixels[0]).collect())
    }

    fn launch(&mut self, shades: Vec<u8>) -> Result<(Instant, Vec<u8>), ModelError> {
        self.device.forwards.send_modify(|seen| seen.push(shades.clone()));
        self.device.pass();
        let fail = |what| Err(ModelError::Sample(format!("{what} {FAULT}")));
        if shades.len() > self.device.memory.load(Ordering::SeqCst) {
            return fail("out of memory");
        }
        assert!(!shades.contains(&PANIC), "a panic {FAULT}");
        self.dying = shades.contains(&DEATH);
        self.lost |= self.dying || shades.contains(&LOST);
        if self.lost || shades.contains(&POISON) {
            return fail("a failure");
        }
        let pace = *self.device.pace.lock().unwrap();
        let done = self.done.unwrap_or_else(Instant::now).max(Instant::now()) + pace * shades.len() as u32;
        self.done = Some(done);
        Ok((done, shades))
    }

    fn collect(&mut self, (done, shades): (Instant, Vec<u8>)) -> Result<Vec<Score>, ModelError> {
        std::thread::sleep(done.saturating_duration_since(Instant::now()));
        let score = |shade| match shade {
            NAN => (f32::NAN, 0.5),
            INFINITE => (f32::NEG_INFINITY, 0.5),
            NAN_STDDEV => (1.0, f32::NAN),
            INFINITE_STDDEV => (1.0, f32::INFINITY),
            shade => (f32::from(shade), 0.5),
        };
        let (drift, scale) = (*self.device.drift.lock().unwrap(), *self.device.scale.lock().unwrap());
        let scores = shades.into_iter().map(score).map(|(mean, stddev)| (mean * scale + drift, stddev));
        Ok(scores.map(|(mean, stddev)| Score { mean, stddev: Some(stddev), ..Score::default() }).collect())
    }

    fn is_lost(&mut self) -> bool {
        self.lost
    }
}

impl Drop for FakeScorer {
    fn drop(&mut self) {
        // Outside whatever the worker guards: this takes its thread with it.
        assert!(!self.dying, "a death {FAULT}");
    }
}

/// A running server.
pub struct TestServer {
    pub address: SocketAddr,
    /// Where it speaks HTTP/1.1.
    pub http: SocketAddr,
    /// The first device.
    pub device: Arc<FakeDevice>,
    pub devices: Vec<Arc<FakeDevice>>,
    shutdown: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServerError>>,
    release: ReleaseOnDrop,
}

impl TestServer {
    /// A server that serves.
    pub async fn start(flags: &[(&str, &str)]) -> Self {
        Self::start_on(1, flags).await
    }

    /// A server on so many devices that serves.
    pub async fn start_on(devices: usize, flags: &[(&str, &str)]) -> Self {
        let devices = (0..devices).map(|_| FakeDevice::new(false)).collect();
        let server = Self::with(flags, devices).await;
        server.until_serving().await;
        server
    }

    /// A server whose model loads until the device is released.
    pub async fn loading(flags: &[(&str, &str)]) -> Self {
        Self::with(flags, vec![FakeDevice::new(true)]).await
    }

    /// A server whose model cannot be loaded.
    pub async fn failing() -> Self {
        let device = FakeDevice::new(false);
        device.refuse(true);
        Self::with(&[], vec![device]).await
    }

    /// A server of several models on one device, the halves of which a test can hold one by one: one for each model.
    pub async fn of_models(names: &'static [&'static str], flags: &[(&str, &str)]) -> Self {
        Self::of_models_on(names, false, flags).await
    }

    /// A server of several models, each on a device of its own.
    pub async fn of_models_apart(names: &'static [&'static str], flags: &[(&str, &str)]) -> Self {
        Self::of_models_on(names, true, flags).await
    }

    async fn of_models_on(names: &'static [&'static str], apart: bool, flags: &[(&str, &str)]) -> Self {
        let devices: Vec<_> = names.iter().map(|_| FakeDevice::new(false)).collect();
        let load = {
            let devices = devices.clone();
            move |settings: &Settings| Ok(loaded_models(settings, names, &devices, apart))
        };
        let server = Self::serving(flags, devices, load).await;
        server.until_serving().await;
        server
    }

    async fn with(flags: &[(&str, &str)], devices: Vec<Arc<FakeDevice>>) -> Self {
        let makers = devices.iter().cloned();
        let makers = makers.map(|device| Box::new(move || device.make()) as MakeScorer<FakeScorer>).collect();
        Self::serving(flags, devices, move |settings: &Settings| Ok(loaded(settings, makers))).await
    }

    async fn serving<L: IntoLoaded<Scorer = FakeScorer> + 'static>(
        flags: &[(&str, &str)],
        devices: Vec<Arc<FakeDevice>>,
        load: impl FnOnce(&Settings) -> Result<L, LoadError> + Send + 'static,
    ) -> Self {
        LazyLock::force(&METRICS);
        let flags = [&[("server.drain_grace_seconds", "0")], flags].concat();
        let settings = settings(&flags);
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (listener, http_listener) = (bind().await, bind().await);
        let (address, http) = (listener.local_addr().unwrap(), http_listener.local_addr().unwrap());
        let (shutdown, told) = oneshot::channel();
        // Nothing tells it to stop at once.
        let told = told.map(|_| std::future::pending());
        let serving = tokio::spawn(server::serve(settings, listener, Some(http_listener), load, told));
        let device = Arc::clone(&devices[0]);
        let release = ReleaseOnDrop(devices.clone());
        Self { address, http, device, devices, shutdown, serving, release }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect().await.unwrap()
    }

    pub async fn client(&self) -> SpatialScoreServiceClient<Channel> {
        SpatialScoreServiceClient::new(self.channel().await)
    }

    /// A client with an address of its own, such as 127.0.0.2: another caller to the server.
    pub async fn client_from(&self, address: &'static str) -> SpatialScoreServiceClient<Channel> {
        let to = self.address;
        let connector = tower::service_fn(move |_| async move {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(address.parse().unwrap(), 0))?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(socket.connect(to).await?))
        });
        let endpoint = Channel::from_shared(format!("http://{to}")).unwrap();
        SpatialScoreServiceClient::new(endpoint.connect_with_connector(connector).await.unwrap())
    }

    /// Until health says so, which comes last: calls are answered a moment before.
    async fn until_serving(&self) {
        let mut health = HealthClient::new(self.channel().await);
        let watch = HealthCheckRequest::default();
        let mut watched = soon(health.watch(watch)).await.unwrap().into_inner();
        let serving = ServingStatus::Serving;
        while soon(watched.message()).await.unwrap().expect("health is watched on").status() != serving {}
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

/// Settings that these flags say.
pub fn settings(flags: &[(&str, &str)]) -> Settings {
    let flags = flags.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    Settings::load(&Sources { flags, ..Sources::default() }).unwrap()
}

/// Several models, each on a part of one device that a test can hold, or on a device of its own.
fn loaded_models(
    settings: &Settings,
    names: &[&str],
    devices: &[Arc<FakeDevice>],
    apart: bool,
) -> Vec<Loaded<FakeScorer>> {
    let model = |(index, (device, name)): (usize, (&Arc<FakeDevice>, &&str))| {
        let device = Arc::clone(device);
        let mut loaded = loaded(settings, vec![Box::new(move || device.make())]);
        (loaded.info.name, loaded.terms.named) = ((*name).to_owned(), true);
        if apart {
            loaded.info.devices = vec![format!("fake:{index}")];
        }
        loaded
    };
    devices.iter().zip(names).enumerate().map(model).collect()
}

/// An engine of these models without a server, each on a device of its own, and what has them come and go.
pub fn engine(
    names: &[&str],
    flags: &[(&str, &str)],
    onlookers: Onlookers,
) -> (Started<FakeScorer>, Vec<Arc<FakeDevice>>) {
    LazyLock::force(&METRICS);
    let devices: Vec<_> = names.iter().map(|_| FakeDevice::new(false)).collect();
    let settings = settings(flags);
    let loaded = loaded_models(&settings, names, &devices, true);
    (Engine::start_managed(&settings, loaded, None, onlookers).unwrap(), devices)
}

fn loaded<S: Scorer + Send>(settings: &Settings, workers: Vec<MakeScorer<S>>) -> Loaded<S> {
    let files = CheckpointFiles::open(checkpoint().to_str().unwrap(), None, None).unwrap();
    let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    let info = ModelInfo {
        name: "fake".into(),
        architecture: "qwen2_5_vl".into(),
        revision: "none".into(),
        dtype: "float32".into(),
        devices: (0..workers.len()).map(|index| format!("fake:{index}")).collect(),
        output: Output::Gaussian,
        profile: "reward_config.json".into(),
        pictures: reward.pictures,
        components: reward.components(),
        takes_questions: reward.takes_questions(),
        notice: "A fake.".into(),
    };
    let processor = Processor::load(&files, &reward, ProcessorLimits::from(&settings.limits)).unwrap();
    Loaded { info, terms: Terms::default(), processor, workers }
}

/// What an item costs in tokens: [`PROMPT`] with a picture of these sides.
pub fn cost(width: u32, height: u32) -> usize {
    let files = CheckpointFiles::open(checkpoint().to_str().unwrap(), None, None).unwrap();
    let reward: RewardConfig = files.require_json("reward_config.json").unwrap();
    let settings = Settings::load(&Sources::default()).unwrap();
    let processor = Processor::load(&files, &reward, ProcessorLimits::from(&settings.limits)).unwrap();
    let rgb8 = vec![0; (width * height * 3) as usize].into();
    processor.admit(PROMPT, Picture::Raw { width, height, rgb8 }).unwrap().tokens()
}

/// A picture of one shade of grey, as pixels. No two are the same: a number stands in its last corner.
pub fn image(shade: u8) -> proto::Image {
    image_of(SIDE, SIDE, shade)
}

/// The same with other sides.
pub fn image_of(width: u32, height: u32, shade: u8) -> proto::Image {
    let mut rgb8 = vec![shade; (width * height * 3) as usize];
    stamp(&mut rgb8);
    let raw = proto::RawImage { width, height, rgb8: rgb8.into() };
    proto::Image { source: Some(proto::image::Source::Raw(raw)) }
}

/// Writes a number of its own at the end of a picture's samples.
pub fn stamp(samples: &mut [u8]) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = (NEXT.fetch_add(1, Ordering::Relaxed) as u32).to_le_bytes();
    let end = samples.len() - number.len();
    samples[end..].copy_from_slice(&number);
}

/// The same as a PNG file.
pub fn png(shade: u8) -> Vec<u8> {
    png_of(SIDE, shade)
}

/// The same with another side.
pub fn png_of(side: u32, shade: u8) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    let mut samples = vec![shade; (side * side) as usize];
    stamp(&mut samples);
    writer.write_image_data(&samples).unwrap();
    writer.finish().unwrap();
    file
}

pub fn encoded(bytes: Vec<u8>) -> proto::Image {
    proto::Image { source: Some(proto::image::Source::Encoded(bytes.into())) }
}

/// An item without a prompt of its own.
pub fn item(image: proto::Image) -> proto::ScoreItem {
    proto::ScoreItem { image: Some(image), ..Default::default() }
}

/// A request that keeps a thread busy for so many fractions of a second: one large picture, under as many prompts, of
/// which none is known from another.
pub fn slow_request(items: usize, shade: u8) -> proto::ScoreRequest {
    let large = encoded(png_of(6900, shade));
    let item = |n| proto::ScoreItem {
        prompt: Some(format!("{PROMPT} {n}")),
        image: Some(large.clone()),
        ..Default::default()
    };
    proto::ScoreRequest { items: (0..items).map(item).collect(), ..Default::default() }
}

/// A request for pictures of these shades.
pub fn request(shades: impl IntoIterator<Item = u8>) -> proto::ScoreRequest {
    let items = shades.into_iter().map(|shade| item(image(shade))).collect();
    proto::ScoreRequest { prompt: Some(PROMPT.into()), items, ..Default::default() }
}

pub fn stream_item(id: &str, shade: u8) -> proto::ScoreStreamRequest {
    let prompt = Some(PROMPT.into());
    let item = Some(proto::ScoreItem { prompt, image: Some(image(shade)), ..Default::default() });
    proto::ScoreStreamRequest { id: id.into(), item, ..Default::default() }
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
