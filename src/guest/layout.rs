//! Addresses and size of a ring, and their check.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::{Queue, QueueState};
use vm_memory::GuestAddress;

use super::fault::Fault;
use super::memory::GuestMemory;

/// Largest number of descriptors of a split virtqueue (virtio 1.3, section 2.7).
pub const MAX_SIZE: u16 = 32768;

/// A ring's size, and the guest addresses of its three parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// Address of the descriptor table, with 16 bytes for each descriptor.
    pub descriptors: GuestAddress,
    /// Address of the available ring (driver area).
    pub avail: GuestAddress,
    /// Address of the used ring (device area).
    pub used: GuestAddress,
}

impl RingLayout {
    /// Checks size and alignment, by the rules of `virtio-queue`, and that all parts lie in `memory`.
    ///
    /// # Errors
    /// A [`Fault`] that names the broken rule.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), Fault> {
        self.resolve(memory).map(|_| ())
    }

    /// Reads the used index in guest memory. Callers must be inside [`contained`](super::contained).
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn used_index(&self, memory: &GuestMemory) -> Result<u16, Fault> {
        let [.., used] = self.resolve(memory)?;
        // SAFETY: `resolve` has checked the used ring's length and alignment. The ring is mapped as long as
        // `memory` lives, which is borrowed here.
        let index = unsafe { AtomicU16::from_ptr(used.add(2).cast().as_ptr()) };
        Ok(u16::from_le(index.load(Ordering::Relaxed)))
    }

    /// Returns where descriptor table, available ring and used ring are mapped; fails as [`check`](Self::check).
    /// The pointers are valid as long as `memory` lives, and aligned to 8, 2 and 4 bytes.
    pub(super) fn resolve(&self, memory: &GuestMemory) -> Result<[NonNull<u8>; 3], Fault> {
        let state = QueueState {
            max_size: MAX_SIZE,
            size: self.size,
            ready: true,
            desc_table: self.descriptors.0,
            avail_ring: self.avail.0,
            used_ring: self.used.0,
            ..QueueState::default()
        };
        Queue::try_from(state).map_err(|error| Fault::Layout(error.to_string()))?;
        let size = u64::from(self.size);
        // An aligned guest address can be misaligned here: a region may start at any offset of its file.
        let part = |address, length, name, alignment| {
            let start = memory.resolve(address, length).ok_or(Fault::RingUnmapped(name))?;
            if !start.addr().get().is_multiple_of(alignment) {
                return Err(Fault::Layout(format!("the {name} is not aligned in its file")));
            }
            Ok(start)
        };
        Ok([
            part(self.descriptors, 16 * size, "descriptor table", 8)?,
            part(self.avail, 6 + 2 * size, "available ring", 2)?,
            part(self.used, 6 + 8 * size, "used ring", 4)?,
        ])
    }
}
