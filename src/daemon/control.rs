//! The control thread of a port: connections, and their messages.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use crate::device::{Device, Refusal};
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller, until};
use crate::policy::{Filter, Rules};
use crate::protocol::{Connection, Event, Message, Reply, Retold};
use crate::sandbox::Role;
use crate::status::PortStatus;
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

/// How long a message that has begun may take when another daemon waits.
const MESSAGE_PATIENCE: Duration = Duration::from_millis(100);
/// How long the other daemon may take.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(2);
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
    /// To end.
    Stop,
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
    /// To stop where it stands, and to have another daemon go on.
    HandOver(Sender<Result<Handed, String>>),
    /// To go on after all.
    Resume,
    /// To end: another daemon has gone on.
    GiveAway,
}

/// What another daemon needs of a port to go on.
pub(super) struct Handed {
    /// The socket on which frontends connect.
    pub(super) listener: Option<OwnedFd>,
    /// The frontend's connection.
    pub(super) connection: Option<OwnedFd>,
    /// Where all is told again that it has told.
    pub(super) told: UnixStream,
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
    /// Another daemon goes on with it.
    given_away: bool,
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
        let (connection, given_away) = Default::default();
        Ok(Control { poller, wake, orders, status, device, endpoint, connection, given_away })
    }

    /// Has the socket's file, at `path`, removed at the end.
    pub(super) fn own_socket(&mut self, path: &Path) {
        self.endpoint.own(path);
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
                Ok(Order::RxFilter(filter, done)) => {
                    info!("{}: rx filter {filter}, by an operator", self.device.name());
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
                Ok(Order::HandOver(reply)) => {
                    if self.hand_over(&reply) {
                        return true;
                    }
                    continue;
                }
                // There is nothing to go on with, or to give away.
                Ok(Order::Resume | Order::GiveAway) => continue,
                Err(TryRecvError::Empty) => return false,
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return true,
            };
            // Whoever has not waited has given up.
            let _ = done.send(());
        }
    }

    /// Stops, and tells another daemon what it has to know; says whether that one has gone on.
    fn hand_over(&mut self, reply: &Sender<Result<Handed, String>>) -> bool {
        let name = self.device.name().to_owned();
        // A message that has begun to come is for us.
        let end = Instant::now() + MESSAGE_PATIENCE;
        while self.connection.as_ref().is_some_and(|connection| !connection.is_at_rest()) {
            if Instant::now() > end {
                let _ =
                    reply.send(Err(format!("{name}: its frontend is in the middle of a message")));
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
            self.talk();
        }
        self.device.suspend();
        match self.handed() {
            Ok((handed, messages, told)) => {
                let _ = reply.send(Ok(handed));
                if let Err(error) = messages.iter().try_for_each(|message| message.send(&told)) {
                    warn!("{name}: tell another daemon what to do: {error}");
                }
            }
            Err(error) => drop(reply.send(Err(format!("{name}: hand it over: {error}")))),
        }
        loop {
            match self.orders.recv() {
                Ok(Order::GiveAway) => {
                    info!("{name}: another daemon goes on");
                    let gone = Endpoint::Connected(None);
                    std::mem::replace(&mut self.endpoint, gone).give_away();
                    self.connection = None;
                    self.given_away = true;
                    return true;
                }
                Ok(Order::Resume) => {
                    info!("{name}: goes on");
                    self.device.resume();
                    return false;
                }
                Ok(Order::Stop) | Err(_) => return true,
                // Whoever waits for others is told that nobody answers.
                Ok(_) => {}
            }
        }
    }

    fn handed(&self) -> io::Result<(Handed, Vec<Retold>, UnixStream)> {
        let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let (ours, told) = UnixStream::pair()?;
        ours.set_write_timeout(Some(HAND_OVER_PATIENCE))?;
        let connection = self.connection.as_ref().map(|it| duplicate(it.as_fd())).transpose()?;
        let listener = self.endpoint.fd().map(duplicate).transpose()?;
        Ok((Handed { listener, connection, told }, self.device.retell()?, ours))
    }

    /// Goes on with what another daemon was told, over its frontend's connection.
    ///
    /// # Errors
    /// What can't be told again.
    pub(super) fn adopt(&mut self, told: UnixStream, stream: Option<UnixStream>) -> io::Result<()> {
        let mut told = Connection::new(told)?;
        let mut poller = Poller::new()?;
        poller.add(&told, Interest::Read, ())?;
        loop {
            match told.receive()? {
                Event::Message(message) => {
                    let code = message.code;
                    self.device.handle(message).map_err(|refusal| {
                        io::Error::other(format!("{code:?} is refused: {refusal}"))
                    })?;
                }
                Event::Pending => poller.wait(Some(HAND_OVER_PATIENCE), |()| {})?,
                Event::Closed => break,
            }
        }
        let Some(stream) = stream else { return Ok(()) };
        let connection = Connection::new(stream)?;
        self.poller.add(&connection, Interest::Read, Source::Connection)?;
        let _ = self.poller.remove(Source::Endpoint);
        self.status.connected();
        self.status.set_features(self.device.features());
        self.connection = Some(connection);
        Ok(())
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
        // Whoever uses the device next would not know of it, but for a daemon that has taken it over.
        if !self.given_away
            && !self.status.filters.rx.get().is_none()
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
