//! The control thread of a port: connections, and their messages.

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
use crate::policy::{Filter, Rules};
use crate::protocol::{Connection, Event, Message, Reply};
use crate::sandbox::Role;
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

pub(super) use handover::{HandoverFds, Predecessor};

/// Messages handled before other descriptors are looked at again.
const MESSAGES_PER_TURN: usize = 64;
/// Time after which orders are looked at again, however many messages wait.
const TURN: Duration = Duration::from_millis(50);

/// What the control thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Order,
    Endpoint,
    Connection,
}

/// What the main thread wants of a port.
pub(super) enum Order {
    /// To end, for this reason.
    Stop(&'static str),
    /// To judge what the guest sends by these rules. When it does, the sender is used.
    Rules(Option<Arc<Rules>>, Sender<()>),
    /// To move frames, or none. When it does, the sender is used.
    Link(bool, Sender<()>),
    /// To have what the guest is given judged by this. The sender hears of it.
    RxFilter(Filter, Sender<io::Result<()>>),
    /// To count traffic by protocol and peer, or not. The sender hears of it.
    CountTraffic(bool, Sender<io::Result<()>>),
    /// To tell what was counted.
    Traffic(Sender<io::Result<Vec<Row>>>),
    /// To suspend the port and pass it on to another daemon. One of the next three orders follows.
    PrepareHandover(Sender<Result<HandoverFds, String>>),
    /// To serve the guest, or to serve it again.
    Resume,
    /// To end: another daemon serves the guest.
    CommitHandover,
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
    /// Another daemon serves the guest: it has not let go yet, or it has taken over.
    is_anothers: bool,
    /// Why its thread ends.
    stops: &'static str,
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
        Ok(Control {
            poller,
            wake,
            orders,
            status,
            device,
            endpoint,
            connection: None,
            is_anothers: false,
            stops: "its thread ends",
        })
    }

    /// What its thread does.
    pub(super) fn role(&self) -> Role {
        self.status.filters.rx.role()
    }

    /// Lets frontends connect.
    pub(super) fn start(&self) -> io::Result<()> {
        self.endpoint.start()
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
            let deadline = deadline.into_iter().chain(self.endpoint.next_look()).min();
            let (mut ordered, mut knocked) = (false, false);
            let waited = self.poller.wait(until(deadline), |source| {
                ordered |= source == Source::Order;
                knocked |= source == Source::Endpoint;
            });
            if let Err(error) = waited {
                warn!("{}: wait for descriptors: {error}", self.device.name());
                return;
            }
            if ordered && self.obey() {
                return;
            }
            let served = self.connection.is_some();
            self.talk();
            if knocked && served {
                self.note_second_frontend();
            }
            self.look_after_socket();
        }
    }

    /// Says that a frontend waits, unless the first one has gone meanwhile.
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

    /// Has the socket's file looked at.
    fn look_after_socket(&mut self) {
        let Some(look) = self.endpoint.look(self.device.name()) else { return };
        self.status.set_hidden(look.hidden);
        let Some((_old, fd)) = look.old.zip(self.endpoint.fd()) else { return };
        let interest = if self.connection.is_some() { Interest::Edge } else { Interest::Read };
        let replaced = self.poller.replace(Source::Endpoint, fd, interest);
        // Whoever waits at the old one is to hear that it has gone.
        let kept = replaced.and_then(|()| fd.try_clone_to_owned());
        if let Err(error) = kept.map(|fd| self.status.set_listener(Some(fd))) {
            warn!("{}: wait for descriptors: {error}", self.device.name());
        }
    }

    /// Carries orders out; says whether to end.
    fn obey(&mut self) -> bool {
        // Before they are looked at: one that comes later wakes again.
        self.wake.clear();
        loop {
            let done = match self.orders.try_recv() {
                Ok(Order::Rules(rules, done)) => {
                    self.device.set_rules(rules);
                    done
                }
                Ok(Order::Link(up, done)) => {
                    self.device.set_link(up);
                    self.status.set_link(up);
                    done
                }
                Ok(Order::RxFilter(filter, done)) => {
                    let _ = done.send(self.status.filters.rx.set(&filter));
                    continue;
                }
                Ok(Order::CountTraffic(enable, done)) => {
                    let _ = done.send(self.status.traffic.enable(enable));
                    continue;
                }
                Ok(Order::Traffic(reply)) => {
                    let _ = reply.send(self.status.traffic.snapshot());
                    continue;
                }
                Ok(Order::PrepareHandover(reply)) => {
                    if self.prepare_handover(&reply) {
                        return true;
                    }
                    continue;
                }
                // The port is not suspended.
                Ok(Order::Resume | Order::CommitHandover) => continue,
                Err(TryRecvError::Empty) => return false,
                Ok(Order::Stop(why)) => {
                    self.stops = why;
                    return true;
                }
                Err(TryRecvError::Disconnected) => return true,
            };
            // Whoever has not waited has given up.
            let _ = done.send(());
        }
    }

    /// Takes a new connection, if there is one.
    fn connect(&mut self) {
        let name = self.device.name();
        let stream = self.endpoint.connection(name);
        // An accept that fails is tried again later, however readable the listener is.
        let _ = self.poller.modify(Source::Endpoint, self.endpoint.interest());
        let Some(stream) = stream else { return };
        let watched = Connection::new(stream).and_then(|connection| {
            self.poller.add(&connection, Interest::Read, Source::Connection)?;
            Ok(connection)
        });
        match watched {
            Ok(connection) => {
                info!("{name}: frontend connected");
                // The next frontend waits until this one has gone. That it does is told once.
                let _ = self.poller.modify(Source::Endpoint, Interest::Edge);
                self.status.connected(connection.peer());
                self.connection = Some(connection);
            }
            Err(error) => warn!("{name}: take a connection: {error}"),
        }
    }

    /// Handles what the frontend has sent.
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

    /// Carries a message out and replies.
    ///
    /// # Errors
    /// Why the connection has to be closed; nothing if the frontend has gone.
    fn answer(&mut self, message: Message) -> Result<(), Option<String>> {
        let (code, need_reply) = (message.code, message.need_reply);
        #[cfg(debug_assertions)]
        crate::fault_point::panic_if("control", |number| u64::from(u32::from(code)) == number);
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
        self.end_connection();
    }

    fn end_connection(&mut self) {
        let started = Instant::now();
        self.device.forget();
        self.status.disconnected();
        debug!("{}: stopped in {:?}", self.device.name(), started.elapsed());
        let _ = self.poller.remove(Source::Connection);
        self.connection = None;
        // Not added again, which the kernel may refuse: nobody could connect any more.
        let _ = self.poller.modify(Source::Endpoint, self.endpoint.interest());
        self.log_counters();
    }

    /// Stops in the order in which nothing is left half done: rings first, then the connection,
    /// then the socket's file (all when `self` is dropped).
    pub(super) fn finish(mut self) {
        if self.is_anothers {
            return;
        }
        if self.connection.is_some() {
            info!("{}: frontend disconnected: {}", self.device.name(), self.stops);
            self.end_connection();
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
