//! System calls: the second of the two rooms where `unsafe` is allowed.
//!
//! Each function here is safe to call: it checks what the kernel's interface asks of its caller,
//! owns what it maps or opens, and turns an error number into an [`std::io::Error`].

#![allow(unsafe_code)]

pub mod bpf;
pub mod device;
pub mod ethtool;
pub mod eventfd;
pub mod flow;
pub mod genetlink;
pub mod link;
pub mod process;
pub mod segment;
pub mod socket;
pub mod stream;
pub mod tap;
pub mod uring;
pub mod xsk;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;

use segment::{ReadSegment, Segment};

/// Plain old data: what the kernel may fill with any bytes, and read all bytes of.
///
/// # Safety
/// Every pattern of bits must be a value of the type, and the type must have no padding.
pub unsafe trait Plain: Copy + 'static {}

// SAFETY: integers, and arrays of such, have all bit patterns and no padding.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// The value whose bytes are all zero.
fn zeros<T: Plain>() -> T {
    // SAFETY: every pattern of bits is a value.
    unsafe { std::mem::zeroed() }
}

/// Turns the `-1` of a system call into the error behind it.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Writes all segments with one call, as one frame.
fn write_segments(fd: BorrowedFd<'_>, segments: &[ReadSegment<'_>]) -> io::Result<usize> {
    let calls = [libc::SYS_write, libc::SYS_writev];
    // SAFETY: a ReadSegment is an iovec of mapped memory, shared or of our own, which its lifetime
    // keeps; the kernel only reads it here.
    unsafe {
        transfer(calls, fd, std::slice::from_raw_parts(segments.as_ptr().cast(), segments.len()))
    }
}

/// Reads one frame into the segments.
fn read_segments(fd: BorrowedFd<'_>, segments: &[Segment<'_>]) -> io::Result<usize> {
    // SAFETY: a Segment is mapped memory, which its lifetime keeps. It is shared, and so may be
    // written at any time, or it is memory of our own that is not looked at meanwhile.
    unsafe { transfer([libc::SYS_read, libc::SYS_readv], fd, segments) }
}

/// Moves the segments by the first of two system calls if there is one, which saves the kernel a copy
/// of the list, and else by the second.
///
/// Not by the C library's functions of these names: each is a point where a thread may be cancelled,
/// which costs two locked operations a frame.
///
/// # Safety
/// The segments must stay mapped, and may be what the calls do with them.
#[inline]
unsafe fn transfer(
    [one, list]: [libc::c_long; 2],
    fd: BorrowedFd<'_>,
    segments: &[Segment<'_>],
) -> io::Result<usize> {
    let fd = fd.as_raw_fd();
    // SAFETY: a Segment is an iovec; the rest is the caller's.
    let moved = unsafe {
        match segments {
            [only] => libc::syscall(one, fd, only.start(), only.len()),
            _ => libc::syscall(list, fd, segments.as_ptr(), segments.len()),
        }
    };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(moved as usize) }
}

/// Waits until one of two descriptors has what it is waited on for (`POLLIN`, `POLLOUT`), or
/// `timeout` has passed (none: for ever), or a signal arrives; says which of them has.
pub fn poll_two(
    fds: [(BorrowedFd<'_>, libc::c_short); 2],
    timeout: Option<Duration>,
) -> io::Result<[bool; 2]> {
    let mut polled = fds.map(|(fd, events)| PollFd::new(fd, PollFlags::from_bits_retain(events)));
    match ppoll(&mut polled, timeout.map(TimeSpec::from), None) {
        Err(Errno::EINTR) => Ok([false; 2]),
        result => Ok(result.map(|_| polled.map(|polled| polled.any() != Some(false)))?),
    }
}

/// Whether nobody is at the other end of a pipe or a socket any more.
pub fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::empty())], PollTimeout::ZERO).is_ok_and(|found| found > 0)
}

/// A new epoll instance.
pub fn epoll() -> io::Result<OwnedFd> {
    let fd = epoll::create(true)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
