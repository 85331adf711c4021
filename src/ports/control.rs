//! The control thread of a port: it accepts connections, and handles vhost-user messages and commands.

mod handover;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use super::PortStatus;
use crate::device::{Device, Refusal};
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller, until};
use crate::policy::{AntiSpoofing, Filter};
use crate::protocol::{Connection, Event, Message, Reply};
use crate::sandbox::Role;
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

pub(super) use handover::{FrontendHandover, HandoverFds};

/// Maximum number of messages before the thread checks other descriptors again.
const MESSAGES_PER_TURN: usize = 64;
/// Time after which the thread reads commands again, however many messages wait.
const TURN: Duration = Duration::from_millis(50);

/// An event that the control thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Command,
    Endpoint,
    Connection,
}

/// A command of the main thread.
pub(super) enum ControlCommand {
    /// Stop, for this reason.
    Stop(&'static str),
    /// Apply these anti-spoofing rules to what the guest sends, then reply.
    AntiSpoofing(Option<Arc<AntiSpoofing>>, Sender<()>),
    /// Set the link up or down, then reply.
    Link(bool, Sender<()>),
    /// Filter the frames to the guest, and reply with the result.
    RxFilter(Filter, Sender<io::Result<()>>),
    /// Enable or disable the count of traffic by protocol and peer, and reply with the result.
    CountTraffic(bool, Sender<io::Result<()>>),
    /// Reply with the counted traffic.
    Traffic(Sender<io::Result<Vec<Row>>>),
    /// Suspend the port, and reply with its descriptors. `Resume`, `CommitHandover` or `Stop` follows.
    PrepareHandover(Sender<Result<HandoverFds, String>>),
    /// Serve the guest, for the first time or again.
    Resume,
    /// Stop: another daemon or port serves the guest.
    CommitHandover,
}

/// A port's device, and the connection to its frontend.
pub(super) struct Control {
    poller: Poller<Source>,
    /// Woken by the main thread after it has sent a command.
    wake: Arc<Waker>,
    commands: Receiver<ControlCommand>,
    status: Arc<PortStatus>,
    device: Device,
    endpoint: Endpoint,
    connection: Option<Connection>,
    /// True while another daemon serves the guest: before this one resumes the port, and after a hand-over.
    is_handed_over: bool,
    /// The reason why the thread ends, for the log.
    stop_reason: &'static str,
}

impl Control {
    /// Creates the control thread's state; the main thread wakes `wake` after it has sent a command.
    pub(super) fn new(
        device: Device,
        endpoint: Endpoint,
        status: Arc<PortStatus>,
        wake: Arc<Waker>,
        commands: Receiver<ControlCommand>,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(&*wake, Interest::Read, Source::Command)?;
        if let Some(fd) = endpoint.fd() {
            poller.add(fd, Interest::Read, Source::Endpoint)?;
        }
        Ok(Control {
            poller,
            wake,
            commands,
            status,
            device,
            endpoint,
            connection: None,
            is_handed_over: false,
            stop_reason: "its thread ends",
        })
    }

    /// Returns the sandbox role of the thread.
    pub(super) fn role(&self) -> Role {
        self.status.filters.rx.role()
    }

    /// Listens, so that frontends can connect.
    pub(super) fn start(&self) -> io::Result<()> {
        self.endpoint.start()
    }

    /// Returns the port's name.
    pub(super) fn name(&self) -> &str {
        self.device.name()
    }

    /// Serves one frontend after the other, until a command stops the port or an inherited connection closes.
    pub(super) fn serve(&mut self) {
        loop {
            if self.connection.is_none() {
                if self.endpoint.is_exhausted() {
                    info!("{}: inherited connection closed; the port ends", self.device.name());
                    return;
                }
                self.connect();
            }
            let deadline = match &self.connection {
                Some(connection) => connection.deadline(),
                None => self.endpoint.deadline(),
            };
            let deadline = deadline.into_iter().chain(self.endpoint.next_look()).min();
            let (mut ordered, mut another_connected) = (false, false);
            let waited = self.poller.wait(until(deadline), |source| {
                ordered |= source == Source::Command;
                another_connected |= source == Source::Endpoint;
            });
            if let Err(error) = waited {
                warn!("{}: cannot wait for events: {error}; the port ends", self.device.name());
                return;
            }
            if ordered && self.handle_commands() {
                return;
            }
            let served = self.connection.is_some();
            self.talk();
            if another_connected && served {
                self.note_second_frontend();
            }
            self.check_socket_file();
        }
    }

