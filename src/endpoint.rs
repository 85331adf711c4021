//! Origin of frontends' connections: a listening socket, an inherited descriptor, or the frontend's own
//! socket.
//!
//! One frontend is served at a time. A second one waits in the listener's queue, because a restarted VMM
//! may connect before the daemon notices the end of the first.

mod socket_file;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{info, warn};

use crate::error::StartError;
use crate::event::Interest;
use crate::sys::socket::{Inherited, bind, classify, connect_now, listen};

use socket_file::FileState;
pub use socket_file::{Look, SocketFile, set_access, share};

/// Pause between attempts to connect: the first, which doubles up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_millis(500);

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// State of a listener: accepting, or pausing after a failed accept. The listener stays readable while a
/// connection waits, and the process may be out of descriptors. No thread sleeps during the pause.
#[derive(Debug, Default)]
pub struct Accepting {
    /// Time of the next attempt, after a failed accept.
    retry: Option<Instant>,
}

impl Accepting {
    /// Returns the connection that an accept brought. A failed accept begins or prolongs the pause. `name` is
    /// the listener's, for the log.
    pub fn connection<T>(&mut self, name: &str, accepted: io::Result<T>) -> Option<T> {
        let accepted = match accepted {
            Ok(stream) => Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            // The client has disconnected; the next one may wait.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return None,
            Err(error) => {
                if self.retry.replace(Instant::now() + ACCEPT_PAUSE).is_none() {
                    let wait = ACCEPT_PAUSE.as_millis();
                    warn!("{name}: cannot accept a connection: {error}; retried every {wait} ms");
                }
                return None;
            }
        };
        if self.retry.take().is_some() {
            info!("{name}: accepts connections again");
        }
        accepted
    }

    /// Returns the time of the next attempt during a pause.
    pub fn retry(&self) -> Option<Instant> {
        self.retry
    }

    /// Returns the events to wait for on the listener.
    pub fn interest(&self) -> Interest {
        if self.retry.is_some() { Interest::Nothing } else { Interest::Read }
    }
}

/// Origin of a port's frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frontend {
    /// Listen at a path.
    Listen(PathBuf),
    /// An inherited descriptor.
    Inherited(RawFd),
    /// Connect to a path.
    Connect(PathBuf),
}

impl Frontend {
    /// Returns the option that selects this origin.
    pub(crate) fn key(&self) -> &'static str {
        match self {
            Frontend::Listen(_) => "socket-path",
            Frontend::Inherited(_) => "fd",
            Frontend::Connect(_) => "connect",
        }
    }
}

/// Source of connections.
#[derive(Debug)]
pub enum Endpoint {
    /// A listening socket, and its file if this process owns that.
    Listener(UnixListener, Option<SocketFile>, Accepting),
    /// An inherited connection, which is the only one.
    Connected(Option<UnixStream>),
    /// A socket to connect to.
    Connect {
        /// The frontend's socket.
        path: PathBuf,
        /// Time of the next attempt.
        next: Instant,
        /// Pause after the next attempt.
        wait: Duration,
    },
}

impl Endpoint {
    /// Opens the endpoint that the configuration names, or takes it over: `given` is the inherited descriptor
    /// that it names, or a socket that another process made. No frontend can connect before
    /// [`start`](Self::start).
    ///
    /// # Errors
    /// The path or descriptor cannot be used. The line names it, the cause and the fix.
    pub fn open(frontend: &Frontend, given: Option<OwnedFd>) -> Result<Self, StartError> {
        match (frontend, given) {
            (Frontend::Inherited(number), Some(fd)) => Self::inherited(*number, fd),
            (Frontend::Inherited(number), None) => Err(StartError::new(format!(
                "descriptor {number} (--fd) was not passed with the request; use 'vhost-user-net ctl add'"
            ))),
            (Frontend::Listen(path), Some(fd)) => {
                let shown = path.display();
                let listener = take_listener(fd).map_err(|error| {
                    StartError::new(format!("cannot use the passed socket of {shown}: {error}"))
                })?;
                // Fails if this user may not search the socket's directory.
                let file = SocketFile::found(path, &listener).map_err(|error| {
                    info!("{shown}: cannot check the file: {error}; it is not removed at the end")
                });
                Ok(Endpoint::Listener(listener, file.ok(), Accepting::default()))
            }
            (Frontend::Listen(path), None) => make_listener(path),
            (Frontend::Connect(path), _) => Ok(Endpoint::Connect {
                path: path.clone(),
                next: Instant::now(),
                wait: FIRST_RETRY,
            }),
        }
    }

