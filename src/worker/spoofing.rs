//! Log lines about frames that anti-spoofing drops: the first at once, then at most one every ten seconds.

use std::time::{Duration, Instant};

use log::warn;

use crate::counters::{DirectionCounters, DropReason};

/// Time between two log lines about one queue pair.
const INTERVAL: Duration = Duration::from_secs(10);
/// Reasons of anti-spoofing for a drop.
const REASONS: [DropReason; 4] = [
    DropReason::SpoofedMac,
    DropReason::SpoofedAddress,
    DropReason::ForbiddenVlan,
    DropReason::Forbidden,
];

/// State of a queue pair's log lines, across all its sessions.
#[derive(Debug)]
pub(super) struct SpoofingLog {
    name: String,
    last_line: Option<Instant>,
    /// Counts of drops that were logged.
    logged: [u64; REASONS.len()],
    /// True if drops have not been logged yet.
    pending: bool,
}

impl SpoofingLog {
    /// Creates the state of a queue pair. Earlier drops, which `tx` includes, are not logged.
    pub(super) fn new(name: &str, tx: &DirectionCounters) -> Self {
        let logged = REASONS.map(|reason| tx.drops(reason));
        SpoofingLog { name: name.to_owned(), last_line: None, logged, pending: false }
    }

    /// Notes that frames were dropped for `reason`.
    pub(super) fn note(&mut self, reason: DropReason) {
        self.pending |= REASONS.contains(&reason);
    }

    /// Logs drops that have not been logged. Returns the time until that is allowed, if it is not allowed yet.
    pub(super) fn report(&mut self, tx: &DirectionCounters) -> Option<Duration> {
        if self.pending { self.report_at(Instant::now(), tx) } else { None }
    }

    fn report_at(&mut self, now: Instant, tx: &DirectionCounters) -> Option<Duration> {
        let since = |at| INTERVAL.saturating_sub(now.duration_since(at));
        let left = self.last_line.map_or(Duration::ZERO, since);
        if !left.is_zero() {
            return Some(left);
        }
        let counts = REASONS.map(|reason| tx.drops(reason));
        let more = REASONS.iter().zip(counts.iter().zip(self.logged)).filter_map(|(reason, it)| {
            let more = it.0.saturating_sub(it.1);
            (more > 0).then(|| format!(" {}={more}", reason.name()))
        });
        warn!(
            "{}: anti-spoofing dropped frames{}; the guest may not send these",
            self.name,
            more.collect::<String>()
        );
        (self.last_line, self.logged, self.pending) = (Some(now), counts, false);
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
        assert!(log.last_line.is_none(), "nothing was spoofed");
        let drop = |log: &mut SpoofingLog, reason| {
            tx.dropped(reason, 1);
            log.note(reason);
        };
        let start = Instant::now();
        drop(&mut log, DropReason::SpoofedMac);
        assert_eq!(log.report_at(start, tx), None);
        assert_eq!((log.last_line, log.logged[0], log.pending), (Some(start), 8, false));
        drop(&mut log, DropReason::Forbidden);
        let second = start + Duration::from_secs(1);
        assert_eq!(log.report_at(second, tx), Some(Duration::from_secs(9)));
        assert!(log.pending, "the worker wakes for it");
        assert_eq!(log.report_at(start + INTERVAL, tx), None);
        assert_eq!((log.logged[3], log.pending), (1, false));
    }
}
