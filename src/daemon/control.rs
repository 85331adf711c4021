//! The control thread of a port: connections, and their messages.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info, warn};

use crate::device::{Device, Refusal};
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller, until};
use crate::policy::Filter;
use crate::protocol::{Connection, Event, Message, Reply};
use crate::sandbox::Role;
use crate::status::PortStatus;
use crate::sys::eventfd::Waker;

/// Messages handled before other descriptors are looked at again.
const MESSAGES_PER_TURN: usize = 64;

/// What the control thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Stop,
    Endpoint,
    Connection,
}

/// A port's device, and whoever speaks to it.
pub(super) struct Control {
    poller: Poller<Source>,
    /// Watched by the poller.
    _stop: Arc<Waker>,
    status: Arc<PortStatus>,
    device: Device,
    endpoint: Endpoint,
    connection: Option<Connection>,
}

impl Control {
    /// `stop` is woken when it is to end.
    pub(super) fn new(
        device: Device,
        endpoint: Endpoint,
        status: Arc<PortStatus>,
        stop: Arc<Waker>,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(&*stop, Interest::Read, Source::Stop)?;
        if let Some(fd) = endpoint.fd() {
            poller.add(fd, Interest::Read, Source::Endpoint)?;
        }
        Ok(Control { poller, _stop: stop, status, device, endpoint, connection: None })
    }

    /// What its thread does.
    pub(super) fn role(&self) -> Role {
        self.status.filters.rx.role()
    }

    /// Lets frontends connect.
    pub(super) fn start(&self) -> io::Result<()> {
        self.endpoint.start()
    }

    /// What is known of the port.
    pub(super) fn status(&self) -> &Arc<PortStatus> {
        &self.status
    }

    /// The port's name.
    pub(super) fn name(&self) -> &str {
        self.device.name()
    }

    /// Serves one frontend after the other until it is to stop.
    pub(super) fn serve(&mut self) {
        loop {
            if self.connection.is_none() {
                if self.endpoint.is_exhausted() {
                    info!("{}: the inherited connection has ended", self.device.name());
                    return;
                }
                self.connect();
            }
            let deadline = match &self.connection {
                Some(connection) => connection.deadline(),
                None => self.endpoint.deadline(),
            };
            let mut stopping = false;
            let waited = self.poller.wait(until(deadline), |source| {
                stopping |= source == Source::Stop;
            });
            if let Err(error) = waited {
                warn!("{}: wait for descriptors: {error}", self.device.name());
                return;
            }
            if stopping {
                return;
            }
            self.talk();
        }
    }

    /// Takes a new connection, if there is one.
    fn connect(&mut self) {
        let Some(stream) = self.endpoint.connection() else { return };
        let name = self.device.name();
        let watched = Connection::new(stream).and_then(|connection| {
            self.poller.add(&connection, Interest::Read, Source::Connection)?;
            // The next frontend waits until this one has gone.
            self.poller.remove(Source::Endpoint)?;
            Ok(connection)
        });
        match watched {
            Ok(connection) => {
                info!("{name}: frontend connected");
                self.status.connected();
                self.connection = Some(connection);
            }
            Err(error) => warn!("{name}: take a connection: {error}"),
        }
    }

    /// Handles what the frontend has sent.
    fn talk(&mut self) {
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
        }
    }

    /// Carries a message out and replies.
    ///
    /// # Errors
    /// Why the connection has to be closed; nothing if the frontend has gone.
    fn answer(&mut self, message: Message) -> Result<(), Option<String>> {
        let (code, need_reply) = (message.code, message.need_reply);
        // SET_PROTOCOL_FEATURES itself may switch acknowledgements on: they count from then on.
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
            (Some(reply), Some(connection)) => connection.send(code, &reply).map_err(|error| {
                let gone = matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                );
                (!gone).then(|| error.to_string())
            }),
            _ => Ok(()),
        }
    }

    /// Lets go of the frontend and of all that it gave us, and waits for the next.
    fn disconnect(&mut self, why: Option<&str>) {
        let name = self.device.name();
        match why {
            Some(why) => warn!("{name}: connection closed: {why}"),
            None => info!("{name}: frontend disconnected"),
        }
        let started = Instant::now();
        self.device.forget();
        self.status.disconnected();
        debug!("{}: stopped in {:?}", self.device.name(), started.elapsed());
        let _ = self.poller.remove(Source::Connection);
        self.connection = None;
        if let Some(fd) = self.endpoint.fd()
            && let Err(error) = self.poller.add(fd, Interest::Read, Source::Endpoint)
        {
            warn!("{}: wait for the next frontend: {error}", self.device.name());
        }
        self.log_counters();
    }

    /// Stops in the order in which nothing is left half done: rings first, then the connection,
    /// then the socket's file (all when `self` is dropped).
    pub(super) fn finish(mut self) {
        if self.connection.is_some() {
            self.disconnect(Some("the daemon stops"));
        }
        // Whoever uses the device next would not know of it.
        if !self.status.filters.rx.get().is_none()
            && let Err(error) = self.status.filters.rx.set(&Filter::default())
        {
            debug!("{}: take its filter off: {error}", self.device.name());
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
                "{name}/{pair}: {} turns, {} sleeps, {} waits for the guest's buffers",
                counters.turns.get(),
                counters.sleeps.get(),
                counters.starved.get()
            );
        }
    }
}
