//! Who is kept out, and who gets in: tokens, TLS, and clients' certificates, through real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::process::run;
use common::*;
use futures::{StreamExt, stream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use spatialscore::edge::auth;
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tempfile::TempDir;
use tokio::sync::Mutex;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

const TRAINER: &str = "trainer-0123456789abcdef";
const EVALUATION: &str = "evaluation-0123456789abcdef";
const NEW: &str = "new-0123456789abcdef0123";
/// For tests that read how a counter of the process grows.
static COUNTERS: Mutex<()> = Mutex::const_new(());

/// A message with the metadata `authorization`.
fn with<T>(authorization: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    request
}

fn bearer<T>(token: &str, message: T) -> Request<T> {
    with(&format!("Bearer {token}"), message)
}

struct TokenFile {
    folder: TempDir,
}

impl TokenFile {
    fn new(text: &str) -> Self {
        let file = Self { folder: tempfile::tempdir().unwrap() };
        file.write(text);
        file
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).unwrap();
    }

    async fn server(&self) -> TestServer {
        let path = self.path();
        let server = TestServer::loading(&[("auth.tokens_file", path.to_str().unwrap())]).await;
        server.device.release();
        let mut client = server.client().await;
        soon(async {
            while client.get_model(bearer(TRAINER, proto::GetModelRequest::default())).await.is_err() {}
        })
        .await;
        server
    }
}

async fn score(client: &SpatialScoreServiceClient<Channel>, token: &str, shade: u8) -> Result<(), Status> {
    let response = client.clone().score(bearer(token, request([shade]))).await?.into_inner();
    assert_eq!(outcomes(&response), [Ok(f32::from(shade))]);
    Ok(())
}

