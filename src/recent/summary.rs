//! What is said of what was scored of late. Pure functions of entries.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::sketch::{MOST_THUMBNAIL, Sketch};
use super::{Entry, Recent};
use crate::error::MOST_TEXT;
use crate::request_context::Priority;
use crate::statistics::rank_correlation;

/// The most series of an answer.
const MOST_SERIES: usize = 8;
/// The parts that the time is divided into.
const SLOTS: usize = 12;
/// A group whose standard deviation is below this has no spread: GRPO adds as much to it before it divides.
const FLAT: f64 = 1e-4;
/// What one picture or group takes in an answer: its prompt, each byte of it escaped, its digest and numbers.
const SHOWN_BYTES: usize = 6 * MOST_TEXT + 512;
/// What a part of the time takes.
const SLOT_BYTES: usize = 256;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// How far back.
    pub age: Duration,
    /// How many of the highest, of the lowest and of the groups.
    pub most: usize,
    /// The one model; `None`: each.
    pub model: Option<String>,
}

/// The most bytes of an answer about so many entries.
pub fn answer_bytes(recent: &Recent, entries: usize, most: usize) -> usize {
    // A small picture that does not compress, in base64.
    let thumbnail = if recent.settings.thumbnails { MOST_THUMBNAIL * 3 / 2 } else { 0 };
    let shown = (3 * most * MOST_SERIES).min(3 * entries);
    shown * (SHOWN_BYTES + thumbnail) + MOST_SERIES * SLOTS * SLOT_BYTES
}

/// All that is said.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Those with the most scores first.
    pub series: Vec<Series>,
    /// How many more there are.
    pub left_out: usize,
}

/// What one model made of what one caller asked at one priority.
#[derive(Debug, Serialize)]
pub struct Series {
    caller: String,
    priority: &'static str,
    model: String,
    revision: String,
    scores: Spread,
    groups: GroupCounts,
    over_time: Vec<Slot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    saturation: Option<Trend>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sharpness: Option<Trend>,
    highest: Vec<Shown>,
    lowest: Vec<Shown>,
    least_spread: Vec<Group>,
}

/// A number of scores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    count: usize,
    mean: f64,
    /// Over all of them, as GRPO takes it.
    stddev: f64,
    lowest: f64,
    highest: f64,
}

/// Groups of several pictures, and those among them whose scores have no spread.
#[derive(Debug, Serialize)]
struct GroupCounts {
    count: usize,
    without_spread: usize,
}

/// Scores of a part of the time.
#[derive(Debug, Serialize)]
struct Slot {
    /// When it began, and when it ended.
    from_seconds_ago: f64,
    to_seconds_ago: f64,
    count: usize,
    /// The lowest, the quartiles, the highest.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantiles: Option<[f64; 5]>,
}

/// What a property of pictures has to do with their scores.
#[derive(Debug, PartialEq, Serialize)]
struct Trend {
    mean: f64,
    of_highest_quarter: f64,
    of_lowest_quarter: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rank_correlation: Option<f64>,
}

/// A picture with its score.
#[derive(Debug, Serialize)]
struct Shown {
    seconds_ago: f64,
    mean: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stddev: Option<f64>,
    group: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    saturation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sharpness: Option<f64>,
    /// A file, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    png: Option<String>,
}

/// Different pictures of one prompt.
#[derive(Debug, Serialize)]
struct Group {
    group: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
    #[serde(flatten)]
    scores: Spread,
}

/// What one model made of what one caller asked at one priority.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key<'a> {
    caller: &'a str,
    priority: &'static str,
    model: &'a str,
    revision: &'a str,
}

fn series(entries: &[Arc<Entry>]) -> BTreeMap<Key<'_>, Vec<&Entry>> {
    let mut series: BTreeMap<Key<'_>, Vec<&Entry>> = BTreeMap::new();
    for entry in entries {
        let key = Key {
            caller: &entry.caller.0,
            priority: entry.priority.name(),
            model: &entry.model,
            revision: &entry.revision,
        };
        series.entry(key).or_default().push(entry);
    }
    series
}

/// The newest of those that are the same picture under the same words, the oldest first.
fn different<'a>(series: &[&'a Entry]) -> Vec<&'a Entry> {
    let mut order = series.to_vec();
    order.sort_by_key(|entry| entry.at);
    let mut seen = HashSet::new();
    let mut found: Vec<_> =
        order.into_iter().rev().filter(|entry| seen.insert((entry.texts, entry.picture))).collect();
    found.reverse();
    found
}

