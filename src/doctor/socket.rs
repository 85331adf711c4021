//! Checks of a port's socket: the daemon can create it, and QEMU's user can connect to it.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::unistd::{AccessFlags, User, getgrouplist};

use super::finding::{Finding, quoted};
use super::host::{Credentials, Host};
use super::options::Socket;
use crate::sandbox::find_group;
use crate::sys::process::may_access;
use crate::sys::socket::MAX_PATH;

/// The user that QEMU runs as.
struct Qemu {
    name: String,
    user: u32,
    /// Primary group, then all groups of the user.
    groups: Vec<u32>,
}

/// Checks the path of a socket.
pub(super) fn check(
    host: &Host,
    credentials: &Credentials,
    socket: &Socket,
    qemu_user: Option<&str>,
) -> Vec<Finding> {
    let path = socket.path.as_path();
    let what = path.display().to_string();
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        let why = format!("the path has {length} bytes; a unix socket's has at most {MAX_PATH}");
        return vec![Finding::fail("socket", what, why)];
    }
    let qemu = match qemu_user.map(find).transpose() {
        Ok(qemu) => qemu,
        Err(why) => return vec![Finding::fail("qemu-user", what, why)],
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = match parent.canonicalize() {
        Ok(directory) if directory.is_dir() => directory,
        Ok(_) => {
            let why = format!("{} is not a directory; choose another path", parent.display());
            return vec![Finding::fail("socket", what, why)];
        }
        Err(error) => {
            return vec![no_directory(&error, parent, credentials, qemu.as_ref(), what)];
        }
    };
    let mut found = vec![creation(host, path, &directory, &what)];
    found.extend(writable_by_others(&directory, &what));
    if let Some(qemu) = qemu {
        let unreachable = search(&directory, &qemu, &what);
        let connects = || connect(credentials, socket, &directory, &qemu, &what);
        found.push(unreachable.unwrap_or_else(connects));
    }
    found
}

fn find(name: &str) -> Result<Qemu, String> {
    let user = User::from_name(name)
        .map_err(|error| format!("cannot look up QEMU's user {name}: {error}"))?
        .ok_or_else(|| format!("QEMU's user {name} does not exist; correct --qemu-user"))?;
    let known = CString::new(name).ok().and_then(|name| getgrouplist(&name, user.gid).ok());
    let mut groups = vec![user.gid.as_raw()];
    groups.extend(known.unwrap_or_default().into_iter().map(|group| group.as_raw()));
    Ok(Qemu { name: name.to_owned(), user: user.uid.as_raw(), groups })
}

fn no_directory(
    error: &io::Error,
    parent: &Path,
    credentials: &Credentials,
    qemu: Option<&Qemu>,
    what: String,
) -> Finding {
    if error.kind() != io::ErrorKind::NotFound {
        let why = format!("cannot open directory {}: {error}", parent.display());
        return Finding::fail("socket", what, why);
    }
    let why = format!("directory {} does not exist", parent.display());
    let shown = quoted(&parent.display().to_string());
    // The daemon takes every process that connects for the VMM, so only the VMM's group may enter. Files
    // in the directory inherit the group.
    let command = match qemu {
        Some(qemu) => {
            format!("install -d -m 2770 -o {} -g {} {shown}", credentials.user, qemu.groups[0])
        }
        None => format!("install -d -m 700 {shown}"),
    };
    Finding::fail("socket", what, why).fix(command)
}

