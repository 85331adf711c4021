//! The server of the control socket: operators read the state of ports, and change, add and remove ports.
//!
//! Each request is a line of JSON, and so is its reply. A client must be root, the daemon's user or the user that
//! started the daemon (SO_PEERCRED). The resources of clients are bounded: at most 32 clients, 16 KiB a request,
//! and the daemon reads no request of a client that has not read its last reply. Descriptors come with the blanks
//! before a request.

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
use crate::error::{StartError, no_descriptor};
use crate::ports::Ports;

use connection::Client;
pub use requests::Command;

/// Version of requests and replies. A change that breaks existing clients increments it.
pub const VERSION: u32 = 1;
/// Maximum number of clients. One more disconnects the client that has been silent longest.
const MAX_CLIENTS: usize = 32;
/// Message that has the helper process read the file again.
const RELOAD: &str = "{\"reload\":true}\n";

/// A request: one line from a client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) command: Command,
}

/// The daemon's own state, for replies.
#[derive(Debug, Default)]
struct DaemonInfo {
    /// The configuration file and the settings that the daemon was started with.
    about: Value,
    /// Names and descriptors of the listening sockets, for the next daemon.
    listeners: Vec<(String, OwnedFd)>,
}

impl DaemonInfo {
    fn listeners(&self) -> io::Result<(Vec<&str>, Vec<OwnedFd>)> {
        let names = self.listeners.iter().map(|(name, _)| name.as_str()).collect();
        let files = self.listeners.iter().map(|(_, fd)| fd.try_clone());
        Ok((names, files.collect::<io::Result<_>>()?))
    }
}

/// The control socket and its clients.
#[derive(Debug)]
pub struct Server {
    endpoint: Option<Endpoint>,
    /// The user ID that started the daemon; `--user` can have changed the daemon's own since.
    starter: u32,
    info: DaemonInfo,
    /// True once another daemon has taken over the ports for good.
    handover_committed: bool,
    /// The helper process, which reads the daemon's file and opens the descriptors of its ports.
    opener: Option<Client>,
    /// The clients; the one that has been silent longest comes first.
    clients: Vec<Client>,
    /// Number of the next client; 0 is the helper process.
    next: u32,
}

/// The event that the server waits for on a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientInterest {
    /// The next request.
    Request,
    /// Space in the send buffer for the rest of the reply.
    Room,
    /// None: the connection is closed.
    Nothing,
}

impl Server {
    /// Creates the control socket that `config` names, if any, with mode 0600; or uses `given`, the socket of
    /// another daemon. Clients can connect after [`start`](Self::start).
    ///
    /// # Errors
    /// The socket cannot be created; the error has the path and the fix.
    pub fn open(config: &Config, given: Option<OwnedFd>) -> Result<Self, StartError> {
        let open = |path: &Path| {
            let failed = |error: io::Error| {
                StartError::new(format!(
                    "cannot set up the control socket {}: {error}",
                    path.display()
                ))
            };
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
            info: DaemonInfo { about, listeners: Vec::new() },
            handover_committed: false,
            opener: None,
            clients: Vec::new(),
            next: 1,
        };
        if let Some(fd) = server.endpoint.as_ref().and_then(Endpoint::fd) {
            let duplicated = fd.try_clone_to_owned();
            let fd = duplicated.map_err(no_descriptor)?;
            server.pass_on("control", fd);
        }
        Ok(server)
    }

    /// Adds a listening socket to those that the next daemon gets.
    pub fn pass_on(&mut self, name: &str, listener: OwnedFd) {
        self.info.listeners.push((name.to_owned(), listener));
    }

    /// Replaces the socket whose name begins with `name` among those that the next daemon gets.
    pub fn pass_on_instead(&mut self, name: &str, listener: OwnedFd) {
        let mut listeners = self.info.listeners.iter_mut();
        if let Some((_, passed)) = listeners.find(|(passed, _)| passed.starts_with(name)) {
            *passed = listener;
        }
    }

    /// Returns the control socket, if there is one.
    pub fn endpoint(&mut self) -> Option<&mut Endpoint> {
        self.endpoint.as_mut()
    }

    /// Returns whether another daemon has taken over the ports for good.
    pub fn has_committed_handover(&self) -> bool {
        self.handover_committed
    }

    /// Sends the rest of the replies, as far as the clients read them.
    pub fn flush(&mut self, ports: &mut Ports) {
        let numbers: Vec<u32> = self.clients.iter().map(|client| client.number).collect();
        for number in numbers {
            self.serve(number, ports);
        }
    }

    /// Refuses a take-over in progress, because this daemon is about to stop all ports.
    pub fn refuse_successor(&mut self, ports: &Ports) {
        let refusal =
            failure("cannot-be-done", "the old daemon was told to stop during the take-over");
        for client in self.clients.iter_mut().filter(|client| client.has_ports(ports)) {
            let _ = client.stream.write_all(refusal.as_bytes());
        }
    }

    /// Makes this daemon the owner of the socket's file at `path`, which it removes at its end.
    pub fn own(&mut self, path: &Path) {
        self.endpoint.iter_mut().for_each(|endpoint| endpoint.own(path));
    }

