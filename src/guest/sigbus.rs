//! Handling of SIGBUS from lost guest memory. Memory is lost when its file is truncated, or a page fails.
//!
//! An access to lost memory raises SIGBUS, which would end the process and all its ports. The handler maps
//! zeros over the region instead, and marks the table as lost. The access continues with zeros, and the worker
//! stops at its next turn. Other ports are not affected.
//!
//! Invariant: a thread touches guest memory only inside [`contained`] for its table, and the handler follows
//! a pointer to a table only while `contained` borrows that table.

use std::cell::Cell;
use std::io;
use std::ptr;

use super::GuestMemory;

thread_local! {
    /// The table that this thread may touch, or null. A plain value without destructor, so that a signal
    /// handler reads it without a lock or an allocation.
    static SERVED: Cell<*const GuestMemory> = const { Cell::new(ptr::null()) };
}

/// Runs `work`, during which the handler replaces lost memory of the table with zeros. Calls nest: the inner
/// call covers the inner table only, and then the outer table is covered again.
pub fn contained<T>(memory: &GuestMemory, work: impl FnOnce() -> T) -> T {
    /// Restores the outer table, also after a panic. Private to `contained`, so no caller can leak it.
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
///
/// # Errors
/// The errors of `sigaction`.
pub fn contain_sigbus() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction. The handler has the signature that SA_SIGINFO requires, and
    // calls only async-signal-safe functions.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t to an SA_SIGINFO handler.
    if unsafe { (*info).si_code } <= 0 {
        // A process sent the signal (SI_USER, SI_QUEUE, SI_TKILL): no memory is lost, and there is no
        // address. A fault's si_code is positive, which no process can send to another.
        return;
    }
    // SAFETY: the SIGBUS of a fault has an address. errno is this thread's own.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    // SAFETY: only `contained` sets SERVED, and it borrows the table for as long as the pointer is there. The
    // thread that caused the fault handles its signal, so SERVED is that thread's.
    let served = unsafe { SERVED.get().as_ref() };
    if !served.is_some_and(|memory| memory.replace_with_zeros(address)) {
        // The address is not in guest memory: the fault ends the process, as without this handler.
        // SAFETY: sets the default action, and returns to the instruction, which faults again.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: errno is this thread's own.
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

    /// Returns a table of one region, and the region's file, for truncation.
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
    fn truncated_memory_reads_as_zeros_and_is_lost() {
        contain_sigbus().unwrap();
        let (memory, file) = memory();
        let byte = byte(&memory);
        // SAFETY: `resolve` returned a mapped byte, and the table lives.
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
        assert!(with_more.is_lost(), "a table made from a lost table is lost too");
    }

    #[test]
    fn inner_scope_restores_the_outer_one() {
        contain_sigbus().unwrap();
        let ((outer, outer_file), (inner, inner_file)) = (memory(), memory());
        // SAFETY: `resolve` returned mapped bytes, and the tables live.
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
            // SAFETY: `resolve` returned a mapped byte, and the table lives.
            assert_eq!(unsafe { byte(&memory).read_volatile() }, 0);
        });
        assert!(memory.is_lost());
    }
}
