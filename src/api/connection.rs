//! A client's connection to the control socket: reading its requests, and answering one after the other.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use log::warn;
use serde_json::json;

use super::requests::{Answer, Refused, carry_out};
use super::{Command, DaemonInfo, VERSION, failure, parse};
use crate::net_config::MAX_QUEUE_PAIRS;
use crate::ports::{Ports, too_late};
use crate::sys::socket::{MAX_DESCRIPTORS, receive, send_with_files};

/// Maximum length of a request in bytes.
const MAX_LINE: usize = 16 << 10;
/// Maximum number of descriptors with a request: a port's frontend, and the queues of its TAP.
const MAX_FILES: usize = 1 + MAX_QUEUE_PAIRS as usize;

/// A client of the control socket.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) number: u32,
    pub(super) stream: UnixStream,
    input: Vec<u8>,
    files: Vec<OwnedFd>,
    pub(super) output: Vec<u8>,
    /// The deadline of the hand-over that this client has asked for last, which identifies that hand-over.
    handover: Option<Instant>,
    /// Names of the ports whose traffic is counted for this client.
    counting: BTreeSet<String>,
}

impl Client {
    pub(super) fn new(number: u32, stream: UnixStream) -> Self {
        let (input, files, output, counting) = Default::default();
        Client { number, stream, input, files, output, handover: None, counting }
    }

    /// Returns whether this client has the daemon's ports, which resume when it disconnects.
    pub(super) fn has_ports(&self, ports: &Ports) -> bool {
        self.handover.is_some() && self.handover == ports.handover_deadline()
    }

    /// Ends the hand-over and the counts that this client has asked for.
    pub(super) fn leave(&self, ports: &mut Ports) {
        if self.has_ports(ports) {
            ports.abort_handover("the other daemon has gone");
        }
        let counted = self.counting.iter().filter_map(|name| ports.find(name).ok());
        for port in counted {
            // If the port does not answer, the next client's request ends the count.
            let _ = port.count_traffic(false);
        }
    }

    /// Sends the rest of the last reply; then reads, and answers the requests one after the other.
    ///
    /// # Errors
    /// The client has disconnected, or has sent too much.
    pub(super) fn talk(
        &mut self,
        ports: &mut Ports,
        info: &DaemonInfo,
        handover_committed: &mut bool,
    ) -> io::Result<()> {
        if self.output.is_empty() && !self.input.contains(&b'\n') {
            self.receive()?;
        }
        while self.send()? {
            let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else {
                return self.check_size();
            };
            let line: Vec<u8> = self.input.drain(..=end).collect();
            let files = std::mem::take(&mut self.files);
            let answer = parse(&line[..end])
                .map(|command| self.answer(command, files, ports, info, handover_committed));
            self.output = match answer {
                Ok(Ok(Answer { value, files })) => {
                    self.pass(&files)?;
                    (json!({"version": VERSION, "ok": value}).to_string() + "\n").into_bytes()
                }
                Ok(Err(Refused { kind, message })) => failure(kind, &message).into_bytes(),
                Err(failure) => failure.into_bytes(),
            };
        }
        Ok(())
    }

    /// Reads the bytes and descriptors that have arrived.
    fn receive(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        match receive(&self.stream, &mut bytes, MAX_DESCRIPTORS) {
            Ok(received) if received.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => {
                self.input.extend(&bytes[..received.bytes]);
                self.files.extend(received.files.into_iter().map(OwnedFd::from));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            // Only blanks came with the descriptors. The request is refused, since it lacks them.
            Err(error) if error.kind() == io::ErrorKind::Other && self.number == 0 => {
                warn!("daemon: the helper process cannot pass descriptors: {error}");
                Ok(())
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::Other {
                    let why = failure("cannot-be-done", &error.to_string());
                    let _ = self.stream.write_all(why.as_bytes());
                }
                Err(error)
            }
        }
    }

    /// Sends the reply; returns false if the client must read first.
    fn send(&mut self) -> io::Result<bool> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(written) => drop(self.output.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Sends the descriptors of a reply.
    fn pass(&self, files: &[OwnedFd]) -> io::Result<()> {
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        // Each message takes 1 KiB of the socket's buffer, which holds 200. The buffer is full only if the client has
        // not read earlier replies.
        send_with_files(&self.stream, &[], &files, b' ')
            .map_err(|error| io::Error::other(format!("cannot pass descriptors: {error}")))
    }

    /// Refuses a request that exceeds the maximum length or number of descriptors.
    fn check_size(&mut self) -> io::Result<()> {
        let too_much = if self.input.len() > MAX_LINE {
            format!("a request has more than {MAX_LINE} bytes")
        } else if self.files.len() > MAX_FILES {
            format!("a request has more than {MAX_FILES} descriptors")
        } else {
            return Ok(());
        };
        let _ = self.stream.write_all(failure("bad-request", &too_much).as_bytes());
        Err(io::Error::new(io::ErrorKind::InvalidData, too_much))
    }

    /// Carries out a request if this client may make it, and records the hand-over or count that it starts.
    fn answer(
        &mut self,
        command: Command,
        files: Vec<OwnedFd>,
        ports: &mut Ports,
        info: &DaemonInfo,
        handover_committed: &mut bool,
    ) -> Result<Answer, Refused> {
        let bad = |message: &str| Refused { kind: "bad-request", message: message.into() };
        if !command.only_asks() {
            ports.check_present()?;
        }
        match &command {
            Command::LetGo {} if self.handover.is_none() => {
                return Err(bad("no hand-over was requested"));
            }
            Command::LetGo {} if !self.has_ports(ports) => return Err(too_late().into()),
            Command::Traffic { port } if self.counting.insert(port.clone()) => {
                if let Err(refusal) = ports.find(port).and_then(|it| it.count_traffic(true)) {
                    self.counting.remove(port);
                    return Err(refusal.into());
                }
            }
            _ => {}
        }
        let takes = matches!(command, Command::HandOver {});
        let lets_go = matches!(command, Command::LetGo {});
        let answer = carry_out(command, files, ports, info)?;
        if takes {
            self.handover = ports.handover_deadline();
        }
        *handover_committed |= lets_go;
        Ok(answer)
    }
}
