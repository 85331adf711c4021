//! The control socket: operators ask what ports do, and change what may be changed while they run.
//!
//! One request a line, in JSON, and one line in reply. Whoever asks must be root or the daemon's own
//! user (SO_PEERCRED). A client can take little: lines are short, clients are few, and who does not
//! read its replies is not read from.

pub mod client;
mod metrics;
mod report;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use log::{info, warn};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Frontend;
use crate::daemon::StartError;
use crate::endpoint::Endpoint;
use crate::policy::Limit;
use crate::status::PortStatus;

/// Version of requests and replies: it changes when one that was good is not understood any more.
pub const VERSION: u32 = 1;
/// Longest request in bytes.
const MAX_LINE: usize = 16 << 10;
/// Clients at once; the one that has been silent for longest makes room.
const MAX_CLIENTS: usize = 32;

/// What may be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// List the ports, a line each.
    List {},
    /// Say how a port is, in words, and what it has counted.
    Show {
        /// The port's name.
        port: String,
    },
    /// Print what all ports have counted for Prometheus (as for node_exporter's textfile collector).
    Metrics {},
    /// Change a port while it runs, until the daemon's end.
    Set {
        /// The port's name.
        port: String,
        /// How much the guest may send.
        #[arg(long, value_name = "RATE")]
        #[serde(default)]
        tx_limit: Option<Limit>,
        /// How much the guest may be given.
        #[arg(long, value_name = "RATE")]
        #[serde(default)]
        rx_limit: Option<Limit>,
    },
}

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
    output: Vec<u8>,
}

/// The socket, and those who are connected to it.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    ports: Vec<Arc<PortStatus>>,
    /// The user that the daemon was started by, which may not be the one that it is now.
    starter: u32,
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
    /// Makes the socket, to which only our own user can connect. Nobody can before
    /// [`start`](Self::start).
    ///
    /// # Errors
    /// With the path, what is wrong, and the way out.
    pub fn open(path: &Path) -> Result<Self, StartError> {
        let endpoint = Endpoint::open(&Frontend::Listen(path.to_owned()), None)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|error| {
            StartError::new(format!("set the permissions of {}: {error}", path.display()))
        })?;
        let (ports, clients) = (Vec::new(), Vec::new());
        Ok(Server { endpoint, ports, starter: geteuid().as_raw(), clients, next: 0 })
    }

    /// Lets clients connect, and ask about these ports.
    ///
    /// # Errors
    /// Those of `listen`.
    pub fn start(&mut self, ports: Vec<Arc<PortStatus>>) -> io::Result<()> {
        self.ports = ports;
        self.endpoint.start()
    }

    /// Becomes readable when somebody connects.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.endpoint.fd()
    }

    /// Takes a client, if one has connected: its number and its socket, and the number of one that
    /// had to go for it.
    pub fn accept(&mut self) -> Option<(u32, &UnixStream, Option<u32>)> {
        let stream = self.endpoint.connection()?;
        if let Err(why) = self.check_peer(&stream) {
            info!("control socket: a client is turned away: {why}");
            let mut stream = stream;
            let _ = stream.write_all(failure("not-allowed", &why).as_bytes());
            return None;
        }
        let gone = (self.clients.len() >= MAX_CLIENTS).then(|| self.clients.remove(0).number);
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.clients.push(Client { number, stream, input: Vec::new(), output: Vec::new() });
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
        self.clients.retain(|client| client.number != number);
    }

    /// Serves a client that can be read from, or written to.
    pub fn serve(&mut self, number: u32) -> Wanted {
        let Some(place) = self.clients.iter().position(|client| client.number == number) else {
            return Wanted::Nothing;
        };
        let mut client = self.clients.remove(place);
        match self.talk(&mut client) {
            Ok(()) => {
                let wanted = if client.output.is_empty() { Wanted::Request } else { Wanted::Room };
                self.clients.push(client);
                wanted
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidData {
                    warn!("control socket: a client is disconnected: {error}");
                }
                Wanted::Nothing
            }
        }
    }

    /// Writes what is left of the last reply; then reads, and answers one request.
    fn talk(&self, client: &mut Client) -> io::Result<()> {
        if client.output.is_empty() && !client.input.contains(&b'\n') {
            let mut bytes = [0; 4096];
            match client.stream.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => client.input.extend(&bytes[..length]),
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
            client.output = self.answer(&line[..end]).into_bytes();
        }
        if client.input.len() > MAX_LINE {
            let why = format!("a request has more than {MAX_LINE} bytes");
            let _ = client.stream.write_all(failure("bad-request", &why).as_bytes());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(())
    }

    /// The reply to a request, as a line.
    fn answer(&self, line: &[u8]) -> String {
        let request: Request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => return failure("bad-request", &error.to_string()),
        };
        if request.version != VERSION {
            let why = format!("version {} is not spoken here, but {VERSION}", request.version);
            return failure("bad-version", &why);
        }
        match self.carry_out(&request.command) {
            Ok(value) => json!({"version": VERSION, "ok": value}).to_string() + "\n",
            Err(why) => failure("no-such-port", &why),
        }
    }

    fn carry_out(&self, command: &Command) -> Result<Value, String> {
        match command {
            Command::List {} => {
                Ok(self.ports.iter().map(|port| json!(report::summary(port))).collect())
            }
            Command::Show { port } => Ok(json!(report::full(self.find(port)?))),
            Command::Metrics {} => Ok(json!(metrics::text(&self.ports))),
            Command::Set { port, tx_limit, rx_limit } => {
                let port = self.find(port)?;
                let limits = &port.limits;
                for (way, limiter, limit) in
                    [("tx", &limits.tx, tx_limit), ("rx", &limits.rx, rx_limit)]
                {
                    if let Some(limit) = limit {
                        info!("{}: {way} limit {limit}, by the control socket", port.name);
                        limiter.set(limit);
                    }
                }
                Ok(json!(report::summary(port)))
            }
        }
    }

    fn find(&self, name: &str) -> Result<&PortStatus, String> {
        let found = self.ports.iter().find(|port| port.name == name);
        let shown: String = name.chars().take(64).collect();
        found.map(Arc::as_ref).ok_or_else(|| format!("there is no port {shown:?}"))
    }
}

fn failure(kind: &str, message: &str) -> String {
    json!({"version": VERSION, "error": {"kind": kind, "message": message}}).to_string() + "\n"
}
