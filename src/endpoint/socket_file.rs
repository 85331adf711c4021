//! The file of a listening unix socket: its permissions, and checks that it still exists.

use std::cell::Cell;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{
    FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown, lchown,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::getegid;

use crate::error::StartError;
use crate::sandbox::find_group;
use crate::sys::process::file_mode_mask;
use crate::sys::socket::{bind, listen};

/// Time between two checks of a socket's file.
const CHECK_INTERVAL: Duration = Duration::from_secs(4);

/// Permits only its owner and the members of `group` to connect to the socket at `path`; without a group,
/// the umask decides.
///
/// # Errors
/// The group does not exist, or this process may not change the file.
pub fn share(path: &Path, group: Option<&str>) -> Result<(), StartError> {
    let shown = path.display();
    let (gid, mode) = match group {
        Some(name) => {
            let gid = find_group(name)
                .ok_or_else(|| StartError::new(format!("{shown}: there is no group {name}")))?;
            (gid, 0o660)
        }
        None => (getegid(), 0o777 & !file_mode_mask()),
    };
    let group = group.map_or_else(|| gid.to_string(), str::to_owned);
    set_access(path, Some(gid.as_raw()), mode).map_err(|error| {
        StartError::new(format!(
            "cannot give {shown} to group {group}: {error}; start as root, or as a member of the group"
        ))
    })
}

/// Sets the mode, and the group if one is given, of the socket's file at `path`. A user who can write to its
/// directory cannot redirect the change: the file is held open, and links are not followed.
///
/// # Errors
/// `path` is no socket, or this process may not change it.
pub fn set_access(path: &Path, group: Option<u32>, mode: u32) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.file_type().is_socket() {
        return Err(io::Error::other("not a socket"));
    }
    // An O_PATH descriptor cannot change the file; its name in /proc can.
    let held = format!("/proc/self/fd/{}", file.as_raw_fd());
    // The packaged units forbid chown(2), so an equal group is not set.
    if group.is_some_and(|group| group != metadata.gid()) {
        chown(&held, None, group)?;
    }
    fs::set_permissions(held, Permissions::from_mode(mode))
}

/// The file of a socket that this process owns. Dropping it removes the file, unless another file has taken
/// its place.
#[derive(Debug)]
pub struct SocketFile {
    pub(super) path: PathBuf,
    /// Device and inode; `None` if the file was missing at the take-over.
    identity: Option<(u64, u64)>,
    /// Permissions as of the last check or the start.
    access: Cell<Access>,
    pub(super) state: FileState,
    pub(super) next_look: Instant,
}

/// A change of a socket's file.
#[derive(Debug)]
pub struct Look {
    /// Reason why new clients do not reach the socket, if they do not.
    pub hidden: Option<&'static str>,
    /// The unreachable socket, if another one has replaced it.
    pub old: Option<UnixListener>,
}

/// Kind of file at a socket's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileState {
    /// The file of this process.
    Ours,
    /// Nothing.
    Gone,
    /// Another process's file, which must not be removed.
    Replaced,
}

/// Permissions of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Access {
    mode: u32,
    group: u32,
}

impl Access {
    fn of(metadata: &fs::Metadata) -> Self {
        Access { mode: metadata.mode() & 0o7777, group: metadata.gid() }
    }

    /// Stores the permissions in the socket itself, because its file may be missing when another daemon or port
    /// takes the socket over.
    fn keep(self, listener: &UnixListener) -> io::Result<()> {
        let socket = fs::File::from(listener.as_fd().try_clone_to_owned()?);
        if socket.metadata()?.gid() != self.group {
            fchown(&socket, None, Some(self.group))?;
        }
        socket.set_permissions(Permissions::from_mode(self.mode))
    }

    /// Returns the permissions [stored](Self::keep) in a socket.
    fn kept_by(listener: &UnixListener) -> io::Result<Self> {
        let socket = fs::File::from(listener.as_fd().try_clone_to_owned()?);
        let access = Access::of(&socket.metadata()?);
        // Daemons up to version 0.1.0 store nothing in the socket, whose mode is 0777 then.
        let mode = if access.mode == 0o777 { 0o755 } else { access.mode };
        Ok(Access { mode, ..access })
    }
}

impl SocketFile {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(SocketFile {
            path: path.to_owned(),
            identity: Some(identity(&metadata)),
            access: Cell::new(Access::of(&metadata)),
            state: FileState::Ours,
            next_look: Instant::now() + CHECK_INTERVAL,
        })
    }

    /// Takes over the file of a socket that another process made. A missing file is made again at the next check.
    pub(super) fn found(path: &Path, listener: &UnixListener) -> io::Result<Self> {
        match SocketFile::of(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(SocketFile {
                path: path.to_owned(),
                identity: None,
                access: Cell::new(Access::kept_by(listener)?),
                state: FileState::Ours,
                next_look: Instant::now(),
            }),
            found => found,
        }
    }

    /// Records the file's permissions.
    pub(super) fn note(&self, metadata: &fs::Metadata, listener: &UnixListener) {
        let access = Access::of(metadata);
        self.access.set(access);
        // Fails for a socket that another user has made.
        let _ = access.keep(listener);
    }

    /// Makes the file again, with a new socket.
    pub(super) fn make_again(&mut self) -> io::Result<UnixListener> {
        let Access { mode, group } = self.access.get();
        let made = bind(&self.path, mode)?;
        let found = fs::symlink_metadata(&self.path)?;
        // A new file has the group of this process or of its directory. lchown(2) follows no link, and no
        // client can connect before listen(2).
        let has_group = found.gid() == group;
        let set = if has_group { Ok(()) } else { lchown(&self.path, None, Some(group)) };
        let set = set.and_then(|()| listen(&made));
        if let Err(error) = set.and_then(|()| made.set_nonblocking(true)) {
            let _ = fs::remove_file(&self.path);
            return Err(error);
        }
        // For a daemon that takes the socket over.
        let _ = self.access.get().keep(&made);
        (self.identity, self.state) = (Some(identity(&found)), FileState::Ours);
        Ok(made)
    }

    /// Checks the file, if it is time; returns its previous state if that has changed, or if the file is missing.
    pub(super) fn look(&mut self, listener: &UnixListener) -> Option<FileState> {
        if Instant::now() < self.next_look {
            return None;
        }
        self.next_look = Instant::now() + CHECK_INTERVAL;
        let state = match fs::symlink_metadata(&self.path) {
            Ok(metadata) if Some(identity(&metadata)) == self.identity => {
                if Access::of(&metadata) != self.access.get() {
                    self.note(&metadata, listener);
                }
                FileState::Ours
            }
            Ok(_) => FileState::Replaced,
            Err(error) if error.kind() == io::ErrorKind::NotFound => FileState::Gone,
            // This user may not search the directory.
            Err(_) => self.state,
        };
        let before = std::mem::replace(&mut self.state, state);
        (state != before || state == FileState::Gone).then_some(before)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| Some(identity(&found)) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_in_a_sockets_place_changes_no_other_file() {
        let directory = std::env::temp_dir().join(format!("access-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (file, link, path) =
            (directory.join("file"), directory.join("link"), directory.join("socket"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mode = |path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
        let before = mode(&file);
        for group in [None, Some("0")] {
            assert!(share(&link, group).is_err());
            assert!(share(&file, group).is_err());
            assert_eq!(mode(&file), before);
        }
        let _listener = bind(&path, 0o700).unwrap();
        assert_eq!(mode(&path), 0o700);
        set_access(&path, None, 0o666).unwrap();
        assert_eq!(mode(&path), 0o666);
        fs::remove_dir_all(&directory).unwrap();
    }
}
