//! A connection to a frontend: messages in, replies out, nothing ever waited for.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::message::Header;
use super::{HEADER_LENGTH, MAX_PAYLOAD, MAX_TABLE_REGIONS, Message, Reply};
use crate::sys::socket::{receive, send_some};

/// How long a frontend may take over the rest of a message that it has begun, or over reading a
/// reply.
const DEADLINE: Duration = Duration::from_secs(5);

/// What looking at the connection brought.
#[derive(Debug)]
pub enum Event {
    /// A whole message.
    Message(Message),
    /// Nothing yet.
    Pending,
    /// The frontend has gone.
    Closed,
}

/// A non-blocking connection.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// The message under way: its header's bytes, then its payload's.
    buffer: Vec<u8>,
    header: Option<Header>,
    /// What came with it: no request has more than one for each region of a table.
    files: Vec<File>,
    /// Replies that the socket had no room for yet.
    unsent: Vec<u8>,
    /// What goes with the first of them.
    unsent_file: Option<File>,
    /// When the frontend must have sent the rest, or read its reply.
    deadline: Option<Instant>,
}

impl Connection {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Connection {
            socket,
            buffer: Vec::with_capacity(HEADER_LENGTH + MAX_PAYLOAD),
            header: None,
            files: Vec::new(),
            unsent: Vec::new(),
            unsent_file: None,
            deadline: None,
        })
    }

    /// Process that connected, or that listens, if it is in our PID namespace.
    pub fn peer(&self) -> Option<i32> {
        let peer = getsockopt(&self.socket, PeerCredentials).ok()?;
        Some(peer.pid()).filter(|pid| *pid != 0)
    }

    /// Whether to wait for room for a reply instead of a message: a frontend that does not read
    /// its replies is not served.
    pub fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether it is between two messages, and every reply has been sent.
    pub fn is_at_rest(&self) -> bool {
        self.header.is_none() && self.buffer.is_empty() && !self.is_sending()
    }

    /// When to look at the connection at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Reads on until a message is whole.
    ///
    /// # Errors
    /// `TimedOut` if the frontend missed its deadline, `InvalidData` with a
    /// [`ProtocolError`](super::ProtocolError) if it does not speak vhost-user, or those of the
    /// socket. The connection is of no further use then.
    pub fn receive(&mut self) -> io::Result<Event> {
        self.send_unsent()?;
        if self.is_sending() {
            return self.pending();
        }
        loop {
            let wanted = match self.header {
                None => HEADER_LENGTH,
                Some(header) => header.size,
            };
            if self.buffer.len() == wanted {
                match self.header.take() {
                    None => {
                        let bytes = self.buffer.as_slice().try_into().expect("just as long");
                        self.header = Some(Header::parse(bytes).map_err(invalid)?);
                        self.buffer.clear();
                    }
                    Some(header) => {
                        let files = std::mem::take(&mut self.files);
                        let message = Message::parse(header, &self.buffer, files);
                        self.buffer.clear();
                        self.deadline = None;
                        return message.map(Event::Message).map_err(invalid);
                    }
                }
                continue;
            }
            let have = self.buffer.len();
            self.buffer.resize(wanted, 0);
            let room = MAX_TABLE_REGIONS - self.files.len();
            let received = receive(&self.socket, &mut self.buffer[have..], room);
            self.buffer.truncate(have + received.as_ref().map_or(0, |received| received.bytes));
            match received {
                Ok(received) if received.bytes == 0 => return Ok(Event::Closed),
                Ok(received) => self.files.extend(received.files),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.pending(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Event::Closed);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Nothing to hand out; the clock runs if something is under way.
    fn pending(&mut self) -> io::Result<Event> {
        let under_way = self.header.is_some() || !self.buffer.is_empty() || self.is_sending();
        if !under_way {
            self.deadline = None;
            return Ok(Event::Pending);
        }
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + DEADLINE);
        if Instant::now() < deadline {
            return Ok(Event::Pending);
        }
        let what = if self.is_sending() { "reading a reply" } else { "sending a message" };
        let seconds = DEADLINE.as_secs();
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the frontend took longer than {seconds} s over {what}"),
        ))
    }

    /// Sends a reply, or keeps it until the socket has room.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(
        &mut self,
        code: vhost::vhost_user::message::FrontendReq,
        reply: Reply,
    ) -> io::Result<()> {
        let bytes = reply.to_bytes(code);
        let file = reply.into_file();
        if file.is_some() {
            // A descriptor goes with the next bytes: there are none of another reply's, for a frontend
            // that has not read one is not served.
            debug_assert!(self.unsent.is_empty());
            self.unsent_file = file;
        }
        self.unsent.extend(bytes);
        self.send_unsent()
    }

    fn send_unsent(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let files = self.unsent_file.as_ref().map(AsFd::as_fd);
            match send_some(&self.socket, &self.unsent, files) {
                Ok(sent) => {
                    self.unsent_file = None;
                    self.unsent.drain(..sent);
                    self.deadline = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn invalid(error: super::ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
