//! The control socket: operators ask what ports do, and change what may be changed while they run.
//!
//! One request a line, in JSON, and one line in reply. Whoever asks must be root or the daemon's own
//! user (SO_PEERCRED). A client can take little: lines are short, clients are few, and who does not
//! read its replies is not read from. Descriptors come with the blanks before a request.

mod connection;
mod metrics;
mod report;
pub mod requests;
pub mod scrape;

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use log::{info, warn};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Config;
use crate::endpoint::{Endpoint, Frontend, set_access};
use crate::error::StartError;
use crate::ports::Ports;

use connection::Client;
pub use requests::Command;

/// Version of requests and replies: it changes when one that was good is not understood any more.
pub const VERSION: u32 = 1;
/// Clients at once; the one that has been silent for longest makes room.
const MAX_CLIENTS: usize = 32;
/// What the opener is told.
const RELOAD: &str = "{\"reload\":true}\n";

/// A line from a client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) command: Command,
}

/// What clients may ask about the daemon itself.
#[derive(Debug, Default)]
struct House {
    /// How it was started.
    about: Value,
    /// Sockets that clients connect to, by what they are for.
    listeners: Vec<(String, OwnedFd)>,
}

impl House {
    fn listeners(&self) -> io::Result<(Vec<&str>, Vec<OwnedFd>)> {
        let names = self.listeners.iter().map(|(name, _)| name.as_str()).collect();
        let files = self.listeners.iter().map(|(_, fd)| fd.try_clone());
        Ok((names, files.collect::<io::Result<_>>()?))
    }
}

/// The socket, and those who are connected to it.
#[derive(Debug)]
pub struct Server {
    endpoint: Option<Endpoint>,
    /// The user that the daemon was started by, which may not be the one that it is now.
    starter: u32,
    house: House,
    /// Another daemon goes on with the ports.
    given_away: bool,
    /// The process that reads the daemon's file, and opens what it names.
    opener: Option<Client>,
    /// Whoever has been silent for longest first.
    clients: Vec<Client>,
    next: u32,
}

/// What a client is to be waited on for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientInterest {
    /// Its next request.
    Request,
    /// Room for the reply.
    Room,
    /// Nothing: it has gone.
    Nothing,
}

impl Server {
    /// Makes the socket that `config` names, if it does, to which only our own user can connect, or goes
    /// on with that of another daemon. Nobody can before [`start`](Self::start).
    ///
    /// # Errors
    /// With the path, what is wrong, and the way out.
    pub fn open(config: &Config, given: Option<OwnedFd>) -> Result<Self, StartError> {
        let open = |path: &Path| {
            let failed =
                |error: io::Error| StartError::new(format!("set up {}: {error}", path.display()));
            if let Some(fd) = given {
                return Endpoint::taken(fd).map_err(failed);
            }
            let endpoint = Endpoint::open(&Frontend::Listen(path.to_owned()), None)?;
            set_access(path, None, 0o600).map_err(failed)?;
            Ok(endpoint)
        };
        let about = json!({"file": config.file, "settings": config.settings()});
        let mut server = Server {
            endpoint: config.control.as_deref().map(open).transpose()?,
            starter: geteuid().as_raw(),
            house: House { about, listeners: Vec::new() },
            given_away: false,
            opener: None,
            clients: Vec::new(),
            next: 1,
        };
        if let Some(fd) = server.endpoint.as_ref().and_then(Endpoint::fd) {
            let duplicated = fd.try_clone_to_owned();
            let fd = duplicated.map_err(|error| StartError::new(format!("control: {error}")))?;
            server.pass_on("control", fd);
        }
        Ok(server)
    }

    /// Passes a socket that clients connect to on to the next daemon.
    pub fn pass_on(&mut self, name: &str, listener: OwnedFd) {
        self.house.listeners.push((name.to_owned(), listener));
    }

    /// Passes another socket on in place of the one whose name begins so.
    pub fn pass_on_instead(&mut self, name: &str, listener: OwnedFd) {
        let mut listeners = self.house.listeners.iter_mut();
        if let Some((_, passed)) = listeners.find(|(passed, _)| passed.starts_with(name)) {
            *passed = listener;
        }
    }

    /// Its socket, if it has one.
    pub fn endpoint(&mut self) -> Option<&mut Endpoint> {
        self.endpoint.as_mut()
    }

    /// Whether another daemon goes on with the ports.
    pub fn has_given_away(&self) -> bool {
        self.given_away
    }

    /// Sends what clients are still to be sent.
    pub fn flush(&mut self, ports: &mut Ports) {
        let numbers: Vec<u32> = self.clients.iter().map(|client| client.number).collect();
        for number in numbers {
            self.serve(number, ports);
        }
    }

    /// Tells a daemon that takes over that this one ends all ports, as if it had let go of none.
    pub fn refuse_successor(&mut self, ports: &Ports) {
        let refusal = failure("cannot-be-done", "the daemon was told to stop meanwhile");
        for client in self.clients.iter_mut().filter(|client| client.has_ports(ports)) {
            let _ = client.stream.write_all(refusal.as_bytes());
        }
    }

    /// Owns the socket's file, at `path`, from now on.
    pub fn own(&mut self, path: &Path) {
        self.endpoint.iter_mut().for_each(|endpoint| endpoint.own(path));
    }

    /// Leaves the socket's file, which is another daemon's now.
    pub fn leave(self) {
        if let Some(endpoint) = self.endpoint {
            endpoint.give_away();
        }
    }

    /// Removes the socket's file, at the end of the process.
    pub fn end(self) {
        if let Some(endpoint) = self.endpoint {
            endpoint.end();
        }
    }

    /// Serves the process that opens what is to be added when the file is read again.
    pub fn serve_opener(&mut self, stream: UnixStream) {
        self.opener = Some(Client::new(0, stream));
    }

