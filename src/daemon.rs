//! The daemon: start order, signals, supervision, hand-over, and the order of its end.
//!
//! Each port has one control thread and one worker per queue pair, and ports share no state. The main thread
//! serves operators, who add, change and remove ports. The main thread opens nothing: an operator passes the
//! descriptors of a new port, or the `opener`, a process that reads the file again on request.

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
/// The reason why the daemon cannot start. Later only a signal ends it.
pub fn run(config: &Config) -> Result<(), StartError> {
    // First, since a new descriptor could get the number of a promised one that was not inherited.
    let inherited = config.ports.iter().map(Descriptors::inherit).collect::<Result<Vec<_>, _>>()?;
    share_pool();
    raise_descriptor_limit().into_iter().for_each(descriptors::set_limit);
    contain_sigbus()
        .map_err(|error| StartError::new(format!("install a signal handler: {error}")))?;
    // Before any thread starts: threads inherit the signal mask.
    let signals =
        Signals::block().map_err(|error| StartError::new(format!("block signals: {error}")))?;
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
    // Before anything is opened, since the old daemon has it open.
    let mut predecessor = match (&config.control, config.take_over) {
        (Some(control), true) => Some(Predecessor::find(control)?),
        _ => None,
    };
    // The old daemon's ports are taken over as they are, and not opened.
    let described = if predecessor.is_some() { &[] } else { &config.ports[..] };
    let (opened, missing) = open_ports(described, inherited, config.file.is_some())?;
    let mut names: Vec<&str> = opened.iter().map(Opened::name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let name = pair[0];
        return Err(StartError::new(format!("two ports are called {name}: give one a name")));
    }
    check_devices(opened.iter().map(Opened::claim))?;
    let mut listener = |name: &str| predecessor.as_mut().and_then(|it| it.listener(name));
    let control = listener("control");
    // A changed address gets a new socket.
    let metrics_name = config.metrics.as_ref().map(|address| format!("metrics {address}"));
    let metrics = metrics_name.as_deref().and_then(&mut listener);
    let mut server = Server::open(config, control)?;
    if let Some(file) = &config.file {
        let opener = opener::start(file, config.log_level)
            .map_err(|error| StartError::new(format!("start a process to reload by: {error}")))?;
        server.serve_opener(opener);
    }
    let scrape =
        config.metrics.as_ref().map(|address| Scrape::open(address, metrics)).transpose()?;
    if let (Some(name), Some(fd)) = (&metrics_name, scrape.as_ref().and_then(Scrape::fd)) {
        server.pass_on(name, fd.try_clone_to_owned().map_err(no_descriptor)?);
    }
    let supervisor = Supervisor::connect();
    if server.is_open() {
        // A port on AF_XDP may be added later.
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
    // A client that connects finds everything ready, and the log has all earlier lines.
    log.flush();
    server
        .start()
        .map_err(|error| StartError::new(format!("listen on the control socket: {error}")))?;
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
            "daemon: {limit} descriptors may be open, and the ports can need {need}; requests of VMMs \
             that share many memory regions are refused; set LimitNOFILE={need} in the unit, or \
             ulimit -n {need}"
        );
    }
    let mut main_loop =
        MainLoop::new(signals, server, scrape, ports, supervisor).map_err(no_descriptor)?;
    if let Some(predecessor) = predecessor {
        predecessor.let_go()?;
        main_loop.take_over(config);
    }
    let ended = main_loop.run();
    main_loop.stop();
    ended.map_err(|error| StartError::new(format!("wait for signals and operators: {error}")))
}

/// Opens what the ports need; returns also the names of the file's ports that can be started later. One missing
/// device does not take the network from the guests of other ports.
///
/// # Errors
/// A port that cannot be started later cannot be opened, or no port can.
fn open_ports(
    described: &[PortConfig],
    inherited: Vec<Descriptors>,
    from_file: bool,
) -> Result<(Vec<Opened>, Vec<String>), StartError> {
    let (mut opened, mut missing) = (Vec::new(), Vec::new());
    for (port, inherited) in described.iter().zip(inherited) {
        let again = port.known_name().filter(|_| from_file && port.descriptors().is_empty());
        match (Opened::new(port.clone(), from_file, inherited), again) {
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
            "{name}: not started: {error}; the other ports are served, and it is tried every second"
        );
    }
    Ok((opened, missing.into_iter().map(|(name, _)| name.to_owned()).collect()))
}
