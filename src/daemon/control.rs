//! The control thread of a port: connections, and their messages.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use log::{debug, info, warn};

use crate::device::{Device, Refusal};
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller, until};
use crate::policy::Rules;
use crate::protocol::{Connection, Event, Message, Reply};
use crate::status::PortStatus;
use crate::sys::eventfd::Waker;

/// Messages handled before other descriptors are looked at again.
const MESSAGES_PER_TURN: usize = 64;

/// What the control thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Order,
    Endpoint,
    Connection,
}

/// What the main thread wants of a port.
pub(super) enum Order {
    /// To end.
    Stop,
    /// To judge what the guest sends by these rules. When it does, the sender is used.
    Rules(Option<Arc<Rules>>, Sender<()>),
    /// To move frames, or none. When it does, the sender is used.
    Link(bool, Sender<()>),
}

/// A port's device, and whoever speaks to it.
pub(super) struct Control {
    poller: Poller<Source>,
    /// Woken when there is an order.
    wake: Arc<Waker>,
    orders: Receiver<Order>,
    status: Arc<PortStatus>,
    device: Device,
    endpoint: Endpoint,
    connection: Option<Connection>,
}

impl Control {
    /// `wake` is woken when there is something among the `orders`.
    pub(super) fn new(
        device: Device,
        endpoint: Endpoint,
        status: Arc<PortStatus>,
        wake: Arc<Waker>,
        orders: Receiver<Order>,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(&*wake, Interest::Read, Source::Order)?;
        if let Some(fd) = endpoint.fd() {
            poller.add(fd, Interest::Read, Source::Endpoint)?;
        }
        Ok(Control { poller, wake, orders, status, device, endpoint, connection: None })
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
            let mut ordered = false;
            let waited = self.poller.wait(until(deadline), |source| {
                ordered |= source == Source::Order;
            });
            if let Err(error) = waited {
                warn!("{}: wait for descriptors: {error}", self.device.name());
                return;
            }
            if ordered && self.obey() {
                return;
            }
            self.talk();
        }
    }

    /// Carries orders out; says whether to end.
    fn obey(&mut self) -> bool {
        // Before they are looked at: one that comes later wakes again.
        self.wake.clear();
        loop {
            let done = match self.orders.try_recv() {
                Ok(Order::Rules(rules, done)) => {
                    info!("{}: other rules for what the guest sends", self.device.name());
                    self.device.set_rules(rules);
                    done
                }
                Ok(Order::Link(up, done)) => {
                    info!("{}: link {}", self.device.name(), if up { "up" } else { "down" });
                    self.device.set_link(up);
                    self.status.set_link(up);
                    done
                }
                Err(TryRecvError::Empty) => return false,
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return true,
            };
            // Whoever has not waited has given up.
            let _ = done.send(());
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
