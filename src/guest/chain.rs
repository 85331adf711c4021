//! Descriptor chains on loan, and the pieces of memory that they consist of.
//!
//! Invariant: a [`Chain`] stands for one head that its virtqueue has lent out. It can't be
//! copied, it goes back to the queue that it came from, once, and its direction is in its type.

use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::ptr::NonNull;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;

/// Which way the device may use a chain's memory.
pub trait Direction: fmt::Debug + 'static {
    /// Whether the device writes it (the descriptors have `VIRTQ_DESC_F_WRITE`).
    const WRITABLE: bool;
    /// Whether a chain has a part that the device only reads, and behind it one that the device writes.
    const MIXED: bool = false;
    /// Flags of a descriptor that is a whole chain.
    const FLAGS: u16 = if Self::WRITABLE { VRING_DESC_F_WRITE as u16 } else { 0 };
}

/// Device-readable: a frame from the guest, on the tx virtqueue.
#[derive(Debug)]
pub enum Readable {}

/// Device-writable: an empty buffer for a frame to the guest, on the rx virtqueue.
#[derive(Debug)]
pub enum Writable {}

/// Device-readable, then device-writable: a command from the guest, on the control virtqueue. A segment
/// without bytes stands between the two parts.
#[derive(Debug)]
pub enum Command {}

impl Direction for Readable {
    const WRITABLE: bool = false;
}

impl Direction for Writable {
    const WRITABLE: bool = true;
}

impl Direction for Command {
    const WRITABLE: bool = true;
    const MIXED: bool = true;
}

/// A piece of shared memory that is contiguous for the host: guest memory, or a bounce buffer that
/// the kernel writes too. It can be read and written.
///
/// It has the layout of `iovec`, and no way to a slice: the guest may be writing there.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Segment<'mem> {
    iovec: libc::iovec,
    memory: PhantomData<&'mem ()>,
}

// SAFETY: a Segment is an address and a length; what it points to is shared memory that is only
// reached through copies made by volatile access or by the kernel.
unsafe impl Send for Segment<'_> {}

impl<'mem> Segment<'mem> {
    /// No bytes.
    pub(super) const EMPTY: Self = Segment {
        iovec: libc::iovec { iov_base: NonNull::<libc::c_void>::dangling().as_ptr(), iov_len: 0 },
        memory: PhantomData,
    };

    /// The `length` bytes from `start`.
    ///
    /// # Safety
    /// They must stay mapped, readable and writable, for `'mem`.
    #[inline]
    pub(crate) unsafe fn new(start: NonNull<u8>, length: usize) -> Self {
        Segment {
            iovec: libc::iovec { iov_base: start.as_ptr().cast(), iov_len: length },
            memory: PhantomData,
        }
    }

