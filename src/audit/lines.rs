//! When it is said that lines are lost.

use std::time::{Duration, Instant};

/// The time between one word and the next: at first, doubled each time, and the longest.
const SILENCE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3600)];

/// What is lost and not said yet.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    unsaid: u64,
    /// Nothing is said before this, and how long that silence was.
    next: Option<(Instant, Duration)>,
}

impl Complaints {
    /// So many more are lost; how many there are to tell of now, if it is time, and how long nothing will be said.
    pub fn add(&mut self, lines: u64, now: Instant) -> Option<(u64, Duration)> {
        self.unsaid += lines;
        let silence = match self.next {
            Some((next, _)) if now < next => return None,
            // It goes on.
            Some((next, silence)) if now < next + silence => (silence * 2).min(SILENCE[1]),
            _ => SILENCE[0],
        };
        self.next = Some((now + silence, silence));
        Some((std::mem::take(&mut self.unsaid), silence))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_is_said_ever_more_seldom() {
        let (mut complaints, start) = (Complaints::default(), Instant::now());
        let said: Vec<_> = (0..100_000)
            .filter_map(|second| {
                let said = complaints.add(1, start + Duration::from_secs(second));
                said.map(|(lost, _)| (second, lost))
            })
            .collect();
        assert_eq!(said[..5], [(0, 1), (1, 1), (3, 2), (7, 4), (15, 8)]);
        assert_eq!(said.windows(2).map(|two| two[1].0 - two[0].0).max(), Some(3600));
        assert!(said.iter().map(|(_, lost)| lost).sum::<u64>() > 96_000);
        // Once it was over, it is said at once.
        let later = start + Duration::from_secs(200_000);
        assert_eq!(complaints.add(1, later).map(|(_, silence)| silence), Some(SILENCE[0]));
    }
}
