//! The device's end of one split virtqueue (virtio 1.3, section 2.7).
//!
//! Ring addresses are resolved to pointers once, when the ring starts; from then on the verbs are
//! *pop*, *push used*, *publish* and *enable notifications*.
//!
//! Invariant: chains complete in the order in which they were popped, so a position in the ring is a
//! chain's identity, and the chains in flight are a range of positions. At any time the used index is the
//! first chain that has not completed, and whoever starts the ring next, this daemon or its successor,
//! resumes there without asking anybody.
//!
//! ```text
//! published  ≤  next_used  ≤  next_avail  ≤  seen_avail
//!      '- completed -'- in flight -'- to be popped -'
//! ```

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use super::chain::{Chain, Direction, Readable};
use super::chain_table::{ChainTable, Slot};
use super::descriptors::Descriptors;
use super::dirty::DirtyLog;
use super::fault::Fault;
use super::inflight::InflightRing;
use super::layout::RingLayout;
use super::memory::GuestMemory;
use super::notify::{LittleEndian, Shared, ask, look, show};
use super::segment::Segment;

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
    /// The used index moved; the driver wants no notification of that.
    Suppressed,
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
    descriptors: Descriptors<'mem>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    size: u16,
    event_idx: bool,
    /// Position of the chain to pop next.
    next_avail: u16,
    /// The driver's available index as it was last read.
    seen_avail: u16,
    /// Position of the chain to complete next.
    next_used: u16,
    /// The used index in guest memory.
    published: u16,
    /// Used index at the last decision about a call; nothing after a start, when the driver's
    /// wishes before it are unknown and a call too many does no harm.
    called_at: Option<u16>,
    /// Available index at which the driver was last told to kick.
    armed: Option<u16>,
    /// The chains by position, those that have completed and are not published among them.
    chains: ChainTable<'mem>,
    /// For each head, whether it is in flight.
    is_in_flight: Box<[bool]>,
    /// Bytes of the chains in flight.
    bytes: usize,
    /// Pieces of chains that have several, and have completed since the last publication.
    pieces: usize,
    /// Where it is noted what is written, and the guest's address of the used ring.
    log: Option<(&'mem DirtyLog, u64)>,
    /// Where it is noted for the frontend which chains are in flight.
    inflight: Option<InflightRing<'mem>>,
    /// One of the two is there.
    is_noted: bool,
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
        let Notification { event_idx, indirect } = notification;
        let size = layout.size;
        let mut queue = Virtqueue {
            memory,
            descriptors: Descriptors::new(memory, descriptors, size, indirect),
            avail,
            used,
            size,
            event_idx,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            published: 0,
            called_at: None,
            armed: None,
            chains: ChainTable::new(size),
            is_in_flight: vec![false; usize::from(size)].into_boxed_slice(),
            bytes: 0,
            pieces: 0,
            log: memory.log().map(|log| (&**log, layout.used.0)),
            inflight: None,
            is_noted: memory.log().is_some(),
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
            self.is_noted = true;
        }
    }

    /// Position of the first chain that has not completed: where the next start resumes.
    #[inline]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Position of the chain that is popped next: the end of those in flight.
    #[inline]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index that the driver sees: the first chain that has completed since is there.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Number of chains in flight.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.next_avail.wrapping_sub(self.next_used).into()
    }

    /// Number of chains that have completed since the last publication.
    #[inline]
    pub fn completed(&self) -> usize {
        self.next_used.wrapping_sub(self.published).into()
    }

    /// Bytes of all chains in flight.
    #[inline]
    pub fn bytes_in_flight(&self) -> usize {
        self.bytes
    }

    /// The chain at a position: one in flight, or one that has completed and is not published, of which
    /// only what was written counts. Any other position gives a chain that was in its place.
    #[inline]
    pub fn chain(&self, position: u16) -> Chain<'_, 'mem, D> {
        debug_assert!(
            position.wrapping_sub(self.published) < self.next_avail.wrapping_sub(self.published),
            "no chain is at {position}"
        );
        self.chains.chain(position)
    }

    /// The only piece of the chain at a position, as [`chain`](Self::chain) shows it, unless it has any other
    /// number of pieces.
    #[inline(always)]
    pub fn only_piece(&self, position: u16) -> Option<Segment<'mem>> {
        self.chains.only_piece(position)
    }

    /// Positions of chains in flight before `until`, oldest first; none if `until` is not among them, nor
    /// right behind them.
    pub fn positions(&self, until: u16) -> impl ExactSizeIterator<Item = u16> + use<D> {
        let first = self.next_used;
        let count = until.wrapping_sub(first);
        let count = if usize::from(count) <= self.in_flight() { count } else { 0 };
        (0..count).map(move |index| first.wrapping_add(index))
    }

    /// Pops chains until the budget is spent or none is left; returns how many.
    ///
    /// # Errors
    /// A [`Fault`] of the guest's; chains popped before it are in flight.
    // By itself, or its variables would compete with all of the worker's turn for registers.
    #[inline(never)]
    pub fn pop(&mut self, budget: Budget) -> Result<usize, Fault> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(0);
        }
        let first = self.next_avail;
        let waiting = usize::from(self.seen_avail.wrapping_sub(first));
        let popped = self.pop_available(waiting.min(budget.chains), budget.bytes);
        if self.inflight.is_some() {
            self.note_popped(first);
        }
        popped.map(|()| self.next_avail.wrapping_sub(first).into())
    }

    /// Pops up to `chains` chains, fewer if they have `bytes` before.
    #[inline]
    fn pop_available(&mut self, chains: usize, bytes: usize) -> Result<(), Fault> {
        let end = self.next_avail.wrapping_add(chains as u16);
        let enough = self.bytes.saturating_add(bytes);
        loop {
            let head = self.pop_simple(end, enough)?;
            // Nearly always that was all.
            let Some(head) = head else { return Ok(()) };
            self.collect(self.next_avail, head)?;
            self.next_avail = self.next_avail.wrapping_add(1);
        }
    }

    /// Pops chains of one piece before position `end`, until `enough` bytes are in flight. Returns the head
    /// of the first chain that is of another kind, which is noted as in flight and not collected: a queue
    /// that fails to is not used again.
    #[inline(always)]
    fn pop_simple(&mut self, end: u16, enough: usize) -> Result<Option<u16>, Fault> {
        // Copies of what the loop needs, which is in registers then.
        let (avail, size, descriptors) = (self.avail, self.size, self.descriptors);
        let is_in_flight = &mut *self.is_in_flight;
        let mut chains = self.chains.writer();
        let first = usize::from(self.next_avail);
        let most = usize::from(end.wrapping_sub(self.next_avail));
        let (mut popped, mut bytes) = (0, self.bytes);
        let result = loop {
            if popped == most || bytes >= enough {
                break Ok(None);
            }
            let slot = chains.slot(first + popped);
            // SAFETY: the slot is below the ring's size.
            let head = unsafe { avail_u16(avail, 4 + 2 * slot.index(), size) };
            let head = head.load(Ordering::Relaxed);
            let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) else {
                break Err(Fault::HeadOutOfRange(head));
            };
            if std::mem::replace(is_in_flight, true) {
                break Err(Fault::HeadOfferedTwice(head));
            }
            let Some(piece) = descriptors.only_piece::<D>(head) else { break Ok(Some(head)) };
            if !D::WRITABLE {
                piece.prefetch();
            }
            chains.set_one(slot, head, piece);
            bytes += piece.len();
            popped += 1;
        };
        self.next_avail = self.next_avail.wrapping_add(popped as u16);
        self.bytes = bytes;
        result
    }

    /// Collects the pieces of a chain of any kind.
    #[inline(never)]
    fn collect(&mut self, position: u16, head: u16) -> Result<(), Fault> {
        let Self { chains, descriptors, .. } = self;
        let collect = |pieces: &mut Vec<_>| descriptors.collect::<D>(head, pieces);
        self.bytes += chains.set_list(position, head, collect)? as usize;
        Ok(())
    }

    /// Looks at the driver's available index; says whether there is anything to pop.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if it claims more chains than the ring has room for.
    fn look(&mut self) -> Result<bool, Fault> {
        let index = look(&self.avail_u16(2));
        self.see(index)
    }

    fn see(&mut self, index: u16) -> Result<bool, Fault> {
        let outstanding = index.wrapping_sub(self.published);
        let popped = self.next_avail.wrapping_sub(self.published);
        if outstanding > self.size || outstanding < popped {
            return Err(Fault::AvailIndex { index, expected: self.next_avail });
        }
        self.seen_avail = index;
        Ok(index != self.next_avail)
    }

    /// Writes the used entry of the oldest chain in flight: the device has finished with it, and has
    /// written `written` bytes to it. The driver sees it when it is published. Returns the chain's bytes.
    ///
    /// # Panics
    /// If none is in flight.
    #[inline(always)]
    pub fn push_used(&mut self, written: u32) -> usize {
        let position = self.next_used;
        assert!(position != self.next_avail, "only a chain in flight completes");
        let slot = self.chains.slot(position);
        let (head, length, pieces) = self.chains.facts(slot);
        // SAFETY: the slot is of this ring's table.
        unsafe { write_used(self.used, slot, head, written) };
        if self.is_noted || pieces != 1 {
            self.note_used(position, written, pieces);
        }
        if D::WRITABLE {
            self.chains.set_written(slot, written);
        }
        if let Some(is_in_flight) = self.is_in_flight.get_mut(usize::from(head)) {
            *is_in_flight = false;
        }
        self.next_used = position.wrapping_add(1);
        self.bytes -= length as usize;
        length as usize
    }

    /// Notes what is of use later: for a VMM that copies memory, for another backend, for the list of
    /// pieces.
    #[inline(never)]
    fn note_used(&mut self, position: u16, written: u32, pieces: u16) {
        if let Some(inflight) = &mut self.inflight {
            inflight.retired(self.chains.facts(self.chains.slot(position)).0);
        }
        if self.log.is_some() {
            self.log_used(4 + 8 * usize::from(position & (self.size - 1)), 8);
            self.log_buffers(position, written);
        }
        if pieces != 1 {
            self.pieces += usize::from(pieces);
        }
    }

    #[cold]
    fn note_popped(&mut self, first: u16) {
        let Some(inflight) = &mut self.inflight else { return };
        for index in 0..self.next_avail.wrapping_sub(first) {
            let slot = self.chains.slot(first.wrapping_add(index));
            inflight.popped(self.chains.facts(slot).0);
        }
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
    fn log_buffers(&self, position: u16, written: u32) {
        let Some((log, _)) = self.log.filter(|_| D::WRITABLE) else { return };
        let mut left = MAX_WRITTEN.max(written as usize);
        for segment in self.chains.chain::<D>(position).segments() {
            let length = segment.len().min(left);
            self.memory.mark(log, segment.address(), length);
            left -= length;
            if left == 0 {
                return;
            }
        }
    }

    /// Takes back all chains in flight, when the ring stops: the next start pops them again.
    pub fn unpop_all(&mut self) {
        for position in self.positions(self.next_avail) {
            let (head, _, pieces) = self.chains.facts(self.chains.slot(position));
            if let Some(inflight) = &mut self.inflight {
                inflight.taken_back(head);
            }
            if self.log.is_some() {
                self.log_buffers(position, 0);
            }
            if pieces != 1 {
                self.pieces += usize::from(pieces);
            }
            self.is_in_flight[usize::from(head)] = false;
        }
        self.next_avail = self.next_used;
        self.bytes = 0;
    }

    /// Shows the driver which chains have completed, with one store, and tells what it wants done.
    pub fn publish(&mut self) -> Published {
        if self.next_used == self.published {
            return Published::Nothing;
        }
        self.published = self.next_used;
        if self.pieces > 0 {
            self.chains.forget(std::mem::take(&mut self.pieces));
        }
        let event_idx = self.event_idx;
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
        if call { Published::Call } else { Published::Suppressed }
    }

    /// Asks the driver to kick when it makes something available. Returns true if it already has:
    /// then there may be no kick, and the ring must be popped again before sleeping.
    ///
    /// # Errors
    /// As [`pop`](Self::pop), for the available index.
    pub fn enable_notify(&mut self) -> Result<bool, Fault> {
        let (offset, value) = match self.event_idx {
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

    /// Asks the driver not to kick. With EVENT_IDX that needs no store once the index that it was to kick
    /// at has been passed.
    pub fn disable_notify(&mut self) {
        let Some(index) = self.armed.take() else { return };
        let (offset, value) = match self.event_idx {
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

    /// Where in the used ring the driver reads at which available index to kick, with EVENT_IDX.
    fn avail_event(&self) -> usize {
        4 + 8 * usize::from(self.size)
    }

    #[inline]
    fn avail_u16(&self, offset: usize) -> LittleEndian<'mem> {
        // SAFETY: callers keep to it, and `start` has resolved the ring for `'mem`.
        unsafe { avail_u16(self.avail, offset, self.size) }
    }

    /// A 16-bit field of the used ring. Callers stay within 6 + 8 × size bytes.
    #[inline]
    fn used_u16(&self, offset: usize) -> LittleEndian<'mem> {
        debug_assert!(offset < 6 + 8 * usize::from(self.size));
        // SAFETY: `start` resolved that many bytes at an even address, for `'mem`, and offsets are even.
        LittleEndian(unsafe { AtomicU16::from_ptr(self.used.add(offset).cast().as_ptr()) })
    }
}

/// A 16-bit field of the available ring at `avail`, which `start` has resolved.
///
/// # Safety
/// The offset is even, and below 6 + 2 × size bytes, which are mapped for `'mem`.
#[inline(always)]
unsafe fn avail_u16<'mem>(avail: NonNull<u8>, offset: usize, size: u16) -> LittleEndian<'mem> {
    debug_assert!(offset < 6 + 2 * usize::from(size));
    // SAFETY: the caller's; the ring is at an even address.
    LittleEndian(unsafe { AtomicU16::from_ptr(avail.add(offset).cast().as_ptr()) })
}

impl Virtqueue<'_, Readable> {
    /// Completes the `count` oldest chains in flight; returns their bytes. It is what as many calls of
    /// [`push_used`](Self::push_used) do, in two thirds of the instructions.
    ///
    /// # Panics
    /// If fewer are in flight.
    #[inline]
    pub fn push_used_run(&mut self, count: usize) -> usize {
        assert!(count <= self.in_flight(), "only chains in flight complete");
        if self.is_noted {
            return (0..count).map(|_| self.push_used(0)).sum();
        }
        let (used, chains) = (self.used, &self.chains);
        let is_in_flight = &mut *self.is_in_flight;
        let (mut position, mut bytes, mut listed) = (self.next_used, 0, 0);
        for _ in 0..count {
            let slot = chains.slot(position);
            let (head, length, pieces) = chains.facts(slot);
            // SAFETY: the slot is of this ring's table.
            unsafe { write_used(used, slot, head, 0) };
            if let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) {
                *is_in_flight = false;
            }
            if pieces != 1 {
                listed += usize::from(pieces);
            }
            bytes += length as usize;
            position = position.wrapping_add(1);
        }
        self.next_used = position;
        self.bytes -= bytes;
        self.pieces += listed;
        bytes
    }
}

/// Writes an entry of the used ring at `used`, which `start` has resolved.
///
/// # Safety
/// The slot is of the same ring's table, and the ring is mapped.
#[inline(always)]
unsafe fn write_used(used: NonNull<u8>, slot: Slot, head: u16, written: u32) {
    // SAFETY: `start` resolved 6 + 8 × size bytes of used ring at an address aligned to 4. Volatile: the
    // driver may look, and sees an entry that the index does not cover yet.
    unsafe {
        let entry = used.add(4 + 8 * slot.index()).cast::<u32>();
        entry.write_volatile(u32::from(head).to_le());
        entry.add(1).write_volatile(written.to_le());
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