    /// Length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.iovec.iov_len
    }

    /// This segment without its first `bytes`.
    ///
    /// # Panics
    /// If it is shorter than that.
    #[inline]
    #[must_use]
    pub fn skip(&self, bytes: usize) -> Self {
        assert!(bytes <= self.iovec.iov_len, "cannot skip more than there is");
        Segment {
            iovec: libc::iovec {
                iov_base: self.iovec.iov_base.wrapping_byte_add(bytes),
                iov_len: self.iovec.iov_len - bytes,
            },
            memory: PhantomData,
        }
    }

    /// The first `bytes` of this segment, or all if it is not longer.
    #[inline]
    #[must_use]
    pub fn first(&self, bytes: usize) -> Self {
        let iov_len = self.iovec.iov_len.min(bytes);
        let iovec = libc::iovec { iov_base: self.iovec.iov_base, iov_len };
        Segment { iovec, memory: PhantomData }
    }

    /// This segment and `next` as one, if that begins where this one ends.
    #[inline]
    pub fn joined(&self, next: &Self) -> Option<Self> {
        // Both are mapped for 'mem: so is the whole.
        let iov_len = self.iovec.iov_len + next.iovec.iov_len;
        (self.address() + self.iovec.iov_len == next.address()).then_some(Segment {
            iovec: libc::iovec { iov_len, ..self.iovec },
            memory: PhantomData,
        })
    }

    /// Where it starts in this process, to find out what it is a part of.
    #[inline]
    pub fn address(&self) -> usize {
        self.iovec.iov_base as usize
    }

    /// The same as a pointer.
    #[inline]
    pub(crate) fn start(&self) -> *mut u8 {
        self.iovec.iov_base.cast()
    }

    /// Has the processor fetch its first bytes: headers are looked at soon.
    #[inline]
    pub(super) fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch changes nothing, and faults nowhere.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.start().cast());
            _mm_prefetch::<_MM_HINT_T0>(self.start().wrapping_add(64).cast());
        }
    }

    /// Copies from `source` as much as both have; returns the bytes copied.
    #[inline]
    pub fn copy_from<'a>(&self, source: impl Into<ReadSegment<'a>>) -> usize {
        let source = source.into();
        let length = self.len().min(source.len());
        // SAFETY: both are mapped for at least `length` bytes (`new`, `of_bytes`). A guest can make
        // its buffers overlap; `copy` allows that, and the guest gets what it asked for. This
        // range is never seen as a Rust reference, so it is no part of a borrowed source.
        unsafe { std::ptr::copy(source.start(), self.start(), length) };
        length
    }

    /// Copies to `target` as much as both have; returns the bytes copied.
    #[inline]
    pub fn read(&self, target: &mut [u8]) -> usize {
        let length = self.len().min(target.len());
        // SAFETY: `length` bytes are mapped (`new`) and `target` is our own, so they do not
        // overlap. The guest may write meanwhile: the copy may then mix old and new bytes, but
        // it is taken once, and only the copy is used.
        unsafe { volatile_copy(self.start(), target.as_mut_ptr(), length) };
        length
    }

    /// Copies from `source` as much as both have; returns the bytes copied.
    #[inline]
    pub fn write(&self, source: &[u8]) -> usize {
        let length = self.len().min(source.len());
        // SAFETY: as in `read`, the other way round.
        unsafe { volatile_copy(source.as_ptr(), self.start(), length) };
        length
    }
}

impl fmt::Debug for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.iovec.iov_base, self.iovec.iov_len)
    }
}

/// A piece of memory that is only read: bytes of our own, such as a header put before a frame, or
/// a [`Segment`] in the same system call.
///
/// ```compile_fail,E0599
/// # use vhost_user_net::guest::ReadSegment;
/// let bytes = [0u8; 4];
/// // `bytes` is borrowed as constant: there is no way to write to it.
/// ReadSegment::of_bytes(&bytes).write(&[1]);
/// ```
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct ReadSegment<'mem>(Segment<'mem>);

impl<'mem> ReadSegment<'mem> {
    /// Memory of our own.
    #[inline]
    pub fn of_bytes(bytes: &'mem [u8]) -> Self {
        let iov_base = bytes.as_ptr().cast_mut().cast();
        ReadSegment(Segment {
            iovec: libc::iovec { iov_base, iov_len: bytes.len() },
            memory: PhantomData,
        })
    }

    /// Length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// This segment without its first `bytes`.
    ///
    /// # Panics
    /// If it is shorter than that.
    #[inline]
    #[must_use]
    pub fn skip(&self, bytes: usize) -> Self {
        ReadSegment(self.0.skip(bytes))
    }

    /// First address in this process.
    #[inline]
    pub(crate) fn start(&self) -> *const u8 {
        self.0.start()
    }

    /// Copies to `target` as much as both have; returns the bytes copied.
    #[inline]
    pub fn read(&self, target: &mut [u8]) -> usize {
        self.0.read(target)
    }
}

