//! Limits on mapped bytes: one per port, and one for the process.
//!
//! Invariant: every mapping of a VMM's file holds a [`Reservation`] for its whole length, taken before the
//! mapping is made. So no VMM can exhaust the address space of the process (47 bits, 128 TiB). A failed
//! allocation would end all ports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::MemoryError;

/// Limit on the bytes that all ports together map: half of the address space of a process on x86-64.
const PROCESS_LIMIT: u64 = 1 << 46;

/// Bytes reserved in this process.
static PROCESS: AtomicU64 = AtomicU64::new(0);

/// A port's limit on mapped bytes: guest memory regions, dirty log and inflight buffer.
#[derive(Debug)]
pub struct MemoryQuota {
    limit: u64,
    mapped: AtomicU64,
    pinned: AtomicU64,
}

impl Default for MemoryQuota {
    /// Sets only the process limit.
    fn default() -> Self {
        MemoryQuota::new(PROCESS_LIMIT)
    }
}

impl MemoryQuota {
    /// Creates a quota of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        MemoryQuota { limit, mapped: AtomicU64::new(0), pinned: AtomicU64::new(0) }
    }

    /// Returns the limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns the bytes mapped now.
    pub fn mapped(&self) -> u64 {
        self.mapped.load(Ordering::Relaxed)
    }

    /// Returns the bytes that the kernel pins for AF_XDP sockets now.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }
}

/// A count of pinned bytes, which the quota includes until the value is dropped.
#[derive(Debug)]
pub struct Pinned {
    quota: Arc<MemoryQuota>,
    bytes: u64,
}

impl Pinned {
    /// Adds `bytes` to the pinned bytes of `quota`.
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

/// A quota, and the bytes of mappings that are unmapped as soon as the new mappings are in force.
#[derive(Debug, Clone)]
pub struct Allowance {
    quota: Arc<MemoryQuota>,
    replaced: u64,
}

impl Allowance {
    /// Charges mappings to `quota` as if `replaced` bytes were unmapped already. While a memory table is
    /// replaced, a port can therefore have twice its limit mapped.
    pub fn new(quota: &Arc<MemoryQuota>, replaced: u64) -> Self {
        Allowance { quota: quota.clone(), replaced }
    }

    /// Reserves `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::OverLimit`] if the port would exceed its limit, [`MemoryError::ProcessFull`] if all ports
    /// together would.
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

/// Adds `bytes` to `number`, unless the sum would exceed `most`.
fn add(number: &AtomicU64, bytes: u64, most: u64) -> Option<u64> {
    let sum = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= most);
    number.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum).ok()
}

/// Reserved bytes, which are released when the value is dropped.
#[derive(Debug)]
pub struct Reservation {
    bytes: u64,
    quota: Option<Arc<MemoryQuota>>,
}

impl Reservation {
    /// Reserves bytes of the process that count towards no port's quota.
    ///
    /// # Errors
    /// [`MemoryError::ProcessFull`] if all ports together would exceed the process limit.
    pub fn of_process(bytes: u64) -> Result<Self, MemoryError> {
        add(&PROCESS, bytes, PROCESS_LIMIT).ok_or(MemoryError::ProcessFull { bytes })?;
        Ok(Reservation { bytes, quota: None })
    }

    /// Returns the number of reserved bytes.
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