/// Those of different pictures that have their words in common, where there are several.
fn groups<'a>(different: &[&'a Entry]) -> Vec<Vec<&'a Entry>> {
    let mut groups: HashMap<blake3::Hash, Vec<&Entry>> = HashMap::new();
    for &entry in different {
        groups.entry(entry.texts).or_default().push(entry);
    }
    groups.into_values().filter(|group| group.len() > 1).collect()
}

fn spread(entries: &[&Entry]) -> Spread {
    let scores = || entries.iter().map(|entry| f64::from(entry.mean));
    let count = entries.len();
    let mean = scores().sum::<f64>() / count.max(1) as f64;
    let variance = scores().map(|score| (score - mean).powi(2)).sum::<f64>() / count.max(1) as f64;
    let (lowest, highest) = (scores().reduce(f64::min), scores().reduce(f64::max));
    Spread {
        count,
        mean,
        stddev: variance.sqrt(),
        lowest: lowest.unwrap_or_default(),
        highest: highest.unwrap_or_default(),
    }
}

/// What of a model is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spreads {
    /// The standard deviation of its scores.
    pub stddev: f64,
    /// Groups of several pictures.
    pub groups: usize,
    /// Those without spread.
    pub flat: usize,
}

impl Default for Spreads {
    fn default() -> Self {
        Self { stddev: f64::NAN, groups: 0, flat: 0 }
    }
}

/// What is measured of each model, as it is now, of what training asked.
pub(super) fn spreads(entries: &[Arc<Entry>]) -> HashMap<Arc<str>, Spreads> {
    let training = || entries.iter().filter(|entry| entry.priority == Priority::Training);
    let mut newest: HashMap<&str, &Entry> = HashMap::new();
    for entry in training() {
        let known = newest.entry(&entry.model).or_insert(entry);
        if entry.at > known.at {
            *known = entry;
        }
    }
    let of = |newest: &Entry| {
        let now: Vec<Arc<Entry>> = training()
            .filter(|entry| (&entry.model, &entry.revision) == (&newest.model, &newest.revision))
            .cloned()
            .collect();
        let stddev = spread(&now.iter().map(Arc::as_ref).collect::<Vec<_>>()).stddev;
        let counts = series(&now).into_values().map(|series| counts(&groups(&different(&series))));
        let add = |sum: Spreads, counts: GroupCounts| Spreads {
            groups: sum.groups + counts.count,
            flat: sum.flat + counts.without_spread,
            ..sum
        };
        (Arc::clone(&newest.model), counts.fold(Spreads { stddev, groups: 0, flat: 0 }, add))
    };
    newest.into_values().map(of).collect()
}

fn counts(groups: &[Vec<&Entry>]) -> GroupCounts {
    let flat = groups.iter().filter(|group| spread(group).stddev < FLAT);
    GroupCounts { count: groups.len(), without_spread: flat.count() }
}

impl Summary {
    /// Of entries, as they are now.
    pub fn of(mut entries: Vec<Arc<Entry>>, now: Instant, asked: &Asked) -> Self {
        entries.retain(|entry| asked.model.as_ref().is_none_or(|model| **model == *entry.model));
        let mut found: Vec<_> = series(&entries).into_iter().collect();
        found.sort_by_key(|(_, entries)| std::cmp::Reverse(entries.len()));
        let left_out = found.len().saturating_sub(MOST_SERIES);
        found.truncate(MOST_SERIES);
        Self {
            series: found.into_iter().map(|(_, entries)| Series::of(&entries, now, asked)).collect(),
            left_out,
        }
    }
}

impl Series {
    /// Of entries that there are.
    fn of(entries: &[&Entry], now: Instant, asked: &Asked) -> Self {
        let first = entries[0];
        let mut different = different(entries);
        let groups = groups(&different);
        let counts = counts(&groups);
        let mut ranked: Vec<Group> = groups.iter().map(|group| Group::of(group)).collect();
        ranked
            .sort_by(|a, b| a.scores.stddev.total_cmp(&b.scores.stddev).then_with(|| a.group.cmp(&b.group)));
        ranked.truncate(asked.most);
        // The newer first where they are the same.
        different.reverse();
        different.sort_by(|a, b| b.mean.total_cmp(&a.mean));
        let shown = |entry: &&Entry| Shown::of(entry, now);
        Self {
            caller: first.caller.0.to_string(),
            priority: first.priority.name(),
            model: first.model.to_string(),
            revision: first.revision.to_string(),
            scores: spread(entries),
            groups: counts,
            over_time: slots(entries, now, asked.age),
            saturation: Trend::of(&different, |sketch| sketch.saturation),
            sharpness: Trend::of(&different, |sketch| sketch.sharpness),
            highest: different.iter().take(asked.most).map(shown).collect(),
            lowest: different.iter().rev().take(asked.most).map(shown).collect(),
            least_spread: ranked,
        }
    }
}

