//! Reload: adds, changes, replaces and removes the ports that differ from the file. Other ports continue
//! untouched.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use serde_json::Value;

use super::connection::{Connection, Failure};
use crate::api::requests::Command;
use crate::config::{Host, PortConfig, PortOptions, read_file};
use crate::endpoint::{Endpoint, Frontend, share};
use crate::error::StartError;
use crate::ports::{Descriptors, open_queues};
use crate::sandbox::find_group;
use crate::sys::device;
use crate::sys::link::find;

/// Results of a reload, a line for each port or setting.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Successes.
    pub done: Vec<String>,
    /// Failures.
    pub failed: Vec<String>,
}

/// A port of the file to start, in place of the running port `old` if there is one.
struct Start<'a> {
    name: &'a str,
    config: &'a PortConfig,
    old: Option<String>,
    /// Reason for the start.
    why: String,
}

/// Reads `file` and changes the daemon's ports to what it says. New ports are added, different ones changed,
/// and ports that the file no longer describes removed. A port that cannot change while it runs is replaced;
/// it continues unchanged if the new one cannot start. Ports that an operator added stay.
///
/// # Errors
/// The file has a mistake, or the daemon cannot be asked.
pub fn reload(daemon: &mut Connection, file: &Path) -> Result<Outcome, Failure> {
    let config = read_file(file).map_err(Failure::Refused)?;
    let mut outcome = Outcome::default();
    let about = daemon.ask(&Command::Features {}, &[])?;
    for (key, value) in config.settings() {
        if about["started"]["settings"][key] != value.as_str() {
            outcome.failed.push(format!("{key}: can't change while the daemon runs; restart it"));
        }
    }
    let list = daemon.ask(&Command::List {}, &[])?;
    let ports = list.as_array().map_or(&[][..], Vec::as_slice);
    let running: BTreeSet<&str> = ports.iter().filter_map(|port| port["name"].as_str()).collect();
    let described: BTreeSet<&str> =
        config.ports.iter().filter_map(PortConfig::known_name).collect();
    let from_file = ports.iter().filter(|port| port["from_file"] == true);
    let mut gone: Vec<(&str, PortConfig)> = Vec::new();
    for name in from_file.filter_map(|port| port["name"].as_str()) {
        if !described.contains(name) {
            gone.push((name, running_config(daemon, name)?.1));
        }
    }
    let mut starts = Vec::new();
    for port in &config.ports {
        let Some(name) = port.known_name() else {
            let why =
                "a port with tap-fd can be added only when the daemon starts; use tap".to_owned();
            outcome.failed.push(why);
            continue;
        };
        if !running.contains(name) {
            // The port may run under its previous name.
            let is_it = |(_, old): &(&str, PortConfig)| old.frontend == port.frontend;
            let old = gone.iter().position(is_it).map(|place| gone.remove(place).0.to_owned());
            let why = old.as_ref().map_or(String::new(), |old| format!("it was called {old}"));
            starts.push(Start { name, config: port, old, why });
            continue;
        }
        let options = Box::new(port.options.clone());
        match daemon.ask(&Command::Change { name: name.to_owned(), port: options }, &[]) {
            Ok(reply) if reply["changed"] == true => outcome.done.push(format!("{name}: changed")),
            Ok(_) => {}
            Err(Failure::NeedsRestart(why)) => {
                starts.push(Start { name, config: port, old: Some(name.to_owned()), why });
            }
            Err(Failure::Refused(why)) => outcome.failed.push(keeps(name, &why)),
            Err(failure) => return Err(failure),
        }
    }
    for (name, _) in gone {
        remove(daemon, name)?;
        outcome.done.push(format!("{name}: removed"));
    }
    // A port may need an object that another port releases, so failed starts are repeated after each success.
    loop {
        let (before, mut failures) = (starts.len(), Vec::new());
        let mut left = Vec::new();
        for start in starts {
            match begin(daemon, &start, &mut outcome) {
                Ok(()) => {}
                Err(gone @ (Failure::Unreachable(_) | Failure::Gone(_))) => return Err(gone),
                Err(failure) => {
                    failures.push(match &start.old {
                        Some(old) => keeps(old, &failure.to_string()),
                        None => format!("{}: not added: {failure}", start.name),
                    });
                    left.push(start);
                }
            }
        }
        if left.is_empty() || left.len() == before {
            outcome.failed.extend(failures);
            let missing = left.iter().filter(|start| start.old.is_none());
            let ports = missing.map(|start| start.name.to_owned()).collect();
            daemon.ask(&Command::Missing { ports }, &[])?;
            return Ok(outcome);
        }
        starts = left;
    }
}

