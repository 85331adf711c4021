//! Counters of a queue pair, with one writer, its worker, and any number of readers.
//!
//! The worker adds to a counter once per burst, without a locked instruction.

mod histogram;
mod reasons;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use histogram::Histogram;
use reasons::ByReason;
pub use reasons::{CopyReason, DropReason};

/// Highest value that a counter can be restored to: 2^56. At 10 Gbit/s, a counter of bytes takes two years for it.
const MAX_RESTORED: u64 = 1 << 56;

/// A number that one thread adds to and any thread may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only the counter's one writer may call this.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Adds the count of another daemon, which comes by way of the VMM. The sum is at most [`MAX_RESTORED`]: so no
    /// VMM can set a counter back by an overflow, or make sums of counters overflow.
    fn restore(&self, other: &Self) {
        let ours = self.get();
        let sum = ours.saturating_add(other.get()).min(MAX_RESTORED);
        self.0.store(ours.max(sum), Ordering::Relaxed);
    }

    /// Returns the present value.
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

/// Counters of one direction of a queue pair.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectionCounters {
    /// Frames moved: tx, accepted by the host; rx, delivered to the guest.
    pub frames: Counter,
    /// Bytes of the moved frames, without the virtio-net header.
    pub bytes: Counter,
    /// Frames dropped, by reason.
    drops: ByReason<DropReason>,
    /// Moved frames whose payload was copied in user space, by reason.
    copies: ByReason<CopyReason>,
    /// Used buffer notifications sent to the guest.
    pub calls: Counter,
    /// Updates of the used index without a notification: the driver wanted none, or the frontend set no descriptor.
    pub calls_suppressed: Counter,
    /// Wake-ups of the worker by a kick.
    pub kicks: Counter,
    /// Bursts that the port's rate limit admitted only in part (tx), or times that it began to admit no frames (rx).
    pub limited: Counter,
    /// Chains published by each update of the used index.
    pub bursts: Histogram<7>,
}

impl DirectionCounters {
    /// Counts `frames` frames dropped for `reason`.
    pub fn dropped(&self, reason: DropReason, frames: u64) {
        self.drops.of(reason).add(frames);
    }

    /// Counts `frames` frames whose payload was copied for `reason`.
    pub fn copied(&self, reason: CopyReason, frames: u64) {
        self.copies.of(reason).add(frames);
    }

    /// Returns the number of frames whose payload was copied for `reason`.
    pub fn copies(&self, reason: CopyReason) -> u64 {
        self.copies.of(reason).get()
    }

    /// Returns the number of frames dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops.of(reason).get()
    }

    fn restore(&self, other: &Self) {
        for (ours, theirs) in [
            (&self.frames, &other.frames),
            (&self.bytes, &other.bytes),
            (&self.calls, &other.calls),
            (&self.calls_suppressed, &other.calls_suppressed),
            (&self.kicks, &other.kicks),
            (&self.limited, &other.limited),
        ] {
            ours.restore(theirs);
        }
        self.drops.restore(&other.drops);
        self.copies.restore(&other.copies);
        self.bursts.restore(&other.bursts);
    }
}

impl PairCounters {
    /// Adds the counts of another daemon, which come by way of the VMM. Each counter stays at or below 2^56. Callers
    /// ensure that the worker does not run meanwhile.
    pub fn restore(&self, other: &Self) {
        self.rx.restore(&other.rx);
        self.tx.restore(&other.tx);
        for (ours, theirs) in [
            (&self.sessions, &other.sessions),
            (&self.turns, &other.turns),
            (&self.poll_attempts, &other.poll_attempts),
            (&self.poll_successes, &other.poll_successes),
            (&self.coalesced_sleeps, &other.coalesced_sleeps),
            (&self.sleeps, &other.sleeps),
            (&self.starved, &other.starved),
        ] {
            ours.restore(theirs);
        }
        self.kick_to_used.restore(&other.kick_to_used);
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

/// Counters of a queue pair.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PairCounters {
    /// Frames from the host to the guest (receiveq).
    pub rx: DirectionCounters,
    /// Frames from the guest to the host (transmitq).
    pub tx: DirectionCounters,
    /// Sessions begun: the rings were started, or a setting of the session was changed.
    pub sessions: Counter,
    /// Microseconds from a wake-up by a tx kick until the first of its chains are published as used.
    pub kick_to_used: Histogram<16>,
    /// Turns of the worker that moved chains.
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
    /// Sleeps of the worker until an event or a timeout, without coalescing sleeps.
    pub sleeps: Counter,
    /// Times that the worker enabled rx notifications because the port needed more buffers from the guest.
    pub starved: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restored_counters_never_go_back_or_overflow() {
        let (pair, mut other) = (PairCounters::default(), PairCounters::default());
        pair.tx.frames.add(20);
        for value in [5, u64::MAX - 24, u64::MAX] {
            let before = pair.tx.frames.get();
            other.tx.frames.0.store(value, Ordering::Relaxed);
            pair.restore(&other);
            assert!(pair.tx.frames.get() >= before && pair.tx.frames.get() <= MAX_RESTORED);
        }
        other.kick_to_used = serde_json::from_value(vec![u64::MAX; 16].into()).unwrap();
        pair.restore(&other);
        assert_eq!(pair.kick_to_used.cumulated().last().unwrap().1, 16 * MAX_RESTORED);
    }

    #[test]
    fn counters_are_handed_over_by_name() {
        let pair = PairCounters::default();
        pair.tx.frames.add(7);
        pair.tx.dropped(DropReason::SpoofedMac, 3);
        pair.rx.copied(CopyReason::Late, 2);
        pair.kick_to_used.observe(5);
        let mut json = serde_json::to_value(&pair).unwrap();
        assert_eq!(json["tx"]["drops"]["spoofed_mac"], 3);
        // Another version lacks some counters, and has others.
        json["tx"]["drops"].as_object_mut().unwrap().remove("too_short");
        json["rx"]["drops"]["too_strange"] = 1.into();
        json["rx"].as_object_mut().unwrap().remove("bursts");
        let again: PairCounters = serde_json::from_value(json).unwrap();
        assert_eq!((again.tx.frames.get(), again.tx.drops(DropReason::SpoofedMac)), (7, 3));
        assert_eq!(again.rx.copies(CopyReason::Late), 2);
        assert_eq!(again.kick_to_used.cumulated(), pair.kick_to_used.cumulated());
    }
}
