//! Privileges that the daemon drops once everything is open: a compromised thread has few.
//!
//! Two steps. [`Sandbox::enter`] restricts the whole process before any thread starts: the configured user and
//! group, no capabilities, no new privileges, no core dumps, no ptrace by other processes, no files, no network.
//! [`Sandbox::confine`] then restricts each thread, at its start, to the system calls of its [`Role`].

mod calls;

use std::collections::HashSet;
use std::io;
use std::path::Path;

use caps::{CapSet, Capability};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use log::{info, warn};
use nix::sys::prctl;
use nix::unistd::{Gid, Group, Uid, User, geteuid, setgroups, setresgid, setresuid};
use seccompiler::{BpfProgram, SeccompAction, apply_filter};
use serde::Deserialize;

use crate::error::StartError;
use crate::sys::process::clear_file_mode_mask;

/// Settings of the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    /// Action on a system call outside the thread's allow-list.
    pub seccomp: Seccomp,
    /// User to become, by name or number.
    pub user: Option<String>,
    /// Group to become, by name or number; without one, the user's.
    pub group: Option<String>,
}

/// Action on a system call outside the thread's allow-list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// Kill the process.
    #[default]
    Kill,
    /// Have the kernel log the call.
    Log,
    /// Install no filter.
    None,
}

/// Rights that the process keeps in the sandbox.
#[derive(Debug)]
pub struct Needs<'a> {
    /// True if the process serves ports on AF_XDP, which require capabilities.
    pub af_xdp: bool,
    /// Paths of the sockets that the process listens on. The process may remove each file and make it again.
    pub sockets: Vec<&'a Path>,
}

/// Task of a thread, which determines its system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Waits for signals.
    Main,
    /// Waits for signals and operators, and starts the threads of added ports. A thread inherits the filter of
    /// the thread that starts it, so this role includes the calls of all others.
    Operated,
    /// Writes the log.
    Log,
    /// Writes captured frames.
    Capture,
    /// Speaks to a frontend, and changes the filter of a TAP.
    Control,
    /// Speaks to a frontend of an AF_XDP port, and changes the port's filter.
    XdpControl,
    /// Moves frames of a TAP or a loopback.
    Worker,
    /// Moves frames of an AF_XDP port, and opens its sockets.
    XdpWorker,
}

/// The sandbox of this process.
#[derive(Debug, Clone, Copy)]
pub struct Sandbox {
    seccomp: Seccomp,
    /// True if the process kept the capabilities for AF_XDP.
    af_xdp: bool,
}

impl Sandbox {
    /// Sandbox that restricts no thread.
    pub const NONE: Self = Sandbox { seccomp: Seccomp::None, af_xdp: true };

    /// Drops all privileges of the process except those that `needs` lists. The caller has opened all configured
    /// objects, and has started no thread.
    ///
    /// # Errors
    /// The user or group does not exist, or the kernel refuses a step. A kernel without landlock is no error;
    /// the log states how far files are restricted.
    pub fn enter(confinement: &Confinement, needs: &Needs<'_>) -> Result<Self, StartError> {
        let kept = capabilities(needs);
        let failed =
            |what: &str, error: &dyn std::fmt::Display| StartError::new(format!("{what}: {error}"));
        // Before becoming another user, who may not.
        limit_capabilities(&kept).map_err(|error| failed("cannot drop capabilities", &error))?;
        let user = become_user(confinement, !kept.is_empty())?;
        let kept =
            drop_capabilities(&kept).map_err(|error| failed("cannot drop capabilities", &error))?;
        prctl::set_no_new_privs().map_err(|error| failed("cannot set no_new_privs", &error))?;
        // A socket that is made again has its mode from the start, and no thread may set it later by path.
        clear_file_mode_mask();
        prctl::set_dumpable(false).map_err(|error| failed("cannot disable core dumps", &error))?;
        let files = restrict_files(&needs.sockets)
            .map_err(|error| failed("cannot restrict file access", &error))?;
        let seccomp = confinement.seccomp;
        let calls = match seccomp {
            Seccomp::Kill => "a system call outside a thread's allow-list kills the process",
            Seccomp::Log => "the kernel logs system calls outside a thread's allow-list",
            Seccomp::None => "system calls are not filtered",
        };
        info!("sandbox: {user}, capabilities: {kept}; {files}; {calls}");
        Ok(Sandbox { seccomp, af_xdp: needs.af_xdp })
    }

    /// Returns true if an AF_XDP port can still be started.
    pub fn has_af_xdp(&self) -> bool {
        self.af_xdp
    }

