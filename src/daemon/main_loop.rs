//! The main thread: it waits for signals, for operators, and for the end.

use std::io;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::supervision::Supervisor;
use crate::api::scrape::Scrape;
use crate::api::{ClientInterest, Server};
use crate::config::Config;
use crate::event::{Interest, Poller, until};
use crate::ports::Ports;
use crate::sys::process::{Signal, Signals};

/// What the main thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signal,
    /// A port has ended, or its device does not work.
    Changed,
    /// A network device has changed.
    Devices,
    /// Somebody connects to the control socket.
    Operators,
    /// A client, by its number.
    Client(u32),
    /// Somebody wants metrics.
    Scrape,
    /// One who does, by their number.
    Visitor(u32),
}

/// The main thread's loop.
pub(super) struct MainLoop<'a> {
    poller: Poller<Source>,
    signals: &'a Signals,
    server: Server,
    scrape: Option<Scrape>,
    ports: Ports,
    supervisor: Supervisor,
    /// When a device was asked for last that has gone.
    mended: Option<Instant>,
}

/// How often a device that has gone is asked for.
const MEND: Duration = Duration::from_secs(1);

impl<'a> MainLoop<'a> {
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
        Ok(MainLoop { poller, signals, server, scrape, ports, supervisor, mended: None })
    }

    /// Waits for a signal that ends the daemon, or until no port runs and none can be added, and
    /// serves operators meanwhile.
    ///
    /// # Errors
    /// Waiting fails, or no port runs any more and one has panicked: a service manager is to start the
    /// daemon again.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut happened = Vec::new();
        self.supervisor.ready(&self.ports);
        while !self.server.has_given_away() && (self.server.is_open() || self.ports.any_runs()) {
            let time = self.supervisor.report(&self.ports);
            let overdue = self.ports.end_overdue_handover();
            let accept = self.wait_for_connections();
            let devices = self.ports.look_at_devices();
            let sockets = self.look_after_sockets();
            let times = [time, self.reopen_tap(), overdue, accept, devices, sockets];
            let time = times.into_iter().flatten().min();
            self.poller.wait(time, |source| happened.push(source))?;
            for source in happened.drain(..) {
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
                    Source::Scrape => self.take_visitor(),
                    Source::Visitor(number) => {
                        if let Some(scrape) = &mut self.scrape {
                            let wanted = scrape.serve(number, &self.ports);
                            self.wait_for(source, wanted);
                        }
                    }
                }
            }
        }
        if !self.server.has_given_away() && self.ports.any_panicked() {
            return Err(io::Error::other(
                "the control thread of a port panicked, and no port runs",
            ));
        }
        Ok(())
    }

    /// Ends all ports.
    pub(super) fn stop(mut self) {
        if self.server.has_given_away() {
            info!("daemon: exits; another daemon serves its ports");
            self.server.flush(&mut self.ports);
            self.server.leave();
            self.scrape.into_iter().for_each(Scrape::leave);
            // A thread that has not suspended yet ends with the process, which is now.
            std::mem::forget(self.ports);
            return;
        }
        self.server.refuse_successor(&self.ports);
        self.supervisor.stopping();
        self.ports.stop();
        self.server.end();
        self.scrape.into_iter().for_each(Scrape::end);
    }

    /// Serves the ports that another daemon has let go of.
    pub(super) fn take_over(&mut self, config: &Config) {
        self.ports.resume();
        config.control.iter().for_each(|path| self.server.own(path));
        if let (Some(scrape), Some(address)) = (&mut self.scrape, &config.metrics) {
            scrape.own(address);
        }
        if config.file.is_some() {
            // What it says by now.
            self.reload();
        }
    }

    /// Has the file read again.
    fn reload(&mut self) {
        info!("daemon: the file is read again");
        let Some(number) = self.server.ask_for_reload() else { return };
        self.serve_client(number);
    }

    /// Has a port's TAP opened again, if it has gone, and ports started that could not be; returns when to
    /// look again.
    fn reopen_tap(&mut self) -> Option<Duration> {
        let port = self.ports.tap_to_reopen();
        if port.is_none() && self.ports.missing().is_empty() {
            return None;
        }
        if let Some(rest) = self.mended.map(|at| MEND.saturating_sub(at.elapsed()))
            && !rest.is_zero()
        {
            return Some(rest);
        }
        let mending = port.and_then(|port| self.server.ask_to_mend(port));
        let missing = self.ports.missing();
        let starting = if missing.is_empty() { None } else { self.server.ask_to_start(missing) };
        let number = mending.or(starting)?;
        self.mended = Some(Instant::now());
        self.serve_client(number);
        Some(MEND)
    }

    /// Waits on the listeners but those whose accept has just failed; returns when to look again.
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

    /// Has the files of the control socket and the metrics' socket looked at; returns when to look again.
    fn look_after_sockets(&mut self) -> Option<Duration> {
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
                    Err(error) => warn!("{name}: wait for descriptors: {error}"),
                }
            }
            next = next.into_iter().chain(endpoint.next_look()).min();
        }
        for (passed, listener) in made {
            self.server.pass_on_instead(passed, listener);
        }
        until(next)
    }

    /// Takes whoever has connected to the control socket.
    fn take_client(&mut self) {
        let Some((number, stream, gone)) = self.server.accept(&mut self.ports) else { return };
        let watched = self.poller.add(stream, Interest::Read, Source::Client(number));
        if let Some(gone) = gone {
            self.poller.forget(Source::Client(gone));
        }
        self.check(Source::Client(number), watched);
    }

    fn serve_client(&mut self, number: u32) {
        let wanted = self.server.serve(number, &mut self.ports);
        self.wait_for(Source::Client(number), wanted);
    }

    /// Takes whoever has come for metrics.
    fn take_visitor(&mut self) {
        let Some(scrape) = &mut self.scrape else { return };
        let Some((number, fd, gone)) = scrape.accept() else { return };
        let source = Source::Visitor(number);
        let watched = self.poller.add(fd, Interest::Read, source);
        if let Some(gone) = gone {
            self.poller.forget(Source::Visitor(gone));
        }
        self.check(source, watched);
    }

    fn wait_for(&mut self, source: Source, wanted: ClientInterest) {
        let watched = match wanted {
            ClientInterest::Request => self.poller.modify(source, Interest::Read),
            ClientInterest::Room => self.poller.modify(source, Interest::Write),
            ClientInterest::Nothing => {
                self.poller.forget(source);
                Ok(())
            }
        };
        self.check(source, watched);
    }

    fn check(&mut self, source: Source, watched: io::Result<()>) {
        let Err(error) = watched else { return };
        warn!("control socket: wait for a client: {error}");
        match (source, &mut self.scrape) {
            (Source::Client(number), _) => self.server.hang_up(number, &mut self.ports),
            (Source::Visitor(number), Some(scrape)) => scrape.hang_up(number),
            _ => {}
        }
        self.poller.forget(source);
    }
}