    fn inherited(number: RawFd, fd: OwnedFd) -> Result<Self, StartError> {
        let failed =
            |error| StartError::new(format!("cannot use descriptor {number} (--fd): {error}"));
        match classify(fd.as_fd()).map_err(failed)? {
            Inherited::Connection => Ok(Endpoint::Connected(Some(UnixStream::from(fd)))),
            Inherited::Listener => {
                let listener = UnixListener::from(fd);
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Endpoint::Listener(listener, None, Accepting::default()))
            }
        }
    }

    /// Takes over another daemon's socket. That daemon owns the file until [`own`](Self::own).
    ///
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn taken(fd: OwnedFd) -> io::Result<Self> {
        Ok(Endpoint::Listener(take_listener(fd)?, None, Accepting::default()))
    }

    /// Owns the socket's file at `path` from now on: checks it regularly and removes it at the end.
    pub fn own(&mut self, path: &Path) {
        // Dropping the `SocketFile` of a file that this process owns already would remove the file.
        if let Endpoint::Listener(listener, file @ None, _) = self {
            *file = SocketFile::found(path, listener).ok();
        }
    }

    /// Permits only the socket's owner and the members of a group, by name or number, to connect.
    ///
    /// # Errors
    /// The group does not exist, or this process may not change the file.
    pub fn share_with(&self, group: &str) -> Result<(), StartError> {
        let Endpoint::Listener(_, Some(SocketFile { path, .. }), _) = self else { return Ok(()) };
        share(path, Some(group))
    }

    /// Removes the socket's file at the end of the process, which closes the socket. Closing it here could
    /// block on connections that wait.
    pub fn end(self) {
        if let Endpoint::Listener(listener, file, _) = self {
            std::mem::forget(listener);
            drop(file);
        }
    }

    /// Closes the socket without removing its file, which another process owns from now on.
    pub fn leave_to_successor(self) {
        if let Endpoint::Listener(_, Some(file), _) = self {
            std::mem::forget(file);
        }
    }

    /// Lets frontends connect.
    ///
    /// # Errors
    /// `listen` fails.
    pub fn start(&self) -> io::Result<()> {
        match self {
            Endpoint::Listener(listener, file, _) => {
                // Fails if this user may not search the socket's directory.
                if let Some(file) = file
                    && let Ok(metadata) = fs::symlink_metadata(&file.path)
                {
                    file.note(&metadata, listener);
                }
                listen(listener)
            }
            Endpoint::Connected(_) | Endpoint::Connect { .. } => Ok(()),
        }
    }

    /// Returns the descriptor that becomes readable when a frontend connects.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Endpoint::Listener(listener, ..) => Some(listener.as_fd()),
            Endpoint::Connected(_) | Endpoint::Connect { .. } => None,
        }
    }

    /// Returns the descriptor that another process needs to take the endpoint over.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Endpoint::Listener(listener, ..) => Some(listener.as_fd()),
            Endpoint::Connected(stream) => stream.as_ref().map(AsFd::as_fd),
            Endpoint::Connect { .. } => None,
        }
    }

    /// Returns the time by which [`connection`](Self::connection) must be called again.
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Endpoint::Connect { next, .. } => Some(*next),
            Endpoint::Listener(.., accepting) => accepting.retry(),
            Endpoint::Connected(_) => None,
        }
    }

    /// Returns true if no further connection can come.
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Endpoint::Connected(None))
    }

    /// Returns the time of the next check of the socket's file, if this process owns the file.
    pub fn next_look(&self) -> Option<Instant> {
        match self {
            Endpoint::Listener(_, Some(file), _) => Some(file.next_look),
            _ => None,
        }
    }

    /// Checks the socket's file, if it is [time](Self::next_look), and makes a deleted file again. Returns and
    /// logs a change; `name` is for the log.
    pub fn look(&mut self, name: &str) -> Option<Look> {
        let Endpoint::Listener(listener, Some(file), _) = self else { return None };
        let before = file.look(listener)?;
        let path = file.path.display().to_string();
        let look = |hidden, old| Some(Look { hidden, old });
        match file.state {
            FileState::Ours => {
                info!("{name}: socket file is back path={path}; clients can connect again");
                look(None, None)
            }
            FileState::Replaced => {
                warn!(
                    "{name}: socket file was replaced by another process path={path}; new clients do not \
                     reach this socket; remove that file"
                );
                let why = "another process has replaced its socket file: new VMMs do not reach it";
                look(Some(why), None)
            }
            FileState::Gone => match file.make_again() {
                Ok(made) => {
                    warn!("{name}: socket file was deleted path={path}; it is made again");
                    look(None, Some(std::mem::replace(listener, made)))
                }
                Err(error) => {
                    // Retried at each check, and logged once.
                    if before != FileState::Gone {
                        warn!(
                            "{name}: socket file was deleted path={path}: cannot make it again: {error}; \
                             new clients cannot connect; put its directory back, or restart the daemon (a new \
                             directory of that name is closed to it)"
                        );
                    }
                    look(Some("its socket file was deleted: no other VMM can connect"), None)
                }
            },
        }
    }

    /// Returns the events to wait for on the [descriptor](Self::fd).
    pub fn interest(&self) -> Interest {
        match self {
            Endpoint::Listener(.., accepting) => accepting.interest(),
            Endpoint::Connected(_) | Endpoint::Connect { .. } => Interest::Nothing,
        }
    }

    /// Returns a new connection, if there is one now. `name` is for the log.
    pub fn connection(&mut self, name: &str) -> Option<UnixStream> {
        match self {
            Endpoint::Listener(listener, _, accepting) => {
                if accepting.retry().is_some_and(|retry| Instant::now() < retry) {
                    return None;
                }
                let accepted = listener.accept().map(|(stream, _)| stream);
                accepting.connection(name, accepted)
            }
            Endpoint::Connected(stream) => stream.take(),
            Endpoint::Connect { path, next, wait } => {
                if Instant::now() < *next {
                    return None;
                }
                match connect_now(path) {
                    Ok(stream) => {
                        // A frontend that disconnects at once is not connected to again at once.
                        *next = Instant::now() + FIRST_RETRY;
                        *wait = FIRST_RETRY;
                        Some(stream)
                    }
                    Err(error) => {
                        if *wait == FIRST_RETRY {
                            let (path, pause) = (path.display(), LAST_RETRY.as_millis());
                            info!(
                                "{name}: cannot connect to {path}: {error}; retried at least every {pause} ms"
                            );
                        }
                        *next = Instant::now() + *wait;
                        *wait = (*wait * 2).min(LAST_RETRY);
                        None
                    }
                }
            }
        }
    }
}

