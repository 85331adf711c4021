//! A connection to a frontend: it receives messages and sends replies, and never blocks.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::message::Header;
use super::{HEADER_LENGTH, MAX_PAYLOAD, MAX_TABLE_REGIONS, Message, Reply};
use crate::sys::socket::{receive, send_some};

/// Time that a frontend has to send the rest of a message, or to read a reply.
const DEADLINE: Duration = Duration::from_secs(5);

/// Result of [`Connection::receive`].
#[derive(Debug)]
pub enum Event {
    /// A whole message.
    Message(Message),
    /// No whole message has arrived, or a reply must be sent first.
    Pending,
    /// The frontend has closed the connection.
    Closed,
}

/// A non-blocking connection to a frontend.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// Received bytes of the current message: of its header, then of its payload.
    buffer: Vec<u8>,
    /// Header of the current message; `None` while its bytes arrive.
    header: Option<Header>,
    /// Descriptors of the current message, at most [`MAX_TABLE_REGIONS`].
    files: Vec<File>,
    /// Bytes of replies that the socket has not accepted yet.
    unsent: Vec<u8>,
    /// Descriptor that goes with the first unsent byte.
    unsent_file: Option<File>,
    /// Time by which the frontend must send the rest of a message, or read a reply.
    deadline: Option<Instant>,
}

impl Connection {
    /// Creates a connection from a connected socket, which becomes non-blocking.
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

    /// Returns the PID of the process that connected or listens; `None` if it is in another PID namespace.
    pub fn peer(&self) -> Option<i32> {
        let peer = getsockopt(&self.socket, PeerCredentials).ok()?;
        Some(peer.pid()).filter(|pid| *pid != 0)
    }

    /// Returns whether a reply is not wholly sent. [`receive`](Self::receive) then reads no message until the
    /// frontend has read the reply.
    pub fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Returns whether the connection is between two messages, with every reply sent.
    pub fn is_at_rest(&self) -> bool {
        self.header.is_none() && self.buffer.is_empty() && !self.is_sending()
    }

    /// Returns the time by which [`receive`](Self::receive) must be called again, if a message or a reply is
    /// incomplete.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Sends the rest of a reply, and reads until a message is whole or the socket is empty.
    ///
    /// # Errors
    /// `TimedOut` if the frontend missed its deadline, `InvalidData` with a
    /// [`ProtocolError`](super::ProtocolError) if it violates the framing, or an error of the socket. The
    /// connection must then be closed.
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

    /// Returns [`Event::Pending`], and starts the deadline if a message or a reply is incomplete.
    ///
    /// # Errors
    /// `TimedOut` after the deadline.
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
        let what = if self.is_sending() { "read a reply" } else { "send a whole message" };
        let seconds = DEADLINE.as_secs();
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the frontend took longer than {seconds} s to {what}"),
        ))
    }

    /// Sends a reply. The connection keeps bytes that the socket does not accept, and sends them later.
    ///
    /// # Errors
    /// An error of the socket.
    pub fn send(
        &mut self,
        code: vhost::vhost_user::message::FrontendReq,
        reply: Reply,
    ) -> io::Result<()> {
        let bytes = reply.to_bytes(code);
        let file = reply.into_file();
        if file.is_some() {
            // A descriptor goes with the next byte that is sent. No byte of another reply is unsent: the
            // connection reads no message before the frontend has read the last reply.
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
