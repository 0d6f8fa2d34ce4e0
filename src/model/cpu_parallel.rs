//! The samples of a batch side by side, on the cores of a CPU.
//!
//! libtorch would split each of a forward's some hundred operations over the cores and wait for the last of them
//! each time; whatever else the machine does then holds all of them up. And the larger a batch, the less of it stays
//! in the cores' caches between two operations. Here each core takes a few samples through the whole model.

use std::io;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Sample;

/// The patches of the pictures that are computed together, at least: enough to make matrix products efficient, few
/// enough to leave the activations in a core's cache.
const PATCHES: usize = 256;

/// A thread for each core that a model may use.
#[derive(Debug)]
pub(super) struct Lanes {
    threads: ThreadPool,
}

/// A model, seen from all the lanes.
struct Shared<'a, M>(&'a M);

// SAFETY: libtorch lets any number of threads read a tensor at once. `Lanes::run` alone makes one of these; what it
// shares is borrowed for reading, and a model's weights are written by nobody once it is loaded.
#[allow(unsafe_code)]
unsafe impl<M> Sync for Shared<'_, M> {}

impl Lanes {
    /// As many lanes as libtorch may use threads here.
    ///
    /// # Errors
    /// The system gave no thread.
    pub fn new() -> io::Result<Self> {
        ThreadPoolBuilder::new()
            .num_threads(usize::try_from(tch::get_num_threads()).unwrap_or(1))
            .thread_name(|n| format!("lane {n}"))
            .build()
            .map(|threads| Self { threads })
            .map_err(io::Error::other)
    }

    /// Cuts a batch into parts that are worth a lane, in order.
    pub fn split<'a, 's>(samples: &'a [&'s Sample]) -> Vec<&'a [&'s Sample]> {
        let (mut parts, mut start, mut patches) = (Vec::new(), 0, 0);
        for (n, sample) in samples.iter().enumerate() {
            patches += sample.patches();
            if patches >= PATCHES || n + 1 == samples.len() {
                parts.push(&samples[start..=n]);
                (start, patches) = (n + 1, 0);
            }
        }
        parts
    }

    /// What `work` gives for each part, in order. A panic in one of them comes out of this.
    pub fn run<M, P, R>(&self, model: &M, mut parts: Vec<P>, work: impl Fn(&M, P) -> R + Sync) -> Vec<R>
    where
        P: Send,
        R: Send,
    {
        if parts.len() <= 1 {
            // One part has the cores for itself.
            return parts.pop().map(|part| work(model, part)).into_iter().collect();
        }
        let cores = self.threads.current_num_threads();
        let each = i32::try_from(cores / parts.len()).unwrap_or(1).max(1);
        let model = Shared(model);
        let work = |part| {
            // As a whole, lest the closure borrow what is inside.
            let Shared(model) = &model;
            tch::set_num_threads(each);
            work(model, part)
        };
        self.threads.install(|| parts.into_par_iter().with_max_len(1).map(work).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::model::Patches;

    fn sample(rows: usize, columns: usize) -> Sample {
        Sample { pictures: vec![Patches { rows, columns, pixels: Vec::new() }], ..Sample::default() }
    }

    #[test]
    fn small_pictures_share_a_lane_and_large_ones_do_not() {
        let (small, large) = (sample(8, 8), sample(32, 32));
        let lengths = |samples: &[&Sample]| Lanes::split(samples).iter().map(|p| p.len()).collect::<Vec<_>>();
        assert_eq!(lengths(&[&small; 10]), [4, 4, 2]);
        assert_eq!(lengths(&[&large; 3]), [1, 1, 1]);
        assert_eq!(lengths(&[&small, &large, &small]), [2, 1]);
        assert!(lengths(&[]).is_empty());
    }

    #[test]
    fn parts_come_back_in_order_each_computed_once() {
        let lanes = Lanes { threads: ThreadPoolBuilder::new().num_threads(3).build().unwrap() };
        let seen = Mutex::new(Vec::new());
        let results = lanes.run(&10, (0..50).collect(), |model, part: i32| {
            seen.lock().unwrap().push(part);
            model * part
        });
        assert_eq!(results, (0..50).map(|part| part * 10).collect::<Vec<_>>());
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
    }
}