/// Checks that the daemon can create the socket, or replace the existing one.
fn creation(host: &Host, path: &Path, directory: &Path, what: &str) -> Finding {
    let shown = quoted(&path.display().to_string());
    if let Err(error) = may_access(None, directory, AccessFlags::W_OK | AccessFlags::X_OK) {
        let directory = directory.display();
        let why = format!("this user cannot create files in {directory}: {error}");
        let found = Finding::fail("socket", what, why);
        return match error.raw_os_error() {
            Some(libc::EACCES) => {
                let user = nix::unistd::geteuid();
                found.fix(format!("chown {user} {}", quoted(&directory.to_string())))
            }
            _ => found,
        };
    }
    match path.symlink_metadata() {
        Ok(file) if file.file_type().is_socket() && listens(host, path) => {
            let why = "a process listens on it, so another daemon cannot";
            Finding::pass("socket", what, why)
        }
        Ok(file) if file.file_type().is_socket() => {
            let why = "exists, and no process listens on it: the daemon replaces it";
            Finding::pass("socket", what, why)
        }
        Ok(_) => {
            let why = "exists and is not a socket, so the daemon does not replace it";
            Finding::fail("socket", what, why).fix(format!("mv {shown} {shown}.old"))
        }
        Err(_) => Finding::pass("socket", what, "the daemon can create it"),
    }
}

/// Returns whether a process listens at a path, from proc_net_unix(5) and its flag `__SO_ACCEPTCON`. The
/// doctor does not connect, because a daemon would take it for its VMM.
fn listens(host: &Host, path: &Path) -> bool {
    const ACCEPTS: u32 = 0x1_0000;
    let path = path.display().to_string();
    host.read("/proc/net/unix").unwrap_or_default().lines().any(|line| {
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS != 0) && line.ends_with(&format!(" {path}"))
    })
}

/// Checks that not every user can create sockets in the directory.
fn writable_by_others(directory: &Path, what: &str) -> Option<Finding> {
    const OTHERS_WRITE: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    let mode = directory.metadata().ok()?.permissions().mode();
    let shown = directory.display();
    match (mode & OTHERS_WRITE != 0, mode & STICKY != 0) {
        (false, _) => None,
        (true, true) => {
            let why = format!(
                "every user can create files in {shown}, and so sockets that a VMM takes for the \
                 daemon's; choose a directory for the VMM only"
            );
            Some(Finding::warn("socket", what, why))
        }
        (true, false) => {
            let why = format!("every user can write to {shown}, and replace the socket");
            let command = format!("chmod o-w {}", quoted(&shown.to_string()));
            Some(Finding::warn("socket", what, why).fix(command))
        }
    }
}

/// Checks that QEMU's user may search each directory of the path. Returns a finding only if not.
fn search(directory: &Path, qemu: &Qemu, what: &str) -> Option<Finding> {
    let mut ancestors: Vec<&Path> = directory.ancestors().collect();
    ancestors.reverse();
    let who = Some((qemu.user, &qemu.groups[..]));
    for ancestor in ancestors {
        let error = match may_access(who, ancestor, AccessFlags::X_OK) {
            Ok(()) => continue,
            Err(error) => error,
        };
        let (name, shown) = (&qemu.name, ancestor.display());
        if error.raw_os_error() != Some(libc::EACCES) {
            let why = format!(
                "cannot check the rights of QEMU's user {name}: {error}; run doctor as root"
            );
            return Some(Finding::warn("qemu-user", what, why));
        }
        let why = format!("QEMU's user {name} may not search {shown}, so it cannot connect");
        let path = quoted(&shown.to_string());
        let command = if ancestor == directory {
            format!("chgrp {} {path} && chmod g+sx {path}", qemu.groups[0])
        } else {
            format!("chmod o+x {path}")
        };
        return Some(Finding::fail("qemu-user", what, why).fix(command));
    }
    None
}

