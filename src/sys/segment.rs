//! Segments: ranges of memory that the kernel or the daemon reads and writes, as `iovec`s whose lifetime
//! ends before the mapping's.
//!
//! Invariant: there is never a slice of shared memory. The daemon copies bytes that the guest may be writing,
//! by volatile access, and inspects only the copy.
//!
//! The type is in this module because the system calls take it; it does not know where memory comes from.
//! `Segment::new` is therefore an `unsafe fn`: its caller promises that the bytes stay mapped, readable and
//! writable, for `'mem`. `guest` keeps the promise with a reference to the mapping of a region or of a UMEM,
//! [`tap`](super::tap) with a byte on its stack. Safe code can only shorten a segment, or join two adjacent
//! ones. Code outside of `guest` and `sys` has no `unsafe`, so it cannot make a segment of other memory.
//! [`ReadSegment::of_bytes`] is safe: it holds the reference to its slice, and no method of `ReadSegment`
//! writes.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// A readable and writable range of shared memory, contiguous in this process: guest memory, or a bounce
/// buffer that the kernel writes too.
///
/// It has the layout of `iovec`. No method returns a slice, because the guest may be writing the memory.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Segment<'mem> {
    iovec: libc::iovec,
    memory: PhantomData<&'mem ()>,
}

// SAFETY: a Segment is an address and a length, valid for `'mem` on every thread. The memory is shared with
// guest or kernel anyway. Through a Segment it is only copied, by this module or by the kernel.
unsafe impl Send for Segment<'_> {}

impl<'mem> Segment<'mem> {
    /// A segment without bytes.
    pub(crate) const EMPTY: Self = Segment {
        iovec: libc::iovec { iov_base: NonNull::<libc::c_void>::dangling().as_ptr(), iov_len: 0 },
        memory: PhantomData,
    };

    /// Creates the segment of `length` bytes from `start`.
    ///
    /// # Safety
    /// The bytes must stay mapped, readable and writable, for `'mem`.
    #[inline]
    pub(crate) unsafe fn new(start: NonNull<u8>, length: usize) -> Self {
        Segment {
            iovec: libc::iovec { iov_base: start.as_ptr().cast(), iov_len: length },
            memory: PhantomData,
        }
    }

    /// Creates the segment of `length` bytes from another segment's [`start`](Self::start).
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline]
    pub(crate) unsafe fn at(start: *mut u8, length: usize) -> Self {
        let iovec = libc::iovec { iov_base: start.cast(), iov_len: length };
        Segment { iovec, memory: PhantomData }
    }

    /// Returns the length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.iovec.iov_len
    }

    /// Returns this segment without its first `bytes`.
    ///
    /// # Panics
    /// If the segment is shorter.
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

    /// Returns the first `bytes` of this segment, or all of a shorter one.
    #[inline]
    #[must_use]
    pub fn first(&self, bytes: usize) -> Self {
        let iov_len = self.iovec.iov_len.min(bytes);
        let iovec = libc::iovec { iov_base: self.iovec.iov_base, iov_len };
        Segment { iovec, memory: PhantomData }
    }

    /// Returns this segment and `next` as one, if `next` begins where this segment ends.
    #[inline]
    pub fn joined(&self, next: &Self) -> Option<Self> {
        // Both are mapped for 'mem, so the whole is too.
        let iov_len = self.iovec.iov_len + next.iovec.iov_len;
        (self.address() + self.iovec.iov_len == next.address()).then_some(Segment {
            iovec: libc::iovec { iov_len, ..self.iovec },
            memory: PhantomData,
        })
    }

    /// Returns the first address in this process, to look up the containing mapping.
    #[inline]
    pub fn address(&self) -> usize {
        self.iovec.iov_base as usize
    }

    /// Returns the first address in this process as a pointer.
    #[inline]
    pub(crate) fn start(&self) -> *mut u8 {
        self.iovec.iov_base.cast()
    }

    /// Prefetches the first 128 bytes into the CPU's caches, for the checks of a frame's headers.
    #[inline]
    pub(crate) fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch changes no memory, and faults at no address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.start().cast());
            _mm_prefetch::<_MM_HINT_T0>(self.start().wrapping_add(64).cast());
        }
    }

    /// Copies from `source`, up to the end of the shorter; returns the number of bytes copied.
    #[inline]
    pub fn copy_from<'a>(&self, source: impl Into<ReadSegment<'a>>) -> usize {
        let source = source.into();
        let length = self.len().min(source.len());
        // SAFETY: both are mapped for at least `length` bytes (`new`, `of_bytes`). A guest can make its buffers
        // overlap, which `copy` allows; then only the guest's own data mixes. No slice of shared memory
        // exists, so a source slice of our own does not overlap this range.
        unsafe { std::ptr::copy(source.start(), self.start(), length) };
        length
    }

    /// Copies the first `N` bytes; returns none if the segment is shorter.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> Option<[u8; N]> {
        (self.len() >= N).then(|| {
            let mut bytes = [0; N];
            self.read(&mut bytes);
            bytes
        })
    }

    /// Reads the first two bytes as a little-endian number; returns none if the segment is shorter.
    #[inline(always)]
    pub fn first_u16(&self) -> Option<u16> {
        self.first_bytes().map(u16::from_le_bytes)
    }

    /// Copies to `target`, up to the end of the shorter; returns the number of bytes copied. Reads each byte
    /// once.
    #[inline]
    pub fn read(&self, target: &mut [u8]) -> usize {
        let length = self.len().min(target.len());
        // SAFETY: `length` bytes are mapped (`new`). `target` is exclusively ours, and no slice of shared
        // memory exists, so the two do not overlap. The guest may write meanwhile: the copy may then
        // mix old and new bytes, but it is taken once, and only the copy is used.
        unsafe { copy_once(self.start(), target.as_mut_ptr(), length) };
        length
    }

    /// Copies to `target`, up to the end of the shorter; returns the number of bytes copied. Only for payload
    /// that is forwarded unchecked: it may read a byte more than once while the guest writes it.
    #[inline]
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let length = self.len().min(target.len());
        // SAFETY: `length` bytes are mapped (`new`), and they do not overlap `target` (see `read`). Every byte
        // is a valid u8, whatever the guest writes meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(self.start(), target.as_mut_ptr(), length) };
        length
    }

    /// Copies from `source`, up to the end of the shorter; returns the number of bytes copied.
    #[inline]
    pub fn write(&self, source: &[u8]) -> usize {
        let length = self.len().min(source.len());
        // SAFETY: `length` bytes are mapped and writable (`new`), and they do not overlap `source` (see
        // `read`). The daemon does not read them back. The guest reads them after the used index covers them,
        // which is stored later, with release.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.start(), length) };
        length
    }
}

