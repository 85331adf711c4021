//! Network devices as rtnetlink shows them: what one is like now, and that some have changed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// `RTNLGRP_LINK` of `linux/rtnetlink.h`.
const LINK_GROUP: u32 = 1;

/// A network device as it is at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index in the network namespace.
    pub index: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Id of the XDP program attached to it.
    pub program: Option<u32>,
    /// Whether that runs in the kernel's generic code, not in the driver.
    pub program_is_generic: bool,
    /// Index of its other end, where that is in the same namespace, for a veth.
    pub veth_peer: Option<u32>,
    /// Whether it is a veth.
    pub is_veth: bool,
    /// Its name.
    pub name: String,
}

/// Looks a device up by name.
///
/// # Errors
/// ENODEV if there is none.
pub fn find(name: &str) -> io::Result<Link> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    ask(message)
}

/// Looks a device up by index.
///
/// # Errors
/// ENODEV if there is none.
pub fn at(index: u32) -> io::Result<Link> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    ask(message)
}

fn ask(message: LinkMessage) -> io::Result<Link> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let payload = NetlinkPayload::from(RouteNetlinkMessage::GetLink(message));
    let mut request = NetlinkMessage::new(header, payload);
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let malformed = |error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's answer: {error}"))
    };
    // An error's number is enough: its message may carry attributes of any kind.
    NetlinkBuffer::new_checked(&answer).map_err(|error| malformed(&error))?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| malformed(&error))?
        .payload
    {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(read(&link)),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        other => Err(malformed(&format!("{other:?}"))),
    }
}

fn read(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        is_up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    let (mut other_end, mut elsewhere) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(index) => other_end = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                link.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::Xdp(infos) => {
                link.program = infos.iter().find_map(|info| match info {
                    LinkXdp::ProgId(id) if *id != 0 => Some(*id),
                    _ => None,
                });
                link.program_is_generic =
                    infos.iter().any(|info| matches!(info, LinkXdp::SkbProgId(id) if *id != 0));
            }
            _ => {}
        }
    }
    link.veth_peer = other_end.filter(|_| link.is_veth && !elsewhere);
    link
}

/// Tells that some network device of this namespace has changed: come, gone, up, down, renamed.
pub struct Watch(Socket);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

impl Watch {
    /// Starts watching.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Watch(socket))
    }

    /// Forgets what it was told; it becomes readable with the next change.
    pub fn clear(&self) {
        let mut buffer = Vec::with_capacity(4096);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, libc::MSG_TRUNC) {
                Ok(_) => {}
                // More came than it could keep: something has changed, which is all we ask.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_is_found_and_a_missing_one_is_not() {
        let link = find("lo").unwrap();
        assert!(link.index > 0 && link.mtu > 0 && !link.is_veth && link.program.is_none());
        assert_eq!(at(link.index).unwrap(), link);
        assert_eq!(find("no-such-dev").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
