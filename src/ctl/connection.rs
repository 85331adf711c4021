//! A connection to a daemon's control socket: requests, replies, and the daemon's requests to its helper
//! process.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::api::requests::Command;
use crate::api::{Request, VERSION};
use crate::sys::socket::{MAX_DESCRIPTORS, receive, send_with_files};

/// Time within which a daemon must reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest reply in bytes.
const MAX_REPLY: u64 = 64 << 20;

/// The reason why a request failed, as one line for people.
#[derive(Debug)]
pub enum Failure {
    /// No daemon can be reached.
    Unreachable(String),
    /// The daemon closed the connection without a reply, as when it died.
    Gone(String),
    /// The daemon refused the request.
    Refused(String),
    /// The request requires that the port is restarted.
    NeedsRestart(String),
}

impl Failure {
    /// Exit status of `ctl`: 1 if the daemon refused, 3 if it cannot be asked.
    pub fn exit_status(&self) -> u8 {
        match self {
            Failure::Refused(_) | Failure::NeedsRestart(_) => 1,
            Failure::Unreachable(_) | Failure::Gone(_) => 3,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Unreachable(why)
        | Failure::Gone(why)
        | Failure::Refused(why)
        | Failure::NeedsRestart(why)) = self;
        f.write_str(why)
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// The daemon's address, for messages.
    daemon: String,
    /// Requests of the daemon that arrived before an awaited reply.
    helper_requests: VecDeque<HelperRequest>,
}

/// A request of a daemon to its helper process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelperRequest {
    /// Read the file again.
    Reload,
    /// Start ports of the file, by name.
    Start(Vec<String>),
    /// Open a port's TAP again, if it exists again.
    ReopenTap(String),
}

impl HelperRequest {
    fn parse(line: &Value) -> Option<Self> {
        if line["reload"] == true {
            return Some(HelperRequest::Reload);
        }
        if let Ok(names) = serde_json::from_value(line["start"].clone()) {
            return Some(HelperRequest::Start(names));
        }
        line["mend"].as_str().map(|port| HelperRequest::ReopenTap(port.to_owned()))
    }
}

impl Connection {
    /// Wraps a connected socket; `daemon` is its address, for messages.
    pub fn new(stream: UnixStream, daemon: String) -> Self {
        Connection { reader: BufReader::new(stream), daemon, helper_requests: VecDeque::new() }
    }

    fn unreachable(&self, error: impl Into<io::Error>) -> Failure {
        let error = error.into();
        let why = format!("cannot reach the daemon at {}: {error}", self.daemon);
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Failure::Gone(why),
            _ => Failure::Unreachable(why),
        }
    }

    /// Sends a request, with descriptors.
    fn send(&self, command: &Command, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let request = Request { version: VERSION, command: command.clone() };
        let line = serde_json::to_string(&request)? + "\n";
        let stream = self.reader.get_ref();
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        send_with_files(stream, line.as_bytes(), files, b' ')
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        (&mut self.reader).take(MAX_REPLY).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Waits for the daemon's next request to its helper process; `None` once the daemon has closed the
    /// connection.
    ///
    /// # Errors
    /// Reading fails, or a line is no message.
    pub fn helper_request(&mut self) -> io::Result<Option<HelperRequest>> {
        self.reader.get_ref().set_read_timeout(None)?;
        loop {
            if let Some(request) = self.helper_requests.pop_front() {
                return Ok(Some(request));
            }
            match self.line() {
                Ok(line) => self.helper_requests.extend(HelperRequest::parse(&line)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a request with descriptors and waits for the reply.
    ///
    /// # Errors
    /// The daemon cannot be reached, or refuses.
    pub fn ask(&mut self, command: &Command, files: &[BorrowedFd<'_>]) -> Result<Value, Failure> {
        // A daemon that refuses the client sends the reason and closes. So the reply is read even if sending failed.
        let sent = self.send(command, files);
        let reply = loop {
            match self.line() {
                Ok(line) => match HelperRequest::parse(&line) {
                    Some(request) if self.helper_requests.contains(&request) => {}
                    Some(request) => self.helper_requests.push_back(request),
                    None => break line,
                },
                Err(error) => {
                    let error = sent.err().unwrap_or(error);
                    return Err(self.unreachable(error));
                }
            }
        };
        result(&reply)
    }

    /// Sends a request and waits for a reply with descriptors.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn ask_for_files(&mut self, command: &Command) -> Result<(Value, Vec<OwnedFd>), Failure> {
        let stream = self.reader.get_ref();
        let exchange = || -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
            let (mut bytes, mut files) = (Vec::new(), Vec::new());
            self.send(command, &[])?;
            let mut buffer = vec![0; 64 << 10];
            while bytes.last() != Some(&b'\n') {
                let received = match receive(stream, &mut buffer, MAX_DESCRIPTORS) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    received => received?,
                };
                if received.bytes == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                bytes.extend(&buffer[..received.bytes]);
                files.extend(received.files.into_iter().map(OwnedFd::from));
            }
            Ok((bytes, files))
        };
        let (bytes, files) = exchange().map_err(|error| self.unreachable(error))?;
        let reply: Value =
            serde_json::from_slice(&bytes).map_err(|error| self.unreachable(error))?;
        result(&reply).map(|value| (value, files))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.get_ref().as_fd()
    }
}

/// Returns the value of a reply.
fn result(reply: &Value) -> Result<Value, Failure> {
    let Some(error) = reply.get("error") else { return Ok(reply["ok"].clone()) };
    let message = error["message"].as_str().unwrap_or("it gives no reason").to_owned();
    Err(match error["kind"].as_str() {
        Some("needs-restart") => Failure::NeedsRestart(message),
        _ => Failure::Refused(message),
    })
}
