//! Buffers that the kernel has, in the order of the fill ring.

use super::{MAX_BUFFERS, RX_SLOTS};

/// Places for buffers: a power of two.
const PLACES: usize = (MAX_BUFFERS + RX_SLOTS).next_power_of_two();

/// Where a posted address leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A buffer of the guest's: the position of its chain.
    Guest(u16),
    /// A slot of the bounce area.
    Slot(u16),
}

impl Target {
    /// As a number: positions are as they are.
    #[inline(always)]
    fn tag(self) -> u32 {
        match self {
            Target::Guest(position) => position.into(),
            Target::Slot(slot) => 1 << 16 | u32::from(slot),
        }
    }
}

/// A buffer that the kernel has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    address: u64,
    /// The tag of its target.
    tag: u32,
    /// Length in bytes of the frame that has arrived in it, with what the program put before it, and waits
    /// for older ones; 0 if there is none.
    length: u32,
}

impl Posted {
    pub(super) fn target(&self) -> Target {
        let number = self.tag as u16;
        if self.tag >> 16 == 0 { Target::Guest(number) } else { Target::Slot(number) }
    }

    pub(super) fn is_slot(&self) -> bool {
        self.tag >> 16 != 0
    }

    /// Length in bytes of the frame that waits in it.
    pub(super) fn filled(&self) -> Option<u16> {
        (self.length > 0).then_some(self.length as u16)
    }

    /// Whether the kernel has this address, and has put nothing there.
    pub(super) fn is_at(&self, address: u64) -> bool {
        self.address == address && self.length == 0
    }

    /// Notes the frame that waits in it, which is not empty.
    pub(super) fn fill(&mut self, length: u16) {
        debug_assert!(length > 0);
        self.length = length.into();
    }
}

/// All of them, oldest first.
#[derive(Debug)]
pub(super) struct PostedRing {
    places: Box<[Posted; PLACES]>,
    oldest: usize,
    count: usize,
}

impl PostedRing {
    pub(super) fn new() -> Self {
        let none = Posted { address: 0, tag: 0, length: 0 };
        PostedRing { places: Box::new([none; PLACES]), oldest: 0, count: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
    }

    /// Adds the youngest. The fill ring has no more places than this.
    pub(super) fn push(&mut self, address: u64, target: Target) {
        self.batch().push(address, target);
    }

    /// Adds many, the youngest last.
    #[inline(always)]
    pub(super) fn batch(&mut self) -> Batch<'_> {
        Batch { next: self.oldest + self.count, ring: self }
    }

    /// Removes the oldest if it is the guest's buffer at `position` and has this address.
    #[inline(always)]
    pub(super) fn pop_guest(&mut self, position: u16, address: u64) -> bool {
        let Posted { address: oldest, tag, .. } = self.places[self.oldest % PLACES];
        let is_it = self.count > 0 && oldest == address && tag == u32::from(position);
        if is_it {
            self.oldest = self.oldest.wrapping_add(1);
            self.count -= 1;
        }
        is_it
    }

    /// Removes the oldest if it meets a condition.
    pub(super) fn pop_if(&mut self, condition: impl FnOnce(&Posted) -> bool) -> Option<Posted> {
        let oldest = self.places[self.oldest % PLACES];
        let found = (self.count > 0 && condition(&oldest)).then_some(oldest)?;
        self.oldest = self.oldest.wrapping_add(1);
        self.count -= 1;
        Some(found)
    }

    /// The buffer that has so many older ones.
    pub(super) fn get_mut(&mut self, age: usize) -> &mut Posted {
        &mut self.places[(self.oldest + age) % PLACES]
    }

    pub(super) fn swap(&mut self, one: usize, other: usize) {
        self.places.swap((self.oldest + one) % PLACES, (self.oldest + other) % PLACES);
    }

    /// Oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Posted> {
        (0..self.count).map(|age| &self.places[(self.oldest + age) % PLACES])
    }
}

/// Buffers that are being added.
pub(super) struct Batch<'r> {
    ring: &'r mut PostedRing,
    next: usize,
}

impl Batch<'_> {
    /// Adds the youngest. The fill ring has no more places than this.
    #[inline(always)]
    pub(super) fn push(&mut self, address: u64, target: Target) {
        self.ring.places[self.next % PLACES] = Posted { address, tag: target.tag(), length: 0 };
        self.next += 1;
    }
}

impl Drop for Batch<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.ring.count = self.next - self.ring.oldest;
    }
}
