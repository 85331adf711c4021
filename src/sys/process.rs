//! System calls about this process: its signals, threads, inherited descriptors and limits, and its memory files.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, FdFlag, OFlag, SealFlag, fcntl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::pthread::pthread_kill;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{self, SigHandler, SigSet};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, fstat, umask};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::sys::sysinfo::sysinfo;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{AccessFlags, Pid, SysconfVar, faccessat, sysconf};

use super::check;

/// Request of an operator by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT: end the process.
    End,
    /// SIGHUP: read the configuration again.
    Reload,
}

/// A descriptor that is readable when SIGTERM, SIGINT or SIGHUP has arrived.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and in each thread that it starts later, and opens the descriptor.
    ///
    /// Ignores SIGXFSZ too: a write beyond the process's largest file size (RLIMIT_FSIZE) then fails.
    pub fn block() -> io::Result<Self> {
        // SAFETY: no handler is installed.
        unsafe { signal::signal(signal::SIGXFSZ, SigHandler::SigIgn)? };
        let set = SigSet::from_iter([signal::SIGTERM, signal::SIGINT, signal::SIGHUP]);
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Signals(SignalFd::with_flags(&set, flags)?))
    }

    /// Takes the next signal that has arrived.
    pub fn take(&self) -> Option<Signal> {
        let arrived = self.0.read_signal().ok()??;
        let reload = arrived.ssi_signo == libc::SIGHUP as u32;
        Some(if reload { Signal::Reload } else { Signal::End })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes all threads allocate from the one malloc arena that grows by brk(2).
///
/// Other arenas cost memory. To create or shrink one, the C library reads files (the number of CPUs, the overcommit
/// setting). A sandboxed thread may not open them: its seccomp filter would kill the process.
pub fn share_pool() {
    // SAFETY: these calls set numbers of the allocator; it ignores those that it does not know.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Freed blocks of this size and more return to the kernel. It is the default, which would otherwise grow
        // when the first such block is freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Raises the soft limit of open descriptors to the hard limit, because all VMMs share the limit. If the kernel
/// refuses, the soft limit stays. Returns the limit in force, if it can be read.
pub fn raise_descriptor_limit() -> Option<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    Some(if raised.is_ok() { hard } else { soft })
}

/// Descriptors that this process was started with, and that [`inherit`] has not taken yet.
static INHERITED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Records the descriptors that this process was started with, for [`inherit`] to take. These are the open
/// descriptors without the close-on-exec flag.
///
/// # Safety
/// No descriptor without this flag may have an owner in this process, except the standard streams. The function must
/// be called before any descriptor is opened.
pub unsafe fn note_inherited() {
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().filter_map(|entry| {
        let number: RawFd = entry.ok()?.file_name().to_str()?.parse().ok()?;
        (number > 2 && descriptor_flags(number).ok()? & libc::FD_CLOEXEC == 0).then_some(number)
    });
    INHERITED.lock().unwrap_or_else(PoisonError::into_inner).extend(numbers);
}

/// Returns the flags of a descriptor (`F_GETFD`).
fn descriptor_flags(number: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: fcntl with this command changes nothing, and fails if no descriptor of this number is open.
    unsafe { check(libc::fcntl(number, libc::F_GETFD)) }
}

/// Takes a descriptor that this process was started with; each can be taken once.
///
/// # Errors
/// The number is no open descriptor, or a standard stream. Or [`note_inherited`] did not find it, or it was taken
/// before.
pub fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if number <= 2 {
        return invalid(format!("descriptor {number} is a standard stream"));
    }
    descriptor_flags(number)?;
    if !INHERITED.lock().unwrap_or_else(PoisonError::into_inner).remove(&number) {
        return invalid(format!(
            "descriptor {number} is this process's own; name one that it was started with, once"
        ));
    }
    // SAFETY: the descriptor was open before any other had an owner (`note_inherited`). Its number has just left
    // the set, so nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Closes the descriptors that this process was started with and that [`inherit`] has not taken.
pub fn close_inherited() {
    let left = mem::take(&mut *INHERITED.lock().unwrap_or_else(PoisonError::into_inner));
    for number in left {
        // SAFETY: as in `inherit`: the number has just left the set, so nothing else owns the descriptor.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

/// Binds the calling thread to one CPU.
///
/// # Errors
/// `InvalidInput` if the CPU does not exist, or this process may not use it.
pub fn pin_this_thread(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Checks that this process may create files in a directory.
///
/// # Errors
/// EACCES, EROFS, or an error of finding the directory.
pub fn check_writable(directory: &Path) -> io::Result<()> {
    access(directory, AccessFlags::W_OK | AccessFlags::X_OK)
}

/// Checks that this thread has the permissions `mode` on a file.
fn access(path: &Path, mode: AccessFlags) -> io::Result<()> {
    Ok(faccessat(AT_FDCWD, path, mode, AtFlags::AT_EACCESS)?)
}

/// Returns the umask. The process must have one thread, because the umask is 0777 for a moment.
pub fn file_mode_mask() -> u32 {
    let mask = umask(Mode::all());
    umask(mask);
    mask.bits()
}

/// Sets the umask to 0: new files get all permissions that they are created with.
pub fn clear_file_mode_mask() {
    umask(Mode::empty());
}

/// Checks that threads of this process may run on these CPUs, by binding a thread to each.
///
/// # Errors
/// Names the first CPU that does not exist, or that this process may not use.
pub fn check_cpus(cpus: &[usize]) -> Result<(), String> {
    let refused = |(cpu, error): (&usize, io::Error)| format!("cannot run on CPU {cpu}: {error}");
    thread::scope(|scope| {
        let tried = scope.spawn(|| {
            cpus.iter().try_for_each(|cpu| pin_this_thread(*cpu).map_err(|error| (cpu, error)))
        });
        tried.join().map_err(|_| "cannot start a thread".to_owned())?.map_err(refused)
    })
}

/// The CPU clock of a thread: the time that the thread has run.
#[derive(Debug, Clone, Copy)]
pub struct ThreadClock(ClockId);

impl ThreadClock {
    /// Returns the clock of the calling thread.
    pub fn of_this_thread() -> Self {
        let mut clock = libc::CLOCK_THREAD_CPUTIME_ID;
        // SAFETY: the calling thread is alive, and the call writes only to `clock`.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        ThreadClock(ClockId::from_raw(clock))
    }

    /// Reads the clock, from any thread; `None` if the clock's thread has ended.
    pub fn elapsed(&self) -> Option<Duration> {
        clock_gettime(self.0).ok().map(Duration::from)
    }
}

/// Installs a handler for SIGURG that does nothing, without SA_RESTART. [`interrupt`] then makes a blocked system
/// call of a thread return `EINTR`.
pub fn permit_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(libc::SIGURG, nothing).map_err(io::Error::from)
}

/// Interrupts the system call that blocks a thread. [`permit_interrupts`] must have been called.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // The thread's id is its handle's own, and is valid until the handle is joined or dropped.
    let _ = pthread_kill(thread.as_pthread_t(), signal::SIGURG);
}

/// Checks that a user with these groups has the permissions `mode` on a file. Without a user, checks this process.
/// The kernel decides, with access control lists.
///
/// # Errors
/// EACCES or EPERM without the permission, ENOENT without the file. EPERM also if this process may not become the
/// user.
pub fn may_access(
    user: Option<(libc::uid_t, &[libc::gid_t])>,
    path: &Path,
    mode: AccessFlags,
) -> io::Result<()> {
    let ask = || {
        if let Some((uid, groups)) = user {
            become_user_in_thread(uid, groups)?;
        }
        access(path, mode)
    };
    // To the kernel, credentials belong to a thread. This thread ends after the check.
    let panicked = |_| Err(io::Error::other("the thread that checks has panicked"));
    thread::scope(|scope| scope.spawn(ask).join().unwrap_or_else(panicked))
}

/// Gives the calling thread, and no other, another user's credentials for good. The C library's functions change all
/// threads of the process; their system calls change one.
///
/// # Errors
/// EPERM if this process may not do so.
fn become_user_in_thread(uid: libc::uid_t, groups: &[libc::gid_t]) -> io::Result<()> {
    let gid = groups.first().copied().unwrap_or(uid);
    // SAFETY: `groups` lives through the first call, which reads `groups.len()` numbers. The others take numbers
    // only. The changes end with this thread.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()),
            libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ]
    };
    if results.iter().any(|&result| result < 0) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(())
}

