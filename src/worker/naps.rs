//! Naps: short sleeps that nobody ends, while frames come in such numbers that being woken for each
//! batch of them would cost more than they do.
//!
//! Both sides pay for a wake-up: the worker for its way into sleep and out of it, and whoever sends
//! for waking it. Network cards have the same (ethtool's `rx-usecs`); here only bursts that follow each
//! other closely bring it about, so nothing that waits for an answer is ever held up by it.

use std::time::{Duration, Instant};

/// Frames that must have come since the last time that there were none: one of the kernel's batches
/// (64, `NAPI_POLL_WEIGHT`) may be in two parts.
const FRAMES: u64 = 32;
/// The time within which they must have come.
const PERIOD: Duration = Duration::from_micros(150);
/// How long a nap is. The kernel adds the thread's timer slack, of 50 µs: at two million frames a
/// second 140 come meanwhile, of the 256 that a ring usually has room for.
const NAP: Duration = Duration::from_micros(20);

/// When a worker has run out of frames, and how many there were before.
#[derive(Debug)]
pub(super) struct Naps {
    frames: u64,
    since: Instant,
}

impl Naps {
    pub(super) fn new() -> Self {
        Naps { frames: 0, since: Instant::now() }
    }

    /// Notes that frames were moved.
    pub(super) fn note(&mut self, frames: u64) {
        self.frames += frames;
    }

    /// There are no more frames for now: says whether to look again after a nap, which it takes, rather
    /// than to be woken.
    pub(super) fn take(&mut self) -> bool {
        let pays = pays(self.frames, self.since.elapsed());
        if pays {
            std::thread::sleep(NAP);
        }
        *self = Naps::new();
        pays
    }
}

fn pays(frames: u64, within: Duration) -> bool {
    frames >= FRAMES && within < PERIOD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_frames_in_a_short_time_are_worth_a_nap() {
        assert!(pays(FRAMES, Duration::ZERO));
        assert!(pays(1000, Duration::from_micros(149)));
        assert!(!pays(FRAMES - 1, Duration::ZERO), "too few");
        assert!(!pays(1000, PERIOD), "they took too long");
    }

    #[test]
    fn frames_count_for_one_nap() {
        let mut naps = Naps::new();
        naps.note(1000);
        naps.take();
        assert_eq!(naps.frames, 0);
        assert!(!naps.take());
    }
}
