//! Pieces of memory that the kernel, or the daemon, reads and writes: `iovec`s whose lifetime says how
//! long they stay mapped.
//!
//! Invariant: nobody gets a slice of shared memory. What the guest may be writing is copied out, by
//! volatile access, and only the copy is looked at.
//!
//! The type is of this room, since the system calls take it, and says nothing about where memory comes
//! from. `Segment::new` is therefore an `unsafe fn`: its caller promises that the bytes stay mapped,
//! readable and writable, for `'mem`. `guest` keeps the promise by borrowing the mapping of a region or
//! of a UMEM, [`tap`](super::tap) with a byte of its own stack. Safe code can only make a segment smaller,
//! or join two that are adjacent; code outside of `guest` and `sys` cannot write `unsafe`, so it cannot
//! make one for memory of its choice. [`ReadSegment::of_bytes`] is safe: it borrows a slice, and a
//! `ReadSegment` has no way to write.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

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
    pub(crate) const EMPTY: Self = Segment {
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

    /// The same, from a segment's own [`start`](Self::start).
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline]
    pub(crate) unsafe fn at(start: *mut u8, length: usize) -> Self {
        let iovec = libc::iovec { iov_base: start.cast(), iov_len: length };
        Segment { iovec, memory: PhantomData }
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
    pub(crate) fn prefetch(&self) {
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

    /// A copy of its first bytes, if it has as many.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> Option<[u8; N]> {
        (self.len() >= N).then(|| {
            let mut bytes = [0; N];
            self.read(&mut bytes);
            bytes
        })
    }

    /// Its first two bytes as a little-endian number, if it has as many.
    #[inline(always)]
    pub fn first_u16(&self) -> Option<u16> {
        self.first_bytes().map(u16::from_le_bytes)
    }

    /// Copies to `target` as much as both have; returns the bytes copied.
    #[inline]
    pub fn read(&self, target: &mut [u8]) -> usize {
        let length = self.len().min(target.len());
        // SAFETY: `length` bytes are mapped (`new`) and `target` is our own, so they do not
        // overlap. The guest may write meanwhile: the copy may then mix old and new bytes, but
        // it is taken once, and only the copy is used.
        unsafe { copy_once(self.start(), target.as_mut_ptr(), length) };
        length
    }

    /// Copies to `target` as much as both have, of what is passed on and not looked at; returns the bytes
    /// copied. The guest may write meanwhile, and these bytes may then be read more than once.
    #[inline]
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let length = self.len().min(target.len());
        // SAFETY: as in `read`; every byte is a value, whatever the guest does.
        unsafe { std::ptr::copy_nonoverlapping(self.start(), target.as_mut_ptr(), length) };
        length
    }

    /// Copies from `source` as much as both have; returns the bytes copied.
    #[inline]
    pub fn write(&self, source: &[u8]) -> usize {
        let length = self.len().min(source.len());
        // SAFETY: as in `read`, the other way round. Nobody reads this back; the guest looks at it when
        // the used index says so, which is stored later, with release.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.start(), length) };
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
/// # use vhost_user_net::sys::segment::ReadSegment;
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
pub(crate) struct Unaligned<T>(pub(crate) T);

/// Copies `length` bytes of shared memory such that each is read once, as words where it can.
///
/// # Safety
/// Both ranges must be mapped and must not overlap, and nobody else may see `to`.
#[inline]
unsafe fn copy_once(from: *const u8, to: *mut u8, length: usize) {
    let mut done = 0;
    // SAFETY: every access lies within `length` bytes of `from` and `to`; Unaligned has
    // alignment 1.
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
