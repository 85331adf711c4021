//! The control thread of a port: connections, and their messages.

use std::io;
use std::iter::Peekable;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use crate::device::{Device, Refusal};
use crate::endpoint::{Endpoint, Frontend};
use crate::event::{Interest, Poller, until};
use crate::policy::{Filter, Rules};
use crate::protocol::{self, Connection, Event, Message, Reply, Retold};
use crate::sandbox::Role;
use crate::status::PortStatus;
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

/// Time for a message that has begun to come in to end when another daemon waits.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(100);
/// Time for the whole replay of a port to come.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time that one message of a replay may block before orders are looked at again.
const REPLAY_TURN: Duration = Duration::from_millis(20);
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

/// A suspended port's descriptors, for another daemon.
pub(super) struct HandoverFds {
    /// The socket on which frontends connect.
    pub(super) listener: Option<OwnedFd>,
    /// The frontend's connection, unless the frontend prevents that it is passed on.
    pub(super) connection: Option<OwnedFd>,
    /// Where the replay of what the frontend has told is read from.
    pub(super) replay: UnixStream,
    /// Messages of the replay.
    pub(super) messages: usize,
}

/// What another daemon has passed on of a port, as far as the control thread takes it.
pub(super) struct Predecessor {
    /// Where the replay of what the frontend has told is read from.
    pub(super) replay: UnixStream,
    /// Messages of the replay, if the predecessor counts them.
    pub(super) messages: Option<usize>,
    /// The frontend's connection.
    pub(super) connection: Option<UnixStream>,
    /// Hears whether the port can be resumed.
    pub(super) done: Sender<Result<(), String>>,
}

/// What is still to be told of a replay.
struct Replay {
    socket: UnixStream,
    messages: Peekable<std::vec::IntoIter<Retold>>,
}

