//! System calls: one of the two modules with `unsafe` code; the other is [`guest`](crate::guest).
//!
//! Invariant: each public function is safe to call. It checks the preconditions of its system call, owns
//! what it maps or opens, and returns an error number as an [`std::io::Error`].

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

/// Plain old data: types that the kernel may fill with any bytes and read whole.
///
/// # Safety
/// Every bit pattern must be a value of the type, and the type must have no padding.
pub unsafe trait Plain: Copy + 'static {}

// SAFETY: every bit pattern of an integer is a value, and integers have no padding.
unsafe impl Plain for u8 {}
// SAFETY: as for u8.
unsafe impl Plain for u32 {}
// SAFETY: as for u8.
unsafe impl Plain for u64 {}
// SAFETY: `T` has no invalid bit pattern and no padding, and an array adds no padding between its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Returns the value whose bytes are all zero.
fn zeros<T: Plain>() -> T {
    // SAFETY: every bit pattern is a value of `T`, as its implementation of `Plain` promises.
    unsafe { std::mem::zeroed() }
}

/// Returns a system call's result, or the error in `errno` if the result is negative.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Writes all segments as one frame, with one system call.
fn write_segments(fd: BorrowedFd<'_>, segments: &[ReadSegment<'_>]) -> io::Result<usize> {
    let calls = [libc::SYS_write, libc::SYS_writev];
    // SAFETY: a ReadSegment has the layout of a Segment (`repr(transparent)`). Its memory, shared or our own,
    // stays mapped for its lifetime, which outlasts the call; these calls only read it.
    unsafe {
        transfer(calls, fd, std::slice::from_raw_parts(segments.as_ptr().cast(), segments.len()))
    }
}

/// Reads one frame into the segments.
fn read_segments(fd: BorrowedFd<'_>, segments: &[Segment<'_>]) -> io::Result<usize> {
    // SAFETY: a Segment's memory stays mapped for its lifetime, which outlasts the call. It is shared memory,
    // which may change at any time anyway, or our own memory that nothing else accesses during the call.
    unsafe { transfer([libc::SYS_read, libc::SYS_readv], fd, segments) }
}

/// Moves one frame: a single segment with the system call `one`, which saves the kernel a copy of the list,
/// several with `list`.
///
/// The C library's functions of these names are cancellation points, which cost two locked operations per
/// frame. So this function makes the system calls directly.
///
/// # Safety
/// The segments' memory must stay mapped through the call, and the calls must be allowed to read or write
/// it, as they do.
#[inline]
unsafe fn transfer(
    [one, list]: [libc::c_long; 2],
    fd: BorrowedFd<'_>,
    segments: &[Segment<'_>],
) -> io::Result<usize> {
    let fd = fd.as_raw_fd();
    // SAFETY: a Segment has the layout of an iovec (`repr(transparent)`). The caller promises the rest.
    let moved = unsafe {
        match segments {
            [only] => libc::syscall(one, fd, only.start(), only.len()),
            _ => libc::syscall(list, fd, segments.as_ptr(), segments.len()),
        }
    };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(moved as usize) }
}

/// Waits until one of two descriptors has its event (`POLLIN`, `POLLOUT`), `timeout` has passed (none: no
/// limit), or a signal arrives. Returns for each descriptor whether it has an event.
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

/// Returns true if the other end of a pipe or a socket is closed.
pub fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::empty())], PollTimeout::ZERO).is_ok_and(|found| found > 0)
}

/// Creates an epoll instance, closed on exec.
pub fn epoll() -> io::Result<OwnedFd> {
    let fd = epoll::create(true)?;
    // SAFETY: the kernel has just created the descriptor, and it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
