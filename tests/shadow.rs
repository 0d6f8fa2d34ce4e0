//! A second model scores a part of the traffic: nobody who calls the first waits for it or hears of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::*;
use spatialscore::config::ShadowSettings;
use spatialscore::edge::proto;
use spatialscore::engine::{Onlookers, Tap};
use spatialscore::processor::{Item, Picture};
use spatialscore::request_context::{Caller, Claim};

/// The models of a fake are none of the settings: with an address for that, they may come later.
const FLAGS: [(&str, &str); 3] =
    [("shadow.share", "1"), ("cache.max_items", "0"), ("admin.listen", "127.0.0.1:0")];

fn shadow_items(model: &str, outcome: &str) -> f64 {
    metric(&format!("spatialscore_shadow_items_total{{model=\"{model}\",outcome=\"{outcome}\"}}"))
}

/// How many of them a second model had, in any way.
fn all_items(model: &str) -> f64 {
    ["scored", "dropped", "failed"].into_iter().map(|outcome| shadow_items(model, outcome)).sum()
}

fn shared(name: &str, of: &str, model: &str) -> f64 {
    metric(&format!("spatialscore_shadow_{name}{{model=\"{model}\",of=\"{of}\"}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_compared_and_callers_have_the_first_ones_scores() {
    let flags = [&FLAGS[..], &[("shadow.model", "negated")]].concat();
    let server = TestServer::of_models_apart(&["plain", "negated"], &flags).await;
    server.devices[1].scale(-1.0);
    let mut client = server.client().await;
    let shades: Vec<u8> = (10..40).collect();
    let answer = soon(client.score(request(shades.clone()))).await.unwrap().into_inner();
    let wanted: Vec<_> = shades.iter().map(|&shade| Ok(f32::from(shade))).collect();
    assert_eq!(outcomes(&answer), wanted);
    until(|| shadow_items("negated", "scored") == 30.0).await;
    // From 24.5 in the mean to -24.5.
    until(|| (shared("mean_shift", "plain", "negated") + 49.0).abs() < 1e-4).await;
    assert_eq!(shared("rank_correlation", "plain", "negated"), -1.0);
    // Who asks for another model than the first is nothing to it, and what has no score.
    let other = proto::ScoreRequest { models: vec!["negated".into()], ..request([50]) };
    soon(client.score(other)).await.unwrap();
    soon(client.score(request([NAN]))).await.unwrap();
    let both = proto::ScoreRequest { models: vec!["negated".into(), "plain".into()], ..request([60]) };
    soon(client.score(both)).await.unwrap();
    until(|| shadow_items("negated", "scored") == 31.0).await;
    server.devices[1].scale(1.0);
    soon(client.score(request(100..140))).await.unwrap();
    until(|| shadow_items("negated", "scored") == 71.0).await;
    until(|| {
        let rank = shared("rank_correlation", "plain", "negated");
        rank > -1.0 && rank < 1.0
    })
    .await;
    assert_eq!(all_items("negated"), 71.0);
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_model_can_be_the_first() {
    let flags = [&FLAGS[..], &[("shadow.model", "some"), ("shadow.of", "a")]].concat();
    let server = TestServer::of_models_apart(&["z", "a", "some"], &flags).await;
    let mut client = server.client().await;
    soon(client.score(request([1, 2, 3]))).await.unwrap();
    let both = proto::ScoreRequest { models: vec!["z".into(), "a".into()], ..request([4, 6]) };
    soon(client.score(both)).await.unwrap();
    until(|| shadow_items("some", "scored") == 2.0).await;
    until(|| (shared("rank_correlation", "a", "some"), shared("mean_shift", "a", "some")) == (1.0, 0.0))
        .await;
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_model_that_stands_still_costs_callers_nothing() {
    let flags =
        [&FLAGS[..], &[("shadow.model", "stuck"), ("shadow.max_items", "5"), ("queue.max_items", "4")]];
    let flags =
        [&flags.concat()[..], &[("limits.max_items_per_request", "4"), ("batch.max_items", "4")]].concat();
    let server = TestServer::of_models_apart(&["flows", "stuck"], &flags).await;
    server.devices[1].hold();
    let mut client = server.client().await;
    for round in 0..20 {
        // All places that there are, each time.
        let shades = [round, round + 40, round + 80, round + 120];
        let answer = soon(client.score(request(shades))).await.unwrap().into_inner();
        assert_eq!(outcomes(&answer), shades.map(|shade| Ok(f32::from(shade))));
    }
    // Five are on their way, five more wait, and the others are dropped.
    until(|| shadow_items("stuck", "dropped") == 70.0).await;
    assert_eq!(shadow_items("stuck", "scored"), 0.0);
    server.devices[1].release();
    until(|| shadow_items("stuck", "scored") == 10.0).await;
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_the_second_model_reach_nobody() {
    let flags = [&FLAGS[..], &[("shadow.model", "fails")]].concat();
    let server = TestServer::of_models_apart(&["works", "fails"], &flags).await;
    server.devices[1].memory(0);
    let mut client = server.client().await;
    let answer = soon(client.score(request([7, 8]))).await.unwrap().into_inner();
    assert_eq!(outcomes(&answer), [Ok(7.0), Ok(8.0)]);
    until(|| shadow_items("fails", "failed") == 2.0).await;
    // One that never ends keeps no server from ending.
    server.devices[1].memory(usize::MAX);
    server.devices[1].pace(std::time::Duration::from_secs(2));
    soon(client.score(request([9]))).await.unwrap();
    drop(client);
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_drops_the_second_ones_items() {
    let settings = ShadowSettings { model: "second".into(), of: String::new(), share: 1.0, max_items: 8 };
    let (tap, shadow) = Tap::new(&settings);
    let flags = [("queue.max_items", "8"), ("batch.max_items", "8"), ("limits.max_items_per_request", "8")];
    let onlookers = Onlookers { shadow: Some(tap), ..Onlookers::default() };
    let ((engine, _lifeline, _manager), devices) = engine(&["first", "second"], &flags, onlookers);
    let runs = tokio::spawn(shadow.run(Arc::clone(&engine)));
    let score = |shade: u8| {
        let engine = Arc::clone(&engine);
        tokio::spawn(async move {
            let (models, claim) = (engine.models().named(&[]).unwrap(), Claim::default());
            let rgb8 = Bytes::from(vec![shade; (SIDE * SIDE * 3) as usize]);
            let item = Item::new(PROMPT, Picture::Raw { width: SIDE, height: SIDE, rgb8 });
            let item = engine.admit(&models, item, &claim).await.unwrap();
            let permits = engine.queue().reserve(&claim, &item.costs().collect::<Vec<_>>()).unwrap();
            engine.score(item, permits, &claim).await.pop().unwrap().unwrap().scored.score.mean
        })
    };
    // While the first one computes, another takes all places that there are.
    devices[0].hold();
    let answer = score(7);
    devices[0].occupied().await;
    let other = Claim { caller: Caller("other".into()), ..Claim::default() };
    let held = engine.queue().reserve(&other, &[1; 8]).unwrap();
    devices[0].release();
    assert_eq!(soon(answer).await.unwrap(), 7.0);
    until(|| shadow_items("second", "dropped") == 1.0).await;
    drop(held);
    assert_eq!(soon(score(8)).await.unwrap(), 8.0);
    until(|| shadow_items("second", "scored") == 1.0).await;
    assert_eq!(devices[1].seen().iter().filter(|&&shade| shade != 128).collect::<Vec<_>>(), [&8]);
    runs.abort();
}