    /// Restricts the calling thread to the system calls of its role.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn confine(&self, role: Role) -> io::Result<()> {
        let action = match self.seccomp {
            Seccomp::Kill => SeccompAction::KillProcess,
            Seccomp::Log => SeccompAction::Log,
            Seccomp::None => return Ok(()),
        };
        let filter: BpfProgram = calls::filter(role, self.af_xdp, action)
            .and_then(TryInto::try_into)
            .map_err(io::Error::other)?;
        apply_filter(&filter).map_err(io::Error::other)
    }
}

/// Returns the capabilities to keep. A port on AF_XDP opens sockets for each session, and loads its program
/// again when its device returns.
fn capabilities(needs: &Needs<'_>) -> HashSet<Capability> {
    if !needs.af_xdp {
        return HashSet::new();
    }
    HashSet::from([
        Capability::CAP_NET_RAW,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_BPF,
        // The kernel locks the memory of a UMEM.
        Capability::CAP_IPC_LOCK,
    ])
}

/// Becomes the configured user and group; returns the user for the log.
fn become_user(confinement: &Confinement, keep: bool) -> Result<String, StartError> {
    let Confinement { user, group, .. } = confinement;
    let no_such = |what: &str, name: &str| {
        StartError::new(format!("there is no {what} {name}; name one that exists"))
    };
    let failed = |what: &str, name: &str, error: nix::Error| {
        StartError::new(format!("cannot become {what} {name}: {error}; start as root"))
    };
    let found = match user {
        Some(name) => Some(find_user(name).ok().flatten().ok_or_else(|| no_such("user", name))?),
        None => None,
    };
    let gid = match (group, &found) {
        (Some(name), _) => Some(find_group(name).ok_or_else(|| no_such("group", name))?),
        (None, Some((_, gid))) => Some(*gid),
        (None, None) => None,
    };
    if let Some(gid) = gid {
        let name = group.as_deref().or(user.as_deref()).unwrap_or_default();
        setgroups(&[gid])
            .and_then(|()| setresgid(gid, gid, gid))
            .map_err(|error| failed("group", name, error))?;
    }
    if let (Some((uid, _)), Some(name)) = (found, user) {
        prctl::set_keepcaps(keep)
            .and_then(|()| setresuid(uid, uid, uid))
            .map_err(|error| failed("user", name, error))?;
    }
    Ok(format!("user {}", geteuid()))
}

/// Finds a user by name or number, with the user's group.
pub(crate) fn find_user(name: &str) -> nix::Result<Option<(Uid, Gid)>> {
    let found = match name.parse() {
        Ok(number) => {
            let uid = Uid::from_raw(number);
            let gid = User::from_uid(uid)?.map_or(Gid::from_raw(number), |user| user.gid);
            return Ok(Some((uid, gid)));
        }
        Err(_) => User::from_name(name)?,
    };
    Ok(found.map(|user| (user.uid, user.gid)))
}

/// Finds a group by name or number.
pub(crate) fn find_group(name: &str) -> Option<Gid> {
    match name.parse() {
        Ok(number) => Some(Gid::from_raw(number)),
        Err(_) => Group::from_name(name).ok().flatten().map(|group| group.gid),
    }
}

/// Removes all capabilities except `needed` from the bounding set.
fn limit_capabilities(needed: &HashSet<Capability>) -> Result<(), caps::errors::CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(needed) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(())
}

/// Drops all capabilities except `needed`; returns the names of the remaining ones.
fn drop_capabilities(needed: &HashSet<Capability>) -> Result<String, caps::errors::CapsError> {
    let have = caps::read(None, CapSet::Permitted)?;
    let kept: HashSet<Capability> = have.intersection(needed).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    let mut names: Vec<String> = kept.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    Ok(if names.is_empty() { "none".into() } else { names.join(" ") })
}

/// Forbids opening files, binding and connecting TCP ports, connecting to abstract sockets, and sending
/// signals to other processes, as far as the kernel supports it; returns the extent for the log.
fn restrict_files(sockets: &[&Path]) -> Result<String, landlock::RulesetError> {
    // An older kernel enforces the rights that it knows.
    let abi = ABI::V6;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    for directory in sockets.iter().map(|path| directory_of(path)) {
        // The daemon removes its socket file at the end, and makes a deleted one again.
        match PathFd::new(directory) {
            Ok(opened) => {
                let access = AccessFs::RemoveFile | AccessFs::MakeSock;
                ruleset = ruleset.add_rule(PathBeneath::new(opened, access))?;
            }
            Err(error) => warn!(
                "{}: cannot open directory: {error}; its socket stays at the end",
                directory.display()
            ),
        }
    }
    let status = ruleset.restrict_self()?.ruleset;
    Ok(match status {
        RulesetStatus::FullyEnforced => "no files and no network by landlock".into(),
        RulesetStatus::PartiallyEnforced => {
            "no files by landlock, as far as this kernel supports it".into()
        }
        RulesetStatus::NotEnforced => "files are not restricted: the kernel has no landlock".into(),
    })
}

/// Returns the directory of a socket.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