impl Group {
    fn of(entries: &[&Entry]) -> Self {
        let first = entries[0];
        Self {
            group: name(first),
            prompt: first.prompt.as_deref().map(str::to_owned),
            scores: spread(entries),
        }
    }
}

/// What a group is known by.
fn name(entry: &Entry) -> String {
    entry.texts.to_hex()[..16].to_owned()
}

impl Shown {
    fn of(entry: &Entry, now: Instant) -> Self {
        let sketch = entry.sketch.get();
        let file = sketch.and_then(|sketch| sketch.thumbnail.as_ref()?.png().ok());
        Self {
            seconds_ago: now.saturating_duration_since(entry.at).as_secs_f64(),
            mean: entry.mean.into(),
            stddev: entry.stddev.map(f64::from),
            group: name(entry),
            prompt: entry.prompt.as_deref().map(str::to_owned),
            saturation: sketch.map(|sketch| sketch.saturation.into()),
            sharpness: sketch.map(|sketch| sketch.sharpness.into()),
            png: file.map(|file| STANDARD.encode(file)),
        }
    }
}

impl Trend {
    /// Over pictures in the order of their scores, the highest first; nothing where none is known.
    fn of(ranked: &[&Entry], property: impl Fn(&Sketch) -> f32) -> Option<Self> {
        let known = ranked.iter().filter_map(|entry| Some((entry.mean, property(entry.sketch.get()?))));
        let pairs: Vec<(f32, f32)> = known.collect();
        let quarter = (pairs.len() / 4).max(1);
        let (highest, lowest) = (pairs.get(..quarter)?, pairs.get(pairs.len() - quarter..)?);
        let mean = |pairs: &[(f32, f32)]| {
            pairs.iter().map(|&(_, value)| f64::from(value)).sum::<f64>() / pairs.len() as f64
        };
        Some(Self {
            mean: mean(&pairs),
            of_highest_quarter: mean(highest),
            of_lowest_quarter: mean(lowest),
            rank_correlation: rank_correlation(&pairs),
        })
    }
}

/// The scores of each part of the time, the oldest first.
fn slots(entries: &[&Entry], now: Instant, age: Duration) -> Vec<Slot> {
    let mut parts = vec![Vec::new(); SLOTS];
    for entry in entries {
        let ago = now.saturating_duration_since(entry.at).as_secs_f64() / age.as_secs_f64();
        // From the newest.
        let slot = ((ago * SLOTS as f64) as usize).min(SLOTS - 1);
        parts[SLOTS - 1 - slot].push(f64::from(entry.mean));
    }
    let edge = |index: usize| age.as_secs_f64() * (SLOTS - index) as f64 / SLOTS as f64;
    let slot = |(index, mut scores): (usize, Vec<f64>)| {
        scores.sort_by(f64::total_cmp);
        Slot {
            from_seconds_ago: edge(index),
            to_seconds_ago: edge(index + 1),
            count: scores.len(),
            quantiles: (!scores.is_empty())
                .then(|| [0.0, 0.25, 0.5, 0.75, 1.0].map(|q| quantile(&scores, q))),
        }
    };
    parts.into_iter().enumerate().map(slot).collect()
}

