//! Guest memory that goes away while it is used: its file is truncated, or a page of it breaks.
//!
//! The kernel answers a touch of such memory with SIGBUS, which would end the process and every
//! port in it. The handler puts empty memory in the region's place instead, so that whatever was
//! under way goes on with zeros, and marks the table as lost: the worker stops at its next turn.
//! Only this port has lost anything.
//!
//! Invariant: a thread touches guest memory only inside [`contained`] for the table, and the handler
//! follows a pointer to a table only while `contained` borrows that table.

use std::cell::Cell;
use std::io;
use std::ptr;

use super::GuestMemory;

thread_local! {
    /// The table that this thread may touch. A plain value without destructor: reading it in a
    /// signal handler needs neither locks nor memory.
    static SERVED: Cell<*const GuestMemory> = const { Cell::new(ptr::null()) };
}

/// Runs `work`, during which a SIGBUS on the table's memory costs the calling thread nothing but
/// the memory. Inside another scope, the inner table is contained and then the outer one again.
pub fn contained<T>(memory: &GuestMemory, work: impl FnOnce() -> T) -> T {
    /// Restores the outer table. It never leaves `contained`, so nobody can forget it.
    struct Scope(*const GuestMemory);
    impl Drop for Scope {
        fn drop(&mut self) {
            SERVED.set(self.0);
        }
    }
    let _scope = Scope(SERVED.replace(memory));
    work()
}

/// Installs the handler, for the whole process.
pub fn contain_sigbus() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction; the handler has the signature that SA_SIGINFO asks
    // for and calls nothing but async-signal-safe functions.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t.
    if unsafe { (*info).si_code } <= 0 {
        // A process sent it (SI_USER, SI_QUEUE, SI_TKILL): no memory has gone, and there is no
        // address. si_code of a fault is positive, and no process can send that to another.
        return;
    }
    // SAFETY: for a fault, a SIGBUS has an address. errno is this thread's.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    // SAFETY: `contained` borrows the table for as long as its address is here, and the signal is
    // handled by the thread that caused it.
    let served = unsafe { SERVED.get().as_ref() };
    if !served.is_some_and(|memory| memory.replace_with_zeros(address)) {
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

    const REGION: RegionRequest =
        RegionRequest { guest_address: 0, size: 0x4000, frontend_address: 0, file_offset: 0 };

    /// A table of one region, and the region's file, to be truncated.
    fn memory() -> (GuestMemory, File) {
        // SAFETY: a fresh descriptor, owned by the File.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(REGION.size).unwrap();
        let other = file.try_clone().unwrap();
        (GuestMemory::map([(REGION, file)]).unwrap(), other)
    }

    fn byte(memory: &GuestMemory) -> *mut u8 {
        memory.resolve(GuestAddress(0x2345), 1).unwrap().as_ptr()
    }

    #[test]
    fn memory_that_is_cut_reads_as_zeros_and_is_known_to_be_lost() {
        contain_sigbus().unwrap();
        let (memory, file) = memory();
        let byte = byte(&memory);
        // SAFETY: resolve vouches for the byte; the table lives.
        contained(&memory, || unsafe {
            byte.write_volatile(7);
            file.set_len(0x1000).unwrap();
            assert!(!memory.is_lost());
            assert_eq!(byte.read_volatile(), 0);
            byte.write_volatile(8);
            assert_eq!(byte.read_volatile(), 8);
        });
        assert!(memory.is_lost());
        let with_more = memory.without(REGION).unwrap();
        assert!(with_more.is_lost(), "a table that was made from it has lost as much");
    }

    #[test]
    fn inner_scope_restores_the_outer_one() {
        contain_sigbus().unwrap();
        let ((outer, outer_file), (inner, inner_file)) = (memory(), memory());
        // SAFETY: resolve vouches for both bytes; the tables live.
        contained(&outer, || unsafe {
            let panicked = std::panic::catch_unwind(|| {
                contained(&inner, || {
                    inner_file.set_len(0).unwrap();
                    assert_eq!(byte(&inner).read_volatile(), 0);
                    std::panic::resume_unwind(Box::new(()));
                })
            });
            assert!(panicked.is_err() && inner.is_lost());
            outer_file.set_len(0).unwrap();
            assert_eq!(byte(&outer).read_volatile(), 0);
        });
        assert!(outer.is_lost());
    }

    #[test]
    fn sent_sigbus_leaves_containment_in_place() {
        contain_sigbus().unwrap();
        let (memory, file) = memory();
        contained(&memory, || {
            // SAFETY: sends a signal to the calling thread, whose handler is installed.
            unsafe { libc::raise(libc::SIGBUS) };
            assert!(!memory.is_lost());
            file.set_len(0).unwrap();
            // SAFETY: resolve vouches for the byte; the table lives.
            assert_eq!(unsafe { byte(&memory).read_volatile() }, 0);
        });
        assert!(memory.is_lost());
    }
}
