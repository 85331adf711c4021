//! Having a daemon's ports be what its file says, without touching those that are already.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use serde_json::Value;

use super::Command;
use super::client::{Connection, Failure};
use crate::config::{Host, PortConfig, PortOptions, read_file};
use crate::daemon::{Descriptors, open_queues};
use crate::endpoint::Endpoint;
use crate::sys::tap::device_exists;

/// What became of a port, or of the daemon's own settings: a line each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What was done.
    pub done: Vec<String>,
    /// What could not be.
    pub failed: Vec<String>,
}

/// Reads `file` and has the daemon's ports be as it says: those that it does not describe any more
/// are removed, those that are new are added, and those that are different are changed, which a port
/// that has to be removed and added again for it does not survive. Ports that an operator has added
/// stay.
///
/// # Errors
/// The file is wrong, or the daemon can't be asked. Nothing has been done then.
pub fn reload(daemon: &mut Connection, file: &Path) -> Result<Outcome, Failure> {
    let config = read_file(file).map_err(Failure::Refused)?;
    let mut outcome = Outcome::default();
    let about = daemon.ask(&Command::Features {}, &[])?;
    for (key, value) in config.settings() {
        if about["started"]["settings"][key] != value.as_str() {
            outcome.failed.push(format!("{key}: can't change while the daemon runs: restart it"));
        }
    }
    let list = daemon.ask(&Command::List {}, &[])?;
    let ports = list.as_array().map_or(&[][..], Vec::as_slice);
    let running: BTreeSet<&str> = ports.iter().filter_map(|port| port["name"].as_str()).collect();
    let mut described = BTreeSet::new();
    // What has to go, before anything can take its place.
    let (mut gone, mut wanted) = (Vec::new(), Vec::new());
    for port in &config.ports {
        let Some(name) = port.known_name() else {
            let why = "a port with tap-fd can be added only when the daemon starts".to_owned();
            outcome.failed.push(why);
            continue;
        };
        described.insert(name);
        if !running.contains(name) {
            wanted.push((name, port));
            continue;
        }
        let options = Box::new(port.options.clone());
        match daemon.ask(&Command::Change { name: name.to_owned(), port: options }, &[]) {
            Ok(reply) if reply["changed"] == true => outcome.done.push(format!("{name}: changed")),
            Ok(_) => {}
            Err(Failure::NeedsRestart(why)) => {
                outcome.done.push(format!("{name}: removed and added again, since {why}"));
                gone.push(name);
                wanted.push((name, port));
            }
            Err(Failure::Refused(why)) => outcome.failed.push(format!("{name}: {why}")),
            Err(failure) => return Err(failure),
        }
    }
    let from_file = ports.iter().filter(|port| port["from_file"] == true);
    for name in from_file.filter_map(|port| port["name"].as_str()) {
        if !described.contains(name) {
            outcome.done.push(format!("{name}: removed"));
            gone.push(name);
        }
    }
    for name in gone {
        daemon.ask(&Command::Remove { port: name.to_owned() }, &[])?;
    }
    for (name, port) in wanted {
        match add(daemon, port, true) {
            Ok(_) if running.contains(name) => {}
            Ok(_) => outcome.done.push(format!("{name}: added")),
            Err(gone @ (Failure::Unreachable(_) | Failure::Gone(_))) => return Err(gone),
            Err(failure) => outcome.failed.push(format!("{name}: not added: {failure}")),
        }
    }
    Ok(outcome)
}

/// Opens a port's TAP again, which had gone, if there is one of its name again: the port is removed, and
/// added as `file` describes it. Says whether that was done.
///
/// # Errors
/// The file is wrong, the daemon can't be asked, or the TAP can't be opened.
pub fn mend(daemon: &mut Connection, file: &Path, name: &str) -> Result<bool, Failure> {
    let config = read_file(file).map_err(Failure::Refused)?;
    let port = config.ports.iter().find(|port| port.known_name() == Some(name));
    let there = |port: &&PortConfig| match &port.host {
        Host::Tap(tap) => device_exists(tap).unwrap_or(false),
        Host::TapDescriptors(_) | Host::AfXdp(_) | Host::Loopback => false,
    };
    let Some(port) = port.filter(there) else { return Ok(false) };
    daemon.ask(&Command::Remove { port: name.to_owned() }, &[])?;
    add(daemon, port, true).map(|_| true)
}

/// Adds a port: opens what a daemon that has given up its rights can't open, and passes it on.
///
/// # Errors
/// What can't be opened, or why the daemon does not take it.
pub(super) fn add(
    daemon: &mut Connection,
    config: &PortConfig,
    from_file: bool,
) -> Result<Value, Failure> {
    let refused = |error: crate::daemon::StartError| Failure::Refused(error.to_string());
    let Descriptors { frontend, mut tap_queues } = Descriptors::inherit(config).map_err(refused)?;
    tap_queues.extend(open_queues(config).map_err(refused)?);
    let endpoint = Endpoint::open(&config.frontend, frontend).map_err(refused)?;
    if let Some(group) = &config.socket_group {
        endpoint.share_with(group).map_err(refused)?;
    }
    let files: Vec<BorrowedFd<'_>> =
        endpoint.descriptor().into_iter().chain(tap_queues.iter().map(AsFd::as_fd)).collect();
    let options: Box<PortOptions> = Box::new(config.options.clone());
    let added = daemon.ask(&Command::Add { port: options, from_file }, &files)?;
    endpoint.give_away();
    Ok(added)
}