/// Removes a port that the file does not describe, or that is started again.
fn remove(daemon: &mut Connection, name: &str) -> Result<(), Failure> {
    let command = Command::Remove { port: name.to_owned(), from_file: true };
    daemon.ask(&command, &[]).map(drop)
}

/// Returns the line about a port that continues unchanged.
fn keeps(name: &str, why: &str) -> String {
    format!("{name}: not changed: {why}")
}

/// Starts a port, in place of a running one if it has one.
fn begin(daemon: &mut Connection, start: &Start<'_>, outcome: &mut Outcome) -> Result<(), Failure> {
    let Start { name, config, old, why } = start;
    match old {
        Some(old) => {
            outcome.failed.extend(replace(daemon, old, config)?);
            outcome.done.push(format!("{name}: replaced, since {why}"));
        }
        None => {
            add(daemon, config, true)?;
            outcome.done.push(format!("{name}: added"));
        }
    }
    Ok(())
}

/// Returns the report and the configuration of a running port.
fn running_config(daemon: &mut Connection, name: &str) -> Result<(Value, PortConfig), Failure> {
    let mut report = daemon.ask(&Command::Show { port: name.to_owned() }, &[])?;
    let options = serde_json::from_value::<PortOptions>(report["options"].take());
    let options = options.map_err(|error| Failure::Refused(format!("{name}: {error}")))?;
    Ok((report, options.check().map_err(Failure::Refused)?))
}

/// Replaces the port `name`: opens the descriptors that neither the sandboxed daemon can open nor the old port
/// has, and passes them on. Returns a failure after the replacement.
///
/// # Errors
/// An object cannot be opened, or the daemon refuses the port. The old port continues.
fn replace(
    daemon: &mut Connection,
    name: &str,
    config: &PortConfig,
) -> Result<Option<String>, Failure> {
    let refused = |error: StartError| Failure::Refused(error.to_string());
    let (report, old) = running_config(daemon, name)?;
    let state = &report["state"];
    if state == "ended" {
        // An ended port has no connection to lose.
        remove(daemon, name)?;
        return add(daemon, config, true).map(|_| None);
    }
    let group = config.socket_group.as_deref();
    if let Some(group) = group.filter(|group| find_group(group).is_none()) {
        return Err(Failure::Refused(format!("socket-group: there is no group {group}")));
    }
    let endpoint = if config.frontend == old.frontend {
        None
    } else {
        let inherited = Descriptors::inherit(config).map_err(refused)?;
        let endpoint = Endpoint::open(&config.frontend, inherited.frontend).map_err(refused)?;
        group.map_or(Ok(()), |group| endpoint.share_with(group)).map_err(refused)?;
        Some(endpoint)
    };
    let is_same_tap = config.host == old.host && state != "degraded";
    // The device may have been renamed since.
    let device = report["device"]["name"].as_str().filter(|_| is_same_tap);
    let queues = if is_same_tap && config.queue_pairs <= old.queue_pairs {
        Vec::new()
    } else {
        open_queues(config, device).map_err(refused)?
    };
    let socket = endpoint.as_ref().and_then(Endpoint::descriptor);
    let files: Vec<BorrowedFd<'_>> =
        socket.into_iter().chain(queues.iter().map(AsFd::as_fd)).collect();
    let port = Box::new(config.options.clone());
    daemon.ask(&Command::Replace { name: name.to_owned(), port }, &files)?;
    let mut failed = None;
    match (endpoint, &config.frontend) {
        (Some(endpoint), _) => endpoint.leave_to_successor(),
        (None, Frontend::Listen(path)) if config.socket_group != old.socket_group => {
            failed = share(path, group).err();
        }
        (None, _) => {}
    }
    if let Host::Tap(tap) = &config.host
        && is_same_tap
        && config.mtu != old.mtu
        && let tap = device.unwrap_or(tap)
        && !is_persistent(tap)
    {
        // The daemon created this TAP with the previous MTU.
        let set = device::set_mtu(tap, config.mtu.into());
        let failure = |error| StartError::new(format!("cannot set the MTU of tap {tap}: {error}"));
        failed = failed.or(set.map_err(failure).err());
    }
    Ok(failed.map(|error| format!("{name}: replaced, but: {error}")))
}

/// Returns true if a TAP persists after its creator exits, or if that is unknown.
fn is_persistent(tap: &str) -> bool {
    find(tap).ok().and_then(|link| link.tun).is_none_or(|tun| tun.persistent)
}

