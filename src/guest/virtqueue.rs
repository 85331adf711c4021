//! The device's end of one split virtqueue (virtio 1.3, section 2.7).
//!
//! Ring addresses are resolved to pointers once, when the ring starts; from then on the verbs are
//! *pop*, *retire* (or *take back*), *publish* and *arm*.
//!
//! Invariant: chains are retired in the order in which they were popped. So at any time the used
//! index is the first chain that has not been finished, and whoever starts the ring next,
//! this daemon or its successor, resumes there without asking anybody.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use virtio_queue::desc::split::Descriptor;

use super::chain::{Burst, Chain, Direction, Segment, Segments, Unaligned};
use super::dirty::DirtyLog;
use super::fault::Fault;
use super::inflight::InflightRing;
use super::layout::RingLayout;
use super::memory::{GuestMemory, Window};
use super::notify::{LittleEndian, Shared, ask, look, show};

/// Segments of one chain at the most: what fits one `writev` (`IOV_MAX`, 1024) beside a header of
/// our own. A frame of 64 KiB in pages has 18.
pub const MAX_SEGMENTS: usize = 1022;

/// Bytes of a chain that a port writes at most: a frame of 64 KiB with its headers, twice over. A TAP's
/// largest frame is 64 KiB (`GSO_LEGACY_MAX_SIZE` of the kernel), and a page of AF_XDP is less.
const MAX_WRITTEN: usize = 128 << 10;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// How driver and device tell each other about their progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// What [`Virtqueue::publish`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// There was nothing to show.
    Nothing,
    /// The used index moved; the driver wants no interrupt for that.
    Quietly,
    /// The used index moved, and the driver wants to be called.
    Call,
}

/// What one turn may pop, so that one ring cannot hold the thread.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Chains.
    pub chains: usize,
    /// Bytes; the chain that passes the limit is still popped.
    pub bytes: usize,
}

/// A running ring of one direction.
#[derive(Debug)]
pub struct Virtqueue<'mem, D: Direction> {
    memory: &'mem GuestMemory,
    descriptors: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    size: u16,
    notification: Notification,
    /// Avail index of the chain to pop next.
    next_avail: u16,
    /// The driver's avail index as it was last read.
    seen_avail: u16,
    /// Used index of the chain to retire next.
    next_used: u16,
    /// The used index in guest memory.
    published: u16,
    /// Used index at the last decision about a call; nothing after a start, when the driver's
    /// wishes before it are unknown and a call too many does no harm.
    called_at: Option<u16>,
    /// Avail index at which the driver was last told to kick.
    armed: Option<u16>,
    /// One bit per head that is on loan.
    on_loan: Box<[u64]>,
    /// Segment lists of chains that went back, for chains to come: no allocation per frame.
    spare: Vec<Vec<Segment<'mem>>>,
    /// The region of the last buffer.
    region: Window<'mem>,
    /// Where it is noted what is written, and the guest's address of the used ring.
    log: Option<(&'mem DirtyLog, u64)>,
    /// Where it is noted which chains are in flight.
    inflight: Option<InflightRing<'mem>>,
    direction: PhantomData<D>,
}

impl<'mem, D: Direction> Virtqueue<'mem, D> {
    /// Starts the ring at the used index in guest memory.
    ///
    /// # Errors
    /// A [`Fault`] if the layout is not allowed, or indices in guest memory contradict each other.
    pub fn start(
        memory: &'mem GuestMemory,
        layout: RingLayout,
        notification: Notification,
    ) -> Result<Self, Fault> {
        let [descriptors, avail, used] = layout.resolve(memory)?;
        let mut queue = Virtqueue {
            memory,
            descriptors,
            avail,
            used,
            size: layout.size,
            notification,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            published: 0,
            called_at: None,
            armed: None,
            on_loan: vec![0; usize::from(layout.size).div_ceil(64)].into_boxed_slice(),
            spare: Vec::new(),
            region: Window::EMPTY,
            log: memory.log().map(|log| (&**log, layout.used.0)),
            inflight: None,
            direction: PhantomData,
        };
        let used = queue.used_u16(2).load(Ordering::Relaxed);
        (queue.next_avail, queue.seen_avail) = (used, used);
        (queue.next_used, queue.published) = (used, used);
        // Nobody knows what it was told before.
        queue.armed = Some(used);
        queue.look()?;
        Ok(queue)
    }