impl fmt::Debug for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.iovec.iov_base, self.iovec.iov_len)
    }
}

/// A read-only range of memory: bytes of our own, such as a header before a frame, or a [`Segment`].
///
/// ```compile_fail,E0599
/// # use vhost_user_net::sys::segment::ReadSegment;
/// let bytes = [0u8; 4];
/// // `bytes` is constant, and a ReadSegment has no `write`.
/// ReadSegment::of_bytes(&bytes).write(&[1]);
/// ```
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct ReadSegment<'mem>(Segment<'mem>);

impl<'mem> ReadSegment<'mem> {
    /// Creates a segment of our own bytes.
    #[inline]
    pub fn of_bytes(bytes: &'mem [u8]) -> Self {
        let iov_base = bytes.as_ptr().cast_mut().cast();
        ReadSegment(Segment {
            iovec: libc::iovec { iov_base, iov_len: bytes.len() },
            memory: PhantomData,
        })
    }

    /// Returns the length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns this segment without its first `bytes`.
    ///
    /// # Panics
    /// If the segment is shorter.
    #[inline]
    #[must_use]
    pub fn skip(&self, bytes: usize) -> Self {
        ReadSegment(self.0.skip(bytes))
    }

    /// Returns the first address in this process as a pointer.
    #[inline]
    pub(crate) fn start(&self) -> *const u8 {
        self.0.start()
    }

    /// Copies to `target`, up to the end of the shorter; returns the number of bytes copied.
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
pub(crate) struct Unaligned<T>(pub(crate) T);

/// Copies `length` bytes of shared memory, mostly as 8-byte words, and reads each byte once.
///
/// # Safety
/// Both ranges must be mapped and must not overlap, and no other thread may access `to`.
#[inline]
unsafe fn copy_once(from: *const u8, to: *mut u8, length: usize) {
    let mut done = 0;
    // SAFETY: every access lies within `length` bytes of `from` and `to`, which the caller promises are mapped.
    // Unaligned has alignment 1.
    unsafe {
        let copy_word = |at: usize| {
            let word = from.add(at).cast::<Unaligned<u64>>().read_volatile();
            to.add(at).cast::<Unaligned<u64>>().write(word);
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
            to.add(done).cast::<Unaligned<u32>>().write(word);
            done += 4;
        }
        if length - done >= 2 {
            let word = from.add(done).cast::<Unaligned<u16>>().read_volatile();
            to.add(done).cast::<Unaligned<u16>>().write(word);
            done += 2;
        }
        if done < length {
            to.add(done).write(from.add(done).read_volatile());
        }
    }
}
