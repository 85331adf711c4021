//! Checks of a configuration against this host, without opening anything.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::unistd::geteuid;

use super::{Config, Host, MetricsAddress, PortConfig};
use crate::endpoint::Frontend;
use crate::port::tap::no_tap;
use crate::sandbox::{find_group, find_user};
use crate::sys::link;
use crate::sys::process::{check_cpus, check_writable};

/// A mistake that this host shows.
#[derive(Debug)]
pub(super) struct Finding {
    /// The port's index; `None` for the daemon's own settings.
    pub(super) port: Option<usize>,
    /// True if the daemon would fail; false if the mistake may be fixed before the daemon starts.
    pub(super) certain: bool,
    /// `KEY: CAUSE; FIX`.
    pub(super) what: String,
}

/// Checks users, groups, CPUs, the directories of sockets, and network devices.
pub(super) fn check_host(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut own = |what: Result<(), Found>| found.extend(finding(None, what));
    if let Some(user) = &config.confinement.user
        && !matches!(find_user(user), Ok(Some(_)))
    {
        own(wrong(format!("user: there is no user {user}; make it with 'useradd'")));
    }
    own(check_group("group", config.confinement.group.as_deref()));
    own(config.control.as_deref().map_or(Ok(()), |path| check_socket("control", path)));
    if let Some(MetricsAddress::Unix(path)) = &config.metrics {
        own(check_socket("metrics", path));
    }
    for (place, port) in config.ports.iter().enumerate() {
        let earlier = &config.ports[..place];
        for checked in check_port(port, earlier) {
            found.extend(finding(Some(place), checked));
        }
    }
    found
}

/// Certainty of a mistake, and its text.
type Found = (bool, String);

fn wrong(what: String) -> Result<(), Found> {
    Err((true, what))
}

fn finding(port: Option<usize>, checked: Result<(), Found>) -> Option<Finding> {
    checked.err().map(|(certain, what)| Finding { port, certain, what })
}

fn check_port(port: &PortConfig, earlier: &[PortConfig]) -> [Result<(), Found>; 5] {
    let socket = match &port.frontend {
        Frontend::Listen(path) => check_socket("socket-path", path),
        Frontend::Inherited(_) | Frontend::Connect(_) => Ok(()),
    };
    let cpus = check_cpus(&port.cpu_affinity).map_err(|why| {
        (true, format!("cpu-affinity: {why}; name CPUs that 'nproc' and its cpuset allow"))
    });
    [
        check_name(port, earlier),
        socket,
        check_group("socket-group", port.socket_group.as_deref()),
        check_device(port),
        cpus,
    ]
}

fn check_name(port: &PortConfig, earlier: &[PortConfig]) -> Result<(), Found> {
    let Some(name) = port.known_name() else { return Ok(()) };
    if earlier.iter().any(|other| other.known_name() == Some(name)) {
        return wrong(format!("name: two ports have the name {name}; set name for one"));
    }
    Ok(())
}

fn check_group(key: &str, group: Option<&str>) -> Result<(), Found> {
    match group {
        Some(name) if find_group(name).is_none() => {
            wrong(format!("{key}: there is no group {name}; make it with 'groupadd'"))
        }
        _ => Ok(()),
    }
}

/// Checks that a socket can be created at `path`. A missing directory below /run is no certain mistake: a service
/// creates its directory when it starts.
fn check_socket(key: &str, path: &Path) -> Result<(), Found> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    let shown = directory.display();
    match fs::metadata(directory) {
        Ok(metadata) if !metadata.is_dir() => {
            return wrong(format!("{key}: {shown} is not a directory; choose another path"));
        }
        Ok(_) => {}
        Err(error) => {
            let what =
                format!("{key}: directory {shown}: {error}; make it before the daemon starts");
            return Err((!directory.starts_with("/run"), what));
        }
    }
    if let Err(error) = check_writable(directory) {
        let what = format!("{key}: directory {shown} is not writable for this user: {error}");
        return Err((geteuid().is_root(), what));
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => wrong(format!(
            "{key}: {} is a file that is not a socket; remove it or choose another path",
            path.display()
        )),
        _ => Ok(()),
    }
}

/// Checks that a device is of the right kind. A missing TAP is no mistake, because the daemon creates it.
fn check_device(port: &PortConfig) -> Result<(), Found> {
    match &port.host {
        Host::Tap(name) => {
            let Ok(link) = link::find(name) else { return Ok(()) };
            match link.tun {
                Some(tun) if tun.is_tap && port.queue_pairs > 1 && !tun.multi_queue => {
                    wrong(format!(
                        "queue-pairs: tap {name} has one queue, not {}; make it again with multi_queue",
                        port.queue_pairs
                    ))
                }
                Some(tun) if tun.is_tap => Ok(()),
                _ => wrong(format!("tap: {}", no_tap(name))),
            }
        }
        Host::AfXdp(af_xdp) => match link::find(&af_xdp.name) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => wrong(format!(
                "af-xdp: there is no network device {}; make it before the daemon starts",
                af_xdp.name
            )),
            _ => Ok(()),
        },
        Host::TapDescriptors(_) | Host::Loopback => Ok(()),
    }
}
