//! Event descriptors: the frontend's kick, call and error descriptors, and the daemon's own wakers.
//!
//! Invariant: no descriptor from a frontend can block the control thread or raise a signal.
//!
//! - The daemon never reads a kick descriptor. The worker watches it edge-triggered, so each kick wakes the
//!   worker once, for any value of the counter.
//! - Call and error descriptors are non-blocking. A write to a socket cannot block: MSG_DONTWAIT applies to
//!   each call. O_NONBLOCK of an eventfd belongs to the open file, so the frontend can clear it, and no system
//!   call writes to an eventfd without obeying it.
//! - So only workers write to call and error descriptors. A frontend can hold up only its own queue pair, until
//!   the control thread interrupts the worker.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::write;

use super::process::set_nonblocking;
use super::socket::{Inherited, classify};

/// Interval between two attempts to replace a descriptor.
const RETRY: Duration = Duration::from_millis(1);
/// Sleep of a worker, before it signals a descriptor, while the control thread replaces it.
const YIELD: Duration = Duration::from_micros(50);

/// A descriptor for notifications between frontend and daemon: an eventfd, or a connected unix stream socket.
///
/// The frontend shares the open file description. It may read, fill or drain it, or change its flags, at any
/// time; so nothing here depends on its counter or bytes.
#[derive(Debug)]
pub struct NotifyFd {
    file: Arc<File>,
    /// True for a unix stream socket, which is signalled with `send`.
    is_socket: bool,
}

impl NotifyFd {
    /// Checks that `file` is an eventfd and makes it non-blocking.
    ///
    /// Other files would do harm: a pipe at its end would wake a worker continuously, a pipe without a reader
    /// would raise SIGPIPE, and epoll does not accept a regular file.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is not an eventfd.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the descriptor is {}, not an eventfd", kind.display()),
            ));
        }
        set_nonblocking(file.as_fd())?;
        Ok(NotifyFd { file: Arc::new(file), is_socket: false })
    }

    /// Checks that `file` is a connected unix stream socket, which user-mode Linux uses for calls, or an eventfd
    /// as in [`new`](Self::new).
    ///
    /// It refuses a pipe. A process that reads from a pipe holds the pipe's lock until the page that it reads
    /// into is present. A writer needs that lock, and no signal ends its wait.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is neither.
    pub fn or_socket(file: File) -> io::Result<Self> {
        if matches!(classify(file.as_fd()), Ok(Inherited::Connection)) {
            return Ok(NotifyFd { file: Arc::new(file), is_socket: true });
        }
        Self::new(file)
    }

    /// Signals the other side: adds one to an eventfd's counter, or sends 8 bytes to a socket.
    ///
    /// # Errors
    /// `WouldBlock` if the counter is at its maximum or the socket is full: then earlier signals are still
    /// pending. `BrokenPipe` if the socket's other end is closed.
    pub fn signal(&self) -> io::Result<()> {
        let one = 1u64.to_ne_bytes();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match self.is_socket {
            true => send(self.file.as_raw_fd(), &one, flags)?,
            false => write(&self.file, &one)?,
        };
        Ok(())
    }

    /// Returns the descriptor's file.
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }
}

impl AsFd for NotifyFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A call or error descriptor that the frontend may replace or remove at any time.
#[derive(Debug, Default)]
pub struct ForeignEvent {
    event: Mutex<Option<NotifyFd>>,
    /// True while the control thread waits to replace the descriptor. Workers then do not start to signal it:
    /// a worker that blocks in one signal after the other would hardly ever release the lock.
    replacing: AtomicBool,
    /// True if a descriptor is set; readable without the lock, which a worker may hold for long.
    is_set: AtomicBool,
}

impl ForeignEvent {
    /// Signals the descriptor; returns false if none is set. Only workers may call it: an eventfd that the
    /// frontend made blocking holds up the caller.
    pub fn signal(&self) -> bool {
        while self.replacing.load(Ordering::Acquire) {
            std::thread::sleep(YIELD);
        }
        let event = self.lock();
        // Errors are ignored: a full counter or socket means that a signal is pending.
        event.as_ref().map(NotifyFd::signal).is_some()
    }

    /// Replaces the descriptor, or removes it. While a worker signals the old one, calls `interrupt` every 1 ms:
    /// `interrupt` must end the worker's system call, which the frontend may have made blocking.
    pub fn replace(&self, event: Option<NotifyFd>, interrupt: impl Fn()) {
        self.is_set.store(event.is_some(), Ordering::Relaxed);
        self.replacing.store(true, Ordering::Release);
        let mut current = loop {
            match self.event.try_lock() {
                Ok(current) => break current,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    interrupt();
                    std::thread::sleep(RETRY);
                }
            }
        };
        *current = event;
        self.replacing.store(false, Ordering::Release);
    }

    /// Returns true if a descriptor is set. Does not wait.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// Returns true if the descriptor is a socket. The kernel may refuse to pass a socket over a socket.
    pub fn is_socket(&self) -> bool {
        self.lock().as_ref().is_some_and(|event| event.is_socket)
    }

    /// Returns the descriptor's file, if one is set.
    pub fn file(&self) -> Option<Arc<File>> {
        self.lock().as_ref().map(NotifyFd::file)
    }

    fn lock(&self) -> MutexGuard<'_, Option<NotifyFd>> {
        self.event.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// An eventfd of the daemon's own, by which one thread wakes another.
#[derive(Debug)]
pub struct Waker(EventFd);

impl Waker {
    /// Creates an eventfd that is not readable.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Waker(EventFd::from_flags(flags)?))
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        // Fails only if the counter is at its maximum, and then the descriptor is readable.
        let _ = self.0.write(1);
    }

    /// Makes the descriptor unreadable until the next [`wake`](Self::wake).
    pub fn clear(&self) {
        // Fails only if the counter is zero already.
        let _ = self.0.read();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn foreign(event: &EventFd) -> NotifyFd {
        let duplicate = event.as_fd().try_clone_to_owned().unwrap();
        NotifyFd::new(File::from(duplicate)).unwrap()
    }

    #[test]
    fn signal_adds_one_to_the_counter() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let foreign = foreign(&event);
        foreign.signal().unwrap();
        foreign.signal().unwrap();
        assert_eq!(event.read().unwrap(), 2);
    }

    #[test]
    fn signal_of_a_full_blocking_eventfd_does_not_block() {
        let event = EventFd::new().unwrap();
        event.write(u64::MAX - 1).unwrap();
        let error = foreign(&event).signal().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn files_and_pipes_are_refused() {
        let (read_end, write_end) = io::pipe().unwrap();
        let files = [
            File::open("/dev/zero").unwrap(),
            File::open("/").unwrap(),
            File::from(OwnedFd::from(read_end)),
            File::from(OwnedFd::from(write_end)),
        ];
        for file in files {
            for refuses in [NotifyFd::new, NotifyFd::or_socket] {
                let error = refuses(file.try_clone().unwrap()).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            }
        }
    }

    #[test]
    fn signal_of_a_full_or_closed_socket_does_not_block() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::from(OwnedFd::from(ours));
        assert!(NotifyFd::new(file.try_clone().unwrap()).is_err(), "no kick descriptor");
        let event = NotifyFd::or_socket(file).unwrap();
        event.signal().unwrap();
        let mut bytes = [0; 8];
        (&theirs).read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, 1u64.to_ne_bytes());
        let error = (0..100_000).find_map(|_| event.signal().err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(event.signal().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let (ours, _theirs) = UnixDatagram::pair().unwrap();
        assert!(NotifyFd::or_socket(File::from(OwnedFd::from(ours))).is_err());
    }
}
