//! Socket filters of a TAP's queues: classic BPF programs that decide for each frame whether the reader
//! gets it.
//!
//! The kernel applies a filter to all queues that are attached when the filter is set. A detached queue keeps
//! its own filter. When a queue is attached *later*, `tun_attach` reads the program again, from the same
//! address, in the memory of the process that attaches the queue. By then other data may be there; and if the
//! kernel does find a program, it leaves the queue out (drivers/net/tun.c, read in 4.20, tried on 6.18).
//!
//! Invariant: a program lies in memory that is readable only during [`ProgramMemory::set`]. At any other time
//! the kernel's read fails, and the queue keeps its filter.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use libc::{sock_filter, sock_fprog};

use super::{Queue, check};

/// Maximum number of instructions of a program (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
const LENGTH: usize = MAX_INSTRUCTIONS * mem::size_of::<sock_filter>();

/// Memory for the program of one device's filter, unreadable except while the filter is set. It must live as
/// long as the device has a filter, so that no other data gets its address.
#[derive(Debug)]
pub struct ProgramMemory(NonNull<sock_filter>);

// SAFETY: only this value owns the mapping, and all access to it requires `&mut`.
unsafe impl Send for ProgramMemory {}

impl ProgramMemory {
    /// Maps the memory.
    ///
    /// # Errors
    /// ENOMEM if the kernel has no memory for the mapping.
    pub fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: creates a mapping at an address that the kernel chooses, so it replaces no other.
        let address = unsafe { libc::mmap(ptr::null_mut(), LENGTH, libc::PROT_NONE, flags, -1, 0) };
        match NonNull::new(address.cast()).filter(|_| address != libc::MAP_FAILED) {
            Some(address) => Ok(ProgramMemory(address)),
            None => Err(io::Error::last_os_error()),
        }
    }

    fn protect(&mut self, protection: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is exactly the mapping, which this value owns, and no Rust reference to it exists.
        unsafe { check(libc::mprotect(self.0.as_ptr().cast(), LENGTH, protection))? };
        Ok(())
    }

    /// Sets `program` as the filter of all attached queues of the queue's device, in place of any other filter.
    ///
    /// # Errors
    /// EINVAL if the program is invalid, ENOMEM if it exceeds `net.core.optmem_max`.
    pub fn set(&mut self, queue: &Queue, program: &[sock_filter]) -> io::Result<()> {
        if program.len() > MAX_INSTRUCTIONS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        let described = sock_fprog { len: program.len() as u16, filter: self.0.as_ptr() };
        // SAFETY: the mapping has space for MAX_INSTRUCTIONS, is writable now, and does not overlap `program`,
        // because no Rust reference to it exists. TUNATTACHFILTER reads one sock_fprog and the program that it
        // describes; both live through the call.
        let set = unsafe {
            ptr::copy_nonoverlapping(program.as_ptr(), self.0.as_ptr(), program.len());
            check(libc::ioctl(queue.file.as_raw_fd(), libc::TUNATTACHFILTER, &described))
        };
        self.protect(libc::PROT_NONE)?;
        set.map(drop)
    }
}

impl Drop for ProgramMemory {
    fn drop(&mut self) {
        // SAFETY: the range is exactly the mapping, which this value owns, and no Rust reference to it exists.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LENGTH) };
    }
}

impl Queue {
    /// Removes the filter from all attached queues of the device, even if another process set it. Does nothing for
    /// a macvtap, which has no filter.
    ///
    /// # Errors
    /// The errors of the ioctl.
    pub fn clear_filter(&self) -> io::Result<()> {
        if self.identity.is_macvtap {
            return Ok(());
        }
        // SAFETY: TUNDETACHFILTER does not read its argument.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNDETACHFILTER, 0))? };
        Ok(())
    }
}