fn tokens() -> String {
    format!("trainer:{TRAINER}\n# the nightly run\nevaluation:{EVALUATION}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_there_is_health_and_nothing_else() {
    let server = TokenFile::new(&tokens()).server().await;
    let mut client = server.client().await;
    score(&client, TRAINER, 1).await.unwrap();
    score(&client, EVALUATION, 2).await.unwrap();
    let answer = client.score(with(&format!("bearer  {TRAINER}"), request([3]))).await;
    assert!(answer.is_ok(), "the scheme's case is nobody's fault");

    let mut refused = Vec::new();
    refused.push(client.score(request([9])).await.unwrap_err());
    refused.push(client.get_model(proto::GetModelRequest::default()).await.unwrap_err());
    refused.push(client.score_stream(stream::iter([stream_item("x", 9)])).await.unwrap_err());
    for wrong in
        ["Basic dXNlcjpwYXNz", TRAINER, "Bearer", "Bearer ", "Bearer trainer:trainer-0123456789abcdef"]
    {
        refused.push(client.score(with(wrong, request([9]))).await.unwrap_err());
    }
    for wrong in [&TRAINER[1..], &format!("{TRAINER}0"), &TRAINER.to_uppercase(), NEW] {
        refused.push(client.score(bearer(wrong, request([9]))).await.unwrap_err());
    }
    let reflection = stream::iter([ServerReflectionRequest::default()]);
    let mut reflect = ServerReflectionClient::new(server.channel().await);
    refused.push(reflect.server_reflection_info(reflection).await.unwrap_err());
    let mut grpc = tonic::client::Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<proto::GetModelRequest, proto::GetModelResponse>::default();
    let made_up = "/made.up/Method".parse().unwrap();
    refused
        .push(grpc.unary(Request::new(proto::GetModelRequest::default()), made_up, codec).await.unwrap_err());
    for status in refused {
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        let said = status.message();
        assert!(
            said.contains("authorization: Bearer TOKEN") || said == "this token is not known here",
            "{said}"
        );
    }
    assert!(!server.device.seen().contains(&9));

    let mut health = HealthClient::new(server.channel().await);
    assert!(health.check(HealthCheckRequest { service: String::new() }).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_change_without_dropping_anyone() {
    let _counters = COUNTERS.lock().await;
    let file = TokenFile::new(&tokens());
    let server = file.server().await;
    let client = server.client().await;
    let (items, outgoing) = tokio::sync::mpsc::channel(4);
    let stream = bearer(EVALUATION, ReceiverStream::new(outgoing));
    let mut answers = client.clone().score_stream(stream).await.unwrap().into_inner();

    file.write(&format!("trainer:{TRAINER}\nlater:{NEW}\n"));
    soon(async { while score(&client, NEW, 1).await.is_err() {} }).await;
    score(&client, TRAINER, 2).await.unwrap();
    assert_eq!(score(&client, EVALUATION, 3).await.unwrap_err().code(), Code::Unauthenticated);
    // What was let in stays in.
    items.send(stream_item("x", 4)).await.unwrap();
    assert_eq!(outcome(&soon(answers.next()).await.unwrap().unwrap().result.unwrap()), Ok(4.0));

    // A file that says nothing, or nonsense, or is gone, changes nothing but the log and this counter.
    let failures = "spatialscore_reload_failures_total{what=\"tokens\"}";
    for (nth, spoil) in [
        (|path: &Path| fs::write(path, "").unwrap()) as fn(&Path),
        |path| fs::write(path, "trainer").unwrap(),
        |path| fs::remove_file(path).unwrap(),
    ]
    .into_iter()
    .enumerate()
    {
        let before = metric(failures);
        spoil(&file.path());
        until(|| metric(failures) > before).await;
        score(&client, NEW, 10 + nth as u8).await.unwrap();
        score(&client, TRAINER, 20 + nth as u8).await.unwrap();
    }
    file.write(&tokens());
    soon(async { while score(&client, EVALUATION, 5).await.is_err() {} }).await;
}

/// An authority, and certificates that it signed, as PEM files.
struct Authority {
    folder: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.path().join("ca.crt"), issuer.pem()).unwrap();
        let authority = Self { folder, issuer };
        authority.sign("server", "127.0.0.1");
        authority.sign("client", "client");
        authority
    }

    /// One whose own certificate is that of a server, too.
    fn self_signed(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(folder.path().join("server.key"), key.serialize_pem()).unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        for file in ["ca.crt", "server.crt"] {
            fs::write(folder.path().join(file), issuer.pem()).unwrap();
        }
        let authority = Self { folder, issuer };
        authority.sign("client", "client");
        authority
    }

    /// A certificate for a name, in NAME.crt, and its key, in NAME.key.
    fn sign(&self, file: &str, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.folder.path().join(format!("{file}.crt")), certificate.pem()).unwrap();
        fs::write(self.folder.path().join(format!("{file}.key")), key.serialize_pem()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A server with TLS; `mutual` asks clients for certificates of this authority.
    async fn server(&self, mutual: bool) -> TestServer {
        let [certificate, key, ca] = ["server.crt", "server.key", "ca.crt"].map(|name| self.text(name));
        let mut flags = vec![("tls.certificate", certificate.as_str()), ("tls.key", &key)];
        if mutual {
            flags.push(("tls.client_ca", &ca));
        }
        let server = TestServer::loading(&flags).await;
        server.device.release();
        let client = self.client(&server, true).await.unwrap();
        let model = || async { client.clone().get_model(proto::GetModelRequest::default()).await };
        soon(async { while model().await.is_err() {} }).await;
        server
    }

    async fn client(
        &self,
        server: &TestServer,
        shows: bool,
    ) -> Result<SpatialScoreServiceClient<Channel>, tonic::transport::Error> {
        let identity = (self.path("client.crt"), self.path("client.key"));
        let identity = shows.then_some((identity.0.as_path(), identity.1.as_path()));
        connect(server, auth::client_config(Some(&self.path("ca.crt")), identity).unwrap()).await
    }
}

async fn connect(
    server: &TestServer,
    tls: auth::ClientTls,
) -> Result<SpatialScoreServiceClient<Channel>, tonic::transport::Error> {
    let endpoint = Channel::from_shared(format!("https://{}", server.address)).unwrap();
    Ok(SpatialScoreServiceClient::new(tls.on(endpoint)?.connect().await?))
}

/// A call that must fail on the way: what its client makes of a connection that is no connection is its own affair.
async fn kept_out(client: Result<SpatialScoreServiceClient<Channel>, tonic::transport::Error>) {
    if let Ok(mut client) = client {
        soon(client.score(request([9]))).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_carries_calls_and_plain_text_gets_nowhere() {
    let authority = Authority::new();
    let server = authority.server(false).await;
    let mut client = authority.client(&server, false).await.unwrap();
    assert_eq!(outcomes(&client.score(request([7])).await.unwrap().into_inner()), [Ok(7.0)]);

    let plain = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    kept_out(plain.connect().await.map(SpatialScoreServiceClient::new)).await;
    // A client that trusts another authority.
    let stranger = Authority::new();
    assert!(stranger.client(&server, false).await.is_err());
    assert!(!server.device.seen().contains(&9));
}

/// As `openssl req -x509` makes it: the certificate is marked as an authority, and signs itself alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_its_own_authority_is_trusted_where_it_is_given() {
    let (ours, others) = (Authority::self_signed("127.0.0.1"), Authority::self_signed("127.0.0.1"));
    let server = ours.server(false).await;
    let mut client = ours.client(&server, false).await.unwrap();
    assert_eq!(outcomes(&client.score(request([7])).await.unwrap().into_inner()), [Ok(7.0)]);
    assert!(others.client(&server, false).await.is_err());
    let misnamed = Authority::self_signed("elsewhere");
    let [certificate, key] = ["server.crt", "server.key"].map(|name| misnamed.text(name));
    let elsewhere =
        TestServer::loading(&[("tls.certificate", certificate.as_str()), ("tls.key", key.as_str())]).await;
    assert!(misnamed.client(&elsewhere, false).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn mutual_tls_lets_in_those_that_the_authority_knows() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let server = authority.server(true).await;
    let mut client = authority.client(&server, true).await.unwrap();
    assert_eq!(outcomes(&client.score(request([7])).await.unwrap().into_inner()), [Ok(7.0)]);
    kept_out(authority.client(&server, false).await).await;
    let [ca, certificate, key] =
        [authority.path("ca.crt"), stranger.path("client.crt"), stranger.path("client.key")];
    let false_papers = auth::client_config(Some(&ca), Some((&certificate, &key))).unwrap();
    kept_out(connect(&server, false_papers).await).await;
    assert!(!server.device.seen().contains(&9));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_change_without_dropping_anyone() {
    let _counters = COUNTERS.lock().await;
    let authority = Authority::new();
    let server = authority.server(false).await;
    let mut client = authority.client(&server, false).await.unwrap();
    let failures = "spatialscore_reload_failures_total{what=\"certificates\"}";
    let before = metric(failures);
    fs::write(authority.path("server.crt"), "nonsense").unwrap();
    until(|| metric(failures) > before).await;
    assert!(authority.client(&server, false).await.is_ok());

    // A new authority signs a new certificate for the same server.
    let successor = Authority::new();
    for name in ["server.crt", "server.key"] {
        fs::copy(successor.path(name), authority.path(name)).unwrap();
    }
    soon(async { while successor.client(&server, false).await.is_err() {} }).await;
    assert!(authority.client(&server, false).await.is_err());
    assert_eq!(outcomes(&client.score(request([7])).await.unwrap().into_inner()), [Ok(7.0)]);
}

/// A server that is refused its settings: exit code 64 and what was said.
fn refused(arguments: &[&str]) -> String {
    let (code, _, said) =
        run(&[&["serve", "--metrics-listen=", "--checkpoint=/nowhere"], arguments].concat());
    assert_eq!(code, 64, "{said}");
    said
}

#[test]
fn a_public_address_asks_who_calls_or_says_that_it_does_not() {
    let public = "--listen=0.0.0.0:0";
    let said = refused(&[public]);
    for word in ["server.listen", "auth.tokens_file", "tls.client_ca", "--allow-anonymous", "127.0.0.1"] {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    let (authority, file) = (Authority::new(), TokenFile::new(&tokens()));
    let [certificate, key, ca] = ["server.crt", "server.key", "ca.crt"].map(|name| authority.text(name));
    let tokens = file.path().to_str().unwrap().to_owned();
    // TLS alone asks nobody.
    let tls = [public, "--tls-cert", &certificate, "--tls-key", &key];
    assert!(refused(&tls).contains("nobody is asked who they are"));
    // These get as far as the checkpoint, which is not there.
    let mutual = [&tls[..], &["--tls-client-ca", &ca]].concat();
    for enough in [&[public, "--allow-anonymous"][..], &[public, "--tokens-file", &tokens], &mutual] {
        let (code, _, said) =
            run(&[&["serve", "--metrics-listen=", "--checkpoint=/nowhere"], enough].concat());
        assert!(code == 1 && said.contains("no checkpoint"), "{code}: {said}");
    }
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_its_fault() {
    let (authority, other) = (Authority::new(), Authority::new());
    let [certificate, key, ca] = ["server.crt", "server.key", "ca.crt"].map(|name| authority.text(name));
    let others = other.text("server.key");
    let file = TokenFile::new("trainer:hunter2\n");
    let tokens = file.path().to_str().unwrap().to_owned();
    let said = refused(&["--tokens-file", &tokens]);
    assert!(said.contains(&tokens) && said.contains("line 1: the token must have at least 16"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    for (setting, flag) in [
        ("auth.tokens_file", "--tokens-file=/dev/zero"),
        ("tls.certificate", "--tls-cert=/dev/zero"),
        ("model.reward_config", "--reward-config=/dev/zero"),
        ("/dev/zero", "--config=/dev/zero"),
    ] {
        let said = refused(&[flag, "--tls-key", &key]);
        assert!(said.contains(setting) && said.contains("is no regular file"), "{said}");
    }
    let said = refused(&["--tokens-file=/nowhere/tokens"]);
    assert!(said.contains("/nowhere/tokens") && said.contains("No such file"), "{said}");
    let said = refused(&["--tls-cert", &certificate]);
    assert!(said.contains("tls.key") && said.contains("is missing"), "{said}");
    let said = refused(&["--tls-client-ca", &ca]);
    assert!(said.contains("tls.certificate") && said.contains("is missing"), "{said}");
    for (arguments, name, fault) in [
        (["--tls-cert", &certificate, "--tls-key", &others], "tls.key", "is not the key of"),
        (["--tls-cert", &others, "--tls-key", &key], "tls.certificate", "holds no certificate"),
        (["--tls-cert", &certificate, "--tls-key", &certificate], "tls.key", "holds no private key"),
        (["--tls-cert", "/nowhere/a", "--tls-key", &key], "tls.certificate", "No such file"),
    ] {
        let said = refused(&arguments);
        assert!(said.contains(name) && said.contains(fault), "{said}");
    }
    let bad_ca = refused(&["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &others]);
    assert!(bad_ca.contains("tls.client_ca") && bad_ca.contains("holds no certificate"), "{bad_ca}");
}

/// The program's own client against TLS, clients' certificates and tokens at once.
#[tokio::test(flavor = "multi_thread")]
async fn score_shows_a_token_and_a_certificate() {
    let (authority, file) = (Authority::new(), TokenFile::new(&tokens()));
    let [certificate, key, ca] = ["server.crt", "server.key", "ca.crt"].map(|name| authority.text(name));
    let server = TestServer::loading(&[
        ("auth.tokens_file", file.path().to_str().unwrap()),
        ("tls.certificate", &certificate),
        ("tls.key", &key),
        ("tls.client_ca", &ca),
    ])
    .await;
    server.device.release();
    let [client_certificate, client_key] = ["client.crt", "client.key"].map(|name| authority.text(name));
    let path = |name: &str| authority.text(name);
    fs::write(path("token"), format!("{EVALUATION}\n")).unwrap();
    fs::write(path("wrong"), NEW).unwrap();
    fs::write(path("a.png"), png(33)).unwrap();
    let (url, token, wrong, picture) =
        (format!("https://{}", server.address), path("token"), path("wrong"), path("a.png"));
    let base = ["score", "--server", &url, "--prompt", "a cup", "--format", "csv", "--wait", "20", &picture];
    let tls = ["--tls-ca", &ca, "--tls-cert", &client_certificate, "--tls-key", &client_key];
    tokio::task::block_in_place(|| {
        let (code, out, said) = run(&[&base[..], &tls, &["--token-file", &token]].concat());
        assert!(code == 0 && out.contains(",33.0,") || out.contains(",33,"), "{code}: {out}{said}");
        let (code, _, said) = run(&[&base[..], &tls].concat());
        assert!(code == 1 && said.starts_with("error: UNAUTHENTICATED: this server asks"), "{said}");
        let (code, _, said) = run(&[&base[..], &tls, &["--token-file", &wrong]].concat());
        assert!(code == 1 && said.contains("this token is not known here") && !said.contains(NEW), "{said}");
        let plain = ["score", "--server", "http://127.0.0.1:1", "--prompt", "a", &picture, "--tls-ca", &ca];
        let (code, _, said) = run(&plain);
        assert!(code == 64 && said.contains("must begin with https://"), "{said}");
        let (code, _, said) = run(&[&base[..], &tls, &["--token-file=/nowhere"]].concat());
        assert!(code == 64 && said.contains("/nowhere: No such file"), "{said}");
    });
}
