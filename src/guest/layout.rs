//! Where a ring lies, checked before it is used.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::{Queue, QueueState};
use vm_memory::GuestAddress;

use super::fault::Fault;
use super::memory::GuestMemory;

/// Largest number of descriptors of a split virtqueue (virtio 1.3, section 2.7).
pub const MAX_SIZE: u16 = 32768;

/// Where a ring lies in guest memory, and how big it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// The descriptor table, 16 bytes each.
    pub descriptors: GuestAddress,
    /// The available ring (the driver area).
    pub avail: GuestAddress,
    /// The used ring (the device area).
    pub used: GuestAddress,
}

impl RingLayout {
    /// Checks size and alignment, by the rules of `virtio-queue`, and that all parts lie in
    /// `memory`.
    ///
    /// # Errors
    /// A [`Fault`] that names what is wrong.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), Fault> {
        self.resolve(memory).map(|_| ())
    }

    /// The used index in guest memory. Callers are inside [`contained`](super::contained).
    ///
    /// # Errors
    /// A [`Fault`] that names what is wrong with the layout.
    pub fn used_index(&self, memory: &GuestMemory) -> Result<u16, Fault> {
        let [.., used] = self.resolve(memory)?;
        // SAFETY: `resolve` vouches for the used ring, which is mapped as long as `memory` lives, and for
        // its alignment.
        let index = unsafe { AtomicU16::from_ptr(used.add(2).cast().as_ptr()) };
        Ok(u16::from_le(index.load(Ordering::Relaxed)))
    }

    /// Where descriptor table, avail and used ring are mapped.
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
        // A region mapped at an odd offset of its file can be out of step with the guest's
        // addresses.
        let part = |address, length, name, alignment| {
            let start = memory.resolve(address, length).ok_or(Fault::RingUnmapped(name))?;
            if !start.addr().get().is_multiple_of(alignment) {
                return Err(Fault::Layout(format!("its {name} is not aligned in its file")));
            }
            Ok(start)
        };
        Ok([
            part(self.descriptors, 16 * size, "descriptor table", 8)?,
            part(self.avail, 6 + 2 * size, "avail ring", 2)?,
            part(self.used, 6 + 8 * size, "used ring", 4)?,
        ])
    }
}
