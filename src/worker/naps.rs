//! Naps: short sleeps that nobody ends, while frames come in such numbers that being woken for each
//! batch of them would cost more than they do.
//!
//! Both sides pay for a wake-up: the worker for its way into sleep and out of it, and whoever sends
//! for waking it. Network cards have the same (ethtool's `rx-usecs`); here only bursts that follow each
//! other closely bring it about, and not frames of which each waits for the answer to another.

use std::time::{Duration, Instant};

/// Frames that must have come since the last time that there were none, twice in a row: one of the
/// kernel's batches (64, `NAPI_POLL_WEIGHT`) may be in two parts.
const FRAMES: u64 = 32;
/// The time within which they must have come.
const PERIOD: Duration = Duration::from_micros(150);
/// How long a nap is. The kernel adds the thread's timer slack, of 50 µs: at two million frames a
/// second 140 come meanwhile, of the 256 that a ring usually has room for.
const NAP: Duration = Duration::from_micros(20);

/// How many frames there have been since a worker ran out of them last.
#[derive(Debug, Default)]
pub(super) struct Naps {
    frames: u64,
    /// When it did, if there had been many.
    since: Option<Instant>,
}

impl Naps {
    /// Notes that frames were moved.
    pub(super) fn note(&mut self, frames: u64) {
        self.frames += frames;
    }

    /// There are no more frames for now: says whether to look again after a nap, which it takes, rather
    /// than to be woken.
    pub(super) fn take(&mut self) -> bool {
        let many = std::mem::take(&mut self.frames) >= FRAMES;
        // Nobody looks at the clock for few.
        let pays = many && self.since.is_some_and(|since| since.elapsed() < PERIOD);
        if pays {
            std::thread::sleep(NAP);
        }
        self.since = many.then(Instant::now);
        pays
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_frames_twice_in_a_short_time_are_worth_a_nap() {
        // However long the test takes: from then on no time has passed.
        let soon = Some(Instant::now() + Duration::from_secs(60));
        let mut naps = Naps { frames: 0, since: soon };
        naps.note(FRAMES - 1);
        naps.note(1);
        assert!(naps.take());
        assert!(!naps.take(), "each counts once");
        naps.note(FRAMES);
        assert!(!naps.take(), "the first time after a pause");

        let mut naps = Naps { frames: FRAMES - 1, since: soon };
        assert!(!naps.take(), "too few");
        let mut naps = Naps { frames: 1000, since: Instant::now().checked_sub(PERIOD) };
        assert!(!naps.take(), "they took too long");
    }
}
