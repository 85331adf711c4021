//! The dirty log: a bitmap that the frontend shares while it migrates the guest, with one bit for each 4 KiB
//! of guest memory that the daemon has written (vhost-user specification, "Migration").
//!
//! Invariant: the daemon marks a page after each write, and before it tells the frontend that no more writes
//! follow. The frontend clears bits and copies pages meanwhile. If a page were marked first, the frontend
//! could copy it between mark and write, and the write would be lost.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::memory::{Mapping, MemoryError};
use super::quota::Allowance;

/// Bytes of guest memory per bit, for any page size.
const PAGE: u64 = 4096;

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Length of the log in bytes.
    length: u64,
}

impl DirtyLog {
    /// Maps `length` bytes of a file, from `offset`.
    ///
    /// # Errors
    /// A [`MemoryError`] if the file is not shared memory or too short, or the port's limit is reached.
    pub fn map(
        file: File,
        offset: u64,
        length: u64,
        allowance: &Allowance,
    ) -> Result<Self, MemoryError> {
        Ok(DirtyLog { mapping: Mapping::new(file, offset, length, allowance)?, length })
    }

    /// Returns the first guest-physical address without a bit.
    pub fn end(&self) -> u64 {
        self.length.saturating_mul(8 * PAGE)
    }

    /// Returns the mapped bytes, including those that page alignment adds.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapping.bytes()
    }

    /// Returns the length of the log in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the file, and the offset in bytes at which the log starts.
    pub fn source(&self) -> (&Arc<File>, u64) {
        self.mapping.source()
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Marks the pages of `length` bytes from a guest-physical address, except pages without a bit.
    pub(super) fn mark(&self, address: u64, length: u64) {
        let Some(last) = length.checked_sub(1).and_then(|more| address.checked_add(more)) else {
            return;
        };
        for page in address / PAGE..=last / PAGE {
            if page / 8 >= self.length {
                return;
            }
            // SAFETY: `map` has mapped `length` bytes, and the check above keeps the byte among them. The
            // frontend may change it at the same time: both sides use atomic operations.
            let byte = unsafe {
                AtomicU8::from_ptr(self.mapping.start().add((page / 8) as usize).as_ptr())
            };
            // Release: a frontend that sees the bit sees the write.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::MemoryQuota;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    #[test]
    fn mark_sets_the_bits_of_pages_within_the_log() {
        // SAFETY: a fresh descriptor, owned by the File.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"log".as_ptr(), 0)) };
        file.set_len(0x2000).unwrap();
        let allowance = Allowance::new(&Arc::<MemoryQuota>::default(), 0);
        let other = file.try_clone().unwrap();
        let log = DirtyLog::map(file, 0x800, 4, &allowance).unwrap();
        assert_eq!(log.end(), 32 * 4096);
        log.mark(0, 1);
        log.mark(4095, 2);
        log.mark(9 * 4096, 3 * 4096);
        log.mark(31 * 4096 + 4095, 10_000);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX, u64::MAX);
        log.mark(5, 0);
        let mut bytes = [0; 8];
        other.read_exact_at(&mut bytes, 0x7fe).unwrap();
        assert_eq!(bytes, [0, 0, 0b11, 0b1110, 0, 0x80, 0, 0]);
        assert!(DirtyLog::map(other.try_clone().unwrap(), 0x1fff, 2, &allowance).is_err());
        assert!(DirtyLog::map(other, 0, 0, &allowance).is_err());
    }
}
