//! The socket filters of a TAP's queues: programs of classic BPF, which say of each frame whether it
//! reaches the reader.
//!
//! The kernel has one filter for all queues that frames are steered to when it is set; a queue keeps
//! the filter that it has while none are. When frames are steered to a queue *after* a filter was
//! set, `tun_attach` reads the program again, from where it was then in the memory of whoever asks.
//! What it finds there could be anything by now; and if it is a program, the queue is left out
//! (drivers/net/tun.c, read in 4.20, tried on 6.18). Therefore a program lies in memory that only
//! [`ProgramMemory::set`] makes readable: at any other time the kernel finds nothing, and the queue
//! keeps its filter.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use libc::{sock_filter, sock_fprog};

use super::{Queue, check};

/// Instructions of a program at the most (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
const LENGTH: usize = MAX_INSTRUCTIONS * mem::size_of::<sock_filter>();

/// Memory for the program of one device's filter, which stays where it is as long as the device has
/// a filter, and has nobody read from it.
#[derive(Debug)]
pub struct ProgramMemory(NonNull<sock_filter>);

// SAFETY: the mapping is the value's own, and is written to through `&mut` only.
unsafe impl Send for ProgramMemory {}

impl ProgramMemory {
    /// Takes the memory.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), LENGTH, libc::PROT_NONE, flags, -1, 0) };
        match NonNull::new(address.cast()).filter(|_| address != libc::MAP_FAILED) {
            Some(address) => Ok(ProgramMemory(address)),
            None => Err(io::Error::last_os_error()),
        }
    }

    fn protect(&mut self, protection: libc::c_int) -> io::Result<()> {
        // SAFETY: all of the mapping is ours, and nothing in Rust refers to it.
        unsafe { check(libc::mprotect(self.0.as_ptr().cast(), LENGTH, protection))? };
        Ok(())
    }

    /// Has the kernel ask the program about frames for each queue of the device that frames are
    /// steered to, in the stead of the one before.
    ///
    /// # Errors
    /// EINVAL if it is no program, ENOMEM if it is larger than `net.core.optmem_max` allows.
    pub fn set(&mut self, queue: &Queue, program: &[sock_filter]) -> io::Result<()> {
        if program.len() > MAX_INSTRUCTIONS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        let described = sock_fprog { len: program.len() as u16, filter: self.0.as_ptr() };
        // SAFETY: the mapping has room for the instructions, and may be written to now.
        // TUNATTACHFILTER reads one sock_fprog and the program that it describes.
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
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LENGTH) };
    }
}

impl Queue {
    /// Has all frames reach each queue of the device that frames are steered to, whoever had set a
    /// filter. A macvtap has none.
    ///
    /// # Errors
    /// Those of the device.
    pub fn clear_filter(&self) -> io::Result<()> {
        if self.identity.is_macvtap {
            return Ok(());
        }
        // SAFETY: TUNDETACHFILTER reads nothing.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNDETACHFILTER, 0))? };
        Ok(())
    }
}
