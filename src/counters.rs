//! What a queue pair counts: plain numbers with one writer, its worker, and any number of readers.
//!
//! They are added to once per burst, without a locked instruction.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

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

/// How often values were how large: at most 1, 2, 4, … up to 2^(N-1), or larger.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    counts: [Counter; N],
    larger: Counter,
    sum: Counter,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| Counter::default());
        Histogram { counts, larger: Counter::default(), sum: Counter::default() }
    }
}

impl<const N: usize> Serialize for Histogram<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = self.counts.iter().chain([&self.larger, &self.sum]);
        serializer.collect_seq(all)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Histogram<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Of another version it may have fewer, or more.
        let mut all = Vec::<Counter>::deserialize(deserializer)?.into_iter();
        let counts = std::array::from_fn(|_| all.next().unwrap_or_default());
        let (larger, sum) = (all.next().unwrap_or_default(), all.next().unwrap_or_default());
        Ok(Histogram { counts, larger, sum })
    }
}

impl<const N: usize> Histogram<N> {
    /// Counts a value. Only the histogram's one writer may call this.
    #[inline]
    pub fn observe(&self, value: u64) {
        let place = (u64::BITS - value.saturating_sub(1).leading_zeros()) as usize;
        self.counts.get(place).unwrap_or(&self.larger).add(1);
        self.sum.add(value);
    }

    fn restore(&self, told: &Self) {
        self.counts.iter().zip(&told.counts).for_each(|(ours, theirs)| ours.restore(theirs));
        self.larger.restore(&told.larger);
        self.sum.restore(&told.sum);
    }

    /// Bounds, and how many values were not above each; infinity, with all of them, comes last.
    pub fn cumulated(&self) -> Vec<(f64, u64)> {
        let mut below = 0;
        let bounds = (0..N).map(|place| (1_u64 << place) as f64).chain([f64::INFINITY]);
        let counts = self.counts.iter().chain([&self.larger]);
        let cumulate = |(bound, count): (f64, &Counter)| {
            below += count.get();
            (bound, below)
        };
        bounds.zip(counts).map(cumulate).collect()
    }

    /// The sum of all values.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }

    /// The bound that a share of the values is not above; nothing if there are no values.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let cumulated = self.cumulated();
        let all = cumulated.last().map_or(0, |(_, all)| *all);
        let enough = |(_, below): &&(f64, u64)| *below as f64 >= share * all as f64;
        cumulated.iter().find(enough).map(|(bound, _)| *bound).filter(|_| all > 0)
    }
}

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Drop {
    /// Shorter than its headers.
    TooShort,
    /// Longer than the port's MTU allows.
    TooLong,
    /// Its virtio header contradicts the frame or the negotiated features.
    BadHeader,
    /// The guest's buffers were too small or too few for it.
    NoRoom,
    /// It needs a checksum or segmentation that the guest did not accept.
    NotAccepted,
    /// Its ring is disabled.
    Disabled,
    /// An operator has set the card's link down.
    LinkDown,
    /// The host refused it.
    HostRefused,
    /// Its source, or the sender that it names, is an Ethernet address that is not the guest's.
    SpoofedMac,
    /// Its source, or what it claims, is an IP address that is not the guest's.
    SpoofedAddress,
    /// It has a VLAN tag that is not the guest's to set.
    ForbiddenVlan,
    /// It is nothing that a guest sends: a router's, a DHCP server's, a bridge's, or unknown.
    Forbidden,
    /// The operator's filter denies it.
    Filtered,
}

impl Drop {
    /// All reasons.
    pub const ALL: [Drop; 13] = [
        Drop::TooShort,
        Drop::TooLong,
        Drop::BadHeader,
        Drop::NoRoom,
        Drop::NotAccepted,
        Drop::Disabled,
        Drop::LinkDown,
        Drop::HostRefused,
        Drop::SpoofedMac,
        Drop::SpoofedAddress,
        Drop::ForbiddenVlan,
        Drop::Forbidden,
        Drop::Filtered,
    ];

    /// The reason as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Drop::TooShort => "too_short",
            Drop::TooLong => "too_long",
            Drop::BadHeader => "bad_header",
            Drop::NoRoom => "no_room",
            Drop::NotAccepted => "not_accepted",
            Drop::Disabled => "disabled",
            Drop::LinkDown => "link_down",
            Drop::HostRefused => "host_refused",
            Drop::SpoofedMac => "spoofed_mac",
            Drop::SpoofedAddress => "spoofed_address",
            Drop::ForbiddenVlan => "forbidden_vlan",
            Drop::Forbidden => "forbidden",
            Drop::Filtered => "filtered",
        }
    }
}

/// Why a frame's payload was copied in user space, on a port that can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CopyReason {
    /// The host completes its checksum: metadata or the sum itself goes with a private copy.
    Checksum,
    /// The guest's frame lies in several pieces.
    Pieces,
    /// There are rules for the guest's frame, and it must be sent as it was judged.
    Rules,
    /// The guest's frame was cut into segments.
    Segmentation,
    /// The guest's buffer does not suit the host, which put the frame into one of ours.
    Unsuitable,
    /// The frame came before the guest's buffer, and waited for it in one of ours.
    Late,
}

impl CopyReason {
    /// All reasons.
    pub const ALL: [CopyReason; 6] = [
        CopyReason::Checksum,
        CopyReason::Pieces,
        CopyReason::Rules,
        CopyReason::Segmentation,
        CopyReason::Unsuitable,
        CopyReason::Late,
    ];

