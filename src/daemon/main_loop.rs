//! The main thread's loop: signals, operators, metrics, and ports that have ended.

use std::io;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::supervision::Supervisor;
use crate::api::scrape::Scrape;
use crate::api::{ClientInterest, Server};
use crate::config::Config;
use crate::error::StartError;
use crate::event::{Interest, Poller, until};
use crate::ports::Ports;
use crate::sys::process::{Signal, Signals};

/// Event that the main thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// A signal has come.
    Signal,
    /// A port has ended, or its device does not work.
    Changed,
    /// A network device has changed.
    Devices,
    /// A client connects to the control socket.
    Operators,
    /// A client of the control socket sends a request, or can take more of a reply.
    Client(u32),
    /// A client connects for metrics.
    Scrape,
    /// A client of the metrics sends a request, or can take more of a reply.
    ScrapeClient(u32),
}

/// State of the main thread.
pub(super) struct MainLoop<'a> {
    poller: Poller<Source>,
    signals: &'a Signals,
    server: Server,
    scrape: Option<Scrape>,
    ports: Ports,
    supervisor: Supervisor,
    /// Time of the last request to the helper process for a missing TAP or port.
    retried: Option<Instant>,
}

/// Time between two requests to the helper process for missing TAPs and ports.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl<'a> MainLoop<'a> {
    /// Registers all sources of events.
    ///
    /// # Errors
    /// A descriptor cannot be registered with epoll.
    pub(super) fn new(
        signals: &'a Signals,
        server: Server,
        scrape: Option<Scrape>,
        ports: Ports,
        supervisor: Supervisor,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(signals, Interest::Read, Source::Signal)?;
        poller.add(ports.changed(), Interest::Read, Source::Changed)?;
        if let Some(fd) = ports.device_changes() {
            poller.add(fd, Interest::Read, Source::Devices)?;
        }
        if let Some(fd) = server.fd() {
            poller.add(fd, Interest::Read, Source::Operators)?;
        }
        if let Some((number, stream)) = server.opener() {
            poller.add(stream, Interest::Read, Source::Client(number))?;
        }
        if let Some(fd) = scrape.as_ref().and_then(Scrape::fd) {
            poller.add(fd, Interest::Read, Source::Scrape)?;
        }
        Ok(MainLoop { poller, signals, server, scrape, ports, supervisor, retried: None })
    }

    /// Serves operators and ports until a signal ends the daemon, another daemon takes over, or no port runs and
    /// none can be added.
    ///
    /// # Errors
    /// epoll fails, or no port runs any more and the control thread of one panicked. The exit status then makes the
    /// service manager restart the daemon.
    pub(super) fn run(&mut self) -> Result<(), StartError> {
        let mut events = Vec::new();
        self.supervisor.ready(&self.ports);
        while !self.server.has_committed_handover()
            && (self.server.is_open() || self.ports.any_runs())
        {
            let time = self.supervisor.report(&self.ports);
            let overdue = self.ports.end_overdue_handover();
            let accept = self.wait_for_connections();
            let devices = self.ports.look_at_devices();
            let sockets = self.check_socket_files();
            let times = [time, self.retry_missing(), overdue, accept, devices, sockets];
            let time = times.into_iter().flatten().min();
            self.poller.wait(time, |source| events.push(source)).map_err(|error| {
                StartError::new(format!("cannot wait for signals and operators: {error}"))
            })?;
            for source in events.drain(..) {
                match source {
                    Source::Signal => match self.signals.take() {
                        Some(Signal::Reload) if self.server.opener().is_some() => self.reload(),
                        Some(Signal::Reload) if self.server.has_file() => error!(
                            "daemon: reload refused: the helper process that reads the file has exited; \
                             use 'vhost-user-net ctl reload', or restart the daemon"
                        ),
                        Some(_) => return Ok(()),
                        None => {}
                    },
                    Source::Changed => {
                        self.ports.changed().clear();
                        self.ports.close_ended();
                    }
                    Source::Devices => self.ports.note_device_changes(),
                    Source::Operators => self.take_client(),
                    Source::Client(number) => self.serve_client(number),
                    Source::Scrape => self.take_scrape_client(),
                    Source::ScrapeClient(number) => {
                        if let Some(scrape) = &mut self.scrape {
                            let interest = scrape.serve(number, &self.ports);
                            self.wait_for(source, interest);
                        }
                    }
                }
            }
        }
        if !self.server.has_committed_handover() && self.ports.any_panicked() {
            return Err(StartError::new(
                "no port runs: the control thread of a port panicked (bug); restart the daemon",
            ));
        }
        Ok(())
    }

    /// Stops all ports; after a take-over, only closes this daemon's own descriptors.
    pub(super) fn stop(mut self) {
        if self.server.has_committed_handover() {
            info!("daemon: exiting; another daemon serves its ports");
            self.server.flush(&mut self.ports);
            self.server.leave();
            self.scrape.into_iter().for_each(Scrape::leave);
            // A control thread that has not suspended its port yet ends with the process.
            std::mem::forget(self.ports);
            return;
        }
        self.server.refuse_successor(&self.ports);
        self.supervisor.stopping();
        self.ports.stop();
        self.server.end();
        self.scrape.into_iter().for_each(Scrape::end);
    }

    /// Resumes the ports that this daemon has taken over, and owns their sockets' files from now on.
    pub(super) fn take_over(&mut self, config: &Config) {
        self.ports.resume();
        config.control.iter().for_each(|path| self.server.own(path));
        if let (Some(scrape), Some(address)) = (&mut self.scrape, &config.metrics) {
            scrape.own(address);
        }
        if config.file.is_some() {
            // The ports have the old daemon's options; the file may have changed since.
            self.reload();
        }
    }

    /// Asks the helper process to read the file again.
    fn reload(&mut self) {
        info!("daemon: reloading its file");
        let Some(number) = self.server.ask_for_reload() else { return };
        self.serve_client(number);
    }

    /// Asks the helper process to open a deleted TAP again and to start missing ports, at most once per
    /// [`RETRY_INTERVAL`]. Returns the time until the next request, if any port needs one.
    fn retry_missing(&mut self) -> Option<Duration> {
        let port = self.ports.tap_to_reopen();
        if port.is_none() && self.ports.missing().is_empty() {
            return None;
        }
        if let Some(rest) = self.retried.map(|at| RETRY_INTERVAL.saturating_sub(at.elapsed()))
            && !rest.is_zero()
        {
            return Some(rest);
        }
        let reopening = port.and_then(|port| self.server.ask_to_reopen_tap(port));
        let missing = self.ports.missing();
        let starting = if missing.is_empty() { None } else { self.server.ask_to_start(missing) };
        let number = reopening.or(starting)?;
        self.retried = Some(Instant::now());
        self.serve_client(number);
        Some(RETRY_INTERVAL)
    }

    /// Waits for connections, except on a listener that pauses after a failed accept. Returns the time until the
    /// first pause ends.
    fn wait_for_connections(&mut self) -> Option<Duration> {
        let scrape = self.scrape.as_ref().and_then(Scrape::retry);
        let mut soonest = None;
        for (source, retry) in [(Source::Operators, self.server.retry()), (Source::Scrape, scrape)]
        {
            let Some(left) = until(retry) else { continue };
            let interest = if left.is_zero() { Interest::Read } else { Interest::Nothing };
            let _ = self.poller.modify(source, interest);
            soonest = soonest.into_iter().chain((!left.is_zero()).then_some(left)).min();
        }
        soonest
    }

    /// Checks the files of the control socket and the metrics socket. Returns the time until the next check.
    fn check_socket_files(&mut self) -> Option<Duration> {
        let metrics = self.scrape.as_mut().and_then(Scrape::endpoint);
        let (mut made, mut next) = (Vec::new(), None);
        for (source, name, passed, endpoint) in [
            (Source::Operators, "control socket", "control", self.server.endpoint()),
            (Source::Scrape, "metrics", "metrics", metrics),
        ] {
            let Some(endpoint) = endpoint else { continue };
            let old = endpoint.look(name).and_then(|look| look.old);
            if let Some((_old, fd)) = old.zip(endpoint.fd()) {
                let watched = self.poller.replace(source, fd, Interest::Read);
                match watched.and_then(|()| fd.try_clone_to_owned()) {
                    Ok(listener) => made.push((passed, listener)),
                    Err(error) => warn!(
                        "{name}: cannot wait on its new socket: {error}; new clients are not served; \
                         restart the daemon"
                    ),
                }
            }
            next = next.into_iter().chain(endpoint.next_look()).min();
        }
        for (passed, listener) in made {
            self.server.pass_on_instead(passed, listener);
        }
        until(next)
    }

    /// Accepts a client of the control socket.
    fn take_client(&mut self) {
        let Some((number, stream, gone)) = self.server.accept(&mut self.ports) else { return };
        let watched = self.poller.add(stream, Interest::Read, Source::Client(number));
        if let Some(gone) = gone {
            self.poller.forget(Source::Client(gone));
        }
        self.check(Source::Client(number), watched);
    }

    /// Serves a client of the control socket.
    fn serve_client(&mut self, number: u32) {
        let interest = self.server.serve(number, &mut self.ports);
        self.wait_for(Source::Client(number), interest);
    }

    /// Accepts a client of the metrics.
    fn take_scrape_client(&mut self) {
        let Some(scrape) = &mut self.scrape else { return };
        let Some((number, fd, gone)) = scrape.accept() else { return };
        let source = Source::ScrapeClient(number);
        let watched = self.poller.add(fd, Interest::Read, source);
        if let Some(gone) = gone {
            self.poller.forget(Source::ScrapeClient(gone));
        }
        self.check(source, watched);
    }

    /// Waits for the next event of a client.
    fn wait_for(&mut self, source: Source, interest: ClientInterest) {
        let watched = match interest {
            ClientInterest::Request => self.poller.modify(source, Interest::Read),
            ClientInterest::Room => self.poller.modify(source, Interest::Write),
            ClientInterest::Nothing => {
                self.poller.forget(source);
                Ok(())
            }
        };
        self.check(source, watched);
    }

    /// Disconnects a client that cannot be waited for.
    fn check(&mut self, source: Source, watched: io::Result<()>) {
        let Err(error) = watched else { return };
        let name = if matches!(source, Source::Client(_)) { "control socket" } else { "metrics" };
        warn!("{name}: client disconnected: cannot wait for it: {error}");
        match (source, &mut self.scrape) {
            (Source::Client(number), _) => self.server.hang_up(number, &mut self.ports),
            (Source::ScrapeClient(number), Some(scrape)) => scrape.hang_up(number),
            _ => {}
        }
        self.poller.forget(source);
    }
}
