//! System calls: the second of the two rooms where `unsafe` is allowed.
//!
//! Each function here is safe to call: it checks what the kernel's interface asks of its caller,
//! owns what it maps or opens, and turns an error number into an [`std::io::Error`].

#![allow(unsafe_code)]

pub mod bpf;
pub mod eventfd;
pub mod link;
pub mod process;
pub mod socket;
pub mod tap;
pub mod umem;
pub mod uring;
pub mod xsk;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::guest::Segment;

/// Turns the `-1` of a system call into the error behind it.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Writes all segments with one call, as one frame.
fn write_segments(fd: BorrowedFd<'_>, segments: &[Segment<'_>]) -> io::Result<usize> {
    // SAFETY: a Segment is an iovec over mapped guest memory or memory of our own, which its
    // lifetime keeps; the kernel only reads it here.
    let written = unsafe {
        libc::writev(fd.as_raw_fd(), segments.as_ptr().cast(), segments.len() as libc::c_int)
    };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(written as usize) }
}

/// A new epoll instance.
pub fn epoll() -> io::Result<OwnedFd> {
    let fd = epoll::create(true)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