/// Properties of a file that a mapping depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// True if the file is open for reading and writing, and no seal forbids writing.
    pub writable: bool,
    /// Size in bytes.
    pub size: u64,
    /// True if the file cannot be truncated any more (F_SEAL_SHRINK of memfd_create(2)).
    pub sealed: bool,
    /// Alignment in bytes of a mapping's offset and length: the page size, or the huge page size on hugetlbfs.
    pub alignment: u64,
}

/// Reads the properties of a memfd, or of a file on tmpfs or hugetlbfs; returns `None` for any other file.
///
/// Another file system can block the daemon for as long as it likes, in system calls and in page faults. It can be the
/// frontend's own (FUSE).
pub fn file_facts(file: &File) -> io::Result<Option<FileFacts>> {
    // Only files of memory have seals (memfd_file_seals_ptr), and the kernel asks no file system for them.
    // Directories and devices on tmpfs have none.
    let seals = match fcntl(file, FcntlArg::F_GET_SEALS) {
        Err(Errno::EINVAL) => return Ok(None),
        seals => SealFlag::from_bits_retain(seals?),
    };
    let (stat, fs) = (fstat(file)?, fstatfs(file)?);
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let page = page_size();
    let is_huge = fs.filesystem_type() == HUGETLBFS_MAGIC;
    let unwritable = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE;
    Ok(Some(FileFacts {
        writable: flags & OFlag::O_ACCMODE == OFlag::O_RDWR && !seals.intersects(unwritable),
        size: stat.st_size as u64,
        sealed: seals.contains(SealFlag::F_SEAL_SHRINK),
        alignment: if is_huge { page.max(fs.optimal_transfer_size() as u64) } else { page },
    }))
}

