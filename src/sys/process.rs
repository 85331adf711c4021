//! Signals, threads and inherited descriptors of this process.

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

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM and SIGINT: to end.
    End,
    /// SIGHUP: to read the configuration again.
    Reload,
}

/// SIGTERM, SIGINT and SIGHUP as a descriptor that can be waited for.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread, and so in each thread that it starts from here on, and
    /// opens a descriptor that becomes readable when one arrives. Ignores SIGXFSZ: writing beyond the
    /// largest file that the process may have (RLIMIT_FSIZE) fails instead.
    pub fn block() -> io::Result<Self> {
        // SAFETY: no handler is installed.
        unsafe { signal::signal(signal::SIGXFSZ, SigHandler::SigIgn)? };
        let set = SigSet::from_iter([signal::SIGTERM, signal::SIGINT, signal::SIGHUP]);
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Signals(SignalFd::with_flags(&set, flags)?))
    }

    /// The next one that has arrived.
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

/// Has all threads allocate from the one pool that grows by brk(2). Pools of their own cost memory, and
/// to make or shrink one the C library reads files (the number of processors, whether memory is
/// overcommitted), which a sandboxed thread may not open: it would end the process.
pub fn share_pool() {
    // SAFETY: sets numbers of the allocator's. If it does not know one, that is as before.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // The default, which would grow with the first large block that is freed: such blocks go back to
        // the kernel.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Raises the soft limit of open descriptors to the hard limit: what one VMM takes is missing for its
/// neighbours. If the kernel refuses, the limit stays as it was. Returns the limit, if it can be read.
pub fn raise_descriptor_limit() -> Option<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    Some(if raised.is_ok() { hard } else { soft })
}

/// Descriptors that this process was started with, and that nobody has taken yet.
static INHERITED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Notes the descriptors that this process was started with, for [`inherit`] to take. Those have no
/// close-on-exec flag.
///
/// # Safety
/// No descriptor without that flag may have an owner in this process, but the standard streams: to be
/// called before anything is opened.
pub unsafe fn note_inherited() {
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().filter_map(|entry| {
        let number: RawFd = entry.ok()?.file_name().to_str()?.parse().ok()?;
        (number > 2 && descriptor_flags(number).ok()? & libc::FD_CLOEXEC == 0).then_some(number)
    });
    INHERITED.lock().unwrap_or_else(PoisonError::into_inner).extend(numbers);
}

/// Flags of a descriptor (`F_GETFD`).
fn descriptor_flags(number: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: fcntl with this command on any number is harmless: it fails where nothing is open.
    unsafe { check(libc::fcntl(number, libc::F_GETFD)) }
}

/// Takes over a descriptor that the process that started us left open for us: once.
///
/// # Errors
/// If the number is not an open descriptor, is one of the standard streams, or was not among those that
/// [`note_inherited`] found, or was taken already.
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
    // SAFETY: the descriptor was open before anything had an owner (`note_inherited`), and its number
    // has just been taken out of the set: nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Closes what the process that started us left open and nobody has taken.
