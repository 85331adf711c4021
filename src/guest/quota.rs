//! Limits on mapped bytes: one per port, and one for the process.
//!
//! Invariant: every mapping of a VMM's file holds a [`Reservation`] for its whole length, taken before
//! the mapping is made. So the address space of the process, 128 TiB with 47 bits, cannot run out: an
//! allocation that fails would end all ports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::MemoryError;

/// Bytes that all ports together can map: half of the address space of a process on x86-64.
const PROCESS_LIMIT: u64 = 1 << 46;

static PROCESS: AtomicU64 = AtomicU64::new(0);

/// A port's limit on mapped bytes: guest regions, dirty log and inflight buffer.
#[derive(Debug)]
pub struct MemoryQuota {
    limit: u64,
    mapped: AtomicU64,
    pinned: AtomicU64,
}

impl Default for MemoryQuota {
    /// The process limit only.
    fn default() -> Self {
        MemoryQuota::new(PROCESS_LIMIT)
    }
}

impl MemoryQuota {
    /// A limit in bytes.
    pub fn new(limit: u64) -> Self {
        MemoryQuota { limit, mapped: AtomicU64::new(0), pinned: AtomicU64::new(0) }
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes mapped now.
    pub fn mapped(&self) -> u64 {
        self.mapped.load(Ordering::Relaxed)
    }

    /// Bytes that the kernel keeps in memory for AF_XDP sockets.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }
}

/// Bytes that are counted as pinned as long as the value lives.
#[derive(Debug)]
pub struct Pinned {
    quota: Arc<MemoryQuota>,
    bytes: u64,
}

impl Pinned {
    /// Counts them.
    pub fn new(quota: &Arc<MemoryQuota>, bytes: u64) -> Self {
        quota.pinned.fetch_add(bytes, Ordering::Relaxed);
        Pinned { quota: quota.clone(), bytes }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.quota.pinned.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A quota, and the bytes of a mapping that goes as soon as the new mappings are in force.
#[derive(Debug, Clone)]
pub struct Allowance {
    quota: Arc<MemoryQuota>,
    replaced: u64,
}

impl Allowance {
    /// Charges mappings to `quota` as if `replaced` bytes were unmapped already. While a table is
    /// replaced a port can therefore have twice its limit mapped.
    pub fn new(quota: &Arc<MemoryQuota>, replaced: u64) -> Self {
        Allowance { quota: quota.clone(), replaced }
    }

    /// Reserves `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::OverLimit`] or [`MemoryError::ProcessFull`].
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, MemoryError> {
        let MemoryQuota { limit, mapped, .. } = &*self.quota;
        let most = limit.saturating_add(self.replaced);
        add(mapped, bytes, most).ok_or(MemoryError::OverLimit { bytes, limit: *limit })?;
        let mut reservation = Reservation::of_process(bytes).inspect_err(|_| {
            mapped.fetch_sub(bytes, Ordering::Relaxed);
        })?;
        reservation.quota = Some(self.quota.clone());
        Ok(reservation)
    }
}

/// Adds to a number that must not exceed `most`.
fn add(number: &AtomicU64, bytes: u64, most: u64) -> Option<u64> {
    let sum = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= most);
    number.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum).ok()
}

/// Reserved bytes, which are free again when the value is dropped.
#[derive(Debug)]
pub struct Reservation {
    bytes: u64,
    quota: Option<Arc<MemoryQuota>>,
}

impl Reservation {
    /// Reserves bytes of the process that no port's quota counts.
    ///
    /// # Errors
    /// [`MemoryError::ProcessFull`].
    pub fn of_process(bytes: u64) -> Result<Self, MemoryError> {
        add(&PROCESS, bytes, PROCESS_LIMIT).ok_or(MemoryError::ProcessFull { bytes })?;
        Ok(Reservation { bytes, quota: None })
    }

    /// The number of bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        PROCESS.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(quota) = &self.quota {
            quota.mapped.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quota_counts_until_reservations_are_dropped() {
        let quota = Arc::new(MemoryQuota::new(100));
        let first = Allowance::new(&quota, 0).reserve(60).unwrap();
        let refused = Allowance::new(&quota, 0).reserve(41).unwrap_err();
        assert!(matches!(refused, MemoryError::OverLimit { bytes: 41, limit: 100 }));
        let next = Allowance::new(&quota, first.bytes()).reserve(100).unwrap();
        assert_eq!(quota.mapped(), 160);
        drop(first);
        assert!(Allowance::new(&quota, 0).reserve(1).is_err());
        drop(next);
        assert_eq!(quota.mapped(), 0);
        assert!(Allowance::new(&quota, 0).reserve(u64::MAX).is_err());
    }

    #[test]
    fn process_limit_holds_without_a_port_limit() {
        let quota = Arc::new(MemoryQuota::new(u64::MAX));
        let refused = Allowance::new(&quota, 0).reserve(PROCESS_LIMIT + 1).unwrap_err();
        assert!(matches!(refused, MemoryError::ProcessFull { .. }));
        assert_eq!(quota.mapped(), 0);
    }
}
