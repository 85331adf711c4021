//! Generic netlink (`linux/genetlink.h`): requests to a family of the kernel, and the attributes of its replies.

use std::io;

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer, NlasIterator,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

/// Length of `struct nlmsghdr` in bytes.
const HEADER: usize = 16;
/// Length of `struct genlmsghdr` in bytes, which follows it.
const GENERIC_HEADER: usize = 4;
/// Message type of an error or an acknowledgement (`linux/netlink.h`).
const NLMSG_ERROR: u16 = 2;
/// Id of the controller family, which knows the ids of all families (`GENL_ID_CTRL`).
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// A generic netlink family, on a socket of its own.
pub struct Family {
    socket: Socket,
    id: u16,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Family({})", self.id)
    }
}

impl Family {
    /// Finds the family `name`.
    ///
    /// # Errors
    /// ENOENT if the kernel has no family of this name.
    pub fn open(name: &str) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let control = Family { socket, id: CONTROL };
        let name = DefaultNla::new(CTRL_ATTR_FAMILY_NAME, [name.as_bytes(), b"\0"].concat());
        let reply = control.ask(CTRL_CMD_GETFAMILY, &[name])?;
        let id = reply.bytes(CTRL_ATTR_FAMILY_ID).and_then(|bytes| bytes.try_into().ok());
        match id {
            Some(id) => Ok(Family { socket: control.socket, id: u16::from_ne_bytes(id) }),
            None => Err(malformed(&"no family id")),
        }
    }

    /// Sends one request, and returns the attributes of the reply.
    ///
    /// # Errors
    /// The family's error, such as ENODEV if the device does not exist, or EOPNOTSUPP if its driver does not support
    /// the request. `InvalidData` if the reply is malformed.
    pub fn ask(&self, command: u8, attributes: &[DefaultNla]) -> io::Result<Attributes> {
        const VERSION: u8 = 1;
        let length = HEADER + GENERIC_HEADER + attributes.buffer_len();
        let mut message = vec![0; length];
        let mut header = NetlinkBuffer::new(&mut message);
        header.set_length(length as u32);
        header.set_message_type(self.id);
        header.set_flags(NLM_F_REQUEST | NLM_F_ACK);
        message[HEADER..][..2].copy_from_slice(&[command, VERSION]);
        attributes.emit(&mut message[HEADER + GENERIC_HEADER..]);
        self.socket.send(&message, 0)?;
        let mut found = None;
        loop {
            let (reply, _) = self.socket.recv_from_full()?;
            let reply = NetlinkBuffer::new_checked(&reply).map_err(|error| malformed(&error))?;
            match (reply.message_type(), reply.payload()) {
                (NLMSG_ERROR, payload) => {
                    let code = payload.first_chunk().copied().map_or(0, i32::from_ne_bytes);
                    return match (code, found) {
                        (0, Some(found)) => Ok(found),
                        (0, None) => Err(malformed(&"an acknowledgement only")),
                        (code, _) => Err(io::Error::from_raw_os_error(-code)),
                    };
                }
                (_, payload) => {
                    let attributes = payload.get(GENERIC_HEADER..).unwrap_or_default();
                    found = Some(Attributes(attributes.to_vec()));
                }
            }
        }
    }
}

/// Returns an attribute that contains other attributes.
pub fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    const NLA_F_NESTED: u16 = 0x8000;
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

/// Returns an attribute with a 32-bit number.
pub fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

/// Bytes of a message's attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes(pub Vec<u8>);

impl Attributes {
    /// Iterates over the attributes, each as its kind and its value. The iterator ends at a malformed attribute.
    pub fn each(&self) -> impl Iterator<Item = (u16, Attributes)> + '_ {
        NlasIterator::new(&self.0[..])
            .map_while(Result::ok)
            .map(|attribute| (attribute.kind(), Attributes(attribute.value().to_vec())))
    }

    /// Returns the value of the first attribute of a kind.
    pub fn bytes(&self, kind: u16) -> Option<Vec<u8>> {
        self.each().find(|(found, _)| *found == kind).map(|(_, value)| value.0)
    }

    /// Returns the attributes that the first attribute of a kind contains.
    pub fn inside(&self, kind: u16) -> Option<Attributes> {
        self.bytes(kind).map(Attributes)
    }

    /// Returns the 32-bit number of a kind; `None` if there is none, or its value has another length.
    pub fn number(&self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.bytes(kind)?.try_into().ok()?))
    }

    /// Returns the 64-bit number of a kind; `None` if there is none, or its value has another length.
    pub fn long(&self, kind: u16) -> Option<u64> {
        Some(u64::from_ne_bytes(self.bytes(kind)?.try_into().ok()?))
    }

    /// Returns the string of a kind, without its NUL.
    pub fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.bytes(kind)?;
        Some(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
    }
}

fn malformed(error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's reply on netlink is malformed: {error}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip() {
        let inner = [number(1, 7), DefaultNla::new(2, b"eth0\0".to_vec())];
        let mut bytes = vec![0; 100];
        let all = [nested(3, &inner)];
        all.as_slice().emit(&mut bytes[..all.as_slice().buffer_len()]);
        bytes.truncate(all.as_slice().buffer_len());
        let read = Attributes(bytes).inside(3).unwrap();
        assert_eq!((read.number(1), read.text(2)), (Some(7), Some("eth0".into())));
        assert_eq!(read.number(2), None, "five bytes parsed as a number");
        assert_eq!(Attributes(vec![9, 0, 1]).each().count(), 0);
    }

    #[test]
    fn unknown_family_is_enoent() {
        let error = Family::open("no-such-family").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
