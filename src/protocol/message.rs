//! Messages of a frontend, each checked for the payload and the descriptors that its request takes.

use std::fs::File;
use std::vec;

use vhost::vhost_user::message::{FrontendReq, VHOST_USER_CONFIG_SIZE};

use super::{
    HEADER_LENGTH, MAX_PAYLOAD, MAX_TABLE_REGIONS, NEED_REPLY, NO_DESCRIPTOR, ProtocolError, REPLY,
    RESERVED, Request, VERSION, VERSION_MASK, VringAddresses,
};
use crate::guest::RegionRequest;

const VRING_INDEX_MASK: u64 = 0xff;
/// Length in bytes of `VhostUserMemoryRegion`.
const REGION_LENGTH: usize = 32;
/// Bytes after the last number of `VhostUserInflight`.
const INFLIGHT_PADDING: usize = 4;

/// A whole message from the frontend.
#[derive(Debug)]
pub struct Message {
    /// The request, with its payload and descriptors.
    pub request: Request,
    /// The request's number, which a reply repeats.
    pub code: FrontendReq,
    /// True if the frontend requests a reply that states success or failure (REPLY_ACK).
    pub need_reply: bool,
}

/// A checked header of a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) code: FrontendReq,
    pub(super) need_reply: bool,
    /// Payload size in bytes.
    pub(super) size: usize,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_LENGTH]) -> Result<Self, ProtocolError> {
        let (words, _) = bytes.as_chunks();
        let [code, flags, size] = std::array::from_fn(|at| u32::from_ne_bytes(words[at]));
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

/// The bytes and descriptors of a message that are not parsed yet. Methods take numbers and files in order, and
/// fail if one is missing.
struct Body<'a> {
    code: FrontendReq,
    /// Size of the whole payload in bytes.
    size: usize,
    payload: &'a [u8],
    /// Number of all descriptors of the message.
    count: usize,
    files: vec::IntoIter<File>,
}