impl<'mem> From<Segment<'mem>> for ReadSegment<'mem> {
    #[inline]
    fn from(segment: Segment<'mem>) -> Self {
        ReadSegment(segment)
    }
}

impl fmt::Debug for ReadSegment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number at any alignment.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub(super) struct Unaligned<T>(pub(super) T);

/// Copies `length` bytes such that each is read once and written once, as words where it can.
///
/// # Safety
/// Both ranges must be mapped and must not overlap.
#[inline]
unsafe fn volatile_copy(from: *const u8, to: *mut u8, length: usize) {
    let mut done = 0;
    // SAFETY: every access lies within `length` bytes of `from` and `to`; Unaligned has
    // alignment 1.
    unsafe {
        let copy_word = |at: usize| {
            let word = from.add(at).cast::<Unaligned<u64>>().read_volatile();
            to.add(at).cast::<Unaligned<u64>>().write_volatile(word);
        };
        while length - done >= 32 {
            [0, 8, 16, 24].into_iter().for_each(|offset| copy_word(done + offset));
            done += 32;
        }
        while length - done >= 8 {
            copy_word(done);
            done += 8;
        }
        if length - done >= 4 {
            let word = from.add(done).cast::<Unaligned<u32>>().read_volatile();
            to.add(done).cast::<Unaligned<u32>>().write_volatile(word);
            done += 4;
        }
        if length - done >= 2 {
            let word = from.add(done).cast::<Unaligned<u16>>().read_volatile();
            to.add(done).cast::<Unaligned<u16>>().write_volatile(word);
            done += 2;
        }
        if done < length {
            to.add(done).write_volatile(from.add(done).read_volatile());
        }
    }
}

/// A chain's memory. Nearly all buffers, and small frames, are one piece: that needs no list.
#[derive(Debug)]
pub(super) enum Segments<'mem> {
    /// One piece.
    One(Segment<'mem>),
    /// Any number of them.
    List(Vec<Segment<'mem>>),
}

/// A descriptor chain that its virtqueue has lent out.
///
/// It must go back: to [`Virtqueue::retire`](super::Virtqueue::retire) when the device has
/// finished with it, or to [`Virtqueue::take_back`](super::Virtqueue::take_back) unused, when a
/// session ends. In a debug build, dropping one instead panics: its head would be lost.
#[must_use = "a chain that is dropped is lost to the guest"]
pub struct Chain<'mem, D: Direction> {
    /// The avail ring's index that it was popped at, which is also the used ring's index that it
    /// will be retired at: chains complete in order.
    position: u16,
    head: u16,
    length: u32,
    segments: Segments<'mem>,
    direction: PhantomData<D>,
}

impl<'mem, D: Direction> Chain<'mem, D> {
    #[inline]
    pub(super) fn new(position: u16, head: u16, length: u32, segments: Segments<'mem>) -> Self {
        Chain { position, head, length, segments, direction: PhantomData }
    }

    /// Takes the chain apart: position, head, and its segments, whose list may be used again.
    #[inline]
    pub(super) fn into_parts(mut self) -> (u16, u16, Segments<'mem>) {
        let none = Segments::List(Vec::new());
        let parts = (self.position, self.head, mem::replace(&mut self.segments, none));
        mem::forget(self);
        parts
    }

    /// Whether this chain stands before `other` in their ring.
    #[inline]
    pub fn is_older_than(&self, other: &Self) -> bool {
        // A ring has 32768 entries at the most: the distance tells.
        (other.position.wrapping_sub(self.position) as i16) > 0
    }

