//! The control socket: operators ask what ports do, and change what may be changed while they run.
//!
//! One request a line, in JSON, and one line in reply. Whoever asks must be root or the daemon's own
//! user (SO_PEERCRED). A client can take little: lines are short, clients are few, and who does not
//! read its replies is not read from. Descriptors come with the blanks before a request.

pub mod client;
mod metrics;
mod record;
pub mod reload;
mod report;
mod requests;
pub mod scrape;
mod stats;

use std::fs;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use log::{info, warn};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::{Config, Frontend, MAX_QUEUE_PAIRS};
use crate::daemon::{Ports, StartError};
use crate::endpoint::Endpoint;
use crate::sys::socket::receive;

pub use requests::Command;
use requests::{Refused, carry_out};

/// Version of requests and replies: it changes when one that was good is not understood any more.
pub const VERSION: u32 = 1;
/// Longest request in bytes.
const MAX_LINE: usize = 16 << 10;
/// Clients at once; the one that has been silent for longest makes room.
const MAX_CLIENTS: usize = 32;
/// Descriptors with a request at the most: a port's frontend, and the queues of its TAP.
const MAX_FILES: usize = 1 + MAX_QUEUE_PAIRS as usize;
/// What the opener is told.
const RELOAD: &str = "{\"reload\":true}\n";

/// A line from a client.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    command: Command,
}

/// A client.
#[derive(Debug)]
struct Client {
    number: u32,
    stream: UnixStream,
    input: Vec<u8>,
    files: Vec<OwnedFd>,
    output: Vec<u8>,
}

impl Client {
    fn new(number: u32, stream: UnixStream) -> Self {
        Client { number, stream, input: Vec::new(), files: Vec::new(), output: Vec::new() }
    }
}

/// The socket, and those who are connected to it.
#[derive(Debug)]
pub struct Server {
    endpoint: Option<Endpoint>,
    /// The user that the daemon was started by, which may not be the one that it is now.
    starter: u32,
    /// How the daemon was started.
    about: Value,
    /// The process that reads the daemon's file, and opens what it names.
    opener: Option<Client>,
    /// Whoever has been silent for longest first.
    clients: Vec<Client>,
    next: u32,
}

/// What a client is to be waited on for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Its next request.
    Request,
    /// Room for the reply.
    Room,
    /// Nothing: it has gone.
    Nothing,
}

impl Server {
    /// Makes the socket that `config` names, if it does, to which only our own user can connect.
    /// Nobody can before [`start`](Self::start).
    ///
    /// # Errors
    /// With the path, what is wrong, and the way out.
    pub fn open(config: &Config) -> Result<Self, StartError> {
        let open = |path: &Path| {
            let endpoint = Endpoint::open(&Frontend::Listen(path.to_owned()), None)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|error| {
                StartError::new(format!("set the permissions of {}: {error}", path.display()))
            })?;
            Ok(endpoint)
        };
        Ok(Server {
            endpoint: config.control.as_deref().map(open).transpose()?,
            starter: geteuid().as_raw(),
            about: json!({"file": config.file, "settings": config.settings()}),
            opener: None,
            clients: Vec::new(),
            next: 1,
        })
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

    /// The opener's number and socket, if there is one.
    pub fn opener(&self) -> Option<(u32, &UnixStream)> {
        self.opener.as_ref().map(|opener| (opener.number, &opener.stream))
    }

    /// Has the opener read the file again, as soon as it is [served](Self::serve).
    pub fn ask_for_reload(&mut self) -> Option<u32> {
        let opener = self.opener.as_mut()?;
        // Once is enough, however often it is asked for.
        if !opener.output.ends_with(RELOAD.as_bytes()) {
            opener.output.extend(RELOAD.as_bytes());
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
    pub fn accept(&mut self) -> Option<(u32, &UnixStream, Option<u32>)> {
        let stream = self.endpoint.as_mut()?.connection()?;
        if let Err(why) = self.check_peer(&stream) {
            info!("control socket: a client is turned away: {why}");
            let mut stream = stream;
            let _ = stream.write_all(failure("not-allowed", &why).as_bytes());
            return None;
        }
        let gone = (self.clients.len() >= MAX_CLIENTS).then(|| self.clients.remove(0).number);
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
    pub fn hang_up(&mut self, number: u32) {
        drop(self.take(number));
    }

    fn take(&mut self, number: u32) -> Option<Client> {
        if let Some(opener) = self.opener.take_if(|opener| opener.number == number) {
            return Some(opener);
        }
        let place = self.clients.iter().position(|client| client.number == number)?;
        Some(self.clients.remove(place))
    }

    /// Serves a client that can be read from, or written to.
    pub fn serve(&mut self, number: u32, ports: &mut Ports) -> Wanted {
        let Some(mut client) = self.take(number) else { return Wanted::Nothing };
        match talk(&mut client, ports, &self.about) {
            Ok(()) => {
                let wanted = if client.output.is_empty() { Wanted::Request } else { Wanted::Room };
                if number == 0 {
                    self.opener = Some(client);
                } else {
                    self.clients.push(client);
                }
                wanted
            }
            Err(error) => {
                if number == 0 {
                    warn!("the process that reads the file again has ended: {error}");
                } else if error.kind() == io::ErrorKind::InvalidData {
                    warn!("control socket: a client is disconnected: {error}");
                }
                Wanted::Nothing
            }
        }
    }
}

/// Writes what is left of the last reply; then reads, and answers one request after the other.
fn talk(client: &mut Client, ports: &mut Ports, about: &Value) -> io::Result<()> {
    if client.output.is_empty() && !client.input.contains(&b'\n') {
        let mut bytes = [0; 4096];
        match receive(&client.stream, &mut bytes) {
            Ok(received) if received.bytes == 0 => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(received) => {
                client.input.extend(&bytes[..received.bytes]);
                client.files.extend(received.files.into_iter().map(OwnedFd::from));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    loop {
        while !client.output.is_empty() {
            match client.stream.write(&client.output) {
                Ok(written) => drop(client.output.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let Some(end) = client.input.iter().position(|byte| *byte == b'\n') else { break };
        let line: Vec<u8> = client.input.drain(..=end).collect();
        let files = std::mem::take(&mut client.files);
        client.output = answer(&line[..end], files, ports, about).into_bytes();
    }
    let too_much = if client.input.len() > MAX_LINE {
        format!("a request has more than {MAX_LINE} bytes")
    } else if client.files.len() > MAX_FILES {
        format!("a request has more than {MAX_FILES} descriptors")
    } else {
        return Ok(());
    };
    let _ = client.stream.write_all(failure("bad-request", &too_much).as_bytes());
    Err(io::Error::new(io::ErrorKind::InvalidData, too_much))
}

/// The reply to a request, as a line.
fn answer(line: &[u8], files: Vec<OwnedFd>, ports: &mut Ports, about: &Value) -> String {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return failure("bad-request", &error.to_string()),
    };
    if request.version != VERSION {
        let why = format!("version {} is not spoken here, but {VERSION}", request.version);
        return failure("bad-version", &why);
    }
    match carry_out(request.command, files, ports, about) {
        Ok(value) => json!({"version": VERSION, "ok": value}).to_string() + "\n",
        Err(Refused { kind, message }) => failure(kind, &message),
    }
}

fn failure(kind: &str, message: &str) -> String {
    json!({"version": VERSION, "error": {"kind": kind, "message": message}}).to_string() + "\n"
}
