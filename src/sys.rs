//! System calls: the second of the two rooms where `unsafe` is allowed.
//!
//! Each function here is safe to call: it checks what the kernel's interface asks of its caller,
//! owns what it maps or opens, and turns an error number into an [`std::io::Error`].

#![allow(unsafe_code)]

pub mod eventfd;
pub mod process;
pub mod socket;
pub mod tap;
pub mod uring;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Turns the `-1` of a system call into the error behind it.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new epoll instance.
pub fn epoll() -> io::Result<OwnedFd> {
    let fd = epoll::create(true)?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