    /// The reason as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            CopyReason::Checksum => "checksum",
            CopyReason::Pieces => "pieces",
            CopyReason::Rules => "rules",
            CopyReason::Segmentation => "segmentation",
            CopyReason::Unsuitable => "unsuitable_buffer",
            CopyReason::Late => "late_buffer",
        }
    }
}

/// Why something is counted apart.
trait Reason {
    /// All reasons by their names, in the order of their numbers.
    fn names() -> Vec<&'static str>;
}

impl Reason for Drop {
    fn names() -> Vec<&'static str> {
        Drop::ALL.map(Drop::name).to_vec()
    }
}

impl Reason for CopyReason {
    fn names() -> Vec<&'static str> {
        CopyReason::ALL.map(CopyReason::name).to_vec()
    }
}

/// A counter for each reason.
#[derive(Debug)]
struct ByReason<R>(Vec<Counter>, PhantomData<R>);

impl<R: Reason> Default for ByReason<R> {
    fn default() -> Self {
        ByReason(R::names().iter().map(|_| Counter::default()).collect(), PhantomData)
    }
}

impl<R> ByReason<R> {
    fn restore(&self, told: &Self) {
        self.0.iter().zip(&told.0).for_each(|(ours, theirs)| ours.restore(theirs));
    }
}

/// By name: another version may have other reasons.
impl<R: Reason> Serialize for ByReason<R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(R::names().into_iter().zip(&self.0))
    }
}

impl<'de, R: Reason> Deserialize<'de> for ByReason<R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut named = BTreeMap::<String, Counter>::deserialize(deserializer)?;
        let counts = R::names().into_iter().map(|name| named.remove(name).unwrap_or_default());
        Ok(ByReason(counts.collect(), PhantomData))
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
    drops: ByReason<Drop>,
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
    pub fn dropped(&self, reason: Drop, frames: u64) {
        self.drops.0[reason as usize].add(frames);
    }

    /// Counts frames whose payload was copied.
    pub fn copied(&self, reason: CopyReason, frames: u64) {
        self.copies.0[reason as usize].add(frames);
    }

    /// Frames whose payload was copied for `reason`.
    pub fn copies(&self, reason: CopyReason) -> u64 {
        self.copies.0[reason as usize].get()
    }

    /// Frames dropped for `reason`.
    pub fn drops(&self, reason: Drop) -> u64 {
        self.drops.0[reason as usize].get()
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
            (&self.looks, &told.looks),
            (&self.replies, &told.replies),
            (&self.naps, &told.naps),
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
        for reason in Drop::ALL {
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
    /// Times that the worker looked on for a guest's answer to what it was given.
    pub looks: Counter,
    /// Times that it came meanwhile.
    pub replies: Counter,
    /// Times that the worker slept a little without being woken, since frames came closely.
    pub naps: Counter,
    /// Times that the worker went to sleep.
    pub sleeps: Counter,
    /// Times that rx had to wait for the guest to provide buffers.
    pub starved: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_counted_below_the_next_power_of_two() {
        let histogram = Histogram::<3>::default();
        assert_eq!(histogram.quantile(0.5), None);
        [0, 1, 2, 3, 4, 5, 1000].iter().for_each(|value| histogram.observe(*value));
        let expected = [(1.0, 2), (2.0, 3), (4.0, 5), (f64::INFINITY, 7)];
        assert_eq!(histogram.cumulated(), expected);
        assert_eq!(histogram.sum(), 1015);
        assert_eq!(histogram.quantile(0.5), Some(4.0));
        assert_eq!(histogram.quantile(1.0), Some(f64::INFINITY));
    }

    #[test]
    fn restored_counters_never_go_back_or_overflow() {
        let (pair, told) = (PairCounters::default(), PairCounters::default());
        pair.tx.frames.add(20);
        for value in [5, u64::MAX - 24, u64::MAX] {
            let before = pair.tx.frames.get();
            told.tx.frames.0.store(value, Ordering::Relaxed);
            pair.restore(&told);
            assert!(pair.tx.frames.get() >= before && pair.tx.frames.get() <= MAX_RESTORED);
        }
        told.kick_to_used.counts.iter().for_each(|it| it.0.store(u64::MAX, Ordering::Relaxed));
        pair.restore(&told);
        assert_eq!(pair.kick_to_used.cumulated().last().unwrap().1, 16 * MAX_RESTORED);
    }

    #[test]
    fn counters_are_handed_over_by_name() {
        let pair = PairCounters::default();
        pair.tx.frames.add(7);
        pair.tx.dropped(Drop::SpoofedMac, 3);
        pair.rx.copied(CopyReason::Late, 2);
        pair.kick_to_used.observe(5);
        let mut told = serde_json::to_value(&pair).unwrap();
        assert_eq!(told["tx"]["drops"]["spoofed_mac"], 3);
        // What another version has not, or has besides.
        told["tx"]["drops"].as_object_mut().unwrap().remove("too_short");
        told["rx"]["drops"]["too_strange"] = 1.into();
        told["rx"].as_object_mut().unwrap().remove("bursts");
        let again: PairCounters = serde_json::from_value(told).unwrap();
        assert_eq!((again.tx.frames.get(), again.tx.drops(Drop::SpoofedMac)), (7, 3));
        assert_eq!(again.rx.copies(CopyReason::Late), 2);
        assert_eq!(again.kick_to_used.cumulated(), pair.kick_to_used.cumulated());
    }
}