pub fn close_inherited() {
    let left = mem::take(&mut *INHERITED.lock().unwrap_or_else(PoisonError::into_inner));
    for number in left {
        // SAFETY: as in `inherit`: it has just been taken out of the set, and nobody else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

/// Binds the calling thread to one processor.
///
/// # Errors
/// `InvalidInput` if there is no such processor, or this process may not use it.
pub fn pin_this_thread(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Checks that this process may make files in a directory.
///
/// # Errors
/// EACCES, or EROFS, or why the directory cannot be looked at.
pub fn check_writable(directory: &Path) -> io::Result<()> {
    access(directory, AccessFlags::W_OK | AccessFlags::X_OK)
}

/// Checks what this thread may do with a file.
fn access(path: &Path, mode: AccessFlags) -> io::Result<()> {
    Ok(faccessat(AT_FDCWD, path, mode, AtFlags::AT_EACCESS)?)
}

/// Permissions that new files do not get (umask). For a process with one thread: others would make files
/// without it for a moment.
pub fn file_mode_mask() -> u32 {
    let mask = umask(Mode::all());
    umask(mask);
    mask.bits()
}

/// Has new files get all the permissions that they are made with.
pub fn clear_file_mode_mask() {
    umask(Mode::empty());
}

/// Checks that threads of this process may run on these CPUs, by a thread that does.
///
/// # Errors
/// With the first CPU that does not exist, or that this process may not use.
pub fn check_cpus(cpus: &[usize]) -> Result<(), String> {
    let refused = |(cpu, error): (&usize, io::Error)| format!("cannot run on CPU {cpu}: {error}");
    thread::scope(|scope| {
        let tried = scope.spawn(|| {
            cpus.iter().try_for_each(|cpu| pin_this_thread(*cpu).map_err(|error| (cpu, error)))
        });
        tried.join().map_err(|_| "cannot start a thread".to_owned())?.map_err(refused)
    })
}

/// The clock of a thread: how long it has run on a processor.
#[derive(Debug, Clone, Copy)]
pub struct ThreadClock(ClockId);

impl ThreadClock {
    /// That of the calling thread.
    pub fn of_this_thread() -> Self {
        let mut clock = libc::CLOCK_THREAD_CPUTIME_ID;
        // SAFETY: the calling thread is alive; the clock's number is written to `clock`.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        ThreadClock(ClockId::from_raw(clock))
    }

    /// What it shows, on whichever thread; nothing if its own has ended.
    pub fn elapsed(&self) -> Option<Duration> {
        clock_gettime(self.0).ok().map(Duration::from)
    }
}

/// Lets threads of this process be [interrupted](interrupt): installs a handler for SIGURG, which does
/// nothing, without SA_RESTART. The signal's one effect is then that a blocked system call returns
/// `EINTR`.
pub fn permit_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(libc::SIGURG, nothing).map_err(io::Error::from)
}

/// Gets a thread out of the system call that it is stuck in, if interrupts are
/// [permitted](permit_interrupts).
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // The thread's id is its handle's own, and is valid until the handle is joined or dropped.
    let _ = pthread_kill(thread.as_pthread_t(), signal::SIGURG);
}

/// Whether a user, with these groups, may do with a file what `mode` says (`R_OK`, `W_OK`, `X_OK`),
/// as the kernel sees it, access control lists included. Without a user: whether this process may.
///
/// # Errors
/// EACCES or EPERM if not, ENOENT if there is none; EPERM also if we may not ask for another user.
pub fn may_access(
    user: Option<(libc::uid_t, &[libc::gid_t])>,
    path: &Path,
    mode: AccessFlags,
) -> io::Result<()> {
    let ask = || {
        if let Some((uid, groups)) = user {
            become_only_here(uid, groups)?;
        }
        access(path, mode)
    };
    // Credentials are a thread's own to the kernel, and this one ends with the answer.
    let panicked = |_| Err(io::Error::other("the thread that asked has panicked"));
    thread::scope(|scope| scope.spawn(ask).join().unwrap_or_else(panicked))
}

/// Makes the calling thread, and no other of the process, another user's for good. The C library's
/// functions change all threads, the system calls behind them one.
fn become_only_here(uid: libc::uid_t, groups: &[libc::gid_t]) -> io::Result<()> {
    let gid = groups.first().copied().unwrap_or(uid);
    // SAFETY: `groups` lives through the first call, which reads as many numbers as it is told; the
    // others take numbers only. What they change ends with this thread.
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

/// What must be known of a file before it is mapped as memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// Whether it was opened for reading and writing.
    pub writable: bool,
    /// Size in bytes.
    pub size: u64,
    /// Whether its size can't shrink any more (F_SEAL_SHRINK of memfd_create(2)).
    pub sealed: bool,
    /// Alignment in bytes that a mapping's offset and length need: the page size, or the huge
    /// page size on hugetlbfs.
    pub alignment: u64,
}

/// Reads them, or returns nothing if the file is not memory: a memfd, or a file on tmpfs or
/// hugetlbfs.
///
/// Any other file system could hold us up: one of the frontend's own (FUSE) answers when it
/// likes, to a question as well as to a touch of the mapped file.
pub fn file_facts(file: &File) -> io::Result<Option<FileFacts>> {
    // The kernel knows seals of memory only (memfd_file_seals_ptr), and looks for them nowhere
    // else. Directories and devices of tmpfs have none either.
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

/// Whether it is a file or a device, as its file system remembers it: nobody is asked, who could hold us
/// up.
pub fn holds_data(file: &File) -> io::Result<bool> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: all zeros is a valid value, and the kernel fills it; the path is an empty string.
    let facts = unsafe {
        let mut facts: libc::statx = mem::zeroed();
        let path = c"".as_ptr();
        check(libc::statx(file.as_raw_fd(), path, flags, libc::STATX_TYPE, &mut facts))?;
        facts
    };
    let kind = libc::mode_t::from(facts.stx_mode) & libc::S_IFMT;
    Ok([libc::S_IFREG, libc::S_IFCHR, libc::S_IFBLK].contains(&kind))
}

/// Memory of our own to be shared, that nobody can cut short: zeros, as long as was asked for.
pub fn sealed_memory(name: &CStr, length: u64) -> io::Result<File> {
    memory_with_seals(name, length, SealFlag::empty())
}

/// Memory of our own that nobody can write to, without a byte: in the place of a file that is not kept.
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

/// RAM of the host in bytes, as it was when this was first called: a sandboxed thread may not ask.
pub fn host_memory() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| sysinfo().map_or(0, |facts| facts.ram_total()))
}

/// The size of a page in bytes.
pub fn page_size() -> u64 {
    let size = sysconf(SysconfVar::PAGE_SIZE);
    size.ok().flatten().expect("the kernel tells each process its page size") as u64
}

/// Sets O_NONBLOCK of an open file.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The name of `/proc/self/fd/N` for messages.
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
    fn descriptors_of_our_own_are_not_inherited() {
        let file = File::open("/").unwrap();
        let error = inherit(file.as_raw_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        assert!(file.metadata().is_ok(), "it is open still");
        assert_eq!(inherit(RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn interrupt_ends_a_system_call_and_spares_an_ended_thread() {
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