impl Body<'_> {
    fn wrong_size(&self) -> ProtocolError {
        ProtocolError::Size { request: self.code, size: self.size }
    }

    fn wrong_count(&self) -> ProtocolError {
        ProtocolError::Descriptors { request: self.code, count: self.count }
    }

    fn wrong_value<T>(&self, what: &'static str) -> Result<T, ProtocolError> {
        Err(ProtocolError::Value { request: self.code, what })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (first, rest) = self.payload.split_first_chunk().ok_or_else(|| self.wrong_size())?;
        self.payload = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.bytes().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.bytes().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// Takes a `VhostUserMemoryRegion`.
    fn region(&mut self) -> Result<RegionRequest, ProtocolError> {
        Ok(RegionRequest {
            guest_address: self.u64()?,
            size: self.u64()?,
            frontend_address: self.u64()?,
            file_offset: self.u64()?,
        })
    }

    fn file(&mut self) -> Result<File, ProtocolError> {
        self.files.next().ok_or_else(|| self.wrong_count())
    }

    /// Skips at most `most` bytes.
    fn skip(&mut self, most: usize) {
        self.payload = &self.payload[most.min(self.payload.len())..];
    }

    /// Takes the fields and descriptors of the request.
    fn request(&mut self) -> Result<Request, ProtocolError> {
        Ok(match self.code {
            FrontendReq::GET_FEATURES => Request::GetFeatures,
            FrontendReq::SET_FEATURES => Request::SetFeatures(self.u64()?),
            FrontendReq::SET_OWNER => Request::SetOwner,
            FrontendReq::RESET_OWNER => Request::ResetOwner,
            FrontendReq::SET_MEM_TABLE => Request::SetMemTable(self.table()?),
            FrontendReq::SET_VRING_NUM => {
                Request::SetVringNum { index: self.u32()?, size: self.u32()? }
            }
            FrontendReq::SET_VRING_ADDR => {
                let (index, flags) = (self.u32()?, self.u32()?);
                let (descriptors, used, avail) = (self.u64()?, self.u64()?, self.u64()?);
                // The log address of the used ring is not needed: a ring's writes are logged by guest address.
                self.u64()?;
                let addresses = VringAddresses { flags, descriptors, used, avail };
                Request::SetVringAddr { index, addresses }
            }
            FrontendReq::SET_VRING_BASE => {
                Request::SetVringBase { index: self.u32()?, base: self.u32()? }
            }
            FrontendReq::GET_VRING_BASE => {
                let (index, _) = (self.u32()?, self.u32()?);
                Request::GetVringBase { index }
            }
            FrontendReq::SET_VRING_KICK => {
                let (index, file) = self.event()?;
                Request::SetVringKick { index, file }
            }
            FrontendReq::SET_VRING_CALL => {
                let (index, file) = self.event()?;
                Request::SetVringCall { index, file }
            }
            FrontendReq::SET_VRING_ERR => {
                let (index, file) = self.event()?;
                Request::SetVringErr { index, file }
            }
            FrontendReq::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            FrontendReq::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.u64()?),
            FrontendReq::GET_QUEUE_NUM => Request::GetQueueNum,
            FrontendReq::SET_VRING_ENABLE => {
                let (index, state) = (self.u32()?, self.u32()?);
                if state > 1 {
                    return self.wrong_value("neither 0 nor 1");
                }
                Request::SetVringEnable { index, enable: state == 1 }
            }
            FrontendReq::NET_SET_MTU => Request::NetSetMtu(self.u64()?),
            FrontendReq::SET_BACKEND_REQ_FD => Request::SetBackendReqFd(self.file()?),
            FrontendReq::GET_CONFIG => {
                let (offset, size, flags) = self.config()?;
                Request::GetConfig { offset, size, flags }
            }
            FrontendReq::SET_CONFIG => self.config().map(|_| Request::SetConfig)?,
            FrontendReq::RESET_DEVICE => Request::ResetDevice,
            FrontendReq::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            FrontendReq::ADD_MEM_REG => {
                self.u64()?;
                Request::AddMemReg(self.region()?, self.file()?)
            }
            FrontendReq::REM_MEM_REG => {
                // Some frontends send the region's descriptor along; it is not needed.
                drop(self.files.next());
                self.u64()?;
                Request::RemMemReg(self.region()?)
            }
            FrontendReq::SET_STATUS => Request::SetStatus(self.u64()?),
            FrontendReq::GET_STATUS => Request::GetStatus,
            FrontendReq::SET_LOG_BASE => {
                Request::SetLogBase { size: self.u64()?, offset: self.u64()?, file: self.file()? }
            }
            FrontendReq::GET_INFLIGHT_FD => {
                let (_, _, rings, size) = self.inflight()?;
                Request::GetInflightFd { rings, size }
            }
            FrontendReq::SET_INFLIGHT_FD => {
                let (length, offset, rings, size) = self.inflight()?;
                Request::SetInflightFd { length, offset, rings, size, file: self.file()? }
            }
            FrontendReq::SET_DEVICE_STATE_FD => {
                let (direction, phase) = (self.u32()?, self.u32()?);
                if direction > 1 || phase != 0 {
                    return self.wrong_value("an unknown direction or phase");
                }
                Request::SetDeviceStateFd { load: direction == 1, file: self.file()? }
            }
            FrontendReq::CHECK_DEVICE_STATE => Request::CheckDeviceState,
            FrontendReq::SEND_RARP => {
                // The first six bytes are the MAC address, in the order of the wire.
                let [a, b, c, d, e, f, ..] = self.bytes::<8>()?;
                Request::SendRarp([a, b, c, d, e, f])
            }
            // The device refuses the request, and the connection stays open. Descriptors are closed.
            other => {
                self.skip(self.size);
                self.files.by_ref().for_each(drop);
                Request::Unsupported(other)
            }
        })
    }

    /// Takes a `VhostUserMemory`, and one descriptor for each region.
    fn table(&mut self) -> Result<Vec<(RegionRequest, File)>, ProtocolError> {
        let (regions, _) = (self.u32()? as usize, self.u32()?);
        if regions > MAX_TABLE_REGIONS {
            return self.wrong_value("more than 8 regions");
        }
        let table = (0..regions).map(|_| Ok((self.region()?, self.file()?)));
        let table = table.collect::<Result<_, _>>()?;
        // User-mode Linux always sends the bytes of two regions.
        self.skip((MAX_TABLE_REGIONS - regions) * REGION_LENGTH);
        Ok(table)
    }

    /// Takes a ring's index, and its kick, call or error descriptor.
    fn event(&mut self) -> Result<(u32, Option<File>), ProtocolError> {
        let value = self.u64()?;
        if value & !(NO_DESCRIPTOR | VRING_INDEX_MASK) != 0 {
            return self.wrong_value("reserved bits are set");
        }
        let file = if value & NO_DESCRIPTOR == 0 { Some(self.file()?) } else { None };
        Ok(((value & VRING_INDEX_MASK) as u32, file))
    }

    /// Takes a `VhostUserConfig`: first byte, length in bytes and flags. The content is skipped.
    fn config(&mut self) -> Result<(u32, u32, u32), ProtocolError> {
        let (offset, size, flags) = (self.u32()?, self.u32()?, self.u32()?);
        if size > VHOST_USER_CONFIG_SIZE {
            return self.wrong_value("longer than any configuration space");
        }
        if self.payload.len() != size as usize {
            return Err(self.wrong_size());
        }
        self.skip(size as usize);
        Ok((offset, size, flags))
    }

    /// Takes a `VhostUserInflight`: length and offset in bytes, number of rings, and descriptors of each.
    fn inflight(&mut self) -> Result<(u64, u64, u16, u16), ProtocolError> {
        let place = (self.u64()?, self.u64()?, self.u16()?, self.u16()?);
        // QEMU and the vhost crate send the structure's padding too.
        if self.payload.len() == INFLIGHT_PADDING {
            self.skip(INFLIGHT_PADDING);
        }
        Ok(place)
    }
}

