//! Adaptive polling: after a request to the guest, the worker polls for its reply for a moment.
//!
//! Who sends a request and waits for the answer waits for each processor that has to be woken on the
//! way. A guest that was just called answers within tens of microseconds, as a rule. A worker that looks
//! on for that long need not be woken again, and the guest need not kick. It costs processor time, so it
//! is done only while answers come, and has a budget. KVM does the same for a guest's processor that
//! halts (`halt_poll_ns`).

use std::time::{Duration, Instant};

/// How long an answer is looked for.
const LONGEST: Duration = Duration::from_micros(100);
/// What may be spent: this part of all time,
const PART: u32 = 16;
/// of which this much is saved up.
const SAVINGS: Duration = Duration::from_millis(5);
/// Most frames and bytes of a request. A stream is answered too, and nobody waits for that.
const FRAMES: u64 = 4;
const BYTES: u64 = 4096;
/// How long it is not looked for answers after a look in vain: twice as long each time, from this
/// to that.
const PAUSES: [Duration; 2] = [Duration::from_micros(500), Duration::from_millis(64)];

/// What a worker knows of a guest's answers.
#[derive(Debug)]
pub(super) struct AdaptivePoll {
    /// What the guest was given, and whether it has sent something, since the worker last had nothing
    /// to do.
    frames: u64,
    bytes: u64,
    sent: bool,
    /// What may be spent, as of `counted`.
    budget: Duration,
    counted: Instant,
    /// How long is paused after the next look in vain, and the end of this pause.
    pause: Duration,
    paused_until: Instant,
}

impl AdaptivePoll {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        AdaptivePoll {
            frames: 0,
            bytes: 0,
            sent: false,
            budget: SAVINGS,
            counted: now,
            pause: PAUSES[0],
            paused_until: now,
        }
    }

    /// Notes what the guest was given.
    pub(super) fn note_given(&mut self, frames: u64, bytes: u64) {
        self.frames += frames;
        self.bytes += bytes;
    }

    /// Notes that the guest has sent something.
    pub(super) fn note_sent(&mut self) {
        self.sent = true;
    }

    /// There is nothing to do for now: says until when to look for an answer, if that may pay.
    pub(super) fn begin(&mut self) -> Option<Instant> {
        let (frames, bytes) = (std::mem::take(&mut self.frames), std::mem::take(&mut self.bytes));
        let sent = std::mem::take(&mut self.sent);
        if frames == 0 || frames > FRAMES || bytes > BYTES || sent {
            return None;
        }
        let now = Instant::now();
        if now < self.paused_until {
            return None;
        }
        self.budget = SAVINGS.min(self.budget + (now - self.counted) / PART);
        self.counted = now;
        (self.budget >= LONGEST).then(|| now + LONGEST)
    }

    /// Whether the guest has sent something since.
    pub(super) fn have_come(&self) -> bool {
        self.sent
    }

    /// It is looked for no longer.
    pub(super) fn end(&mut self) {
        let now = Instant::now();
        self.budget = self.budget.saturating_sub(now - self.counted);
        self.counted = now;
        if self.sent {
            self.pause = PAUSES[0];
        } else {
            self.paused_until = now + self.pause;
            self.pause = PAUSES[1].min(2 * self.pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_to_few_frames_is_looked_for_once() {
        let mut adaptive_poll = AdaptivePoll::new();
        assert!(adaptive_poll.begin().is_none());
        for (frames, bytes, is_request) in [
            (1, 60, true),
            (FRAMES, BYTES, true),
            (FRAMES + 1, BYTES, false),
            (1, BYTES + 1, false),
        ] {
            adaptive_poll.note_given(frames, bytes);
            assert_eq!(
                adaptive_poll.begin().is_some(),
                is_request,
                "{frames} frames, {bytes} bytes"
            );
            assert!(adaptive_poll.begin().is_none());
        }
        adaptive_poll.note_given(1, 60);
        adaptive_poll.note_sent();
        assert!(adaptive_poll.begin().is_none(), "it has been answered");
    }

    #[test]
    fn after_looks_in_vain_there_are_longer_and_longer_pauses() {
        let mut adaptive_poll = AdaptivePoll::new();
        for milliseconds in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0] {
            adaptive_poll.note_given(1, 60);
            assert!(adaptive_poll.begin().is_some());
            assert!(!adaptive_poll.have_come());
            let before = Instant::now();
            adaptive_poll.end();
            let pause = Duration::from_secs_f64(milliseconds / 1e3);
            assert!(adaptive_poll.paused_until >= before + pause);
            assert!(adaptive_poll.paused_until <= Instant::now() + pause);
            adaptive_poll.note_given(1, 60);
            adaptive_poll.paused_until += Duration::from_secs(60);
            assert!(adaptive_poll.begin().is_none());
            adaptive_poll.paused_until = Instant::now();
        }
        adaptive_poll.note_given(1, 60);
        assert!(adaptive_poll.begin().is_some());
        adaptive_poll.note_sent();
        assert!(adaptive_poll.have_come());
        adaptive_poll.end();
        assert!(adaptive_poll.begin().is_none());
        assert_eq!(adaptive_poll.pause, PAUSES[0]);
        adaptive_poll.note_given(1, 60);
        assert!(adaptive_poll.begin().is_some(), "at once, after an answer");
    }

    #[test]
    fn looking_has_a_budget() {
        let mut adaptive_poll = AdaptivePoll::new();
        adaptive_poll.budget = Duration::ZERO;
        adaptive_poll.note_given(1, 60);
        assert!(adaptive_poll.begin().is_none());
        // What a look takes is saved up again in so many times the time.
        adaptive_poll.counted = Instant::now().checked_sub(PART * LONGEST).unwrap();
        adaptive_poll.note_given(1, 60);
        assert!(adaptive_poll.begin().is_some());
        adaptive_poll.counted = Instant::now().checked_sub(LONGEST).unwrap();
        adaptive_poll.note_sent();
        adaptive_poll.end();
        assert!(adaptive_poll.budget < LONGEST);
        adaptive_poll.counted = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        adaptive_poll.begin();
        adaptive_poll.note_given(1, 60);
        assert!(adaptive_poll.begin().is_some());
        assert_eq!(adaptive_poll.budget, SAVINGS, "and no more than this");
    }
}
