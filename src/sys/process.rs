//! Signals, threads and inherited descriptors of this process.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

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
pub struct Signals(File);

impl Signals {
    /// Blocks the signals in this thread, and so in each thread that it starts from here on, and
    /// opens a descriptor that becomes readable when one arrives. Ignores SIGXFSZ: writing beyond the
    /// largest file that the process may have (RLIMIT_FSIZE) fails instead.
    pub fn block() -> io::Result<Self> {
        // SAFETY: no handler is installed.
        if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let set = vmm_sys_util::signal::create_sigset(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
            .map_err(io::Error::from)?;
        // SAFETY: `set` is an initialised signal set; the old mask is not asked for.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: the descriptor is fresh and becomes owned here and nowhere else.
        unsafe {
            let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            Ok(Signals(File::from_raw_fd(fd)))
        }
    }

    /// The next one that has arrived.
    pub fn take(&self) -> Option<Signal> {
        let mut arrived = [0; mem::size_of::<libc::signalfd_siginfo>()];
        (&self.0).read_exact(&mut arrived).ok()?;
        // Its first field is the signal's number (signalfd(2)).
        let number = arrived.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        let reload = number == Some(libc::SIGHUP as u32);
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
    // SAFETY: the kernel fills the structure, or it stays zeros and is not used; it lives through both
    // calls.
    unsafe {
        let mut limit: libc::rlimit = mem::zeroed();
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit)).ok()?;
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        let result = check(libc::setrlimit(libc::RLIMIT_NOFILE, &raised));
        Some(if result.is_ok() { raised.rlim_cur } else { limit.rlim_cur })
    }
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
    let flags = descriptor_flags(number)?;
    if !INHERITED.lock().unwrap_or_else(PoisonError::into_inner).remove(&number) {
        return invalid(format!(
            "descriptor {number} is this process's own; name one that it was started with, once"
        ));
    }
    // SAFETY: the descriptor was open before anything had an owner (`note_inherited`), and its number
    // has just been taken out of the set: nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: sets a flag of a descriptor that we own.
    unsafe { check(libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC))? };
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
    // SAFETY: cpu_set_t is plain old data, and all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: `cpu` is below CPU_SETSIZE, and the set lives through the call.
    unsafe {
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(0, mem::size_of_val(&set), &set))?;
    }
    Ok(())
}

/// Checks that this process may make files in a directory.
///
/// # Errors
/// EACCES, or EROFS, or why the directory cannot be looked at.
pub fn check_writable(directory: &Path) -> io::Result<()> {
    let path = CString::new(directory.as_os_str().as_bytes())?;
    let (how, by) = (libc::W_OK | libc::X_OK, libc::AT_EACCESS);
    // SAFETY: the path ends with a nul, and lives through the call.
    unsafe { check(libc::faccessat(libc::AT_FDCWD, path.as_ptr(), how, by))? };
    Ok(())
}

/// Permissions that new files do not get (umask). For a process with one thread: others would make files
/// without it for a moment.
pub fn file_mode_mask() -> u32 {
    // SAFETY: umask has no preconditions, and cannot fail.
    unsafe {
        let mask = libc::umask(0o777);
        libc::umask(mask);
        mask
    }
}

/// Has new files get all the permissions that they are made with.
pub fn clear_file_mode_mask() {
    // SAFETY: umask has no preconditions, and cannot fail.
    unsafe { libc::umask(0) };
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
pub struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    /// That of the calling thread.
    pub fn of_this_thread() -> Self {
        let mut clock = libc::CLOCK_THREAD_CPUTIME_ID;
        // SAFETY: the calling thread is alive; the clock's number is written to `clock`.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        ThreadClock(clock)
    }

    /// What it shows, on whichever thread; nothing if its own has ended.
    pub fn elapsed(&self) -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel looks the number up, and writes to `time`.
        unsafe { check(libc::clock_gettime(self.0, &mut time)).ok()? };
        Some(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
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
    // SAFETY: the thread's id is its handle's own, and is valid until the handle is joined or dropped.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGURG) };
}

/// Whether a user, with these groups, may do with a file what `mode` says (`R_OK`, `W_OK`, `X_OK`),
/// as the kernel sees it, access control lists included. Without a user: whether this process may.
///
/// # Errors
/// EACCES or EPERM if not, ENOENT if there is none; EPERM also if we may not ask for another user.
pub fn may_access(
    user: Option<(libc::uid_t, &[libc::gid_t])>,
    path: &Path,
    mode: libc::c_int,
) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let ask = || {
        if let Some((uid, groups)) = user {
            become_only_here(uid, groups)?;
        }
        // SAFETY: the path is a string that ends with a nul.
        unsafe { check(libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS))? };
        Ok(())
    };
    // Credentials are a thread's own to the kernel, and this one ends with the answer.
    let panicked = |_| Err(io::Error::other("the thread that asked has panicked"));
    std::thread::scope(|scope| scope.spawn(ask).join().unwrap_or_else(panicked))
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
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    // The kernel knows seals of memory only (memfd_file_seals_ptr), and looks for them nowhere
    // else. Directories and devices of tmpfs have none either.
    // SAFETY: reads the seals of a descriptor that we own.
    let seals = match unsafe { check(libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS)) } {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        seals => seals?,
    };
    // SAFETY: all zeros is a valid value of both; the kernel fills them during the calls.
    let (stat, fs) = unsafe {
        let mut stat: libc::stat64 = mem::zeroed();
        let mut fs: libc::statfs64 = mem::zeroed();
        check(libc::fstat64(file.as_raw_fd(), &mut stat))?;
        check(libc::fstatfs64(file.as_raw_fd(), &mut fs))?;
        (stat, fs)
    };
    // SAFETY: reads the flags of a descriptor that we own.
    let flags = unsafe { check(libc::fcntl(file.as_raw_fd(), libc::F_GETFL))? };
    let page = page_size();
    let unwritable = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
    Ok(Some(FileFacts {
        writable: flags & libc::O_ACCMODE == libc::O_RDWR && seals & unwritable == 0,
        size: stat.st_size as u64,
        sealed: seals & libc::F_SEAL_SHRINK != 0,
        alignment: if fs.f_type == HUGETLBFS_MAGIC { page.max(fs.f_bsize as u64) } else { page },
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
pub fn sealed_memory(name: &std::ffi::CStr, length: u64) -> io::Result<File> {
    memory_with_seals(name, length, 0)
}

/// Memory of our own that nobody can write to, without a byte: in the place of a file that is not kept.
pub fn unwritable_memory(name: &std::ffi::CStr) -> io::Result<File> {
    memory_with_seals(name, 0, libc::F_SEAL_WRITE)
}

fn memory_with_seals(name: &std::ffi::CStr, length: u64, seals: libc::c_int) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string; the descriptor is fresh and becomes owned here.
    let file = unsafe { File::from_raw_fd(check(libc::memfd_create(name.as_ptr(), flags))?) };
    file.set_len(length)?;
    let seals = seals | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: sets seals of a descriptor that we own.
    unsafe { check(libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals))? };
    Ok(file)
}

/// RAM of the host in bytes, as it was when this was first called: a sandboxed thread may not ask.
pub fn host_memory() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        // SAFETY: all zeros is a valid value, and the kernel fills it. If the call fails, it stays 0.
        let facts = unsafe {
            let mut facts: libc::sysinfo = mem::zeroed();
            libc::sysinfo(&mut facts);
            facts
        };
        facts.totalram.saturating_mul(facts.mem_unit.into())
    })
}

/// The size of a page in bytes.
pub fn page_size() -> u64 {
    // SAFETY: the call has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
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
