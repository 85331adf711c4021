//! Guest memory that goes away while it is used: its file is truncated, or a page of it breaks.
//!
//! The kernel answers a touch of such memory with SIGBUS, which would end the process and every
//! port in it. The handler puts empty memory in the region's place instead, so that whatever was
//! under way goes on with zeros, and marks the table as lost: the worker stops at its next turn.
//! Only this port has lost anything.
//!
//! Invariant: a thread touches guest memory only while it holds a [`Contained`] for the table.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;

use super::GuestMemory;

thread_local! {
    /// The table that this thread may touch. A plain value without destructor: reading it in a
    /// signal handler needs neither locks nor memory.
    static SERVED: Cell<*const GuestMemory> = const { Cell::new(ptr::null()) };
}

/// For as long as this lives, a SIGBUS on the table's memory costs the calling thread nothing but
/// the memory.
#[derive(Debug)]
pub struct Contained<'mem>(PhantomData<(&'mem GuestMemory, *const ())>);

impl<'mem> Contained<'mem> {
    /// For the calling thread, which serves one table at a time.
    pub fn new(memory: &'mem GuestMemory) -> Self {
        SERVED.set(memory);
        Contained(PhantomData)
    }
}

impl Drop for Contained<'_> {
    fn drop(&mut self) {
        SERVED.set(ptr::null());
    }
}

/// Installs the handler, for the whole process.
pub fn contain_sigbus() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction; the handler has the signature that SA_SIGINFO asks
    // for and calls nothing but async-signal-safe functions.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t; for SIGBUS it has an address. errno is this thread's.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    // SAFETY: `Contained` borrows the table for as long as its address is here, and the signal is
    // handled by the thread that caused it.
    let served = unsafe { SERVED.get().as_ref() };
    if !served.is_some_and(|memory| memory.lose(address)) {
        // Not the guest's: a fault of our own ends the process as it would without us.
        // SAFETY: sets the default action; the instruction faults once more.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::memory::RegionRequest;
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use vm_memory::GuestAddress;

    #[test]
    fn memory_that_is_cut_reads_as_zeros_and_is_known_to_be_lost() {
        contain_sigbus().unwrap();
        // SAFETY: a fresh descriptor, owned by the File.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(0x4000).unwrap();
        let other = file.try_clone().unwrap();
        let request =
            RegionRequest { guest_address: 0, size: 0x4000, frontend_address: 0, file_offset: 0 };
        let memory = GuestMemory::map([(request, file)]).unwrap();
        let byte = memory.resolve(GuestAddress(0x2345), 1).unwrap().as_ptr();
        let contained = Contained::new(&memory);
        // SAFETY: resolve vouches for the byte; the table lives.
        unsafe {
            byte.write_volatile(7);
            other.set_len(0x1000).unwrap();
            assert!(!memory.is_lost());
            assert_eq!(byte.read_volatile(), 0);
            byte.write_volatile(8);
            assert_eq!(byte.read_volatile(), 8);
        }
        assert!(memory.is_lost());
        drop(contained);
        let with_more = memory.without(request).unwrap();
        assert!(with_more.is_lost(), "a table that was made from it has lost as much");
    }
}
