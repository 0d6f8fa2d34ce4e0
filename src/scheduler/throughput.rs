//! How fast the queue drains, and when who was refused should come back.

use std::time::{Duration, Instant};

/// The time over which tokens are counted before they tell a rate.
const WINDOW: Duration = Duration::from_millis(500);
/// How much the newest measurement counts.
const NEWEST: f64 = 0.5;
/// How many times the time that is left an answer must be expected to take before a call is refused for it.
const LATE_BY: u32 = 2;
/// What is told while nothing has been measured.
const UNKNOWN: Duration = Duration::from_secs(1);
/// The least and the greatest wait that is told.
const WAIT: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(60)];

/// Tokens per second of the whole path, from the queue's room to the answers, measured while there is work.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Drain {
    since: Option<Instant>,
    tokens: usize,
    rate: Option<f64>,
    /// The rate while there was always more than the devices could take: how fast it can be. With less to do it is
    /// slower only for want of work, and nobody is turned away for that.
    full_rate: Option<f64>,
    /// Whether the devices have had all there was since the window began.
    lull: bool,
}

impl Drain {
    /// There is work now, and there was none: time without any tells nothing.
    pub fn begin(&mut self, now: Instant) {
        (self.since, self.tokens, self.lull) = (Some(now), 0, false);
    }

    /// A device has taken all there was.
    pub fn lull(&mut self) {
        self.lull = true;
    }

    /// So many tokens were answered; `idle`: and nothing else waits.
    pub fn answered(&mut self, tokens: usize, idle: bool, now: Instant) {
        let Some(since) = self.since else { return };
        self.tokens += tokens;
        let took = now.saturating_duration_since(since);
        if took >= WINDOW || idle {
            let newest = self.tokens as f64 / took.as_secs_f64().max(1e-6);
            let smooth =
                |rate: Option<f64>| rate.map_or(newest, |rate| NEWEST * newest + (1.0 - NEWEST) * rate);
            self.rate = Some(smooth(self.rate));
            if took >= WINDOW {
                self.full_rate = match self.full_rate {
                    full if !self.lull => Some(smooth(full)),
                    // It can be so fast, also with less to do.
                    full => full.map(|full| full.max(newest)),
                };
            }
            (self.tokens, self.lull) = (0, false);
            self.since = (!idle).then_some(now);
        }
    }

    /// The time in which so many tokens drain; `None` where nothing has been measured.
    fn time_for(&self, tokens: usize) -> Option<Duration> {
        self.rate.map(|rate| Duration::from_secs_f64((tokens as f64 / rate.max(1.0)).min(86400.0)))
    }

    /// How many of the tokens before a call are too many for who has `left`, and the time that all of them take; `None`
    /// where there is no saying that it would be late. It must be late by a wide margin: an estimate may be wrong.
    pub fn too_many(&self, before: usize, left: Duration) -> Option<(usize, Duration)> {
        let rate = self.full_rate?.max(1.0);
        let expected = Duration::from_secs_f64((before as f64 / rate).min(86400.0));
        let excess = before.saturating_sub((rate * left.as_secs_f64()) as usize);
        (expected > LATE_BY * left).then_some((excess, expected))
    }
}

/// When the next one who is refused should come back.
///
/// Each who is refused is promised a time of its own, spaced by what it asks for: were all told the same, one would
/// find room and the others would be refused again.
#[derive(Debug, Default)]
pub(super) struct Comeback(Option<Instant>);

impl Comeback {
    /// The wait of one who asks for `tokens`, of which there is room for once `excess` have drained. Who was promised
    /// a time need not come, so no promise lies beyond the time in which `whole` drains: then the round begins anew.
    pub fn promise(
        &mut self,
        drain: &Drain,
        excess: usize,
        tokens: usize,
        whole: usize,
        now: Instant,
    ) -> Duration {
        let times = [excess, tokens, whole].map(|tokens| drain.time_for(tokens));
        let [Some(earliest), Some(own), Some(whole)] = times else { return UNKNOWN };
        let first = now + earliest;
        let at = self.0.filter(|&at| at > first && at <= now + whole).unwrap_or(first);
        self.0 = Some(at + own);
        at.saturating_duration_since(now).clamp(WAIT[0], WAIT[1])
    }
}

/// How long it is from the plan of a batch to its answer, for telling what can no longer be in time.
#[derive(Debug, Default)]
pub(super) struct Latency {
    /// Seconds per token, smoothed.
    per_token: f64,
}

impl Latency {
    /// A batch of so many tokens took so long.
    pub fn record(&mut self, tokens: usize, took: Duration) {
        let newest = took.as_secs_f64() / tokens.max(1) as f64;
        let old = if self.per_token > 0.0 { self.per_token } else { newest };
        self.per_token = NEWEST * newest + (1.0 - NEWEST) * old;
    }

    /// What a batch of so many tokens should take, with a fifth to spare; zero where nothing has been measured.
    pub fn of(&self, tokens: usize) -> Duration {
        Duration::from_secs_f64((1.2 * self.per_token * tokens as f64).min(86400.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_time_with_work() {
        let (mut drain, start) = (Drain::default(), Instant::now());
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        assert_eq!(drain.time_for(1), None);
        drain.begin(at(0.0));
        drain.answered(1000, false, at(0.4));
        assert_eq!(drain.time_for(1), None, "too early to tell");
        drain.answered(1000, false, at(1.0));
        assert_eq!(drain.time_for(2000), Some(Duration::from_secs(1)));
        drain.answered(2000, true, at(2.0));
        // An hour without work changes nothing.
        drain.begin(at(3600.0));
        drain.answered(2000, true, at(3601.0));
        assert_eq!(drain.time_for(2000), Some(Duration::from_secs(1)));
    }

    #[test]
    fn nobody_is_late_by_a_rate_that_was_low_for_want_of_work() {
        let (mut drain, start) = (Drain::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let left = Duration::from_secs(1);
        drain.begin(at(0));
        drain.lull();
        drain.answered(10, false, at(1));
        assert_eq!(drain.too_many(1_000_000, left), None, "nothing is known of its speed");
        drain.answered(100, false, at(2));
        assert_eq!(drain.too_many(200, left), None, "twice the time is not wide enough");
        assert_eq!(drain.too_many(300, left), Some((200, Duration::from_secs(3))));
        // Slow for want of work: nothing new. Fast in spite of it: it can be.
        drain.lull();
        drain.answered(10, false, at(3));
        assert_eq!(drain.too_many(300, left), Some((200, Duration::from_secs(3))));
        drain.lull();
        drain.answered(300, true, at(4));
        assert_eq!(drain.too_many(600, left), None);
        // A stall that is over is forgotten, though nothing waits long enough any more to measure it again.
        drain.begin(at(4));
        drain.answered(1, false, at(1000));
        drain.answered(1, false, at(2000));
        drain.lull();
        drain.answered(300, false, at(2001));
        assert_eq!(drain.too_many(600, left), None);
    }

    #[test]
    fn who_is_refused_comes_back_one_after_the_other() {
        let (mut drain, mut comeback, now) = (Drain::default(), Comeback::default(), Instant::now());
        assert_eq!(comeback.promise(&drain, 10, 10, 100, now), UNKNOWN);
        drain.begin(now);
        drain.answered(100, true, now + Duration::from_secs(1));
        let waits: Vec<u64> =
            (0..12).map(|_| comeback.promise(&drain, 20, 10, 100, now).as_millis() as u64).collect();
        assert_eq!(waits, [200, 300, 400, 500, 600, 700, 800, 900, 1000, 200, 300, 400]);
    }
}
