//! `--batch-invariant` through the socket: a picture alone, and among others, has one score to the last bit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use common::encoded;
use common::process::Server;
use golden::Case;
use spatialscore::edge::proto::score_result::Outcome;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::edge::proto::{ScoreItem, ScoreRequest};
use tonic::transport::Channel;

async fn means(client: &mut SpatialScoreServiceClient<Channel>, items: Vec<ScoreItem>) -> Vec<u32> {
    let request = ScoreRequest { items, ..ScoreRequest::default() };
    let results = client.score(request).await.unwrap().into_inner().results;
    let mean = |outcome| match outcome {
        Some(Outcome::Score(score)) => f32::to_bits(score.mean),
        other => panic!("{other:?}"),
    };
    results.into_iter().map(|result| mean(result.outcome)).collect()
}

/// The head is in fp32, whose last bits show what the neighbours change: without the flag two of three do.
#[tokio::test(flavor = "multi_thread")]
async fn a_picture_has_one_score_alone_and_among_others() {
    let case = Case::open("mlp");
    let checkpoint = format!("--set=model.checkpoint={}", case.checkpoint());
    let flags = [&checkpoint, "--dtype=bfloat16", "--batch-invariant", "--set=cache.max_items=0"];
    let mut server = Server::start_with(&flags);
    server.logged("serving", "model");
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let mut items = Vec::new();
    for item in &case.items {
        let [file] = <[_; 1]>::try_from(item.files(&case.directory)).unwrap();
        items.push(ScoreItem {
            prompt: Some(item.prompt.clone()),
            image: Some(encoded(file)),
            ..ScoreItem::default()
        });
    }
    let mut alone = Vec::new();
    for item in &items {
        alone.extend(means(&mut client, vec![item.clone()]).await);
    }
    let group = items.iter().cycle().take(23).cloned().collect();
    let expected: Vec<u32> = alone.iter().cycle().take(23).copied().collect();
    assert_eq!(means(&mut client, group).await, expected);
}
