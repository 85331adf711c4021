//! The control thread's part of a hand-over. In the old daemon it suspends the port and passes its frontend on;
//! in the new daemon it takes over the frontend.

use std::io;
use std::iter::Peekable;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, TryRecvError};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Control, ControlCommand, Source};
use crate::endpoint::{Endpoint, Frontend};
use crate::event::{Interest, Poller, until};
use crate::protocol::{self, Connection, Event, ReplayMessage};

/// Time that a frontend has to finish a message before a take-over disconnects it.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(100);
/// Time that the whole replay of a port may take.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time that one message of a replay may block before the thread reads commands again.
const REPLAY_TURN: Duration = Duration::from_millis(20);

/// A suspended port's descriptors, for another daemon.
pub(in crate::ports) struct HandoverFds {
    /// The socket that frontends connect to.
    pub(in crate::ports) listener: Option<OwnedFd>,
    /// The frontend's connection, unless the frontend prevents a hand-over of the connection.
    pub(in crate::ports) connection: Option<OwnedFd>,
    /// The socket from which the new daemon reads the replay of the frontend's messages.
    pub(in crate::ports) replay: UnixStream,
    /// Number of messages of the replay.
    pub(in crate::ports) messages: usize,
}

/// The frontend that another daemon passes on to a port's control thread.
pub(in crate::ports) struct FrontendHandover {
    /// The socket from which the control thread reads the replay of the frontend's messages.
    pub(in crate::ports) replay: UnixStream,
    /// Number of messages of the replay; `None` if the old daemon does not pass it on.
    pub(in crate::ports) messages: Option<usize>,
    /// The frontend's connection.
    pub(in crate::ports) connection: Option<UnixStream>,
    /// Receives the result: the port can resume, or the reason why not.
    pub(in crate::ports) done: Sender<Result<(), String>>,
}

/// The messages of a replay that are not sent yet.
struct Replay {
    socket: UnixStream,
    messages: Peekable<std::vec::IntoIter<ReplayMessage>>,
}

impl Replay {
    /// Sends one message if the socket has space; returns whether messages may be left.
    fn send_next(&mut self) -> bool {
        let Some(message) = self.messages.peek() else { return false };
        match message.send(&self.socket) {
            Ok(()) => drop(self.messages.next()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The reader has gone, or notices by the number of messages.
            Err(_) => return false,
        }
        true
    }
}

impl Control {
    /// Suspends the port, replies with its descriptors, and waits for the outcome; returns whether the thread must
    /// end.
    pub(super) fn prepare_handover(&mut self, reply: &Sender<Result<HandoverFds, String>>) -> bool {
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
        self.wait_for_outcome(replay)
    }

    /// Receives the rest of a message that has begun. Returns whether the connection can be passed on; a frontend
    /// prevents that if it sends half a message, reads no replies, or has descriptors in flight.
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

    /// Waits until the port resumes or ends, and sends the rest of the replay meanwhile; returns whether the thread
    /// must end.
    fn wait_for_outcome(&mut self, mut replay: Option<Replay>) -> bool {
        loop {
            let command = if replay.as_mut().is_some_and(Replay::send_next) {
                match self.commands.try_recv() {
                    Err(TryRecvError::Empty) => continue,
                    command => command.ok(),
                }
            } else {
                // Closing the socket ends the replay.
                replay = None;
                self.commands.recv().ok()
            };
            match command {
                Some(ControlCommand::CommitHandover) => {
                    info!("{}: handed over", self.device.name());
                    let gone = Endpoint::Connected(None);
                    std::mem::replace(&mut self.endpoint, gone).leave_to_successor();
                    self.connection = None;
                    self.is_handed_over = true;
                    return true;
                }
                Some(ControlCommand::Resume) => {
                    self.resume();
                    return false;
                }
                Some(ControlCommand::Stop(why)) => {
                    self.stop_reason = why;
                    return true;
                }
                None => return true,
                Some(ControlCommand::CountTraffic(enable, done)) => {
                    let _ = done.send(self.status.traffic.enable(enable));
                }
                // The drop of the sender ends the main thread's wait for a reply.
                Some(_) => {}
            }
        }
    }

    /// Serves the guest: again after an aborted take-over, or for the first time after a committed one.
    fn resume(&mut self) {
        let name = self.device.name();
        if std::mem::take(&mut self.is_handed_over)
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
        let messages = if connection.is_some() { self.device.replay()? } else { Vec::new() };
        let fds = HandoverFds { listener, connection, replay, messages: messages.len() };
        Ok((fds, Replay { socket: ours, messages: messages.into_iter().peekable() }))
    }

    /// Takes over the frontend of another daemon, and waits until the port may resume; returns whether the thread
    /// must serve.
    pub(in crate::ports) fn take_over(&mut self, frontend: FrontendHandover) -> bool {
        self.is_handed_over = true;
        self.device.suspend();
        let done = frontend.done.clone();
        let taken = self.restore(frontend);
        let failed = taken.is_err();
        let _ = done.send(taken.map_err(|error| error.to_string()));
        !failed && !self.wait_for_outcome(None)
    }

    /// Replays the messages that the frontend has sent to its last backend. If one is refused, since the frontend
    /// has taken back what it refers to, only this frontend is disconnected.
    ///
    /// # Errors
    /// Part of the replay is missing, or the process has no descriptor left.
    fn restore(&mut self, frontend: FrontendHandover) -> io::Result<()> {
        let FrontendHandover { replay, messages, connection, .. } = frontend;
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
                        // A lack of descriptors must not disconnect the frontend: it fails the take-over.
                        replay.as_fd().try_clone_to_owned()?;
                        refusal = Some(format!("{code:?} refused: {why}"));
                    }
                }
                Event::Pending if Instant::now() > deadline => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the replay took longer than 2 s",
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
            return Err(io::Error::other(format!("received {received} of {sent} replay messages")));
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
}