/// Opens a port's deleted TAP again, if a device of its name exists: replaces the port by the one that `file`
/// describes. Returns true if it did.
///
/// # Errors
/// The file has a mistake, the daemon cannot be asked, or the TAP cannot be opened.
pub fn reopen_tap(daemon: &mut Connection, file: &Path, name: &str) -> Result<bool, Failure> {
    let config = read_file(file).map_err(Failure::Refused)?;
    let port = config.ports.iter().find(|port| port.known_name() == Some(name));
    let there = |port: &&PortConfig| match &port.host {
        Host::Tap(tap) => device::index(tap).is_ok_and(|index| index.is_some()),
        Host::TapDescriptors(_) | Host::AfXdp(_) | Host::Loopback => false,
    };
    let Some(port) = port.filter(there) else { return Ok(false) };
    replace(daemon, name, port).map(|_| true)
}

/// Returns the reason why a port and a running one exclude each other, if they do. The kernel would only report
/// that a device is busy.
///
/// # Errors
/// The daemon cannot be asked.
pub(super) fn conflict(
    daemon: &mut Connection,
    config: &PortConfig,
) -> Result<Option<String>, Failure> {
    let list = daemon.ask(&Command::List {}, &[])?;
    let ports = list.as_array().map_or(&[][..], Vec::as_slice);
    for name in ports.iter().filter_map(|port| port["name"].as_str()) {
        let (report, running) = running_config(daemon, name)?;
        let why = config.conflict(name, Some(&running).filter(|_| report["state"] != "ended"));
        if why.is_some() {
            return Ok(why);
        }
    }
    Ok(None)
}

/// Starts those of the ports `names` of `file` that can be started.
///
/// # Errors
/// The file has a mistake, or the daemon cannot be asked.
pub fn start_missing(
    daemon: &mut Connection,
    file: &Path,
    names: &[String],
) -> Result<Outcome, Failure> {
    let config = read_file(file).map_err(Failure::Refused)?;
    let is_named = |name: &&str| names.iter().any(|it| it == name);
    let (mut outcome, mut missing) = (Outcome::default(), Vec::new());
    for port in &config.ports {
        let Some(name) = port.known_name().filter(is_named) else { continue };
        let added = open(port)
            .map_err(|error| Failure::Refused(error.to_string()))
            .and_then(|opened| pass(daemon, port, true, opened));
        match added {
            Ok(_) => outcome.done.push(format!("{name}: added")),
            Err(gone @ (Failure::Unreachable(_) | Failure::Gone(_))) => return Err(gone),
            Err(failure) => {
                outcome.failed.push(format!("{name}: not added: {failure}"));
                missing.push(name.to_owned());
            }
        }
    }
    daemon.ask(&Command::Missing { ports: missing }, &[])?;
    Ok(outcome)
}

/// Adds a port: opens the descriptors that the sandboxed daemon cannot open, and passes them on.
///
/// # Errors
/// An object cannot be opened, or the daemon refuses the port.
pub(super) fn add(
    daemon: &mut Connection,
    config: &PortConfig,
    from_file: bool,
) -> Result<Value, Failure> {
    match open(config) {
        Ok(opened) => pass(daemon, config, from_file, opened),
        Err(error) => {
            let why = conflict(daemon, config)?.unwrap_or_else(|| error.to_string());
            Err(Failure::Refused(why))
        }
    }
}

/// Opens a port's socket, then its TAP, so that no TAP is created if the socket cannot be opened.
fn open(config: &PortConfig) -> Result<(Endpoint, Vec<OwnedFd>), StartError> {
    let Descriptors { frontend, mut tap_queues } = Descriptors::inherit(config)?;
    let endpoint = Endpoint::open(&config.frontend, frontend)?;
    if let Some(group) = &config.socket_group {
        endpoint.share_with(group)?;
    }
    tap_queues.extend(open_queues(config, None)?);
    Ok((endpoint, tap_queues))
}

/// Passes an opened port to the daemon.
fn pass(
    daemon: &mut Connection,
    config: &PortConfig,
    from_file: bool,
    (endpoint, tap_queues): (Endpoint, Vec<OwnedFd>),
) -> Result<Value, Failure> {
    let files: Vec<BorrowedFd<'_>> =
        endpoint.descriptor().into_iter().chain(tap_queues.iter().map(AsFd::as_fd)).collect();
    let options: Box<PortOptions> = Box::new(config.options.clone());
    let added = daemon.ask(&Command::Add { port: options, from_file }, &files)?;
    endpoint.leave_to_successor();
    Ok(added)
}