    /// Lets clients connect.
    ///
    /// # Errors
    /// Those of `listen`.
    pub fn start(&self) -> io::Result<()> {
        self.endpoint.as_ref().map_or(Ok(()), Endpoint::start)
    }

    /// Whether anybody can ask.
    pub fn is_open(&self) -> bool {
        self.endpoint.is_some() || self.opener.is_some()
    }

    /// Becomes readable when somebody connects.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.endpoint.as_ref().and_then(Endpoint::fd)
    }

    /// When to accept again, after an accept that failed.
    pub fn retry(&self) -> Option<Instant> {
        self.endpoint.as_ref().and_then(Endpoint::deadline)
    }

    /// True if the daemon was started with a configuration file, which SIGHUP reloads.
    pub fn has_file(&self) -> bool {
        self.house.about["file"].is_string()
    }

    /// The opener's number and socket, if there is one.
    pub fn opener(&self) -> Option<(u32, &UnixStream)> {
        self.opener.as_ref().map(|opener| (opener.number, &opener.stream))
    }

    /// Has the opener read the file again, as soon as it is [served](Self::serve).
    pub fn ask_for_reload(&mut self) -> Option<u32> {
        self.tell_opener(RELOAD)
    }

    /// Has the opener start ports of the file, by name, as soon as it is [served](Self::serve).
    pub fn ask_to_start(&mut self, names: &[String]) -> Option<u32> {
        self.tell_opener(&(json!({"start": names}).to_string() + "\n"))
    }

    fn tell_opener(&mut self, line: &str) -> Option<u32> {
        let opener = self.opener.as_mut()?;
        // Once is enough, however often it is asked for.
        if !opener.output.ends_with(line.as_bytes()) {
            opener.output.extend(line.as_bytes());
        }
        Some(opener.number)
    }

    /// Has the opener open a port's device again, if that is there again.
    pub fn ask_to_mend(&mut self, port: &str) -> Option<u32> {
        let opener = self.opener.as_mut()?;
        // It is slow, or stuck: one wish at a time.
        if opener.output.is_empty() {
            opener.output.extend((json!({"mend": port}).to_string() + "\n").into_bytes());
        }
        Some(opener.number)
    }

    /// Takes a client, if one has connected: its number and its socket, and the number of one that
    /// had to go for it.
    pub fn accept(&mut self, ports: &mut Ports) -> Option<(u32, &UnixStream, Option<u32>)> {
        let stream = self.endpoint.as_mut()?.connection("control socket")?;
        if let Err(why) = self.check_peer(&stream) {
            info!("control socket: a client is turned away: {why}");
            let mut stream = stream;
            let _ = stream.write_all(failure("not-allowed", &why).as_bytes());
            return None;
        }
        // Not the one that has the ports.
        let first = self.clients.iter().position(|client| !client.has_ports(ports));
        let full = self.clients.len() >= MAX_CLIENTS;
        let gone = first.filter(|_| full).map(|place| {
            let client = self.clients.remove(place);
            client.leave(ports);
            client.number
        });
        let number = self.next;
        self.next = self.next.wrapping_add(1).max(1);
        self.clients.push(Client::new(number, stream));
        self.clients.last().map(|client| (number, &client.stream, gone))
    }

    fn check_peer(&self, stream: &UnixStream) -> Result<(), String> {
        stream.set_nonblocking(true).map_err(|error| error.to_string())?;
        let peer = getsockopt(stream, PeerCredentials).map_err(|error| error.to_string())?;
        let allowed = [0, self.starter, geteuid().as_raw()];
        if allowed.contains(&peer.uid()) {
            return Ok(());
        }
        Err(format!("user {} is neither root nor the daemon's own", peer.uid()))
    }

    /// Disconnects a client.
    pub fn hang_up(&mut self, number: u32, ports: &mut Ports) {
        if let Some(client) = self.take(number) {
            client.leave(ports);
        }
    }

    fn take(&mut self, number: u32) -> Option<Client> {
        if let Some(opener) = self.opener.take_if(|opener| opener.number == number) {
            return Some(opener);
        }
        let place = self.clients.iter().position(|client| client.number == number)?;
        Some(self.clients.remove(place))
    }

    /// Serves a client that can be read from, or written to.
    pub fn serve(&mut self, number: u32, ports: &mut Ports) -> ClientInterest {
        let Some(mut client) = self.take(number) else { return ClientInterest::Nothing };
        match client.talk(ports, &self.house, &mut self.given_away) {
            Ok(()) => {
                let wanted = if client.output.is_empty() {
                    ClientInterest::Request
                } else {
                    ClientInterest::Room
                };
                if number == 0 {
                    self.opener = Some(client);
                } else {
                    self.clients.push(client);
                }
                wanted
            }
            Err(error) => {
                client.leave(ports);
                if number == 0 {
                    warn!("the process that reads the file again has ended: {error}");
                } else if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::Other)
                {
                    warn!("control socket: a client is disconnected: {error}");
                }
                ClientInterest::Nothing
            }
        }
    }
}

/// Reads a request.
///
/// # Errors
/// The reply to a line that is no request, or is of another [`VERSION`].
pub fn parse(line: &[u8]) -> Result<Command, String> {
    let request: Request =
        serde_json::from_slice(line).map_err(|error| failure("bad-request", &error.to_string()))?;
    if request.version != VERSION {
        let why = format!("version {} is not spoken here, but {VERSION}", request.version);
        return Err(failure("bad-version", &why));
    }
    Ok(request.command)
}

fn failure(kind: &str, message: &str) -> String {
    json!({"version": VERSION, "error": {"kind": kind, "message": message}}).to_string() + "\n"
}
