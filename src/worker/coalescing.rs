//! Wake-up coalescing: short sleeps with notifications disabled, while a wake-up for each batch of frames would cost
//! more than the frames do.
//!
//! Both sides pay for a wake-up: the worker for going to sleep and waking, the sender for waking it. NICs coalesce
//! interrupts for the same reason (ethtool's `rx-usecs`).
//!
//! A run is the frames that move until the worker runs out of work. Two large runs in close succession start
//! coalescing. Frames that each wait for the reply to another never do.

use std::mem;
use std::thread;
use std::time::{Duration, Instant};

/// Lowest number of frames in a large run: half a batch of the kernel (64 frames, `NAPI_POLL_WEIGHT`), which may come
/// as two runs.
const MIN_FRAMES: u64 = 32;
/// Longest time from the end of one run, or of the sleep after it, to the end of the next.
const MAX_PERIOD: Duration = Duration::from_micros(150);
/// Longest coalescing sleep.
const MAX_SLEEP: Duration = Duration::from_micros(70);
/// Divisor of the smaller ring's size: a sleep ends before more than a quarter of the ring would be used.
const RING_DIVISOR: u32 = 4;

/// State of a session's coalescing, and the counts of the present run.
#[derive(Debug)]
pub(super) struct Coalescer {
    frames: u64,
    /// Chains of these frames.
    chains: usize,
    /// Start of this run, if the last run was large.
    since: Option<Instant>,
    /// Length of the coalescing sleep before this run.
    slept: Duration,
    /// Chains that may be used during a sleep.
    max_chains: u32,
}

impl Coalescer {
    /// Creates a coalescer for a queue pair whose smaller ring has `smaller` entries.
    pub(super) fn new(smaller: u16) -> Self {
        let max_chains = u32::from(smaller) / RING_DIVISOR;
        Coalescer { frames: 0, chains: 0, since: None, slept: Duration::ZERO, max_chains }
    }

    /// Notes that frames were moved, in `chains` chains.
    pub(super) fn note(&mut self, frames: u64, chains: usize) {
        self.frames += frames;
        self.chains += chains;
    }

    /// Ends a run, when the worker has run out of work. Sleeps if coalescing pays, and returns true if it does.
    pub(super) fn sleep_if_busy(&mut self) -> bool {
        let (frames, chains) = (mem::take(&mut self.frames), mem::take(&mut self.chains));
        let slept = mem::take(&mut self.slept);
        let many = frames >= MIN_FRAMES;
        // A small run reads no clock.
        let time = self.since.filter(|_| many).map(|since| since.elapsed());
        let pays = time.is_some_and(|time| time < MAX_PERIOD);
        if let Some(time) = time.filter(|_| pays) {
            self.slept = self.length(time + slept, chains);
            thread::sleep(self.slept);
        }
        self.since = many.then(Instant::now);
        pays
    }

    /// Returns the length of a sleep, if `chains` chains were used within `time`.
    fn length(&self, time: Duration, chains: usize) -> Duration {
        MAX_SLEEP.min(time * self.max_chains / chains.max(1) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_large_runs_in_succession_start_coalescing() {
        // A start in the future: no time passes, however long the test takes.
        let soon = Some(Instant::now() + Duration::from_secs(60));
        let mut coalescer = Coalescer { since: soon, ..Coalescer::new(256) };
        coalescer.note(MIN_FRAMES - 1, 31);
        coalescer.note(1, 1);
        assert!(coalescer.sleep_if_busy());
        assert!(!coalescer.sleep_if_busy(), "each frame counts once");
        coalescer.note(MIN_FRAMES, 32);
        assert!(!coalescer.sleep_if_busy(), "the first time after a pause");

        let mut coalescer = Coalescer { since: soon, ..Coalescer::new(256) };
        coalescer.note(MIN_FRAMES - 1, 31);
        assert!(!coalescer.sleep_if_busy(), "too few");
        let mut coalescer =
            Coalescer { since: Instant::now().checked_sub(MAX_PERIOD), ..Coalescer::new(256) };
        coalescer.note(1000, 1000);
        assert!(!coalescer.sleep_if_busy(), "they took too long");
    }

    #[test]
    fn a_sleep_ends_before_a_quarter_of_the_ring_is_used() {
        let micros = Duration::from_micros;
        for (size, time, chains, sleep) in [
            (1024, micros(100), 256, MAX_SLEEP),
            (1024, micros(100), 512, micros(50)),
            (256, micros(100), 64, MAX_SLEEP),
            (256, micros(100), 256, micros(25)),
            (2, micros(100), 64, Duration::ZERO),
        ] {
            assert_eq!(Coalescer::new(size).length(time, chains), sleep, "{size} {chains}");
        }
    }
}
