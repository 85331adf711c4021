//! Wake-up coalescing: short sleeps that nobody ends, while frames come in such numbers that being woken for each
//! batch of them would cost more than they do.
//!
//! Both sides pay for a wake-up: the worker for its way into sleep and out of it, and whoever sends
//! for waking it. Network cards have the same (ethtool's `rx-usecs`); here only bursts that follow each
//! other closely bring it about, and not frames of which each waits for the answer to another.

use std::mem;
use std::thread;
use std::time::{Duration, Instant};

/// Frames that must have come since the last time that there were none, twice in a row: one of the
/// kernel's batches (64, `NAPI_POLL_WEIGHT`) may be in two parts.
const FRAMES: u64 = 32;
/// The time within which they must have come, or have been dealt with after a nap.
const PERIOD: Duration = Duration::from_micros(150);
/// How long a nap is,
const LONGEST: Duration = Duration::from_micros(70);
/// unless more than one of so many parts of a ring would be used meanwhile.
const PARTS: u32 = 4;

/// How many frames there have been since a worker ran out of them last.
#[derive(Debug)]
pub(super) struct Coalescer {
    frames: u64,
    /// Chains that these took.
    chains: usize,
    /// When it did, if there had been many.
    since: Option<Instant>,
    /// How long it has slept before that, not to be woken.
    napped: Duration,
    /// How many chains may be used during a nap.
    room: u32,
}

impl Coalescer {
    /// For rings of which the smaller has so many entries.
    pub(super) fn new(smaller: u16) -> Self {
        let room = u32::from(smaller) / PARTS;
        Coalescer { frames: 0, chains: 0, since: None, napped: Duration::ZERO, room }
    }

    /// Notes that frames were moved, in so many chains.
    pub(super) fn note(&mut self, frames: u64, chains: usize) {
        self.frames += frames;
        self.chains += chains;
    }

    /// There are no more frames for now: says whether to look again after a nap, which it takes, rather
    /// than to be woken.
    pub(super) fn take(&mut self) -> bool {
        let (frames, chains) = (mem::take(&mut self.frames), mem::take(&mut self.chains));
        let napped = mem::take(&mut self.napped);
        let many = frames >= FRAMES;
        // Nobody looks at the clock for few.
        let time = self.since.filter(|_| many).map(|since| since.elapsed());
        let pays = time.is_some_and(|time| time < PERIOD);
        if let Some(time) = time.filter(|_| pays) {
            self.napped = self.length(time + napped, chains);
            thread::sleep(self.napped);
        }
        self.since = many.then(Instant::now);
        pays
    }

    /// How long to sleep, where so many chains are used in a time.
    fn length(&self, time: Duration, chains: usize) -> Duration {
        LONGEST.min(time * self.room / chains.max(1) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_frames_twice_in_a_short_time_are_worth_a_nap() {
        // However long the test takes: from then on no time has passed.
        let soon = Some(Instant::now() + Duration::from_secs(60));
        let mut coalescer = Coalescer { since: soon, ..Coalescer::new(256) };
        coalescer.note(FRAMES - 1, 31);
        coalescer.note(1, 1);
        assert!(coalescer.take());
        assert!(!coalescer.take(), "each counts once");
        coalescer.note(FRAMES, 32);
        assert!(!coalescer.take(), "the first time after a pause");

        let mut coalescer = Coalescer { since: soon, ..Coalescer::new(256) };
        coalescer.note(FRAMES - 1, 31);
        assert!(!coalescer.take(), "too few");
        let mut coalescer =
            Coalescer { since: Instant::now().checked_sub(PERIOD), ..Coalescer::new(256) };
        coalescer.note(1000, 1000);
        assert!(!coalescer.take(), "they took too long");
    }

    #[test]
    fn no_ring_runs_dry_during_a_nap() {
        let micros = Duration::from_micros;
        for (size, time, chains, nap) in [
            (1024, micros(100), 256, LONGEST),
            (1024, micros(100), 512, micros(50)),
            (256, micros(100), 64, LONGEST),
            (256, micros(100), 256, micros(25)),
            (2, micros(100), 64, Duration::ZERO),
        ] {
            assert_eq!(Coalescer::new(size).length(time, chains), nap, "{size} {chains}");
        }
    }
}
