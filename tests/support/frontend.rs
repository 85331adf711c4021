//! A frontend that sends any vhost-user message, valid or invalid, whole or byte by byte.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::SOON;
use super::guest::{FRONTEND_BASE, Ram};

pub(crate) const NEED_REPLY: u32 = 8;

const MQ: u64 = 1;
const REPLY_ACK: u64 = 1 << 3;

/// Protocol features: MQ, LOG_SHMFD, RARP, REPLY_ACK, MTU, BACKEND_REQ, CONFIG,
/// INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS, DEVICE_STATE.
pub(crate) const PROTOCOL_FEATURES: u64 = 1
    | 1 << 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 19;

/// A connection to the daemon.
#[derive(Debug)]
pub(crate) struct Frontend {
    pub(crate) stream: UnixStream,
    /// Features that another backend offers. `None` for our daemon, which must offer all.
    offered: Option<u64>,
}

/// Builds a message's header.
pub(crate) fn header(code: u32, flags: u32, size: usize) -> Vec<u8> {
    [code, flags, size as u32].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Builds the `VhostUserMemoryRegion` of `ram`.
pub(crate) fn region(ram: &Ram) -> Vec<u8> {
    [ram.base, ram.size, FRONTEND_BASE + ram.base, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

pub(crate) fn pair(index: u32, value: u32) -> Vec<u8> {
    [index, value].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

impl Frontend {
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Frontend { stream, offered: None }
    }

    /// Creates a frontend for any backend, which may offer fewer features than the daemon.
    #[allow(dead_code)]
    pub(crate) fn of_any(stream: UnixStream) -> Self {
        Frontend { offered: Some(u64::MAX), ..Self::new(stream) }
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn send_with(&mut self, code: FrontendReq, flags: u32, payload: &[u8], fds: &[i32]) {
        let mut bytes = header(code.into(), 1 | flags, payload.len());
        bytes.extend(payload);
        if fds.is_empty() {
            self.send_raw(&bytes);
        } else {
            let sent = loop {
                match self.stream.send_with_fds(&[&bytes[..]], fds) {
                    Err(error) if error.errno() == Errno::EINTR as i32 => {}
                    sent => break sent.unwrap(),
                }
            };
            assert_eq!(sent, bytes.len());
        }
    }

    pub(crate) fn send(&mut self, code: FrontendReq, payload: &[u8]) {
        self.send_with(code, 0, payload, &[]);
    }

    /// Reads a reply. Returns its payload, or nothing if the connection was closed.
    pub(crate) fn try_reply(&mut self, code: FrontendReq) -> Option<Vec<u8>> {
        let mut head = [0; 12];
        if self.stream.read_exact(&mut head).is_err() {
            return None;
        }
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), u32::from(code), "the reply is to another request");
        assert_eq!(word(4), 5, "a reply has version 1 and the reply flag");
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some(payload)
    }

    pub(crate) fn reply(&mut self, code: FrontendReq) -> Vec<u8> {
        self.try_reply(code).unwrap_or_else(|| panic!("no reply to {code:?}"))
    }

    /// Sends a request whose reply is a number.
    pub(crate) fn get(&mut self, code: FrontendReq) -> u64 {
        self.send(code, &[]);
        u64::from_ne_bytes(self.reply(code).try_into().unwrap())
    }

    /// Sends a request with NEED_REPLY. Reports whether it succeeded; `None` if the connection was closed.
    pub(crate) fn try_ask(
        &mut self,
        code: FrontendReq,
        payload: &[u8],
        fds: &[i32],
    ) -> Option<bool> {
        self.send_with(code, NEED_REPLY, payload, fds);
        self.try_reply(code).map(|reply| u64::from_ne_bytes(reply.try_into().unwrap()) == 0)
    }

    #[track_caller]
    pub(crate) fn ask(&mut self, code: FrontendReq, payload: &[u8], fds: &[i32]) {
        assert_eq!(self.try_ask(code, payload, fds), Some(true), "{code:?}");
    }

    #[track_caller]
    pub(crate) fn refused(&mut self, code: FrontendReq, payload: &[u8], fds: &[i32]) {
        assert_eq!(self.try_ask(code, payload, fds), Some(false), "{code:?}");
    }

    pub(crate) fn event(&mut self, code: FrontendReq, index: u32, event: Option<&EventFd>) {
        match event {
            Some(event) => self.ask(code, &u64::from(index).to_ne_bytes(), &[event.as_raw_fd()]),
            None => self.ask(code, &(u64::from(index) | 0x100).to_ne_bytes(), &[]),
        }
    }

    /// Negotiates protocol features and sets the owner, as every frontend does first. Returns the offered
    /// features.
    pub(crate) fn begin(&mut self) -> u64 {
        let offered = self.get(FrontendReq::GET_FEATURES);
        let mut protocol = self.get(FrontendReq::GET_PROTOCOL_FEATURES);
        if let Some(theirs) = &mut self.offered {
            *theirs = offered;
            protocol &= MQ | REPLY_ACK;
            assert_eq!(protocol & REPLY_ACK, REPLY_ACK, "it answers what it is asked");
        } else {
            assert_eq!(protocol, PROTOCOL_FEATURES);
        }
        self.send(FrontendReq::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes());
        self.ask(FrontendReq::SET_OWNER, &[], &[]);
        offered
    }

    /// Sets those of `features` that the backend offers, and returns them.
    pub(crate) fn set_features(&mut self, features: u64) -> u64 {
        let features = features & self.offered.unwrap_or(u64::MAX);
        self.ask(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[]);
        features
    }

    pub(crate) fn set_mem_table(&mut self, rams: &[&Ram]) {
        let mut payload = pair(rams.len() as u32, 0);
        rams.iter().for_each(|ram| payload.extend(region(ram)));
        let fds: Vec<i32> = rams.iter().map(|ram| ram.file.as_raw_fd()).collect();
        self.ask(FrontendReq::SET_MEM_TABLE, &payload, &fds);
    }

    /// Asks for an inflight buffer. Returns its length and its file.
    pub(crate) fn get_inflight_fd(&mut self, rings: u16, size: u16) -> Option<(u64, File)> {
        self.send(FrontendReq::GET_INFLIGHT_FD, &inflight(0, 0, rings, size));
        let mut reply = [0; 64];
        let (length, file) = self.stream.recv_with_fd(&mut reply).ok()?;
        assert!(length == 0 || length == 12 + 24, "{length} bytes");
        Some((u64::from_ne_bytes(reply[12..20].try_into().unwrap()), file?))
    }

    /// Sends a dirty log, without waiting for the reply.
    pub(crate) fn try_set_log_base(&mut self, size: u64, offset: u64, file: &File) {
        let place: Vec<u8> = [size, offset].iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.send_with(FrontendReq::SET_LOG_BASE, 0, &place, &[file.as_raw_fd()]);
    }

    /// Sends a dirty log. Reports whether the daemon accepted it.
    pub(crate) fn set_log_base(&mut self, size: u64, offset: u64, file: &File) -> bool {
        self.try_set_log_base(size, offset, file);
        let reply = self.reply(FrontendReq::SET_LOG_BASE);
        reply == [size, offset].map(u64::to_ne_bytes).concat()
    }

    /// Sends a dirty log. Reports whether the daemon accepted it, or else closed the connection.
    pub(crate) fn set_log_base_or_close(&mut self, size: u64, file: &File) -> bool {
        self.try_set_log_base(size, 0, file);
        self.try_reply(FrontendReq::SET_LOG_BASE).is_some()
    }

    pub(crate) fn add_mem_reg(&mut self, ram: &Ram) {
        let mut payload = vec![0; 8];
        payload.extend(region(ram));
        self.ask(FrontendReq::ADD_MEM_REG, &payload, &[ram.file.as_raw_fd()]);
    }

    pub(crate) fn enable(&mut self, index: u32, enable: bool) {
        self.ask(FrontendReq::SET_VRING_ENABLE, &pair(index, enable.into()), &[]);
    }

    /// Stops a ring with GET_VRING_BASE. Returns its base.
    pub(crate) fn get_vring_base(&mut self, index: u32) -> u32 {
        self.send(FrontendReq::GET_VRING_BASE, &pair(index, 0));
        let reply = self.reply(FrontendReq::GET_VRING_BASE);
        assert_eq!(reply[..4], index.to_ne_bytes());
        u32::from_ne_bytes(reply[4..8].try_into().unwrap())
    }

    /// Reports whether the daemon has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 64]), Ok(0) | Err(_))
    }
}

/// Builds a `VhostUserInflight`.
pub(crate) fn inflight(length: u64, offset: u64, rings: u16, size: u16) -> Vec<u8> {
    let place = [length, offset].map(u64::to_ne_bytes).concat();
    [place, [rings, size].map(u16::to_ne_bytes).concat(), vec![0; 4]].concat()
}

/// Builds the payload of SET_VRING_ADDR from guest addresses.
pub(crate) fn addresses(
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    avail: u64,
) -> Vec<u8> {
    let mut payload = pair(index, flags);
    for address in [FRONTEND_BASE + descriptors, FRONTEND_BASE + used, FRONTEND_BASE + avail, 0] {
        payload.extend(address.to_ne_bytes());
    }
    payload
}

/// Opens a descriptor that is no eventfd.
pub(crate) fn dev_null() -> File {
    File::open("/dev/null").unwrap()
}
