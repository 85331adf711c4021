//! Rate limits of a port: for each direction a token bucket of bits and one of packets.
//!
//! A bucket is represented by the time at which it will be full again (the virtual scheduling algorithm of ITU-T
//! I.371). A frame passes unless that time is further away than an empty bucket takes to fill. The frame then
//! postpones that time by its size divided by the rate. So a frame larger than the bucket's content passes too, and
//! the next frame waits longer: over time, the rate is kept.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::limit::{Limit, Rate};

/// Units of time in a nanosecond. 64 bits of such units last for nine years.
const UNITS: u64 = 64;

/// The limiters of both directions.
#[derive(Debug)]
pub struct Limits {
    /// Limiter of frames to the guest.
    pub rx: Limiter,
    /// Limiter of frames from the guest.
    pub tx: Limiter,
}

/// A token bucket. Its content can be negative after a large frame.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Units of time for 1000 bytes, or 1000 packets.
    each: u64,
    /// Units of time in which an empty bucket fills.
    depth: u64,
    /// Time at which the bucket will be full.
    full_at: u64,
}

impl Bucket {
    /// Creates a full bucket. `scale` is 8 for bytes at a rate in bits, and 1 for packets.
    fn new(rate: Rate, scale: u64, now: u64) -> Self {
        const SECOND: u64 = 1_000_000_000 * UNITS;
        let each = (1000 * scale).saturating_mul(SECOND) / rate.per_second;
        let depth = u128::from(rate.burst) * u128::from(scale) * u128::from(SECOND)
            / u128::from(rate.per_second);
        Bucket { each, depth: depth.min(u128::from(u64::MAX >> 2)) as u64, full_at: now }
    }

    /// Returns the units of time until a frame may pass.
    fn wait(&self, now: u64) -> u64 {
        self.full_at.saturating_sub(now.saturating_add(self.depth))
    }

    /// Returns the bytes or packets in the bucket.
    fn left(&self, now: u64) -> u64 {
        let time = now.saturating_add(self.depth).saturating_sub(self.full_at.max(now));
        time.saturating_mul(1000) / self.each.max(1)
    }

    fn charge(&mut self, amount: u64, now: u64) {
        let takes = u128::from(amount) * u128::from(self.each) / 1000;
        let takes = u64::try_from(takes).unwrap_or(u64::MAX);
        self.full_at = self.full_at.max(now).saturating_add(takes);
    }
}

#[derive(Debug, Default)]
struct Buckets {
    limit: Limit,
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

impl Buckets {
    fn wait(&self, now: u64) -> u64 {
        let both = [&self.bytes, &self.packets];
        both.into_iter().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or(0)
    }

    fn charge(&mut self, packets: u64, bytes: u64, now: u64) {
        for (bucket, amount) in [(&mut self.bytes, bytes), (&mut self.packets, packets)] {
            if let Some(bucket) = bucket {
                bucket.charge(amount, now);
            }
        }
    }
}

/// Nanoseconds until each bucket is full, for a take-over by another daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    bytes: u64,
    packets: u64,
}

/// The buckets of one direction, which all queue pairs of a port share.
#[derive(Debug)]
pub struct Limiter {
    /// True if a limit is set.
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    epoch: Instant,
}

impl Limiter {
    /// Creates a limiter with full buckets.
    pub fn new(limit: &Limit) -> Self {
        let limiter = Limiter {
            limited: AtomicBool::new(false),
            buckets: Mutex::default(),
            epoch: Instant::now(),
        };
        limiter.set(limit);
        limiter
    }

    /// Replaces the limit. The buckets are full then.
    pub fn set(&self, limit: &Limit) {
        let now = self.now();
        let bucket = |rate: Option<Rate>, scale| rate.map(|rate| Bucket::new(rate, scale, now));
        let (bytes, packets) = (bucket(limit.bits, 8), bucket(limit.packets, 1));
        *self.lock() = Buckets { limit: *limit, bytes, packets };
        self.limited.store(*limit != Limit::default(), Ordering::Relaxed);
    }

    /// Returns the limit in force.
    pub fn limit(&self) -> Limit {
        self.lock().limit
    }

    /// Returns true if a limit is set. If not, callers need not charge frames.
    #[inline]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Returns the number of frames that may pass now, and charges these frames. An item is a frame's number of
    /// packets and of bytes.
    pub fn admit(&self, frames: impl Iterator<Item = (u64, u64)>) -> usize {
        let now = self.now();
        let mut buckets = self.lock();
        let mut admitted = 0;
        for (packets, bytes) in frames {
            if buckets.wait(now) > 0 {
                break;
            }
            buckets.charge(packets, bytes, now);
            admitted += 1;
        }
        admitted
    }

