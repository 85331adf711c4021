//! A port's socket: whether the daemon can make it, and QEMU's user reach it.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::unistd::{AccessFlags, User, getgrouplist};

use super::finding::{Finding, quoted};
use super::host::{Host, Myself};
use super::options::Socket;
use crate::sandbox::find_group;
use crate::sys::process::may_access;
use crate::sys::socket::MAX_PATH;

/// QEMU's user, with all groups.
struct Qemu {
    name: String,
    user: u32,
    groups: Vec<u32>,
}

/// Checks the place of a socket.
pub(super) fn check(
    host: &Host,
    myself: &Myself,
    socket: &Socket,
    qemu_user: Option<&str>,
) -> Vec<Finding> {
    let path = socket.path.as_path();
    let what = format!("socket {}", path.display());
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        let why =
            format!("its path has {length} bytes, and a unix socket's {MAX_PATH} at the most");
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
            let why = format!("{} is no directory: choose another path", parent.display());
            return vec![Finding::fail("socket", what, why)];
        }
        Err(error) => return vec![no_directory(&error, parent, myself, qemu.as_ref(), what)],
    };
    let mut found = vec![place(host, path, &directory, &what)];
    found.extend(openness(&directory, &what));
    if let Some(qemu) = qemu {
        let searched = search(&directory, &qemu, &what);
        found.push(searched.unwrap_or_else(|| connect(myself, socket, &directory, &qemu, &what)));
    }
    found
}

fn find(name: &str) -> Result<Qemu, String> {
    let user = User::from_name(name)
        .map_err(|error| format!("look up QEMU's user {name}: {error}"))?
        .ok_or_else(|| format!("there is no user {name}, whom QEMU is to run as: mend the name"))?;
    let known = CString::new(name).ok().and_then(|name| getgrouplist(&name, user.gid).ok());
    let mut groups = vec![user.gid.as_raw()];
    groups.extend(known.unwrap_or_default().into_iter().map(|group| group.as_raw()));
    Ok(Qemu { name: name.to_owned(), user: user.uid.as_raw(), groups })
}

fn no_directory(
    error: &io::Error,
    parent: &Path,
    myself: &Myself,
    qemu: Option<&Qemu>,
    what: String,
) -> Finding {
    if error.kind() != io::ErrorKind::NotFound {
        let why = format!("its directory {}: {error}", parent.display());
        return Finding::fail("socket", what, why);
    }
    let why = format!("its directory {} is not there", parent.display());
    let shown = quoted(&parent.display().to_string());
    // Whoever connects is the VMM: nobody but its group gets in. What is made there is the group's.
    let command = match qemu {
        Some(qemu) => {
            format!("install -d -m 2770 -o {} -g {} {shown}", myself.user, qemu.groups[0])
        }
        None => format!("install -d -m 700 {shown}"),
    };
    Finding::fail("socket", what, why).fix(command)
}

/// Whether the socket can be put there.
fn place(host: &Host, path: &Path, directory: &Path, what: &str) -> Finding {
    let shown = quoted(&path.display().to_string());
    if let Err(error) = may_access(None, directory, AccessFlags::W_OK | AccessFlags::X_OK) {
        let directory = directory.display();
        let why = format!("this user can't make files in {directory}: {error}");
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
            Finding::pass("socket", what, "a process listens there: another daemon can't")
        }
        Ok(file) if file.file_type().is_socket() => {
            Finding::pass("socket", what, "it is there, and nobody listens: the daemon replaces it")
        }
        Ok(_) => {
            let why = "it is a file that is no socket, and the daemon leaves that alone";
            Finding::fail("socket", what, why).fix(format!("mv {shown} {shown}.old"))
        }
        Err(_) => {
            Finding::pass("socket", what, "its directory is there, and the daemon can make it")
        }
    }
}

/// Whether some process listens at a path (proc_net_unix(5); flag `__SO_ACCEPTCON`). To connect would
/// tell, too, but a daemon takes whoever connects for its VMM.
fn listens(host: &Host, path: &Path) -> bool {
    const ACCEPTS: u32 = 0x1_0000;
    let path = path.display().to_string();
    host.read("/proc/net/unix").unwrap_or_default().lines().any(|line| {
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS != 0) && line.ends_with(&format!(" {path}"))
    })
}