    /// Notes in the table's inflight buffer, if it has one, which chains are in flight. `index` is the
    /// ring's among all of the card's.
    pub fn note_inflight(&mut self, index: u16) {
        self.inflight = self.memory.inflight().and_then(|buffer| buffer.ring(index, self.size));
        if let Some(inflight) = &mut self.inflight {
            inflight.clear(self.next_used);
        }
    }

    /// Used index of the first chain that is not finished: where the next start resumes.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Pops chains into `burst` until the budget is spent or none is left; returns how many.
    ///
    /// # Errors
    /// A [`Fault`] of the guest's; chains popped before it stay in `burst`.
    // By itself, or its variables would compete with all of the worker's turn for registers.
    #[inline(never)]
    pub fn pop(&mut self, burst: &mut Burst<'mem, D>, budget: Budget) -> Result<usize, Fault> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(0);
        }
        let waiting = usize::from(self.seen_avail.wrapping_sub(self.next_avail));
        let most = waiting.min(budget.chains);
        let mut bytes = 0;
        for popped in 0..most {
            if bytes >= budget.bytes {
                return Ok(popped);
            }
            let chain = self.pop_one()?;
            bytes += chain.len();
            burst.push_back(chain);
        }
        Ok(most)
    }

    /// Looks at the driver's avail index; says whether there is anything to pop.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if it claims more chains than the ring has room for.
    fn look(&mut self) -> Result<bool, Fault> {
        let index = look(&self.avail_u16(2));
        self.see(index)
    }

    fn see(&mut self, index: u16) -> Result<bool, Fault> {
        let outstanding = index.wrapping_sub(self.next_used);
        let lent = self.next_avail.wrapping_sub(self.next_used);
        if outstanding > self.size || outstanding < lent {
            return Err(Fault::AvailIndex { index, expected: self.next_avail });
        }
        self.seen_avail = index;
        Ok(index != self.next_avail)
    }

    #[inline]
    fn pop_one(&mut self) -> Result<Chain<'mem, D>, Fault> {
        let position = self.next_avail;
        let slot = usize::from(position & (self.size - 1));
        let head = self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(Fault::HeadOutOfRange(head));
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.on_loan[word] & bit != 0 {
            return Err(Fault::HeadOfferedTwice(head));
        }
        let (segments, length) = self.walk(head)?;
        self.on_loan[word] |= bit;
        self.next_avail = position.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.popped(head);
        }
        Ok(Chain::new(position, head, length, segments))
    }

    /// The segments of the chain at `head`, and their bytes.
    #[inline]
    fn walk(&mut self, head: u16) -> Result<(Segments<'mem>, u32), Fault> {
        let first = self.descriptor(self.descriptors, head);
        let length = first.len();
        // Nearly always: one descriptor, in one region.
        if !D::MIXED
            && first.flags() == D::FLAGS
            && length > 0
            && let Some(found) = self.memory.at(first.addr().0, &mut self.region)
            && length as usize <= found.len()
        {
            let segment = found.first(length as usize);
            if !D::WRITABLE {
                segment.prefetch();
            }
            return Ok((Segments::One(segment), length));
        }
        let mut list = self.spare.pop().unwrap_or_default();
        let length = self.walk_all(head, first, &mut list)?;
        Ok((Segments::List(list), length))
    }

    /// Collects the segments of the chain at `head`, of any kind; returns their bytes.
    #[inline(never)]
    fn walk_all(
        &mut self,
        head: u16,
        first: Descriptor,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<u32, Fault> {
        if !first.refers_to_indirect_table() {
            return self.walk_table(head, first, self.descriptors, self.size, segments);
        }
        if !self.notification.indirect || first.has_next() {
            return Err(Fault::IndirectNotAllowed { head });
        }
        // A chain may not be longer than the ring, however it is stored (section 2.7.5.3.1).
        let length = first.len();
        if length == 0 || !length.is_multiple_of(16) || length / 16 > u32::from(self.size) {
            return Err(Fault::IndirectLength(length));
        }
        let table = self
            .memory
            .resolve(first.addr(), length.into())
            .ok_or(Fault::BufferUnmapped { address: first.addr().0, length })?;
        let entries = (length / 16) as u16;
        let first = self.descriptor(table, 0);
        self.walk_table(head, first, table, entries, segments)
    }

    #[inline]
    fn walk_table(
        &mut self,
        head: u16,
        first: Descriptor,
        table: NonNull<u8>,
        entries: u16,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<u32, Fault> {
        let mut descriptor = first;
        let mut total = 0u32;
        let mut in_answer = !D::MIXED;
        // A chain without a loop passes each descriptor once at the most.
        for _ in 0..entries {
            if descriptor.refers_to_indirect_table() {
                return Err(Fault::IndirectNotAllowed { head });
            }
            if D::MIXED && !in_answer && descriptor.is_write_only() {
                segments.push(Segment::EMPTY);
                in_answer = true;
            }
            if descriptor.is_write_only() != (D::WRITABLE && in_answer) {
                return Err(Fault::WrongDirection { head });
            }
            total = total.checked_add(descriptor.len()).ok_or(Fault::ChainTooLarge { head })?;
            self.map(head, descriptor, segments)?;
            if !descriptor.has_next() {
                return Ok(total);
            }
            let next = descriptor.next();
            if next >= entries {
                return Err(Fault::NextOutOfRange(next));
            }
            descriptor = self.descriptor(table, next);
        }
        Err(Fault::ChainTooLong { head })
    }

    /// Adds the descriptor's memory to `segments`, in as many pieces as it spans regions.
    #[inline]
    fn map(
        &mut self,
        head: u16,
        descriptor: Descriptor,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<(), Fault> {
        let (mut address, mut left) = (descriptor.addr().0, descriptor.len() as usize);
        let unmapped =
            Fault::BufferUnmapped { address: descriptor.addr().0, length: descriptor.len() };
        while left > 0 {
            let Some(found) = self.memory.at(address, &mut self.region) else {
                return Err(unmapped);
            };
            if segments.len() >= MAX_SEGMENTS {
                return Err(Fault::ChainTooLong { head });
            }
            let segment = found.first(left);
            segments.push(segment);
            left -= segment.len();
            address = address.wrapping_add(segment.len() as u64);
        }
        Ok(())
    }

    #[inline]
    fn descriptor(&self, table: NonNull<u8>, index: u16) -> Descriptor {
        // SAFETY: the caller has checked `index` against the table's number of entries, and the
        // table was resolved with 16 bytes for each, at any alignment (indirect tables have no rule
        // about theirs). Volatile: the guest may write meanwhile, and the copy must be the one
        // value that all checks see.
        let [address, rest] = unsafe {
            let words = table.cast::<Unaligned<u64>>().add(2 * usize::from(index));
            [words.read_volatile().0, words.add(1).read_volatile().0].map(u64::from_le)
        };
        let (length, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
        Descriptor::new(address, length, flags, next)
    }

    /// Writes the chain's used entry: the device has finished with it, and has written `written`
    /// bytes to it. The driver sees it when it is published.
    ///
    /// # Panics
    /// If an older chain is still on loan.
    #[inline]
    pub fn retire(&mut self, chain: Chain<'mem, D>, written: u32) {
        let (position, head, segments) = chain.into_parts();
        assert_eq!(position, self.next_used, "chains must be retired in the order of the ring");
        let slot = usize::from(position & (self.size - 1));
        // SAFETY: `start` resolved 6 + 8 × size bytes of used ring at an address aligned to 4,
        // and slot < size. Relaxed: `publish` orders these stores.
        unsafe {
            let entry = self.used.add(4 + 8 * slot).cast::<u32>().as_ptr();
            AtomicU32::from_ptr(entry).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(entry.add(1)).store(written.to_le(), Ordering::Relaxed);
        }
        self.next_used = position.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.retired(head);
        }
        if self.log.is_some() {
            self.log_used(4 + 8 * slot, 8);
            self.log_buffers(&segments, written);
        }
        self.release(head, segments);
    }

    /// Notes that bytes of the used ring were written.
    #[cold]
    fn log_used(&self, offset: usize, length: u64) {
        if let Some((log, ring)) = self.log {
            log.mark(ring + offset as u64, length);
        }
    }

    /// Notes that the first bytes of a chain may have been written: as many as a port writes at most,
    /// which can be more than the guest is told. A TAP's frame that is dropped after it was read was
    /// written too, and to several chains if it needed them. So the work for a chain has a limit, and
    /// does not grow with buffers of gigabytes.
    #[cold]
    fn log_buffers(&self, segments: &Segments<'mem>, written: u32) {
        let Some((log, _)) = self.log.filter(|_| D::WRITABLE) else { return };
        let segments = match segments {
            Segments::One(only) => std::slice::from_ref(only),
            Segments::List(list) => list,
        };
        let mut left = MAX_WRITTEN.max(written as usize);
        for segment in segments {
            let length = segment.len().min(left);
            self.memory.mark(log, segment.address(), length);
            left -= length;
            if left == 0 {
                return;
            }
        }
    }

    /// Takes a chain back that was not used, when the ring stops: the next start pops it again.
    pub fn take_back(&mut self, chain: Chain<'mem, D>) {
        let (_, head, segments) = chain.into_parts();
        if let Some(inflight) = &mut self.inflight {
            inflight.taken_back(head);
        }
        if self.log.is_some() {
            self.log_buffers(&segments, 0);
        }
        self.release(head, segments);
    }

    #[inline]
    fn release(&mut self, head: u16, segments: Segments<'mem>) {
        self.on_loan[usize::from(head / 64)] &= !(1 << (head % 64));
        if let Segments::List(mut list) = segments {
            list.clear();
            self.spare.push(list);
        }
    }

    /// Shows the driver what was retired, with one store, and tells what it wants done.
    pub fn publish(&mut self) -> Published {
        if self.next_used == self.published {
            return Published::Nothing;
        }
        self.published = self.next_used;
        let event_idx = self.notification.event_idx;
        let wish = self.avail_u16(if event_idx { 4 + 2 * usize::from(self.size) } else { 0 });
        let wish = show(&self.used_u16(2), self.next_used, &wish);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used);
        }
        if self.log.is_some() {
            self.log_used(0, 4);
        }
        let call = if event_idx {
            let before = self.called_at.replace(self.next_used);
            before.is_none_or(|before| passed(wish, self.next_used, before))
        } else {
            wish & AVAIL_F_NO_INTERRUPT == 0
        };
        if call { Published::Call } else { Published::Quietly }
    }

    /// Asks the driver to kick when it makes something available. Returns true if it already has:
    /// then there may be no kick, and the ring must be popped again before sleeping.
    ///
    /// # Errors
    /// As [`pop`](Self::pop), for the avail index.
    pub fn arm(&mut self) -> Result<bool, Fault> {
        let (offset, value) = match self.notification.event_idx {
            true => (self.avail_event(), self.next_avail),
            false => (0, 0),
        };
        let index = ask(&self.used_u16(offset), value, &self.avail_u16(2));
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
        self.armed = Some(self.next_avail);
        self.see(index)
    }

    /// Asks the driver not to kick. With EVENT_IDX that needs no store once the index armed at has
    /// been passed.
    pub fn disarm(&mut self) {
        let Some(index) = self.armed.take() else { return };
        let (offset, value) = match self.notification.event_idx {
            true if index != self.next_avail => return,
            // As if it had been.
            true => (self.avail_event(), index.wrapping_sub(1)),
            false => (0, USED_F_NO_NOTIFY),
        };
        self.used_u16(offset).store(value, Ordering::Relaxed);
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
    }

    /// Where in the used ring the driver reads at which avail index to kick, with EVENT_IDX.
    fn avail_event(&self) -> usize {
        4 + 8 * usize::from(self.size)
    }

    /// A 16-bit field of the avail ring. Callers stay within 6 + 2 × size bytes.
    #[inline]
    fn avail_u16(&self, offset: usize) -> LittleEndian<'_> {
        debug_assert!(offset < 6 + 2 * usize::from(self.size));
        // SAFETY: `start` resolved that many bytes at an even address, and offsets are even.
        LittleEndian(unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast().as_ptr()) })
    }

    /// A 16-bit field of the used ring. Callers stay within 6 + 8 × size bytes.
    #[inline]
    fn used_u16(&self, offset: usize) -> LittleEndian<'_> {
        debug_assert!(offset < 6 + 8 * usize::from(self.size));
        // SAFETY: `start` resolved that many bytes at an even address, and offsets are even.
        LittleEndian(unsafe { AtomicU16::from_ptr(self.used.add(offset).cast().as_ptr()) })
    }
}

/// `vring_need_event` of the specification (section 2.7.10): whether moving from `before` to
/// `now` passed `event`.
#[inline]
fn passed(event: u16, now: u16, before: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::passed;

    #[test]
    fn an_event_is_passed_once_per_lap() {
        assert!(passed(4, 5, 4));
        assert!(passed(4, 9, 0));
        assert!(!passed(5, 5, 4));
        assert!(!passed(3, 5, 4));
        assert!(passed(0xffff, 0, 0xffff));
        assert!(!passed(0, 0, 0xffff));
    }
}