    /// Returns the number of frames of the largest size that may pass now. The caller must [`charge`](Self::charge)
    /// the frames when their lengths are known.
    pub fn allowance(&self) -> usize {
        const LARGEST: u64 = 64 << 10;
        const SEGMENTS: u64 = 45;
        let now = self.now();
        let buckets = self.lock();
        let left = |bucket: &Option<Bucket>| bucket.map_or(u64::MAX, |bucket| bucket.left(now));
        let (bytes, packets) = (left(&buckets.bytes), left(&buckets.packets));
        if buckets.wait(now) > 0 {
            return 0;
        }
        (bytes / LARGEST).min(packets / SEGMENTS).max(1) as usize
    }

    /// Charges packets and bytes that have passed already.
    pub fn charge(&self, packets: u64, bytes: u64) {
        let now = self.now();
        self.lock().charge(packets, bytes, now);
    }

    /// Returns the buckets' debt.
    pub fn debt(&self) -> Debt {
        let now = self.now();
        let buckets = self.lock();
        let owed = |bucket: &Option<Bucket>| {
            bucket.map_or(0, |bucket| bucket.full_at.saturating_sub(now) / UNITS)
        };
        Debt { bytes: owed(&buckets.bytes), packets: owed(&buckets.packets) }
    }

    /// Takes over the debt of a predecessor's limiter, at most one minute of it.
    pub fn owe(&self, debt: &Debt) {
        const MOST: u64 = 60_000_000_000;
        let now = self.now();
        let mut buckets = self.lock();
        let Buckets { bytes, packets, .. } = &mut *buckets;
        for (bucket, owed) in [(bytes, debt.bytes), (packets, debt.packets)] {
            if let Some(bucket) = bucket {
                bucket.full_at = bucket.full_at.max(now + owed.min(MOST) * UNITS);
            }
        }
    }

    /// Returns the time until a frame may pass.
    pub fn wait(&self) -> Duration {
        Duration::from_nanos(self.lock().wait(self.now()).div_ceil(UNITS))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Buckets> {
        // No thread panics while it holds the lock.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        (self.epoch.elapsed().as_nanos() as u64).saturating_mul(UNITS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(text: &str) -> Limit {
        text.parse().unwrap()
    }

    /// Simulates attempts each `step` during `time`. Returns the number of frames of `length` bytes that pass, and
    /// the longest run of frames.
    fn pass(limit: &Limit, length: u64, time: Duration, step: Duration) -> (u64, u64) {
        let mut buckets = Buckets {
            limit: *limit,
            bytes: limit.bits.map(|rate| Bucket::new(rate, 8, 0)),
            packets: limit.packets.map(|rate| Bucket::new(rate, 1, 0)),
        };
        let (mut passed, mut longest) = (0, 0);
        let mut now = Duration::ZERO;
        while now < time {
            let units = now.as_nanos() as u64 * UNITS;
            let mut run = 0;
            while buckets.wait(units) == 0 {
                buckets.charge(1, length, units);
                run += 1;
            }
            passed += run;
            longest = run.max(longest);
            now += step;
        }
        (passed, longest)
    }

    #[test]
    fn rate_is_kept_for_all_frame_sizes() {
        for (rate, length, seconds) in [
            ("10mbit", 60, 1.0),
            ("10mbit", 65_000, 9.0),
            ("1gbit", 1514, 1.0),
            ("100gbit", 60, 0.01),
        ] {
            let limit = limit(rate);
            let (bits, burst) = limit.bits.map(|rate| (rate.per_second, rate.burst)).unwrap();
            let time = Duration::from_secs_f64(seconds);
            let (passed, _) = pass(&limit, length, time, Duration::from_micros(50));
            let expected = ((bits as f64 / 8.0 * seconds) as u64 + burst) / length;
            let tolerance = expected / 200 + 2;
            assert!(passed.abs_diff(expected) <= tolerance, "{rate}, {length}: {passed}");
        }
        let (passed, longest) = pass(
            &limit("10kpps,packet-burst=20"),
            64,
            Duration::from_secs(1),
            Duration::from_micros(7),
        );
        assert!(passed.abs_diff(10_020) <= 2, "{passed}");
        assert_eq!(longest, 21);
    }

    #[test]
    fn frame_larger_than_the_bucket_passes_and_is_charged() {
        let mut bucket = Bucket::new(Rate { per_second: 8000, burst: 100 }, 8, 0);
        assert_eq!(bucket.wait(0), 0);
        bucket.charge(1000, 0);
        // 1000 bytes at 1000 bytes per second, with a burst of 100 bytes.
        assert_eq!(bucket.wait(0), 900_000_000 * UNITS);
    }

    #[test]
    fn limit_takes_effect_at_once() {
        let limiter = Limiter::new(&Limit::default());
        assert!(!limiter.is_limited());
        assert_eq!(limiter.admit(std::iter::repeat_n((1, 1500), 1000)), 1000);
        limiter.set(&limit("1pps,packet-burst=3"));
        assert!(limiter.is_limited());
        assert_eq!(limiter.admit(std::iter::repeat_n((1, 1500), 1000)), 4);
        let wait = limiter.wait();
        assert!(!wait.is_zero() && wait <= Duration::from_secs(1), "{wait:?}");
        limiter.set(&Limit::default());
        assert_eq!(limiter.wait(), Duration::ZERO);
    }
}
