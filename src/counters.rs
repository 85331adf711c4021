//! What a queue pair counts: plain numbers with one writer, its worker, and any number of readers.
//!
//! They are added to once per burst, without a locked instruction.

mod histogram;
mod reasons;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use histogram::Histogram;
use reasons::ByReason;
pub use reasons::{CopyReason, DropReason};

/// Highest value that a counter can be restored to: 2^56. In bytes, 10 Gbit/s take two years for it.
const MAX_RESTORED: u64 = 1 << 56;

/// A number that one thread adds to and others may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it. Only the counter's one writer may call this.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Adds what another daemon has counted, as a VMM tells it. The sum stays below [`MAX_RESTORED`], so
    /// that no VMM can set its counters back by an overflow, or have sums of counters overflow.
    fn restore(&self, told: &Self) {
        let ours = self.get();
        let sum = ours.saturating_add(told.get()).min(MAX_RESTORED);
        self.0.store(ours.max(sum), Ordering::Relaxed);
    }

    /// The value at this moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

impl<'de> Deserialize<'de> for Counter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(|value| Counter(AtomicU64::new(value)))
    }
}

/// The numbers of one direction of a queue pair.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectionCounters {
    /// Frames moved.
    pub frames: Counter,
    /// Bytes of those frames, without the virtio header.
    pub bytes: Counter,
    /// Frames dropped, by reason.
    drops: ByReason<DropReason>,
    /// Of those moved, frames whose payload was copied in user space, by reason.
    copies: ByReason<CopyReason>,
    /// Interrupts sent to the guest.
    pub calls: Counter,
    /// Times that the used index moved and the guest wanted no interrupt.
    pub calls_suppressed: Counter,
    /// Times that a kick woke the worker.
    pub kicks: Counter,
    /// Bursts that the port's limit cut short.
    pub limited: Counter,
    /// Chains that were shown to the guest as used at once.
    pub bursts: Histogram<7>,
}

impl DirectionCounters {
    /// Counts dropped frames.
    pub fn dropped(&self, reason: DropReason, frames: u64) {
        self.drops.of(reason).add(frames);
    }

    /// Counts frames whose payload was copied.
    pub fn copied(&self, reason: CopyReason, frames: u64) {
        self.copies.of(reason).add(frames);
    }

    /// Frames whose payload was copied for `reason`.
    pub fn copies(&self, reason: CopyReason) -> u64 {
        self.copies.of(reason).get()
    }

    /// Frames dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops.of(reason).get()
    }

    fn restore(&self, told: &Self) {
        for (ours, theirs) in [
            (&self.frames, &told.frames),
            (&self.bytes, &told.bytes),
            (&self.calls, &told.calls),
            (&self.calls_suppressed, &told.calls_suppressed),
            (&self.kicks, &told.kicks),
            (&self.limited, &told.limited),
        ] {
            ours.restore(theirs);
        }
        self.drops.restore(&told.drops);
        self.copies.restore(&told.copies);
        self.bursts.restore(&told.bursts);
    }
}

impl PairCounters {
    /// Adds all that another daemon has counted, as a VMM tells it; each counter stays below 2^56. Only
    /// while their one writer does not run.
    pub fn restore(&self, told: &Self) {
        self.rx.restore(&told.rx);
        self.tx.restore(&told.tx);
        for (ours, theirs) in [
            (&self.sessions, &told.sessions),
            (&self.turns, &told.turns),
            (&self.poll_attempts, &told.poll_attempts),
            (&self.poll_successes, &told.poll_successes),
            (&self.coalesced_sleeps, &told.coalesced_sleeps),
            (&self.sleeps, &told.sleeps),
            (&self.starved, &told.starved),
        ] {
            ours.restore(theirs);
        }
        self.kick_to_used.restore(&told.kick_to_used);
    }
}

impl fmt::Display for DirectionCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} frames, {} bytes", self.frames.get(), self.bytes.get())?;
        for reason in DropReason::ALL {
            let count = self.drops(reason);
            if count > 0 {
                write!(f, ", {count} dropped ({})", reason.name())?;
            }
        }
        for reason in CopyReason::ALL {
            let count = self.copies(reason);
            if count > 0 {
                write!(f, ", {count} copied ({})", reason.name())?;
            }
        }
        let limited = self.limited.get();
        if limited > 0 {
            write!(f, ", {limited} bursts limited")?;
        }
        write!(
            f,
            ", {} kicks, {} calls, {} calls suppressed",
            self.kicks.get(),
            self.calls.get(),
            self.calls_suppressed.get()
        )
    }
}

/// The numbers of a queue pair. rx and tx are the guest's: tx is from the guest to the host.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PairCounters {
    /// To the guest.
    pub rx: DirectionCounters,
    /// From the guest.
    pub tx: DirectionCounters,
    /// Sessions that began: the rings were started, or something about them was changed.
    pub sessions: Counter,
    /// Microseconds from when a kick for frames from the guest woke the worker until the guest was
    /// shown that the first of them are used.
    pub kick_to_used: Histogram<16>,
    /// Turns of the worker that moved something.
    pub turns: Counter,
    /// Polls for a guest's reply.
    #[serde(rename = "looks")]
    pub poll_attempts: Counter,
    /// Polls that ended with a reply.
    #[serde(rename = "replies")]
    pub poll_successes: Counter,
    /// Sleeps to coalesce wake-ups, with notifications disabled.
    #[serde(rename = "naps")]
    pub coalesced_sleeps: Counter,
    /// Times that the worker went to sleep.
    pub sleeps: Counter,
    /// Times that rx had to wait for the guest to provide buffers.
    pub starved: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restored_counters_never_go_back_or_overflow() {
        let (pair, mut told) = (PairCounters::default(), PairCounters::default());
        pair.tx.frames.add(20);
        for value in [5, u64::MAX - 24, u64::MAX] {
            let before = pair.tx.frames.get();
            told.tx.frames.0.store(value, Ordering::Relaxed);
            pair.restore(&told);
            assert!(pair.tx.frames.get() >= before && pair.tx.frames.get() <= MAX_RESTORED);
        }
        told.kick_to_used = serde_json::from_value(vec![u64::MAX; 16].into()).unwrap();
        pair.restore(&told);
        assert_eq!(pair.kick_to_used.cumulated().last().unwrap().1, 16 * MAX_RESTORED);
    }

    #[test]
    fn counters_are_handed_over_by_name() {
        let pair = PairCounters::default();
        pair.tx.frames.add(7);
        pair.tx.dropped(DropReason::SpoofedMac, 3);
        pair.rx.copied(CopyReason::Late, 2);
        pair.kick_to_used.observe(5);
        let mut told = serde_json::to_value(&pair).unwrap();
        assert_eq!(told["tx"]["drops"]["spoofed_mac"], 3);
        // What another version has not, or has besides.
        told["tx"]["drops"].as_object_mut().unwrap().remove("too_short");
        told["rx"]["drops"]["too_strange"] = 1.into();
        told["rx"].as_object_mut().unwrap().remove("bursts");
        let again: PairCounters = serde_json::from_value(told).unwrap();
        assert_eq!((again.tx.frames.get(), again.tx.drops(DropReason::SpoofedMac)), (7, 3));
        assert_eq!(again.rx.copies(CopyReason::Late), 2);
        assert_eq!(again.kick_to_used.cumulated(), pair.kick_to_used.cumulated());
    }
}