impl Message {
    /// Parses the payload and descriptors of a message.
    ///
    /// # Errors
    /// The payload size, the number of descriptors or a field is not the request's.
    pub(super) fn parse(
        header: Header,
        payload: &[u8],
        files: Vec<File>,
    ) -> Result<Self, ProtocolError> {
        let Header { code, need_reply, size } = header;
        let count = files.len();
        let mut body = Body { code, size, payload, count, files: files.into_iter() };
        let request = body.request()?;
        if !body.payload.is_empty() {
            return Err(body.wrong_size());
        }
        if !body.files.as_slice().is_empty() {
            return Err(body.wrong_count());
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
    fn invalid_headers_are_refused() {
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
    fn every_request_checks_payload_size_and_descriptors() {
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
    fn ring_message_has_descriptor_or_flag() {
        let with = parse(FrontendReq::SET_VRING_CALL, &3u64.to_ne_bytes(), 1).unwrap();
        assert!(matches!(with.request, Request::SetVringCall { index: 3, file: Some(_) }));
        let without = parse(FrontendReq::SET_VRING_CALL, &0x103u64.to_ne_bytes(), 0).unwrap();
        assert!(matches!(without.request, Request::SetVringCall { index: 3, file: None }));
        assert!(parse(FrontendReq::SET_VRING_CALL, &0x103u64.to_ne_bytes(), 1).is_err());
        assert!(parse(FrontendReq::SET_VRING_CALL, &3u64.to_ne_bytes(), 0).is_err());
        assert!(parse(FrontendReq::SET_VRING_CALL, &0x10000u64.to_ne_bytes(), 1).is_err());
    }
}