    /// Logs that another frontend waits, unless the first one has disconnected meanwhile.
    fn note_second_frontend(&self) {
        let Some(connection) = &self.connection else { return };
        let served = connection.peer().map_or("?".into(), |process| process.to_string());
        warn!(
            "{}: another VMM connected and waits served_process={served}; it is served when the first one \
             disconnects",
            self.device.name()
        );
        self.status.set_another_waits();
    }

    /// Checks the socket's file, and watches the socket that replaces a deleted one.
    fn check_socket_file(&mut self) {
        let Some(look) = self.endpoint.look(self.device.name()) else { return };
        self.status.set_hidden(look.hidden);
        let Some((_old, fd)) = look.old.zip(self.endpoint.fd()) else { return };
        let interest = if self.connection.is_some() { Interest::Edge } else { Interest::Read };
        let replaced = self.poller.replace(Source::Endpoint, fd, interest);
        // Frontends that wait at the old socket see its close.
        let kept = replaced.and_then(|()| fd.try_clone_to_owned());
        if let Err(error) = kept.map(|fd| self.status.set_listener(Some(fd))) {
            warn!(
                "{}: cannot wait on its new socket: {error}; new VMMs are not served; remove the port and add it \
                 again",
                self.device.name()
            );
        }
    }

    /// Carries out all commands that have come; returns whether the thread must end.
    fn handle_commands(&mut self) -> bool {
        // The event is cleared first, so that a later command wakes the thread again.
        self.wake.clear();
        loop {
            let done = match self.commands.try_recv() {
                Ok(ControlCommand::AntiSpoofing(rules, done)) => {
                    self.device.set_anti_spoofing(rules);
                    done
                }
                Ok(ControlCommand::Link(up, done)) => {
                    self.device.set_link(up);
                    self.status.set_link(up);
                    done
                }
                Ok(ControlCommand::RxFilter(filter, done)) => {
                    let _ = done.send(self.status.filters.rx.set(&filter));
                    continue;
                }
                Ok(ControlCommand::CountTraffic(enable, done)) => {
                    let _ = done.send(self.status.traffic.enable(enable));
                    continue;
                }
                Ok(ControlCommand::Traffic(reply)) => {
                    let _ = reply.send(self.status.traffic.snapshot());
                    continue;
                }
                Ok(ControlCommand::PrepareHandover(reply)) => {
                    if self.prepare_handover(&reply) {
                        return true;
                    }
                    continue;
                }
                // Both are for suspended ports only.
                Ok(ControlCommand::Resume | ControlCommand::CommitHandover) => continue,
                Err(TryRecvError::Empty) => return false,
                Ok(ControlCommand::Stop(why)) => {
                    self.stop_reason = why;
                    return true;
                }
                Err(TryRecvError::Disconnected) => return true,
            };
            // The main thread may have given up waiting.
            let _ = done.send(());
        }
    }

    /// Accepts a connection, if there is one.
    fn connect(&mut self) {
        let name = self.device.name();
        let stream = self.endpoint.connection(name);
        // After an error the thread accepts again later, although the listener stays readable.
        let _ = self.poller.modify(Source::Endpoint, self.endpoint.interest());
        let Some(stream) = stream else { return };
        let watched = Connection::new(stream).and_then(|connection| {
            self.poller.add(&connection, Interest::Read, Source::Connection)?;
            Ok(connection)
        });
        match watched {
            Ok(connection) => {
                info!("{name}: frontend connected");
                // The next frontend waits until this one disconnects; the edge reports once that it waits.
                let _ = self.poller.modify(Source::Endpoint, Interest::Edge);
                self.status.connected(connection.peer());
                self.connection = Some(connection);
            }
            Err(error) => warn!("{name}: cannot serve a connection: {error}"),
        }
    }