/// Of sorted scores, of which there are some: between two of them in proportion, as numpy has it.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::super::tests::entry;
    use super::*;

    fn asked(most: usize) -> Asked {
        Asked { age: Duration::from_secs(120), most, model: None }
    }

    /// The values of `numpy.quantile`, `numpy.std` and `scipy.stats.spearmanr`.
    #[test]
    fn the_numbers_are_those_of_numpy() {
        let sorted = [-1.0, 0.5, 2.0, 7.25, 7.5, 11.0];
        let quantiles = [0.0, 0.25, 0.5, 0.75, 1.0].map(|q| quantile(&sorted, q));
        assert_eq!(quantiles, [-1.0, 0.875, 4.625, 7.4375, 11.0]);
        assert_eq!(quantile(&[3.0], 0.75), 3.0);
        let now = Instant::now();
        let entries: Vec<Entry> =
            sorted.iter().enumerate().map(|(n, &mean)| entry("a", now, "p", n as u32, mean as f32)).collect();
        let spread = spread(&entries.iter().collect::<Vec<_>>());
        assert!((spread.stddev - 4.307_011_4).abs() < 1e-6, "{spread:?}");
        assert_eq!((spread.count, spread.lowest, spread.highest), (6, -1.0, 11.0));
        assert_eq!(spread.mean, 4.541_666_666_666_667);
    }

    #[test]
    fn a_series_says_what_scores_high_and_which_groups_have_no_spread() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut entries = Vec::new();
        for n in 0..8_u32 {
            let spread = entry("a", at(1), "spread", n, n as f32);
            let look = Sketch { saturation: n as f32 / 8.0, sharpness: 100.0 - n as f32, thumbnail: None };
            spread.sketch.set(look).unwrap();
            entries.push(spread);
            entries.push(entry("a", at(90), "flat", n, 3.0 + n as f32 * 1e-6));
            // The same picture again is no group.
            entries.push(entry("a", at(100), "again", 0, 5.0));
        }
        entries.push(Entry { priority: Priority::Evaluation, ..entry("a", at(1), "spread", 0, 9.0) });
        entries.push(Entry { revision: "2".into(), ..entry("b", at(1), "spread", 0, 9.0) });
        let entries: Vec<_> = entries.into_iter().map(Arc::new).collect();
        let summary = Summary::of(entries.clone(), at(120), &asked(3));
        assert_eq!((summary.series.len(), summary.left_out), (3, 0));
        let first = &summary.series[0];
        assert_eq!((&*first.caller, first.priority, first.scores.count), ("a", "training", 24));
        assert_eq!((first.groups.count, first.groups.without_spread), (2, 1));
        assert_eq!(first.least_spread.iter().map(|group| group.scores.count).collect::<Vec<_>>(), [8, 8]);
        assert_eq!(first.least_spread[0].prompt.as_deref(), Some("flat"));
        let means = |shown: &[Shown]| shown.iter().map(|one| one.mean).collect::<Vec<_>>();
        assert_eq!(means(&first.highest), [7.0, 6.0, 5.0]);
        assert_eq!(means(&first.lowest), [0.0, 1.0, 2.0]);
        let saturation = first.saturation.as_ref().unwrap();
        assert_eq!((saturation.of_highest_quarter, saturation.of_lowest_quarter), (0.8125, 0.0625));
        assert_eq!(saturation.rank_correlation, Some(1.0));
        assert_eq!(first.sharpness.as_ref().unwrap().rank_correlation, Some(-1.0));
        let counts: Vec<usize> = first.over_time.iter().map(|slot| slot.count).collect();
        assert_eq!(counts, [8, 0, 0, 0, 0, 0, 0, 0, 8, 8, 0, 0].map(|n: usize| n));
        assert_eq!(first.over_time[0].quantiles, Some([0.0, 1.75, 3.5, 5.25, 7.0]));
        assert_eq!((first.over_time[11].from_seconds_ago, first.over_time[11].to_seconds_ago), (10.0, 0.0));

        let one = Summary::of(entries, at(120), &Asked { model: Some("b".into()), ..asked(3) });
        assert!(one.series.is_empty());
    }

    #[test]
    fn metrics_are_of_training_with_the_newest_revision() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut entries = vec![
            entry("a", start, "p", 0, 100.0),
            Entry { priority: Priority::Evaluation, ..entry("a", later, "p", 1, 50.0) },
        ];
        for (caller, prompt, means) in
            [("a", "p", [1.0, 3.0]), ("b", "p", [2.0, 2.0]), ("b", "q", [2.0, 2.0])]
        {
            for (picture, mean) in means.into_iter().enumerate() {
                let revision = "2".into();
                entries.push(Entry { revision, ..entry(caller, later, prompt, picture as u32, mean) });
            }
        }
        let entries: Vec<_> = entries.into_iter().map(Arc::new).collect();
        let found = spreads(&entries);
        let of = found["a"];
        assert_eq!((found.len(), of.groups, of.flat), (1, 3, 2));
        assert!((of.stddev - (2.0_f64 / 6.0).sqrt()).abs() < 1e-12, "{of:?}");
        assert!(Spreads::default().stddev.is_nan());
    }

    #[test]
    fn an_answer_is_bounded() {
        let now = Instant::now();
        let entries: Vec<_> =
            (0..100).map(|n| Arc::new(entry(&format!("caller {n}"), now, "p", 0, 1.0))).collect();
        let summary = Summary::of(entries, now, &asked(24));
        assert_eq!((summary.series.len(), summary.left_out), (MOST_SERIES, 100 - MOST_SERIES));
        assert!(Summary::of(Vec::new(), now, &asked(24)).series.is_empty());
    }
}