/// Whether strangers can put sockets of their own there.
fn openness(directory: &Path, what: &str) -> Option<Finding> {
    const OTHERS_WRITE: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    let mode = directory.metadata().ok()?.permissions().mode();
    let shown = directory.display();
    match (mode & OTHERS_WRITE != 0, mode & STICKY != 0) {
        (false, _) => None,
        (true, true) => {
            let why = format!(
                "everybody can make files in {shown}, and so sockets that a VMM takes for ours: \
                 choose a directory of the VMM's own"
            );
            Some(Finding::warn("socket", what, why))
        }
        (true, false) => {
            let why = format!("everybody can put another socket in its place in {shown}");
            let command = format!("chmod o-w {}", quoted(&shown.to_string()));
            Some(Finding::warn("socket", what, why).fix(command))
        }
    }
}

/// Whether QEMU's user gets as far as the directory; nothing if so.
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
            let why =
                format!("whether {name} can reach it can't be asked ({error}): run this as root");
            return Some(Finding::warn("qemu-user", what, why));
        }
        let why = format!("QEMU's user {name} may not search {shown}, and can't connect");
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

/// Whether QEMU's user may connect, which takes the right to write.
fn connect(
    myself: &Myself,
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
            Ok(()) => Finding::pass("qemu-user", what, format!("QEMU's user {name} may connect")),
            Err(_) => {
                let why = format!("QEMU's user {name} may not write to it, and can't connect");
                let command = format!("chgrp {} {shown} && chmod g+w {shown}", qemu.groups[0]);
                Finding::fail("qemu-user", what, why).fix(command)
            }
        };
    }
    let made = Made::by(myself, directory, group.as_deref());
    if made.admits(qemu) {
        let why = format!("QEMU's user {name} may connect to it, as it will be made");
        return Finding::pass("qemu-user", what, why);
    }
    let why = format!(
        "it will be made with mode {:o}, and QEMU's user {name} can't connect then: name its group by \
         socket-group",
        made.mode
    );
    let at = quoted(&directory.display().to_string());
    let group = qemu.groups[0];
    let command = if qemu.groups.contains(&made.group) {
        "umask 007".to_owned()
    } else {
        format!("chgrp {group} {at} && chmod g+sx {at} && umask 007")
    };
    Finding::warn("qemu-user", what, why).fix(command)
}

/// A socket that the daemon will make.
struct Made {
    owner: u32,
    group: u32,
    mode: u32,
}

impl Made {
    /// In a directory with the set-group-ID bit it is the directory's group's (inode(7)).
    fn by(myself: &Myself, directory: &Path, given_to: Option<&str>) -> Self {
        if let Some(group) = given_to.and_then(find_group) {
            return Made { owner: myself.user, group: group.as_raw(), mode: 0o660 };
        }
        const SET_GROUP: u32 = 0o2000;
        let own = myself.groups.last().copied().unwrap_or(0);
        let inherited = directory.metadata().ok().filter(|it| it.mode() & SET_GROUP != 0);
        let group = inherited.map_or(own, |it| it.gid());
        Made { owner: myself.user, group, mode: 0o777 & !myself.umask }
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
    fn a_listener_is_seen_without_connecting() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000: 00000002 00000000 00010000 0001 01 7 /run/a b\n\
                     0000: 00000003 00000000 00000000 0001 03 8 /run/c\n";
        let (_directory, host) = fake(&[("/proc/net/unix", table)]);
        assert!(listens(&host, Path::new("/run/a b")));
        assert!(!listens(&host, Path::new("/run/c")), "it is connected");
        assert!(!listens(&host, Path::new("/run/d")));
    }

    #[test]
    fn a_socket_is_its_owners_its_groups_or_everybodys() {
        let qemu = Qemu { name: "q".into(), user: 5, groups: vec![6, 7] };
        let admits = |owner, group, mode| Made { owner, group, mode }.admits(&qemu);
        assert!(admits(5, 0, 0o755) && !admits(0, 0, 0o755));
        assert!(admits(0, 7, 0o770) && !admits(0, 7, 0o757));
        assert!(admits(0, 0, 0o777));
    }

    #[test]
    fn what_is_no_socket_is_moved_out_of_the_way() {
        let (directory, host) = fake(&[("run/it", "precious")]);
        let path = directory.as_path().join("run/it");
        let socket = Socket { path, group: None };
        let found = check(&host, &Myself::default(), &socket, None).remove(0);
        assert_eq!(found.status, Status::Fail);
        assert!(found.fix.unwrap().starts_with("mv "));
        let nobody = check(&host, &Myself::default(), &socket, Some("no-such-user")).remove(0);
        assert!(nobody.why.contains("no-such-user"));
    }
}
