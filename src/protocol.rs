//! vhost-user messages: framing, and one enum value per request.
//!
//! Knows no device. Invariant: whatever the frontend sends, and however slowly, nothing here
//! waits for it; a message is handed out only when it is whole, has the length its request must
//! have, and came with the descriptors that belong to it. Structures and numbers are those of
//! `vhost::vhost_user::message`.

mod connection;
mod replay;

use std::fmt;
use std::fs::File;

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VHOST_USER_CONFIG_SIZE};

use crate::guest::RegionRequest;

pub use connection::{Connection, Event};
pub use replay::{ReplayMessage, can_be_passed};

/// Length in bytes of a message's header: request, flags, payload size.
pub const HEADER_LENGTH: usize = 12;
/// Longest payload in bytes that any request may have.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// Regions of one SET_MEM_TABLE (the specification's VHOST_USER_MAX_RAM_SLOTS of old).
pub const MAX_TABLE_REGIONS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;
const RESERVED: u32 = !0xf;

/// Bit of a SET_VRING_KICK, CALL or ERR payload that says that no descriptor comes with it.
const NO_DESCRIPTOR: u64 = 0x100;
const VRING_INDEX_MASK: u64 = 0xff;

/// Why the connection has to be closed: what came is no vhost-user.
#[derive(Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The header's version or reserved flags are wrong, or it claims to be a reply.
    Flags(u32),
    /// There is no such request.
    UnknownRequest(u32),
    /// The payload is longer than any may be.
    TooLong(u32),
    /// The payload's size is not the request's.
    Size {
        /// Name of the request.
        request: FrontendReq,
        /// Payload size in bytes.
        size: usize,
    },
    /// More or fewer descriptors came than belong to the request.
    Descriptors {
        /// Name of the request.
        request: FrontendReq,
        /// How many came.
        count: usize,
    },
    /// A field of the payload has a value that the specification does not have.
    Value {
        /// Name of the request.
        request: FrontendReq,
        /// What is wrong.
        what: &'static str,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Flags(flags) => write!(f, "header flags {flags:#x} are not allowed"),
            ProtocolError::UnknownRequest(code) => write!(f, "there is no request {code}"),
            ProtocolError::TooLong(size) => write!(f, "a payload of {size} bytes is too long"),
            ProtocolError::Size { request, size } => {
                write!(f, "{request:?} with a payload of {size} bytes")
            }
            ProtocolError::Descriptors { request, count } => {
                write!(f, "{request:?} with {count} descriptors")
            }
            ProtocolError::Value { request, what } => write!(f, "{request:?}: {what}"),
        }
    }
}

impl std::error::Error for ProtocolError {}

/// Where a ring lies, in the frontend's addresses (SET_VRING_ADDR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// Bit 0: log writes to the ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Avail ring.
    pub avail: u64,
}

/// A request of the frontend's, by the specification's names.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionRequest, File)>),
    SetVringNum {
        index: u32,
        size: u32,
    },
    SetVringAddr {
        index: u32,
        addresses: VringAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        file: Option<File>,
    },
    SetVringCall {
        index: u32,
        file: Option<File>,
    },
    SetVringErr {
        index: u32,
        file: Option<File>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    NetSetMtu(u64),
    SetBackendReqFd(File),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionRequest, File),
    RemMemReg(RegionRequest),
    SetStatus(u64),
    GetStatus,
    SetLogBase {
        size: u64,
        offset: u64,
        file: File,
    },
    GetInflightFd {
        rings: u16,
        size: u16,
    },
    SetInflightFd {
        length: u64,
        offset: u64,
        rings: u16,
        size: u16,
        file: File,
    },
    SetDeviceStateFd {
        /// The state comes, or else it is to be sent.
        load: bool,
        file: File,
    },
    CheckDeviceState,
    /// The address of a card that has moved here.
    SendRarp([u8; 6]),
    /// A request that exists but belongs to a protocol feature that is not offered.
    Unsupported(FrontendReq),
}