impl Replay {
    /// Sends a message, if there is room; says whether any is left.
    fn send_next(&mut self) -> bool {
        let Some(message) = self.messages.peek() else { return false };
        match message.send(&self.socket) {
            Ok(()) => drop(self.messages.next()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Whoever reads has gone, or notices by the number of messages.
            Err(_) => return false,
        }
        true
    }
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

    /// Suspends the port, passes it on, and waits for what comes of that; says whether the thread is to
    /// end.
    fn prepare_handover(&mut self, reply: &Sender<Result<HandoverFds, String>>) -> bool {
        let can_be_passed = self.bring_connection_to_rest();
        self.device.suspend();
        let replay = match self.handover_fds(can_be_passed) {
            Ok((fds, replay)) => {
                let _ = reply.send(Ok(fds));
                Some(replay)
            }
            Err(error) => {
                let _ = reply.send(Err(error.to_string()));
                None
            }
        };
        self.stand_still(replay)
    }

    /// Lets a message that has begun to come in come to its end. Says whether the connection can be
    /// passed on, which a frontend can prevent: with half a message, by reading no replies, and with
    /// sockets in flight.
    fn bring_connection_to_rest(&mut self) -> bool {
        let end = Instant::now() + MESSAGE_TIMEOUT;
        while self.connection.as_ref().is_some_and(|connection| !connection.is_at_rest()) {
            if Instant::now() > end {
                warn!("{}: frontend is in the middle of a message", self.device.name());
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
            self.talk();
        }
        true
    }

    /// Waits until the port resumes or ends, and sends the rest of the replay meanwhile; says whether the
    /// thread is to end.
    fn stand_still(&mut self, mut replay: Option<Replay>) -> bool {
        loop {
            let order = if replay.as_mut().is_some_and(Replay::send_next) {
                match self.orders.try_recv() {
                    Err(TryRecvError::Empty) => continue,
                    order => order.ok(),
                }
            } else {
                // The end of the socket is the end of the replay.
                replay = None;
                self.orders.recv().ok()
            };
            match order {
                Some(Order::CommitHandover) => {
                    info!("{}: handed over", self.device.name());
                    let gone = Endpoint::Connected(None);
                    std::mem::replace(&mut self.endpoint, gone).give_away();
                    self.connection = None;
                    self.is_anothers = true;
                    return true;
                }
                Some(Order::Resume) => {
                    self.resume();
                    return false;
                }
                Some(Order::Stop(why)) => {
                    self.stops = why;
                    return true;
                }
                None => return true,
                Some(Order::CountTraffic(enable, done)) => {
                    let _ = done.send(self.status.traffic.enable(enable));
                }
                // The sender is dropped: whoever waits is told that nobody answers.
                Some(_) => {}
            }
        }
    }

    /// Serves the guest: again, after a take-over that failed, or for the first time, after one that
    /// did not.
    fn resume(&mut self) {
        let name = self.device.name();
        if std::mem::take(&mut self.is_anothers)
            && let Frontend::Listen(path) = &self.status.frontend
        {
            self.endpoint.own(path);
        }
        if let Err(error) = self.status.filters.rx.reassert() {
            warn!("{name}: cannot set its rx filter again: {error}");
        }
        self.device.resume();
        info!("{}: resumed", self.device.name());
    }

    fn handover_fds(&self, can_be_passed: bool) -> io::Result<(HandoverFds, Replay)> {
        let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let (ours, replay) = UnixStream::pair()?;
        ours.set_write_timeout(Some(REPLAY_TURN))?;
        let listener = self.endpoint.fd().map(duplicate).transpose()?;
        let mut connection = self.connection.as_ref().filter(|_| can_be_passed);
        if let Some(it) = connection
            && !protocol::can_be_passed(it)?
        {
            connection = None;
        }
        if connection.is_none() && self.connection.is_some() {
            warn!("{}: frontend will be disconnected by a take-over", self.device.name());
        }
        let connection = connection.map(|it| duplicate(it.as_fd())).transpose()?;
        let messages = if connection.is_some() { self.device.retell()? } else { Vec::new() };
        let fds = HandoverFds { listener, connection, replay, messages: messages.len() };
        Ok((fds, Replay { socket: ours, messages: messages.into_iter().peekable() }))
    }

    /// Takes the frontend over that another daemon serves, and waits until the port may resume; says
    /// whether it is to serve.
    pub(super) fn take_over(&mut self, predecessor: Predecessor) -> bool {
        self.is_anothers = true;
        self.device.suspend();
        let done = predecessor.done.clone();
        let taken = self.restore(predecessor);
        let failed = taken.is_err();
        let _ = done.send(taken.map_err(|error| error.to_string()));
        !failed && !self.stand_still(None)
    }

    /// Hears what the frontend has told its last backend. If that can't be carried out any more, since
    /// the frontend has taken away what it is about, the frontend is disconnected: nobody else pays.
    ///
    /// # Errors
    /// Part of the replay is missing, or there is no descriptor to be had.
    fn restore(&mut self, predecessor: Predecessor) -> io::Result<()> {
        let Predecessor { replay, messages, connection, .. } = predecessor;
        let mut replay = Connection::new(replay)?;
        let mut poller = Poller::new()?;
        poller.add(&replay, Interest::Read, ())?;
        let deadline = Instant::now() + REPLAY_TIMEOUT;
        let (mut received, mut refusal) = (0, None);
        loop {
            match replay.receive()? {
                Event::Message(message) => {
                    received += 1;
                    let code = message.code;
                    if refusal.is_none()
                        && let Err(why) = self.device.handle(message)
                    {
                        // Not for want of a descriptor: the frontend is not to pay for that.
                        replay.as_fd().try_clone_to_owned()?;
                        refusal = Some(format!("{code:?} is refused: {why}"));
                    }
                }
                Event::Pending if Instant::now() > deadline => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the replay takes too long",
                    ));
                }
                Event::Pending => poller.wait(until(Some(deadline)), |()| {})?,
                Event::Closed if !replay.is_at_rest() => {
                    return Err(io::Error::other("the replay ends in the middle of a message"));
                }
                Event::Closed => break,
            }
        }
        if let Some(sent) = messages.filter(|sent| *sent != received) {
            return Err(io::Error::other(format!("{received} of {sent} replay messages came")));
        }
        if let Some(why) = refusal {
            warn!("{}: frontend disconnected: its state cannot be taken over: {why}", self.name());
            self.device.forget();
            return Ok(());
        }
        let Some(stream) = connection else { return Ok(()) };
        let connection = Connection::new(stream)?;
        self.poller.add(&connection, Interest::Read, Source::Connection)?;
        let _ = self.poller.modify(Source::Endpoint, Interest::Edge);
        self.status.connected(connection.peer());
        self.status.set_features(self.device.features());
        self.connection = Some(connection);
        Ok(())
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