/// Wraps a listening socket that another process made.
fn take_listener(fd: OwnedFd) -> io::Result<UnixListener> {
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Makes a socket at `path`, in place of a stale one.
fn make_listener(path: &Path) -> Result<Endpoint, StartError> {
    let shown = path.display();
    let failed = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "; make its directory first",
            io::ErrorKind::PermissionDenied => "; its directory must be writable for this user",
            _ => "",
        };
        StartError::new(format!("cannot listen on {shown}: {error}{hint}"))
    };
    remove_stale(path)?;
    let listener = bind(path, 0o777).map_err(failed)?;
    let file = SocketFile::of(path).map_err(failed)?;
    Ok(Endpoint::Listener(listener, Some(file), Accepting::default()))
}

/// Removes a stale socket, which a killed process or one without the right to remove it left behind.
///
/// # Errors
/// The file is not a socket, a process listens on it, or this process may not remove it.
pub fn remove_stale(path: &Path) -> Result<(), StartError> {
    let shown = path.display();
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(StartError::new(format!(
            "cannot listen on {shown}: a file that is not a socket is there; remove it or choose another \
             path"
        )));
    }
    match connect_now(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            info!("socket: replacing a stale file path={shown}");
            fs::remove_file(path).map_err(|error| {
                StartError::new(format!("cannot remove the stale socket {shown}: {error}"))
            })
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(StartError::new(format!(
                "cannot listen on {shown}: another user's socket is there; remove it as that user"
            )))
        }
        // Connected, or its queue is full: a process listens.
        _ => Err(StartError::new(format!(
            "cannot listen on {shown}: another process listens there; stop it or choose another path"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_pauses_after_errors_that_stay() {
        let error = |number| Err::<(), _>(io::Error::from_raw_os_error(number));
        let mut accepting = Accepting::default();
        for number in [libc::EAGAIN, libc::ECONNABORTED] {
            assert_eq!(accepting.connection("vm1", error(number)), None);
            assert_eq!(accepting.interest(), Interest::Read);
        }
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EPERM] {
            assert_eq!(accepting.connection("vm1", error(number)), None);
            assert_eq!(accepting.interest(), Interest::Nothing);
            assert!(accepting.retry().is_some_and(|retry| retry > Instant::now()));
        }
        assert_eq!(accepting.connection("vm1", Ok(())), Some(()));
        assert_eq!((accepting.retry(), accepting.interest()), (None, Interest::Read));
    }
}