/// Returns whether a descriptor is a regular file or a device. AT_STATX_DONT_SYNC keeps a file system's server (FUSE)
/// from being asked, which could block the daemon.
pub fn holds_data(file: &File) -> io::Result<bool> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: all zeros is a valid statx, which the kernel fills; the path is an empty string.
    let facts = unsafe {
        let mut facts: libc::statx = mem::zeroed();
        let path = c"".as_ptr();
        check(libc::statx(file.as_raw_fd(), path, flags, libc::STATX_TYPE, &mut facts))?;
        facts
    };
    let kind = libc::mode_t::from(facts.stx_mode) & libc::S_IFMT;
    Ok([libc::S_IFREG, libc::S_IFCHR, libc::S_IFBLK].contains(&kind))
}

/// Creates a memfd of `length` bytes, all zeros, whose size no process can change.
pub fn sealed_memory(name: &CStr, length: u64) -> io::Result<File> {
    memory_with_seals(name, length, SealFlag::empty())
}

/// Creates an empty memfd that no process can write to. It replaces a file that is not kept.
pub fn unwritable_memory(name: &CStr) -> io::Result<File> {
    memory_with_seals(name, 0, SealFlag::F_SEAL_WRITE)
}

fn memory_with_seals(name: &CStr, length: u64, seals: SealFlag) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(length)?;
    let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals | fixed))?;
    Ok(file)
}

/// Returns the host's RAM in bytes, as of the first call: a sandboxed thread may not read it.
pub fn host_memory() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| sysinfo().map_or(0, |facts| facts.ram_total()))
}

/// Returns the page size in bytes.
pub fn page_size() -> u64 {
    let size = sysconf(SysconfVar::PAGE_SIZE);
    size.ok().flatten().expect("the kernel tells each process its page size") as u64
}

/// Sets O_NONBLOCK of an open file, for all its descriptors.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Returns a descriptor's name for messages, from `/proc/self/fd`.
pub fn describe(fd: BorrowedFd<'_>) -> String {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map(|path| path.display().to_string())
        .unwrap_or_else(|_| format!("descriptor {}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn own_descriptors_are_not_inherited() {
        let file = File::open("/").unwrap();
        let error = inherit(file.as_raw_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        assert!(file.metadata().is_ok(), "the descriptor was closed");
        assert_eq!(inherit(RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn interrupt_ends_system_call_and_ignores_ended_thread() {
        permit_interrupts().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let thread = std::thread::spawn(move || (&reader).read(&mut [0]));
        while !thread.is_finished() {
            interrupt(&thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        interrupt(&thread);
        assert_eq!(thread.join().unwrap().unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
