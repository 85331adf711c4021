//! The metrics endpoint for Prometheus: a unix socket, or a TCP port on the loopback device.
//!
//! A connection carries one request. Resources of clients are bounded: at most 8 connections, and 8 KiB a request.
//! One more connection closes the one that has been silent longest.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use log::warn;

use super::{ClientInterest, metrics};
use crate::config::MetricsAddress;
use crate::endpoint::{Accepting, Endpoint, Frontend, set_access};
use crate::error::StartError;
use crate::ports::Ports;
use crate::sys::socket::refuse_descriptors;

/// The endpoint's name in the log.
const NAME: &str = "metrics";
/// Maximum length of a request in bytes; Prometheus sends some hundreds.
const MAX_REQUEST: usize = 8 << 10;
/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;
/// Maximum number of connections.
const MAX_CLIENTS: usize = 8;

#[derive(Debug)]
enum Listener {
    Unix(Endpoint),
    Tcp(TcpListener, Accepting),
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(bytes),
            Stream::Tcp(stream) => stream.read(bytes),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Tcp(stream) => stream.write(bytes),
        }
    }
}

/// A client, such as Prometheus.
#[derive(Debug)]
struct HttpClient {
    number: u32,
    stream: Stream,
    request: Vec<u8>,
    reply: Vec<u8>,
}

/// The metrics endpoint and its clients.
#[derive(Debug)]
pub struct Scrape {
    listener: Listener,
    /// The clients; the one that has been silent longest comes first.
    clients: Vec<HttpClient>,
    /// Number of the next client.
    next: u32,
}

impl Scrape {
    /// Listens at `address`, or uses `given`, the socket of another daemon. [`serve`](Self::serve) answers the clients.
    ///
    /// # Errors
    /// The address cannot be used; the error has the address and the fix.
    pub fn open(address: &MetricsAddress, given: Option<OwnedFd>) -> Result<Self, StartError> {
        let failed =
            |error: io::Error| StartError::new(format!("cannot listen on {address}: {error}"));
        let listener = match address {
            MetricsAddress::Unix(path) => {
                Listener::Unix(if let Some(fd) = given {
                    Endpoint::taken(fd).map_err(failed)?
                } else {
                    let endpoint = Endpoint::open(&Frontend::Listen(path.clone()), None)?;
                    // Metrics are no secret, and Prometheus runs as another user.
                    set_access(path, None, 0o666).map_err(failed)?;
                    endpoint.fd().into_iter().for_each(refuse_descriptors);
                    endpoint.start().map_err(failed)?;
                    endpoint
                })
            }
            MetricsAddress::Tcp(address) => {
                let bind = || TcpListener::bind(address);
                let given = given.map(|fd| Ok(TcpListener::from(fd)));
                let listener = given.unwrap_or_else(bind).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Listener::Tcp(listener, Accepting::default())
            }
        };
        Ok(Scrape { listener, clients: Vec::new(), next: 0 })
    }

    /// Makes this daemon the owner of the socket's file, if there is one, which it removes at its end.
    pub fn own(&mut self, address: &MetricsAddress) {
        if let (Listener::Unix(endpoint), MetricsAddress::Unix(path)) =
            (&mut self.listener, address)
        {
            endpoint.own(path);
        }
    }

    /// Keeps the socket's file, which another daemon owns now.
    pub fn leave(self) {
        if let Listener::Unix(endpoint) = self.listener {
            endpoint.leave_to_successor();
        }
    }

    /// Removes the socket's file, if there is one, at the end of the process.
    pub fn end(self) {
        if let Listener::Unix(endpoint) = self.listener {
            endpoint.end();
        }
        std::mem::forget(self.clients);
    }

    /// Returns the unix socket, if the endpoint is one.
    pub fn endpoint(&mut self) -> Option<&mut Endpoint> {
        match &mut self.listener {
            Listener::Unix(endpoint) => Some(endpoint),
            Listener::Tcp(..) => None,
        }
    }

