//! Words about frames that anti-spoofing drops: at once, and then every ten seconds at most.

use std::time::{Duration, Instant};

use log::warn;

use crate::counters::{DirectionCounters, DropReason};

/// Time between two lines about one queue pair.
const INTERVAL: Duration = Duration::from_secs(10);
/// The reasons.
const REASONS: [DropReason; 4] = [
    DropReason::SpoofedMac,
    DropReason::SpoofedAddress,
    DropReason::ForbiddenVlan,
    DropReason::Forbidden,
];

/// What was said of a queue pair, over all its sessions.
#[derive(Debug)]
pub(super) struct SpoofingLog {
    name: String,
    said: Option<Instant>,
    counts: [u64; REASONS.len()],
    /// Frames were dropped that nothing was said of.
    pending: bool,
}

impl SpoofingLog {
    /// Nothing is said of what was dropped before.
    pub(super) fn new(name: &str, tx: &DirectionCounters) -> Self {
        let counts = REASONS.map(|reason| tx.drops(reason));
        SpoofingLog { name: name.to_owned(), said: None, counts, pending: false }
    }

    /// A frame was dropped.
    pub(super) fn note(&mut self, reason: DropReason) {
        self.pending |= REASONS.contains(&reason);
    }

    /// Says what was dropped, if it is time for that; else returns when it is.
    pub(super) fn report(&mut self, tx: &DirectionCounters) -> Option<Duration> {
        if self.pending { self.report_at(Instant::now(), tx) } else { None }
    }

    fn report_at(&mut self, now: Instant, tx: &DirectionCounters) -> Option<Duration> {
        let since = |at| INTERVAL.saturating_sub(now.duration_since(at));
        let left = self.said.map_or(Duration::ZERO, since);
        if !left.is_zero() {
            return Some(left);
        }
        let counts = REASONS.map(|reason| tx.drops(reason));
        let more = REASONS.iter().zip(counts.iter().zip(self.counts)).filter_map(|(reason, it)| {
            let more = it.0.saturating_sub(it.1);
            (more > 0).then(|| format!(" {}={more}", reason.name()))
        });
        warn!(
            "{}: anti-spoofing dropped frames{}; the guest sends what is not its own",
            self.name,
            more.collect::<String>()
        );
        (self.said, self.counts, self.pending) = (Some(now), counts, false);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::PairCounters;

    #[test]
    fn drops_within_ten_seconds_wait_for_one_line() {
        let counters = PairCounters::default();
        let tx = &counters.tx;
        tx.dropped(DropReason::SpoofedMac, 7);
        let mut log = SpoofingLog::new("vm1/0", tx);
        for other in [DropReason::TooShort, DropReason::Filtered, DropReason::LinkDown] {
            log.note(other);
        }
        assert_eq!(log.report(tx), None);
        assert!(log.said.is_none(), "nothing was spoofed");
        let drop = |log: &mut SpoofingLog, reason| {
            tx.dropped(reason, 1);
            log.note(reason);
        };
        let start = Instant::now();
        drop(&mut log, DropReason::SpoofedMac);
        assert_eq!(log.report_at(start, tx), None);
        assert_eq!((log.said, log.counts[0], log.pending), (Some(start), 8, false));
        drop(&mut log, DropReason::Forbidden);
        let second = start + Duration::from_secs(1);
        assert_eq!(log.report_at(second, tx), Some(Duration::from_secs(9)));
        assert!(log.pending, "the worker wakes for it");
        assert_eq!(log.report_at(start + INTERVAL, tx), None);
        assert_eq!((log.counts[3], log.pending), (1, false));
    }
}