/// A whole message of the frontend's.
#[derive(Debug)]
pub struct Message {
    /// What it asks for.
    pub request: Request,
    /// Its number.
    pub code: FrontendReq,
    /// Whether the frontend wants to hear of success or failure.
    pub need_reply: bool,
}

/// A reply's payload.
#[derive(Debug)]
pub enum Reply {
    /// One 64-bit number.
    U64(u64),
    /// `VhostUserLog` of a dirty log that was taken: cloud-hypervisor waits for all of it, QEMU takes a
    /// reply of any length.
    Log {
        /// The log's length in bytes.
        size: u64,
        /// Where it starts in its file.
        offset: u64,
    },
    /// Index and number of a ring.
    VringState {
        /// The ring.
        index: u32,
        /// The number asked for.
        num: u32,
    },
    /// Bytes of the configuration space; none says that they could not be read.
    Config {
        /// First byte.
        offset: u32,
        /// The request's flags.
        flags: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// An inflight buffer.
    Inflight {
        /// Its length in bytes.
        length: u64,
        /// Rings that it is for.
        rings: u16,
        /// Descriptors of each at the most.
        size: u16,
        /// Its memory.
        file: File,
    },
}

impl Reply {
    /// The descriptor that goes with it, if one does.
    pub fn into_file(self) -> Option<File> {
        match self {
            Reply::Inflight { file, .. } => Some(file),
            Reply::U64(_) | Reply::Log { .. } | Reply::VringState { .. } | Reply::Config { .. } => {
                None
            }
        }
    }

    /// The reply's bytes, header first.
    pub fn to_bytes(&self, code: FrontendReq) -> Vec<u8> {
        let mut payload = Vec::with_capacity(32);
        match self {
            Reply::U64(value) => payload.extend(value.to_ne_bytes()),
            Reply::Log { size, offset } => {
                payload.extend(size.to_ne_bytes());
                payload.extend(offset.to_ne_bytes());
            }
            Reply::VringState { index, num } => {
                payload.extend(index.to_ne_bytes());
                payload.extend(num.to_ne_bytes());
            }
            Reply::Config { offset, flags, bytes } if !bytes.is_empty() => {
                payload.extend(offset.to_ne_bytes());
                payload.extend((bytes.len() as u32).to_ne_bytes());
                payload.extend(flags.to_ne_bytes());
                payload.extend(bytes);
            }
            Reply::Inflight { length, rings, size, .. } => {
                payload.extend(length.to_ne_bytes());
                payload.extend(0u64.to_ne_bytes());
                payload.extend(rings.to_ne_bytes());
                payload.extend(size.to_ne_bytes());
                // The structure's padding, without which QEMU and the vhost crate refuse it.
                payload.extend([0; 4]);
            }
            // The specification's way to say that the read failed.
            Reply::Config { .. } => {}
        }
        let mut message = Vec::with_capacity(HEADER_LENGTH + payload.len());
        message.extend(u32::from(code).to_ne_bytes());
        message.extend((VERSION | REPLY).to_ne_bytes());
        message.extend((payload.len() as u32).to_ne_bytes());
        message.extend(payload);
        message
    }
}

/// A message's header, checked.
#[derive(Debug, Clone, Copy)]
struct Header {
    code: FrontendReq,
    need_reply: bool,
    size: usize,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_LENGTH]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(bytes);
        let (code, flags, size) = (fields.u32(), fields.u32(), fields.u32());
        if flags & VERSION_MASK != VERSION || flags & (REPLY | RESERVED) != 0 {
            return Err(ProtocolError::Flags(flags));
        }
        let code = FrontendReq::try_from(code).map_err(|_| ProtocolError::UnknownRequest(code))?;
        if size as usize > MAX_PAYLOAD {
            return Err(ProtocolError::TooLong(size));
        }
        Ok(Header { code, need_reply: flags & NEED_REPLY != 0, size: size as usize })
    }
}

