//! Event descriptors: those that somebody else handed us, and our own.
//!
//! Invariant: no descriptor from a frontend can block the control thread or raise a signal. Kick
//! descriptors are never read: the worker watches them edge-triggered, so each kick wakes it once
//! whatever the counter says. Call and error descriptors are non-blocking. A socket among them does
//! not block whatever the frontend does. The frontend can make an eventfd blocking, since the flag
//! belongs to the open file, and no system call writes to an eventfd without regard to it. So only a
//! worker writes to them: the frontend can hold up its own queue pair, until the control thread
//! interrupts the worker.

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

/// How soon to look again whether a descriptor can be replaced.
const RETRY: Duration = Duration::from_millis(1);
/// How long whoever signals a descriptor sleeps at a time while somebody replaces it.
const GIVE_WAY: Duration = Duration::from_micros(50);

/// A descriptor by which the frontend and we notify each other: it was checked to be an eventfd, or a
/// connected unix stream socket.
///
/// It is the frontend's open file description: the other side may read it, fill it or change its
/// flags at any time, and nothing here depends on its counter or bytes.
#[derive(Debug)]
pub struct NotifyFd {
    file: Arc<File>,
    /// It is a unix stream socket, which is signalled in its own way.
    is_socket: bool,
}

impl NotifyFd {
    /// Checks that `file` is an eventfd and makes it non-blocking.
    ///
    /// A pipe at its end, a full pipe without a reader or a regular file would wake a worker for
    /// ever, raise SIGPIPE or fail to be watched at all.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is anything but an eventfd.
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

    /// Checks that `file` is an eventfd, as [`new`](Self::new) does, or a connected unix stream socket, by which
    /// user-mode Linux is called. A pipe is refused: whoever reads it holds its lock for as long as the
    /// memory that they read to takes to appear, and no signal ends the wait for that lock.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is anything else.
    pub fn or_socket(file: File) -> io::Result<Self> {
        if matches!(classify(file.as_fd()), Ok(Inherited::Connection)) {
            return Ok(NotifyFd { file: Arc::new(file), is_socket: true });
        }
        Self::new(file)
    }

    /// Adds one to the counter, which wakes whoever waits for it, or sends so many bytes.
    ///
    /// # Errors
    /// `WouldBlock` if the counter is at its maximum, or the socket is full: whoever waits has been woken
    /// long ago.
    pub fn signal(&self) -> io::Result<()> {
        let one = 1u64.to_ne_bytes();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match self.is_socket {
            true => send(self.file.as_raw_fd(), &one, flags)?,
            false => write(&self.file, &one)?,
        };
        Ok(())
    }

    /// Its file.
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }
}

impl AsFd for NotifyFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The place of a descriptor that the frontend may change at any time, or take away.
#[derive(Debug, Default)]
pub struct ForeignEvent {
    place: Mutex<Option<NotifyFd>>,
    /// Somebody waits to replace it: whoever signals it lets them go first. Else a thread that is stuck
    /// in one signal after the other would hardly ever leave the place free.
    replacing: AtomicBool,
    /// Whether there is one, without a wait for whoever signals it.
    is_set: AtomicBool,
}

impl ForeignEvent {
    /// Signals it, if there is one; says whether there was.
    pub fn signal(&self) -> bool {
        while self.replacing.load(Ordering::Acquire) {
            std::thread::sleep(GIVE_WAY);
        }
        let event = self.lock();
        // A full counter means that a signal is pending anyway.
        event.as_ref().map(NotifyFd::signal).is_some()
    }

    /// Puts another descriptor in its place, or none. While somebody signals it, `interrupt` is
    /// called again and again: it must get them out of the system call that they may be stuck in.
    pub fn replace(&self, event: Option<NotifyFd>, interrupt: impl Fn()) {
        self.is_set.store(event.is_some(), Ordering::Relaxed);
        self.replacing.store(true, Ordering::Release);
        let mut place = loop {
            match self.place.try_lock() {
                Ok(place) => break place,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    interrupt();
                    std::thread::sleep(RETRY);
                }
            }
        };
        *place = event;
        self.replacing.store(false, Ordering::Release);
    }

    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// Whether it is a socket, which the kernel may refuse to pass on.
    pub fn is_socket(&self) -> bool {
        self.lock().as_ref().is_some_and(|event| event.is_socket)
    }

    /// Its file, if there is one.
    pub fn file(&self) -> Option<Arc<File>> {
        self.lock().as_ref().map(NotifyFd::file)
    }

    fn lock(&self) -> MutexGuard<'_, Option<NotifyFd>> {
        self.place.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// An eventfd of our own, by which one thread wakes another.
#[derive(Debug)]
pub struct Waker(EventFd);

impl Waker {
    /// Makes one that nobody has rung yet.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Waker(EventFd::from_flags(flags)?))
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        // It fails only when the counter is full, and then the descriptor is readable.
        let _ = self.0.write(1);
    }

    /// Makes the descriptor unreadable until it is woken again.
    pub fn clear(&self) {
        // It fails only when the counter is zero already.
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
    fn a_signal_adds_one() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let foreign = foreign(&event);
        foreign.signal().unwrap();
        foreign.signal().unwrap();
        assert_eq!(event.read().unwrap(), 2);
    }

    #[test]
    fn a_blocking_eventfd_at_its_maximum_does_not_block() {
        let event = EventFd::new().unwrap();
        event.write(u64::MAX - 1).unwrap();
        let error = foreign(&event).signal().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn anything_but_an_eventfd_is_refused() {
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
    fn full_or_closed_socket_does_not_block_its_signal() {
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