    /// Keeps the socket's file, which another daemon owns now.
    pub fn leave(self) {
        if let Some(endpoint) = self.endpoint {
            endpoint.leave_to_successor();
        }
    }

    /// Removes the socket's file at the end of the process.
    pub fn end(self) {
        if let Some(endpoint) = self.endpoint {
            endpoint.end();
        }
    }

    /// Sets the connection to the helper process.
    pub fn serve_opener(&mut self, stream: UnixStream) {
        self.opener = Some(Client::new(0, stream));
    }

    /// Listens, so that clients can connect.
    ///
    /// # Errors
    /// listen(2) fails.
    pub fn start(&self) -> io::Result<()> {
        self.endpoint.as_ref().map_or(Ok(()), Endpoint::start)
    }

    /// Returns whether a client or the helper process can send requests.
    pub fn is_open(&self) -> bool {
        self.endpoint.is_some() || self.opener.is_some()
    }

    /// Returns the descriptor that becomes readable when a client connects.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.endpoint.as_ref().and_then(Endpoint::fd)
    }

    /// Returns the time of the next accept, if the last one failed.
    pub fn retry(&self) -> Option<Instant> {
        self.endpoint.as_ref().and_then(Endpoint::deadline)
    }

    /// Returns whether the daemon was started with a configuration file, which SIGHUP reloads.
    pub fn has_file(&self) -> bool {
        self.info.about["file"].is_string()
    }

    /// Returns the number and the socket of the helper process, if it runs.
    pub fn opener(&self) -> Option<(u32, &UnixStream)> {
        self.opener.as_ref().map(|opener| (opener.number, &opener.stream))
    }

    /// Queues the message that has the helper process read the file again. [`serve`](Self::serve) sends it to the
    /// client whose number is returned.
    pub fn ask_for_reload(&mut self) -> Option<u32> {
        self.queue_for_opener(RELOAD)
    }

    /// Queues the message that has the helper process start the ports `names` of the file; returns as
    /// [`ask_for_reload`](Self::ask_for_reload).
    pub fn ask_to_start(&mut self, names: &[String]) -> Option<u32> {
        self.queue_for_opener(&(json!({"start": names}).to_string() + "\n"))
    }

    fn queue_for_opener(&mut self, line: &str) -> Option<u32> {
        let opener = self.opener.as_mut()?;
        // One of several equal messages suffices.
        if !opener.output.ends_with(line.as_bytes()) {
            opener.output.extend(line.as_bytes());
        }
        Some(opener.number)
    }

    /// Queues the message that has the helper process open the TAP of `port` again, if a device of its name exists
    /// again; returns as [`ask_for_reload`](Self::ask_for_reload).
    pub fn ask_to_reopen_tap(&mut self, port: &str) -> Option<u32> {
        let opener = self.opener.as_mut()?;
        // A slow or stuck helper process gets one such message at a time.
        if opener.output.is_empty() {
            opener.output.extend((json!({"mend": port}).to_string() + "\n").into_bytes());
        }
        Some(opener.number)
    }

    /// Accepts a client, if one has connected. Returns its number and socket, and the number of the client that was
    /// disconnected for it, if any.
    pub fn accept(&mut self, ports: &mut Ports) -> Option<(u32, &UnixStream, Option<u32>)> {
        let stream = self.endpoint.as_mut()?.connection("control socket")?;
        if let Err(why) = self.check_peer(&stream) {
            info!("control socket: client refused: {why}");
            let mut stream = stream;
            let _ = stream.write_all(failure("not-allowed", &why).as_bytes());
            return None;
        }
        // Never the daemon that takes over the ports.
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
        Err(format!(
            "user {} may not use the control socket; be root or the daemon's user",
            peer.uid()
        ))
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

    /// Serves a client whose socket is readable or writable; returns the next event to wait for.
    pub fn serve(&mut self, number: u32, ports: &mut Ports) -> ClientInterest {
        let Some(mut client) = self.take(number) else { return ClientInterest::Nothing };
        match client.talk(ports, &self.info, &mut self.handover_committed) {
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
                    warn!(
                        "daemon: the helper process has exited: {error}; SIGHUP does nothing any more, \
                         use 'vhost-user-net ctl reload'"
                    );
                } else if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::Other)
                {
                    warn!("control socket: client disconnected: {error}");
                }
                ClientInterest::Nothing
            }
        }
    }
}

/// Parses a request.
///
/// # Errors
/// The line is no request, or has another [`VERSION`]; the error is the reply.
pub fn parse(line: &[u8]) -> Result<Command, String> {
    let request: Request =
        serde_json::from_slice(line).map_err(|error| failure("bad-request", &error.to_string()))?;
    if request.version != VERSION {
        let why = format!(
            "unsupported protocol version {}; this daemon speaks {VERSION}",
            request.version
        );
        return Err(failure("bad-version", &why));
    }
    Ok(request.command)
}

/// Returns the reply that refuses a request.
fn failure(kind: &str, message: &str) -> String {
    json!({"version": VERSION, "error": {"kind": kind, "message": message}}).to_string() + "\n"
}