/// Reads numbers off the front of a payload whose length was checked before.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> u32 {
        let (first, rest) = self.0.split_first_chunk().expect("the payload's size was checked");
        self.0 = rest;
        u32::from_ne_bytes(*first)
    }

    fn u64(&mut self) -> u64 {
        let (first, rest) = self.0.split_first_chunk().expect("the payload's size was checked");
        self.0 = rest;
        u64::from_ne_bytes(*first)
    }

    /// `VhostUserMemoryRegion`.
    fn region(&mut self) -> RegionRequest {
        RegionRequest {
            guest_address: self.u64(),
            size: self.u64(),
            frontend_address: self.u64(),
            file_offset: self.u64(),
        }
    }
}

const REGION_LENGTH: usize = 32;
/// `VhostUserInflight` without padding.
const INFLIGHT_LENGTH: usize = 20;

impl Message {
    /// Puts a whole message together.
    fn parse(header: Header, payload: &[u8], mut files: Vec<File>) -> Result<Self, ProtocolError> {
        let Header { code, need_reply, size } = header;
        let wrong_size = ProtocolError::Size { request: code, size };
        let mut fields = Fields(payload);
        // The payload's length, checked before any field is read.
        let length = |expected: usize| {
            if size == expected { Ok(()) } else { Err(ProtocolError::Size { request: code, size }) }
        };
        let count = files.len();
        let wrong_count = ProtocolError::Descriptors { request: code, count };
        let mut expected_files = 0;

        let request = match code {
            FrontendReq::GET_FEATURES => length(0).map(|()| Request::GetFeatures)?,
            FrontendReq::SET_FEATURES => length(8).map(|()| Request::SetFeatures(fields.u64()))?,
            FrontendReq::SET_OWNER => length(0).map(|()| Request::SetOwner)?,
            FrontendReq::RESET_OWNER => length(0).map(|()| Request::ResetOwner)?,
            FrontendReq::SET_MEM_TABLE => {
                if size < 8 {
                    return Err(wrong_size);
                }
                let regions = fields.u32() as usize;
                fields.u32();
                if regions > MAX_TABLE_REGIONS {
                    return Err(ProtocolError::Value {
                        request: code,
                        what: "more than 8 regions",
                    });
                }
                // User-mode Linux always sends room for two.
                if !(8 + regions * REGION_LENGTH..=8 + MAX_TABLE_REGIONS * REGION_LENGTH)
                    .contains(&size)
                {
                    return Err(wrong_size);
                }
                if count != regions {
                    return Err(wrong_count);
                }
                expected_files = count;
                Request::SetMemTable(files.drain(..).map(|file| (fields.region(), file)).collect())
            }
            FrontendReq::SET_VRING_NUM => {
                length(8)?;
                Request::SetVringNum { index: fields.u32(), size: fields.u32() }
            }
            FrontendReq::SET_VRING_BASE => {
                length(8)?;
                Request::SetVringBase { index: fields.u32(), base: fields.u32() }
            }
            FrontendReq::GET_VRING_BASE => {
                length(8)?;
                Request::GetVringBase { index: fields.u32() }
            }
            FrontendReq::SET_VRING_ENABLE => {
                length(8)?;
                let (index, state) = (fields.u32(), fields.u32());
                if state > 1 {
                    return Err(ProtocolError::Value { request: code, what: "neither 0 nor 1" });
                }
                Request::SetVringEnable { index, enable: state == 1 }
            }
            FrontendReq::SET_VRING_ADDR => {
                length(40)?;
                let (index, flags) = (fields.u32(), fields.u32());
                let (descriptors, used, avail) = (fields.u64(), fields.u64(), fields.u64());
                let addresses = VringAddresses { flags, descriptors, used, avail };
                Request::SetVringAddr { index, addresses }
            }
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR => {
                length(8)?;
                let value = fields.u64();
                if value & !(NO_DESCRIPTOR | VRING_INDEX_MASK) != 0 {
                    return Err(ProtocolError::Value {
                        request: code,
                        what: "reserved bits are set",
                    });
                }
                let index = (value & VRING_INDEX_MASK) as u32;
                expected_files = usize::from(value & NO_DESCRIPTOR == 0);
                let file = if count == expected_files { files.pop() } else { None };
                match code {
                    FrontendReq::SET_VRING_KICK => Request::SetVringKick { index, file },
                    FrontendReq::SET_VRING_CALL => Request::SetVringCall { index, file },
                    _ => Request::SetVringErr { index, file },
                }
            }
            FrontendReq::GET_PROTOCOL_FEATURES => {
                length(0).map(|()| Request::GetProtocolFeatures)?
            }
            FrontendReq::SET_PROTOCOL_FEATURES => {
                length(8).map(|()| Request::SetProtocolFeatures(fields.u64()))?
            }
            FrontendReq::GET_QUEUE_NUM => length(0).map(|()| Request::GetQueueNum)?,
            FrontendReq::NET_SET_MTU => length(8).map(|()| Request::NetSetMtu(fields.u64()))?,
            FrontendReq::SET_BACKEND_REQ_FD => {
                length(0)?;
                if count != 1 {
                    return Err(wrong_count);
                }
                expected_files = 1;
                Request::SetBackendReqFd(files.remove(0))
            }
            FrontendReq::GET_CONFIG | FrontendReq::SET_CONFIG => {
                if size < 12 {
                    return Err(wrong_size);
                }
                let (offset, bytes, flags) = (fields.u32(), fields.u32(), fields.u32());
                if bytes > VHOST_USER_CONFIG_SIZE {
                    return Err(ProtocolError::Value {
                        request: code,
                        what: "longer than any configuration space",
                    });
                }
                length(12 + bytes as usize)?;
                if code == FrontendReq::SET_CONFIG {
                    Request::SetConfig
                } else {
                    Request::GetConfig { offset, size: bytes, flags }
                }
            }
            FrontendReq::RESET_DEVICE => length(0).map(|()| Request::ResetDevice)?,
            FrontendReq::GET_MAX_MEM_SLOTS => length(0).map(|()| Request::GetMaxMemSlots)?,
            FrontendReq::ADD_MEM_REG => {
                length(8 + REGION_LENGTH)?;
                fields.u64();
                if count != 1 {
                    return Err(wrong_count);
                }
                expected_files = 1;
                Request::AddMemReg(fields.region(), files.remove(0))
            }
            FrontendReq::REM_MEM_REG => {
                length(8 + REGION_LENGTH)?;
                fields.u64();
                // Some frontends send the region's descriptor along; it is not needed.
                expected_files = count.min(1);
                Request::RemMemReg(fields.region())
            }
            FrontendReq::SET_STATUS => length(8).map(|()| Request::SetStatus(fields.u64()))?,
            FrontendReq::GET_STATUS => length(0).map(|()| Request::GetStatus)?,
            FrontendReq::SET_LOG_BASE => {
                length(16)?;
                if count != 1 {
                    return Err(wrong_count);
                }
                expected_files = 1;
                let (size, offset) = (fields.u64(), fields.u64());
                Request::SetLogBase { size, offset, file: files.remove(0) }
            }
            FrontendReq::GET_INFLIGHT_FD | FrontendReq::SET_INFLIGHT_FD => {
                // Some send the structure's padding along.
                if size != INFLIGHT_LENGTH && size != INFLIGHT_LENGTH + 4 {
                    return Err(wrong_size);
                }
                let (length, offset, numbers) = (fields.u64(), fields.u64(), fields.u32());
                let [rings, size] = [numbers.to_ne_bytes()]
                    .map(|[a, b, c, d]| [[a, b], [c, d]].map(u16::from_ne_bytes))[0];
                if code == FrontendReq::GET_INFLIGHT_FD {
                    Request::GetInflightFd { rings, size }
                } else if count != 1 {
                    return Err(wrong_count);
                } else {
                    expected_files = 1;
                    let file = files.remove(0);
                    Request::SetInflightFd { length, offset, rings, size, file }
                }
            }
            FrontendReq::SET_DEVICE_STATE_FD => {
                length(8)?;
                let (direction, phase) = (fields.u32(), fields.u32());
                if direction > 1 || phase != 0 {
                    return Err(ProtocolError::Value {
                        request: code,
                        what: "an unknown direction or phase",
                    });
                }
                if count != 1 {
                    return Err(wrong_count);
                }
                expected_files = 1;
                Request::SetDeviceStateFd { load: direction == 1, file: files.remove(0) }
            }
            FrontendReq::CHECK_DEVICE_STATE => length(0).map(|()| Request::CheckDeviceState)?,
            FrontendReq::SEND_RARP => {
                length(8)?;
                // The address is the first six bytes, as they lie there.
                let [a, b, c, d, e, f, ..] = fields.u64().to_ne_bytes();
                Request::SendRarp([a, b, c, d, e, f])
            }
            // Whatever came along is closed; the frontend is answered, not cut off.
            other => {
                expected_files = count;
                Request::Unsupported(other)
            }
        };
        if count != expected_files {
            return Err(wrong_count);
        }
        Ok(Message { request, code, need_reply })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(code: FrontendReq, payload: &[u8], files: usize) -> Result<Message, ProtocolError> {
        let header = Header { code, need_reply: false, size: payload.len() };
        let files = (0..files).map(|_| File::open("/dev/null").unwrap()).collect();
        Message::parse(header, payload, files)
    }

    #[test]
    fn headers_that_are_no_request_are_refused() {
        let header = |code: u32, flags: u32, size: u32| {
            let mut bytes = [0; HEADER_LENGTH];
            bytes[0..4].copy_from_slice(&code.to_ne_bytes());
            bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
            bytes[8..12].copy_from_slice(&size.to_ne_bytes());
            Header::parse(&bytes).map(|header| header.size)
        };
        assert_eq!(header(1, 1, 0), Ok(0));
        for flags in [0, 2, 3, 5, 0x11, u32::MAX] {
            assert_eq!(header(1, flags, 0), Err(ProtocolError::Flags(flags)));
        }
        for code in [0, 45, u32::MAX] {
            assert_eq!(header(code, 1, 0), Err(ProtocolError::UnknownRequest(code)));
        }
        assert_eq!(header(5, 1, u32::MAX), Err(ProtocolError::TooLong(u32::MAX)));
    }

    #[test]
    fn every_request_checks_its_size_and_its_descriptors() {
        for code in 1..=44 {
            let code = FrontendReq::try_from(code).unwrap();
            for size in [0, 1, 7, 8, 9, 11, 12, 39, 40, 41, 4096] {
                for files in [0, 1, 2, 9] {
                    let parsed = parse(code, &vec![0; size], files);
                    let Ok(message) = parsed else { continue };
                    assert_eq!(message.code, code);
                    let supported = !matches!(message.request, Request::Unsupported(_));
                    assert!(!supported || files <= 1, "{code:?} took {files} descriptors");
                }
            }
        }
    }

    #[test]
    fn a_ring_message_without_descriptor_says_so() {
        let with = parse(FrontendReq::SET_VRING_CALL, &3u64.to_ne_bytes(), 1).unwrap();
        assert!(matches!(with.request, Request::SetVringCall { index: 3, file: Some(_) }));
        let without = parse(FrontendReq::SET_VRING_CALL, &0x103u64.to_ne_bytes(), 0).unwrap();
        assert!(matches!(without.request, Request::SetVringCall { index: 3, file: None }));
        assert!(parse(FrontendReq::SET_VRING_CALL, &0x103u64.to_ne_bytes(), 1).is_err());
        assert!(parse(FrontendReq::SET_VRING_CALL, &3u64.to_ne_bytes(), 0).is_err());
        assert!(parse(FrontendReq::SET_VRING_CALL, &0x10000u64.to_ne_bytes(), 1).is_err());
    }

    #[test]
    fn a_failed_read_of_the_configuration_space_has_no_payload() {
        let reply = Reply::Config { offset: 0, flags: 0, bytes: vec![] };
        assert_eq!(reply.to_bytes(FrontendReq::GET_CONFIG).len(), HEADER_LENGTH);
    }
}