    /// Returns the descriptor that becomes readable when a client connects.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.listener {
            Listener::Unix(endpoint) => endpoint.fd(),
            Listener::Tcp(listener, _) => Some(listener.as_fd()),
        }
    }

    /// Returns the time of the next accept, if the last one failed.
    pub fn retry(&self) -> Option<Instant> {
        match &self.listener {
            Listener::Unix(endpoint) => endpoint.deadline(),
            Listener::Tcp(_, accepting) => accepting.retry(),
        }
    }

    /// Accepts a client, if one has connected. Returns its number and socket, and the number of the client that was
    /// disconnected for it, if any.
    pub fn accept(&mut self) -> Option<(u32, BorrowedFd<'_>, Option<u32>)> {
        let stream = match &mut self.listener {
            Listener::Unix(endpoint) => Stream::Unix(endpoint.connection(NAME)?),
            Listener::Tcp(listener, accepting) => {
                let accepted = listener.accept().map(|(stream, _)| stream);
                Stream::Tcp(accepting.connection(NAME, accepted)?)
            }
        };
        let prepared = match &stream {
            Stream::Unix(stream) => stream.set_nonblocking(true),
            Stream::Tcp(stream) => stream.set_nonblocking(true),
        };
        if let Err(error) = prepared {
            warn!("metrics: cannot serve a connection: {error}");
            return None;
        }
        let gone = (self.clients.len() >= MAX_CLIENTS).then(|| self.clients.remove(0).number);
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.clients.push(HttpClient { number, stream, request: Vec::new(), reply: Vec::new() });
        let client = self.clients.last()?;
        let fd = match &client.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        };
        Some((number, fd, gone))
    }

    /// Closes the connection of a client.
    pub fn hang_up(&mut self, number: u32) {
        self.clients.retain(|client| client.number != number);
    }

    /// Serves a client whose socket is readable or writable; returns the next event to wait for.
    pub fn serve(&mut self, number: u32, ports: &Ports) -> ClientInterest {
        let place = self.clients.iter().position(|client| client.number == number);
        let Some(mut client) = place.map(|place| self.clients.remove(place)) else {
            return ClientInterest::Nothing;
        };
        let wanted = client.talk(ports).unwrap_or(ClientInterest::Nothing);
        if wanted != ClientInterest::Nothing {
            self.clients.push(client);
        }
        wanted
    }
}

impl HttpClient {
    fn talk(&mut self, ports: &Ports) -> io::Result<ClientInterest> {
        let would_block = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        if self.reply.is_empty() {
            let mut bytes = [0; 2048];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(ClientInterest::Nothing),
                Ok(length) => self.request.extend(&bytes[..length]),
                Err(error) if would_block(&error) => return Ok(ClientInterest::Request),
                Err(error) => return Err(error),
            }
            match answer(&self.request, ports) {
                Some(reply) => self.reply = reply,
                None => return Ok(ClientInterest::Request),
            }
        }
        while !self.reply.is_empty() {
            match self.stream.write(&self.reply) {
                Ok(written) => drop(self.reply.drain(..written)),
                Err(error) if would_block(&error) => return Ok(ClientInterest::Room),
                Err(error) => return Err(error),
            }
        }
        Ok(ClientInterest::Nothing)
    }
}

/// Returns the reply to a request; `None` if part of the request is missing.
fn answer(bytes: &[u8], ports: &Ports) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let (status, body) = match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < MAX_REQUEST => return None,
        Ok(httparse::Status::Complete(_)) => match (request.method, request.path) {
            (Some("GET"), Some("/metrics")) => ("200 OK", metrics::text(ports)),
            (Some("GET"), _) => ("404 Not Found", "metrics are at /metrics\n".into()),
            _ => ("405 Method Not Allowed", "GET /metrics\n".into()),
        },
        Ok(httparse::Status::Partial) | Err(_) => ("400 Bad Request", "no HTTP request\n".into()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    Some((head + &body).into_bytes())
}