/// Checks that QEMU's user may connect, which requires the right to write.
fn connect(
    credentials: &Credentials,
    Socket { path, group }: &Socket,
    directory: &Path,
    qemu: &Qemu,
    what: &str,
) -> Finding {
    let name = &qemu.name;
    let who = Some((qemu.user, &qemu.groups[..]));
    let shown = quoted(&path.display().to_string());
    if path.exists() {
        return match may_access(who, path, AccessFlags::W_OK) {
            Ok(()) => Finding::pass("qemu-user", what, format!("QEMU's user {name} can connect")),
            Err(_) => {
                let why =
                    format!("QEMU's user {name} may not write to the socket, so it cannot connect");
                let command = format!("chgrp {} {shown} && chmod g+w {shown}", qemu.groups[0]);
                Finding::fail("qemu-user", what, why).fix(command)
            }
        };
    }
    let future = FutureSocket::new(credentials, directory, group.as_deref());
    if future.admits(qemu) {
        let why = format!("QEMU's user {name} can connect once the daemon has created the socket");
        return Finding::pass("qemu-user", what, why);
    }
    let why = format!(
        "the daemon will create the socket with mode {:o}, so QEMU's user {name} cannot connect; set \
         socket-group to a group of that user",
        future.mode
    );
    let at = quoted(&directory.display().to_string());
    let group = qemu.groups[0];
    let command = if qemu.groups.contains(&future.group) {
        "umask 007".to_owned()
    } else {
        format!("chgrp {group} {at} && chmod g+sx {at} && umask 007")
    };
    Finding::warn("qemu-user", what, why).fix(command)
}

/// Owner and mode of a socket that the daemon will create.
struct FutureSocket {
    owner: u32,
    group: u32,
    mode: u32,
}

impl FutureSocket {
    /// Predicts owner and mode. The group is `socket_group`, else the group of a directory with the
    /// set-group-ID bit (inode(7)), else the daemon's.
    fn new(credentials: &Credentials, directory: &Path, socket_group: Option<&str>) -> Self {
        if let Some(group) = socket_group.and_then(find_group) {
            return FutureSocket { owner: credentials.user, group: group.as_raw(), mode: 0o660 };
        }
        const SET_GROUP: u32 = 0o2000;
        let own = credentials.groups.last().copied().unwrap_or(0);
        let inherited = directory.metadata().ok().filter(|it| it.mode() & SET_GROUP != 0);
        let group = inherited.map_or(own, |it| it.gid());
        FutureSocket { owner: credentials.user, group, mode: 0o777 & !credentials.umask }
    }

    fn admits(&self, qemu: &Qemu) -> bool {
        let write = if qemu.user == 0 {
            return true;
        } else if qemu.user == self.owner {
            0o200
        } else if qemu.groups.contains(&self.group) {
            0o020
        } else {
            0o002
        };
        self.mode & write != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    #[test]
    fn listener_is_found_without_connecting() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000: 00000002 00000000 00010000 0001 01 7 /run/a b\n\
                     0000: 00000003 00000000 00000000 0001 03 8 /run/c\n";
        let (_directory, host) = fake(&[("/proc/net/unix", table)]);
        assert!(listens(&host, Path::new("/run/a b")));
        assert!(!listens(&host, Path::new("/run/c")), "it is a connected socket");
        assert!(!listens(&host, Path::new("/run/d")));
    }

    #[test]
    fn socket_admits_owner_group_or_others_by_mode() {
        let qemu = Qemu { name: "q".into(), user: 5, groups: vec![6, 7] };
        let admits = |owner, group, mode| FutureSocket { owner, group, mode }.admits(&qemu);
        assert!(admits(5, 0, 0o755) && !admits(0, 0, 0o755));
        assert!(admits(0, 7, 0o770) && !admits(0, 7, 0o757));
        assert!(admits(0, 0, 0o777));
    }

    #[test]
    fn file_at_the_sockets_path_is_moved_away() {
        let (directory, host) = fake(&[("run/it", "precious")]);
        let path = directory.as_path().join("run/it");
        let socket = Socket { path, group: None };
        let found = check(&host, &Credentials::default(), &socket, None).remove(0);
        assert_eq!(found.status, Status::Fail);
        assert!(found.fix.unwrap().starts_with("mv "));
        let unknown =
            check(&host, &Credentials::default(), &socket, Some("no-such-user")).remove(0);
        assert!(unknown.why.contains("no-such-user"));
    }
}