    /// The chain's memory without its first `bytes`, in order.
    #[inline]
    pub fn segments_after(&self, bytes: usize) -> impl Iterator<Item = Segment<'mem>> + Clone {
        let mut skip = bytes;
        self.segments().iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len());
            skip -= skipped;
            (skipped < segment.len()).then(|| segment.skip(skipped))
        })
    }

    /// The first piece of that, if there is any.
    #[inline]
    pub fn first_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        match &self.segments {
            Segments::One(only) => (bytes < only.len()).then(|| only.skip(bytes)),
            Segments::List(_) => self.first_of_list_after(bytes),
        }
    }

    #[inline(never)]
    fn first_of_list_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        self.segments_after(bytes).next()
    }

    /// Index of the chain's first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes in all segments together.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// The chain's memory, in order.
    #[inline]
    pub fn segments(&self) -> &[Segment<'mem>] {
        match &self.segments {
            Segments::One(only) => std::slice::from_ref(only),
            Segments::List(list) => list,
        }
    }

    /// A copy of the chain's first bytes, of which it has as many.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        match &self.segments {
            Segments::One(only) if only.len() >= N => only.read(&mut bytes),
            _ => self.read_start(&mut bytes),
        };
        bytes
    }

    /// Copies the chain's first bytes to `target`; returns how many there were.
    #[inline]
    pub fn read_start(&self, target: &mut [u8]) -> usize {
        match &self.segments {
            Segments::One(only) => only.read(target),
            Segments::List(_) => self.read_pieces(target),
        }
    }

    #[inline(never)]
    fn read_pieces(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in self.segments() {
            if done == target.len() {
                break;
            }
            done += segment.read(&mut target[done..]);
        }
        done
    }
}

impl Chain<'_, Writable> {
    /// Writes `bytes` at `offset`, as far as the chain reaches.
    #[inline]
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        if let Segments::One(only) = &self.segments
            && only.len() >= offset + bytes.len()
        {
            only.skip(offset).write(bytes);
        } else {
            self.write_pieces(offset, bytes);
        }
    }

    #[inline(never)]
    fn write_pieces(&self, offset: usize, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in self.segments_after(offset) {
            if rest.is_empty() {
                return;
            }
            rest = &rest[segment.write(rest)..];
        }
    }

    /// Copies `source`'s bytes from `offset` on to this chain's start; returns how many it took.
    pub fn copy_from(&self, source: &Chain<'_, Readable>, offset: usize) -> usize {
        let mut done = 0;
        for piece in source.segments_after(offset) {
            let copied = self.copy_segment(done, piece);
            done += copied;
            if copied < piece.len() {
                break;
            }
        }
        done
    }

    /// Copies `source` to `offset` and behind it, as far as the chain reaches; returns how many
    /// bytes it took.
    pub fn copy_segment<'a>(&self, offset: usize, source: impl Into<ReadSegment<'a>>) -> usize {
        let source = source.into();
        let mut done = 0;
        for target in self.segments_after(offset) {
            if done == source.len() {
                break;
            }
            done += target.copy_from(source.skip(done));
        }
        done
    }
}

impl<'mem> Chain<'mem, Command> {
    /// The command's memory, and that for its answer.
    pub fn parts(&self) -> (&[Segment<'mem>], &[Segment<'mem>]) {
        let mut parts = self.segments().splitn(2, |segment| segment.len() == 0);
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    }
}

impl Chain<'_, Readable> {
    /// Copies the chain's bytes from `offset` on to `target`, as many as both have; returns how
    /// many those were.
    #[inline]
    pub fn copy_to(&self, offset: usize, target: &Segment<'_>) -> usize {
        let mut done = 0;
        for source in self.segments_after(offset) {
            if done == target.len() {
                break;
            }
            done += target.skip(done).copy_from(source);
        }
        done
    }
}

impl<D: Direction> fmt::Debug for Chain<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("position", &self.position)
            .field("segments", &self.segments)
            .finish()
    }
}

#[cfg(debug_assertions)]
impl<D: Direction> Drop for Chain<'_, D> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("descriptor chain with head {} was dropped, not given back", self.head);
        }
    }
}

/// Chains of one virtqueue in the order in which they were popped.
pub type Burst<'mem, D> = VecDeque<Chain<'mem, D>>;
