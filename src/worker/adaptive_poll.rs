//! Adaptive polling: after a request to the guest, the worker polls for the guest's reply for up to 100 µs.
//!
//! The latency of a request includes the wake-up of each CPU on its way. A guest that was just called usually
//! replies within tens of microseconds. If the worker polls for that time, nothing has to wake it, and the guest
//! need not kick. Polling costs CPU time, so the worker polls only while replies come, and within a budget. KVM
//! polls in the same way for a guest's CPU that halts (`halt_poll_ns`).

use std::time::{Duration, Instant};

/// Longest poll for a reply.
const MAX_POLL: Duration = Duration::from_micros(100);
/// Divisor of elapsed time: the budget grows by one sixteenth of it.
const BUDGET_DIVISOR: u32 = 16;
/// Highest budget.
const MAX_BUDGET: Duration = Duration::from_millis(5);
/// Limit on the frames of a request. More frames are a stream: the guest replies to a stream too, but no peer waits
/// for these replies.
const MAX_FRAMES: u64 = 4;
/// Limit on the bytes of a request.
const MAX_BYTES: u64 = 4096;
/// Shortest and longest pause after a poll without a reply. Each such poll doubles the pause.
const BACKOFF: [Duration; 2] = [Duration::from_micros(500), Duration::from_millis(64)];

/// State of a session's polls for replies.
#[derive(Debug)]
pub(super) struct AdaptivePoll {
    /// Frames given to the guest since the worker last ran out of work.
    frames: u64,
    /// Bytes of these frames.
    bytes: u64,
    /// True if the guest has sent a frame since then.
    has_reply: bool,
    /// Time that polls may take, as of `updated`.
    budget: Duration,
    updated: Instant,
    /// Pause after the next poll without a reply.
    backoff: Duration,
    /// End of the present pause.
    backoff_until: Instant,
}

impl AdaptivePoll {
    /// Creates a state with a full budget and no pause.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        AdaptivePoll {
            frames: 0,
            bytes: 0,
            has_reply: false,
            budget: MAX_BUDGET,
            updated: now,
            backoff: BACKOFF[0],
            backoff_until: now,
        }
    }

    /// Notes frames that the guest was given.
    pub(super) fn note_rx(&mut self, frames: u64, bytes: u64) {
        self.frames += frames;
        self.bytes += bytes;
    }

    /// Notes that the guest has sent a frame.
    pub(super) fn note_tx(&mut self) {
        self.has_reply = true;
    }

    /// Begins a poll, when the worker has run out of work. Returns the end of the poll, or `None` if polling would
    /// not pay.
    pub(super) fn begin(&mut self) -> Option<Instant> {
        let (frames, bytes) = (std::mem::take(&mut self.frames), std::mem::take(&mut self.bytes));
        let has_reply = std::mem::take(&mut self.has_reply);
        if frames == 0 || frames > MAX_FRAMES || bytes > MAX_BYTES || has_reply {
            return None;
        }
        let now = Instant::now();
        if now < self.backoff_until {
            return None;
        }
        self.budget = MAX_BUDGET.min(self.budget + (now - self.updated) / BUDGET_DIVISOR);
        self.updated = now;
        (self.budget >= MAX_POLL).then(|| now + MAX_POLL)
    }

    /// Returns true if the guest has sent a frame since [`begin`](Self::begin).
    pub(super) fn has_reply(&self) -> bool {
        self.has_reply
    }

    /// Ends a poll: charges its time to the budget, and starts a pause if no reply came.
    pub(super) fn end(&mut self) {
        let now = Instant::now();
        self.budget = self.budget.saturating_sub(now - self.updated);
        self.updated = now;
        if self.has_reply {
            self.backoff = BACKOFF[0];
        } else {
            self.backoff_until = now + self.backoff;
            self.backoff = BACKOFF[1].min(2 * self.backoff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_polled_for_once() {
        let mut adaptive_poll = AdaptivePoll::new();
        assert!(adaptive_poll.begin().is_none());
        for (frames, bytes, is_request) in [
            (1, 60, true),
            (MAX_FRAMES, MAX_BYTES, true),
            (MAX_FRAMES + 1, MAX_BYTES, false),
            (1, MAX_BYTES + 1, false),
        ] {
            adaptive_poll.note_rx(frames, bytes);
            assert_eq!(
                adaptive_poll.begin().is_some(),
                is_request,
                "{frames} frames, {bytes} bytes"
            );
            assert!(adaptive_poll.begin().is_none());
        }
        adaptive_poll.note_rx(1, 60);
        adaptive_poll.note_tx();
        assert!(adaptive_poll.begin().is_none(), "the reply has come");
    }

    #[test]
    fn failed_polls_back_off_exponentially() {
        let mut adaptive_poll = AdaptivePoll::new();
        for milliseconds in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0] {
            adaptive_poll.note_rx(1, 60);
            assert!(adaptive_poll.begin().is_some());
            assert!(!adaptive_poll.has_reply());
            let before = Instant::now();
            adaptive_poll.end();
            let backoff = Duration::from_secs_f64(milliseconds / 1e3);
            assert!(adaptive_poll.backoff_until >= before + backoff);
            assert!(adaptive_poll.backoff_until <= Instant::now() + backoff);
            adaptive_poll.note_rx(1, 60);
            adaptive_poll.backoff_until += Duration::from_secs(60);
            assert!(adaptive_poll.begin().is_none());
            adaptive_poll.backoff_until = Instant::now();
        }
        adaptive_poll.note_rx(1, 60);
        assert!(adaptive_poll.begin().is_some());
        adaptive_poll.note_tx();
        assert!(adaptive_poll.has_reply());
        adaptive_poll.end();
        assert!(adaptive_poll.begin().is_none());
        assert_eq!(adaptive_poll.backoff, BACKOFF[0]);
        adaptive_poll.note_rx(1, 60);
        assert!(adaptive_poll.begin().is_some(), "at once, after a reply");
    }

    #[test]
    fn polls_have_a_budget() {
        let mut adaptive_poll = AdaptivePoll::new();
        adaptive_poll.budget = Duration::ZERO;
        adaptive_poll.note_rx(1, 60);
        assert!(adaptive_poll.begin().is_none());
        // The budget for one poll takes 16 times as long to grow.
        adaptive_poll.updated = Instant::now().checked_sub(BUDGET_DIVISOR * MAX_POLL).unwrap();
        adaptive_poll.note_rx(1, 60);
        assert!(adaptive_poll.begin().is_some());
        adaptive_poll.updated = Instant::now().checked_sub(MAX_POLL).unwrap();
        adaptive_poll.note_tx();
        adaptive_poll.end();
        assert!(adaptive_poll.budget < MAX_POLL);
        adaptive_poll.updated = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        adaptive_poll.begin();
        adaptive_poll.note_rx(1, 60);
        assert!(adaptive_poll.begin().is_some());
        assert_eq!(adaptive_poll.budget, MAX_BUDGET, "and no more");
    }
}
