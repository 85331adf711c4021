//! The daemon: start order, signals, supervision, take-over, and the order of its end.
//!
//! Each port has one control thread and one worker per queue pair, and ports share no state. The main thread
//! serves operators, who add, change and remove ports. The sandboxed main thread opens no device: the operator's
//! `ctl`, or the helper process ([`opener`]), passes the descriptors of a new port.

mod handover;
mod main_loop;
pub mod opener;
mod supervision;

use log::{error, warn};

use crate::api::Server;
use crate::api::scrape::Scrape;
use crate::config::{Config, PortConfig};
use crate::descriptors;
use crate::error::{StartError, no_descriptor, no_thread};
use crate::guest::contain_sigbus;
use crate::logging::Log;
use crate::port::af_xdp::program::read_kernel_files;
use crate::ports::{Descriptors, Opened, Ports, check_devices};
use crate::sandbox::{Role, Sandbox};
use crate::sys::process::{Signals, raise_descriptor_limit, share_pool};

use handover::Predecessor;
use main_loop::MainLoop;
use supervision::Supervisor;

/// Runs all ports until a signal ends the daemon, or the last inherited connection ends.
///
/// # Errors
/// The daemon cannot start, the main thread cannot wait for events, or a port's control thread panicked and no
/// port runs any more.
pub fn run(config: &Config) -> Result<(), StartError> {
    // First: a descriptor opened here could get the number of a configured one that was not inherited.
    let inherited = config.ports.iter().map(Descriptors::inherit).collect::<Result<Vec<_>, _>>()?;
    share_pool();
    raise_descriptor_limit().into_iter().for_each(descriptors::set_limit);
    contain_sigbus()
        .map_err(|error| StartError::new(format!("cannot install a signal handler: {error}")))?;
    // Before any thread starts, because threads inherit the signal mask.
    let signals = Signals::block()
        .map_err(|error| StartError::new(format!("cannot block signals: {error}")))?;
    let mut log = Log::new(config.log_level);
    let result = serve(config, inherited, &signals, &mut log);
    log.flush();
    result
}

fn serve(
    config: &Config,
    inherited: Vec<Descriptors>,
    signals: &Signals,
    log: &mut Log,
) -> Result<(), StartError> {
    // Before anything is opened, because the old daemon has the same devices open.
    let mut predecessor = match (&config.control, config.take_over) {
        (Some(control), true) => Some(Predecessor::find(control)?),
        _ => None,
    };
    // A take-over receives the open ports of the old daemon.
    let described = if predecessor.is_some() { &[] } else { &config.ports[..] };
    let (opened, missing) = open_ports(described, inherited, config.file.is_some())?;
    let mut names: Vec<&str> = opened.iter().map(Opened::name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let name = pair[0];
        return Err(StartError::new(format!("two ports have the name {name}; set name for one")));
    }
    check_devices(opened.iter().map(Opened::claim))?;
    let mut listener = |name: &str| predecessor.as_mut().and_then(|it| it.listener(name));
    let control = listener("control");
    // If the file names another address now, the metrics get a new socket.
    let metrics_name = config.metrics.as_ref().map(|address| format!("metrics {address}"));
    let metrics = metrics_name.as_deref().and_then(&mut listener);
    let mut server = Server::open(config, control)?;
    if let Some(file) = &config.file {
        let opener = opener::start(file, config.log_level).map_err(|error| {
            StartError::new(format!("cannot start the helper process: {error}"))
        })?;
        server.serve_opener(opener);
    }
    let scrape =
        config.metrics.as_ref().map(|address| Scrape::open(address, metrics)).transpose()?;
    if let (Some(name), Some(fd)) = (&metrics_name, scrape.as_ref().and_then(Scrape::fd)) {
        server.pass_on(name, fd.try_clone_to_owned().map_err(no_descriptor)?);
    }
    let supervisor = Supervisor::connect();
    if server.is_open() {
        // An operator may add a port on AF_XDP later, when the sandbox forbids reading these files.
        read_kernel_files();
    }
    let sandbox = Sandbox::enter(&config.confinement, &config.needs())?;
    log.start(move || sandbox.confine(Role::Log)).map_err(no_thread)?;
    let mut ports = Ports::new(sandbox)?;
    ports.set_missing(missing);
    let prepared = opened
        .into_iter()
        .map(|port| ports.prepare(port, Vec::new()))
        .collect::<Result<Vec<_>, _>>()?;
    // Earlier log lines come first, and a client that connects finds all ports prepared.
    log.flush();
    server.start().map_err(|error| {
        StartError::new(format!("cannot listen on the control socket: {error}"))
    })?;
    for port in prepared {
        ports.start(port)?;
    }
    let role = if server.is_open() { Role::Operated } else { Role::Main };
    sandbox.confine(role).map_err(no_thread)?;
    if let Some(predecessor) = &mut predecessor {
        predecessor.take_over(&mut ports)?;
    }
    if let Some(need) = descriptors::started() {
        let limit = descriptors::limit();
        warn!(
            "daemon: limit of open descriptors is low limit={limit} needed={need}; requests of VMMs that \
             share many memory regions are refused; set LimitNOFILE={need} in the unit, or run ulimit -n \
             {need}"
        );
    }
    let mut main_loop =
        MainLoop::new(signals, server, scrape, ports, supervisor).map_err(no_descriptor)?;
    if let Some(predecessor) = predecessor {
        predecessor.commit()?;
        main_loop.take_over(config);
    }
    let ended = main_loop.run();
    main_loop.stop();
    ended
}

/// Opens the sockets and devices of the described ports. Returns the opened ports, and the names of those to try
/// again later, which only a file can describe: one missing device must not stop the other ports.
///
/// # Errors
/// No port can be opened, or a port that cannot be tried again later cannot be opened.
fn open_ports(
    described: &[PortConfig],
    inherited: Vec<Descriptors>,
    from_file: bool,
) -> Result<(Vec<Opened>, Vec<String>), StartError> {
    let (mut opened, mut missing) = (Vec::new(), Vec::new());
    for (port, inherited) in described.iter().zip(inherited) {
        let retry = port.known_name().filter(|_| from_file && port.descriptors().is_empty());
        match (Opened::new(port.clone(), from_file, inherited), retry) {
            (Ok(port), _) => opened.push(port),
            (Err(error), Some(name)) => missing.push((name, error)),
            (Err(error), None) => return Err(error),
        }
    }
    if opened.is_empty() && !missing.is_empty() {
        return Err(missing.swap_remove(0).1);
    }
    for (name, error) in &missing {
        error!(
            "{name}: not started: {error}; other ports run, and this one is retried every second"
        );
    }
    Ok((opened, missing.into_iter().map(|(name, _)| name.to_owned()).collect()))
}