    /// Handles the messages that the frontend has sent.
    fn talk(&mut self) {
        let end = Instant::now() + TURN;
        for _ in 0..MESSAGES_PER_TURN {
            let Some(connection) = &mut self.connection else { return };
            let ended = match connection.receive() {
                Ok(Event::Message(message)) => self.answer(message).err(),
                Ok(Event::Pending) => {
                    let wanted =
                        if connection.is_sending() { Interest::Write } else { Interest::Read };
                    let _ = self.poller.modify(Source::Connection, wanted);
                    return;
                }
                Ok(Event::Closed) => Some(None),
                Err(error) => Some(Some(error.to_string())),
            };
            if let Some(why) = ended {
                self.disconnect(why.as_deref());
            }
            if Instant::now() > end {
                return;
            }
        }
    }

    /// Handles a message, and replies.
    ///
    /// # Errors
    /// The reason why the connection must be closed; `None` if the frontend has disconnected.
    fn answer(&mut self, message: Message) -> Result<(), Option<String>> {
        let (code, need_reply) = (message.code, message.need_reply);
        #[cfg(debug_assertions)]
        crate::fault_point::panic_if("control", |number| u64::from(u32::from(code)) == number);
        // SET_PROTOCOL_FEATURES itself can enable acknowledgements, which apply to this message already.
        let handled = self.device.handle(message);
        let acknowledge = need_reply && self.device.acknowledges();
        self.status.set_features(self.device.features());
        let reply = match handled {
            Ok(Some(reply)) => Some(reply),
            Ok(None) => acknowledge.then_some(Reply::U64(0)),
            Err(Refusal::Refused(why)) => {
                warn!("{}: {code:?} refused: {why}", self.device.name());
                acknowledge.then_some(Reply::U64(1))
            }
            Err(Refusal::Unanswerable(why)) => return Err(Some(format!("{code:?}: {why}"))),
        };
        match (reply, &mut self.connection) {
            (Some(reply), Some(connection)) => connection.send(code, reply).map_err(|error| {
                let gone = matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                );
                (!gone).then(|| error.to_string())
            }),
            _ => Ok(()),
        }
    }

    /// Closes the connection, and releases all that the frontend has passed.
    fn disconnect(&mut self, why: Option<&str>) {
        let name = self.device.name();
        match why {
            Some(why) => warn!("{name}: connection closed: {why}"),
            None => info!("{name}: frontend disconnected"),
        }
        self.end_connection();
    }

    fn end_connection(&mut self) {
        let started = Instant::now();
        self.device.forget();
        self.status.disconnected();
        debug!("{}: stopped in {:?}", self.device.name(), started.elapsed());
        let _ = self.poller.remove(Source::Connection);
        self.connection = None;
        // The source stays registered: the kernel may refuse to add it again, and then no frontend could connect.
        let _ = self.poller.modify(Source::Endpoint, self.endpoint.interest());
        self.log_counters();
    }

    /// Stops the rings, then closes the connection, then removes the socket's file. The last two happen when `self`
    /// is dropped.
    pub(super) fn finish(mut self) {
        if self.is_handed_over {
            return;
        }
        if self.connection.is_some() {
            info!("{}: frontend disconnected: {}", self.device.name(), self.stop_reason);
            self.end_connection();
        }
        // The next user of the device must not meet this port's filter.
        if !self.status.filters.rx.get().is_none()
            && let Err(error) = self.status.filters.rx.set(&Filter::default())
        {
            debug!("{}: cannot remove the rx filter: {error}", self.device.name());
        }
        info!("{}: stopped", self.device.name());
    }

    fn log_counters(&self) {
        for (pair, worker) in self.device.workers().iter().enumerate() {
            let name = self.device.name();
            let counters = &worker.status().counters;
            info!("{name}/{pair}: rx {}", counters.rx);
            info!("{name}/{pair}: tx {}", counters.tx);
            debug!(
                "{name}/{pair}: {} turns, {} sleeps, {} waits for rx buffers",
                counters.turns.get(),
                counters.sleeps.get(),
                counters.starved.get()
            );
        }
    }
}
