//! Buffers that the kernel has, in the order of the fill ring.

use super::{MAX_BUFFERS, RX_BUFFERS};

/// Capacity of a [`PostedRing`]: a power of two.
const PLACES: usize = (MAX_BUFFERS + RX_BUFFERS).next_power_of_two();

/// Owner of a posted address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A guest buffer: the position of its chain.
    Guest(u16),
    /// A bounce buffer: its number.
    Bounce(u16),
}

impl Target {
    /// Returns the target as a number. The tag of a guest buffer is its position.
    #[inline(always)]
    fn tag(self) -> u32 {
        match self {
            Target::Guest(position) => position.into(),
            Target::Bounce(buffer) => 1 << 16 | u32::from(buffer),
        }
    }
}

/// A buffer that the kernel has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    address: u64,
    /// Tag of the target.
    tag: u32,
    /// Length in bytes of the frame that waits in the buffer, with the header that the program has written; 0
    /// if no frame has arrived.
    length: u32,
}

impl Posted {
    pub(super) fn target(&self) -> Target {
        let number = self.tag as u16;
        if self.tag >> 16 == 0 { Target::Guest(number) } else { Target::Bounce(number) }
    }

    /// Returns true for a bounce buffer.
    pub(super) fn is_bounce(&self) -> bool {
        self.tag >> 16 != 0
    }

    /// Returns the length in bytes of the frame that waits in the buffer.
    pub(super) fn filled(&self) -> Option<u16> {
        (self.length > 0).then_some(self.length as u16)
    }

    /// Returns true if the buffer has this address and no frame.
    pub(super) fn is_at(&self, address: u64) -> bool {
        self.address == address && self.length == 0
    }

    /// Records a frame that waits in the buffer. `length` is at least 1.
    pub(super) fn fill(&mut self, length: u16) {
        debug_assert!(length > 0);
        self.length = length.into();
    }
}

/// All posted buffers, oldest first.
#[derive(Debug)]
pub(super) struct PostedRing {
    places: Box<[Posted; PLACES]>,
    /// Number of the oldest buffer; its place is that number modulo [`PLACES`].
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

    /// Adds the youngest buffer. There is room: the fill ring is no larger than this ring.
    pub(super) fn push(&mut self, address: u64, target: Target) {
        self.batch().push(address, target);
    }

    /// Begins to add several buffers, the youngest last.
    #[inline(always)]
    pub(super) fn batch(&mut self) -> Batch<'_> {
        Batch { next: self.oldest + self.count, ring: self }
    }

    /// Removes the oldest buffer if it is the guest buffer at `position` with this address. Returns true if
    /// so.
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

    /// Removes the oldest buffer if it meets a condition.
    pub(super) fn pop_if(&mut self, condition: impl FnOnce(&Posted) -> bool) -> Option<Posted> {
        let oldest = self.places[self.oldest % PLACES];
        let found = (self.count > 0 && condition(&oldest)).then_some(oldest)?;
        self.oldest = self.oldest.wrapping_add(1);
        self.count -= 1;
        Some(found)
    }

    /// Returns the buffer that has `age` older ones.
    pub(super) fn get_mut(&mut self, age: usize) -> &mut Posted {
        &mut self.places[(self.oldest + age) % PLACES]
    }

    pub(super) fn swap(&mut self, one: usize, other: usize) {
        self.places.swap((self.oldest + one) % PLACES, (self.oldest + other) % PLACES);
    }

    /// Iterates over the buffers, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Posted> {
        (0..self.count).map(|age| &self.places[(self.oldest + age) % PLACES])
    }
}

/// Addition of several buffers, whose number is stored once, on drop.
pub(super) struct Batch<'r> {
    ring: &'r mut PostedRing,
    next: usize,
}

impl Batch<'_> {
    /// Adds the youngest buffer. There is room: the fill ring is no larger than this ring.
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
