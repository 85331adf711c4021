//! State of network devices, and notifications of changes, by rtnetlink.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_packet_core::{
    DefaultNla, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, Nla,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoTun, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, LinkXdp, Prop,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;

use super::device::MAX_NAME;

/// `RTNLGRP_LINK` of `linux/rtnetlink.h`.
const LINK_GROUP: u32 = 1;
/// `IFLA_ALT_IFNAME` of `linux/if_link.h`.
const ALTERNATIVE_NAME: u16 = 53;

/// Time to wait for an answer of the kernel.
const ANSWER_TIMEOUT: TimeVal = TimeVal::new(1, 0);

/// State of a network device when it was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Index in the network namespace.
    pub index: u32,
    /// True if the device is set up (`IFF_UP`).
    pub is_up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Id of the attached XDP program.
    pub program: Option<u32>,
    /// True if the XDP program runs in generic mode, not in the driver.
    pub program_is_generic: bool,
    /// Index of a veth's peer, if the peer is in the same namespace.
    pub veth_peer: Option<u32>,
    /// True if the device is a veth.
    pub is_veth: bool,
    /// Primary name.
    pub name: String,
    /// Kind of virtual device: `tun`, `veth`, `bridge`, `vxlan`; empty for a NIC.
    pub kind: String,
    /// Bus and address of a device on a host bus, as `pci` and `0000:00:03.0` (Linux 5.14 or later).
    pub parent: Option<(String, String)>,
    /// Index of the bridge, bond or similar device that has this one as a port.
    pub master: Option<u32>,
    /// Index of the device below a VLAN or a tunnel.
    pub lower: Option<u32>,
    /// TUN or TAP state, if the device is one.
    pub tun: Option<Tun>,
    /// Alternative names.
    pub alternative_names: Vec<String>,
    /// True if the host configures addresses and routes from router advertisements received here.
    pub takes_advertisements: bool,
    /// Dropped frames.
    pub drops: Drops,
}

impl Link {
    /// Returns true if `name` is the primary or an alternative name.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.alternative_names.iter().any(|it| it == name)
    }

    /// Returns true for a macvtap or an ipvtap, whose queues are opened through a device file of its own.
    pub fn is_macvtap(&self) -> bool {
        ["macvtap", "ipvtap"].contains(&&*self.kind)
    }
}

/// Frames that a device has dropped since its creation, in the device's own directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops {
    /// Received frames dropped, for any reason.
    pub rx: u64,
    /// Frames to send that were dropped. A TAP sends to its reader.
    pub tx: u64,
}

/// State of a TUN or TAP device: `IFLA_TUN_*` of `linux/if_link.h`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tun {
    /// User that may open the device without CAP_NET_ADMIN. With neither owner nor group, every user may.
    pub owner: Option<u32>,
    /// Group that may open the device without CAP_NET_ADMIN.
    pub group: Option<u32>,
    /// True for a TAP (Ethernet frames), false for a TUN (IP packets).
    pub is_tap: bool,
    /// True if a virtio-net header precedes each frame.
    pub vnet_hdr: bool,
    /// True if the device remains after its last queue is closed.
    pub persistent: bool,
    /// True if several queues can be opened.
    pub multi_queue: bool,
    /// Number of open queues, attached or detached. The kernel reports it for multi-queue devices only.
    pub queues: u32,
}

/// Looks up a device by its primary or an alternative name.
///
/// # Errors
/// ENODEV if there is no such device.
pub fn find(name: &str) -> io::Result<Link> {
    let mut message = LinkMessage::default();
    message.attributes.push(if name.len() > MAX_NAME {
        let text = [name.as_bytes(), &[0]].concat();
        LinkAttribute::Other(DefaultNla::new(ALTERNATIVE_NAME, text))
    } else {
        // The kernel searches primary and alternative names.
        LinkAttribute::IfName(name.to_owned())
    });
    Questions::open()?.ask_for_one(message)
}

/// Looks up a device by index.
///
/// # Errors
/// ENODEV if there is no such device.
pub fn at(index: u32) -> io::Result<Link> {
    Questions::open()?.at(index)
}

/// Lists all devices of this network namespace.
///
/// # Errors
/// The errors of netlink; EAGAIN if the kernel does not answer within 1 s.
pub fn all() -> io::Result<Vec<Link>> {
    Questions::open()?.all()
}

/// A netlink socket for repeated look-ups of devices.
pub struct Questions {
    socket: Socket,
    /// Sequence number of the last request. An answer with another number is to an earlier request.
    number: AtomicU32,
}

impl std::fmt::Debug for Questions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Questions")
    }
}

impl Questions {
    /// Opens the socket.
    ///
    /// # Errors
    /// EAFNOSUPPORT if netlink is not permitted.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &ANSWER_TIMEOUT)?;
        Ok(Questions { socket, number: AtomicU32::new(0) })
    }

    /// Looks up a device by index.
    ///
    /// # Errors
    /// ENODEV if there is no such device; EAGAIN if the kernel does not answer within 1 s.
    pub fn at(&self, index: u32) -> io::Result<Link> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.ask_for_one(message)
    }

    /// Lists all devices of the network namespace in which the socket was opened.
    ///
    /// # Errors
    /// The errors of netlink; EAGAIN if the kernel does not answer within 1 s.
    pub fn all(&self) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        self.ask(LinkMessage::default(), NLM_F_DUMP, |link| {
            links.push(link);
            false
        })?;
        Ok(links)
    }

    fn ask_for_one(&self, message: LinkMessage) -> io::Result<Link> {
        let mut found = None;
        self.ask(message, 0, |link| {
            found = Some(link);
            true
        })?;
        found.ok_or_else(|| malformed(&"it ends early"))
    }

    /// Sends a request, and calls `is_last` with each device of the answer, until `is_last` returns true or the
    /// answer ends.
    fn ask(
        &self,
        message: LinkMessage,
        flags: u16,
        mut is_last: impl FnMut(Link) -> bool,
    ) -> io::Result<()> {
        let number = self.number.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        send(&self.socket, message, flags, number)?;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let next = NetlinkBuffer::new_checked(rest).map_err(|error| malformed(&error))?;
                let length = next.length().next_multiple_of(4) as usize;
                // Ignores a late answer to an earlier request.
                if next.sequence_number() == number
                    && parse(rest)?.is_none_or(|link| is_last(read(&link)))
                {
                    return Ok(());
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

fn send(socket: &Socket, message: LinkMessage, flags: u16, number: u32) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = flags | NLM_F_REQUEST;
    header.sequence_number = number;
    let payload = NetlinkPayload::from(RouteNetlinkMessage::GetLink(message));
    let mut request = NetlinkMessage::new(header, payload);
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0).map(drop)
}

fn malformed(error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's answer: {error}"))
}

/// Parses the first message of an answer; returns none for the message that ends the answer.
fn parse(answer: &[u8]) -> io::Result<Option<LinkMessage>> {
    NetlinkBuffer::new_checked(answer).map_err(|error| malformed(&error))?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer)
        .map_err(|error| malformed(&error))?
        .payload
    {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        NetlinkPayload::Done(_) => Ok(None),
        // The error number is enough: the message's attributes may be of any kind.
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
    let (mut other_end, mut elsewhere, mut vxlan_lower) = (None, false, None);
    let mut parent = (String::new(), String::new());
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(index) => other_end = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::PropList(all) => {
                let names = all.iter().filter_map(|it| match it {
                    Prop::AltIfName(name) => Some(name.clone()),
                    _ => None,
                });
                link.alternative_names.extend(names);
            }
            LinkAttribute::Stats64(it) => {
                link.drops = Drops { rx: it.rx_dropped + it.rx_missed_errors, tx: it.tx_dropped };
            }
            LinkAttribute::AfSpecUnspec(all) => {
                link.takes_advertisements = all.iter().any(takes_advertisements);
            }
            LinkAttribute::ParentDevName(name) => parent.1.clone_from(name),
            LinkAttribute::ParentDevBusName(bus) => parent.0.clone_from(bus),
            LinkAttribute::LinkInfo(infos) => {
                link.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                infos.iter().for_each(|info| read_info(info, &mut link, &mut vxlan_lower));
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
    link.lower = vxlan_lower.or(other_end).filter(|_| !link.is_veth && !elsewhere);
    link.parent = Some(parent).filter(|(bus, name)| !bus.is_empty() && !name.is_empty());
    link
}

/// Returns true if a device's IPv6 settings accept router advertisements: `ipv6_accept_ra` of
/// include/net/ipv6.h.
fn takes_advertisements(family: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet6(facts) = family else { return false };
    facts.iter().any(|fact| match fact {
        AfSpecInet6::DevConf(it) if it.disable_ipv6 != 0 => false,
        AfSpecInet6::DevConf(it) if it.forwarding != 0 => it.accept_ra == 2,
        AfSpecInet6::DevConf(it) => it.accept_ra != 0,
        _ => false,
    })
}

/// Reads the attributes that depend on the kind of device.
fn read_info(info: &LinkInfo, link: &mut Link, vxlan_lower: &mut Option<u32>) {
    match info {
        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
        LinkInfo::Data(InfoData::Vxlan(facts)) => {
            *vxlan_lower = facts.iter().find_map(|fact| match fact {
                InfoVxlan::Link(index) if *index != 0 => Some(*index),
                _ => None,
            });
        }
        LinkInfo::Data(InfoData::Tun(facts)) => {
            let mut tun = Tun::default();
            facts.iter().for_each(|fact| read_tun(fact, &mut tun));
            link.tun = Some(tun);
        }
        _ => {}
    }
}

/// Reads an `IFLA_TUN_*` attribute.
fn read_tun(attribute: &InfoTun, tun: &mut Tun) {
    /// `IFF_TAP` of `linux/if_tun.h`, the type of a TAP.
    const TAP: u8 = libc::IFF_TAP as u8;
    let mut value = [0; 4];
    if attribute.value_len() > value.len() {
        return;
    }
    attribute.emit_value(&mut value[..attribute.value_len()]);
    let number = u32::from_ne_bytes(value);
    match attribute.kind() {
        1 => tun.owner = Some(number),
        2 => tun.group = Some(number),
        3 => tun.is_tap = value[0] == TAP,
        5 => tun.vnet_hdr = number != 0,
        6 => tun.persistent = number != 0,
        7 => tun.multi_queue = number != 0,
        8 | 9 => tun.queues += number,
        _ => {}
    }
}

/// Notifications of changes to this namespace's network devices: created, deleted, up, down, renamed. The
/// descriptor is readable after a change.
pub struct Watch(Socket);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

impl Watch {
    /// Subscribes to the notifications.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Watch(socket))
    }

    /// Reads all pending notifications; the descriptor becomes readable again with the next change. Returns
    /// the indexes of the changed devices, or none if the socket's buffer overflowed: any device may have
    /// changed then.
    pub fn clear(&self) -> Option<BTreeSet<u32>> {
        let mut changed = Some(BTreeSet::new());
        let mut buffer = Vec::with_capacity(4096);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, libc::MSG_TRUNC) {
                // The message is an `nlmsghdr`, followed by an `ifinfomsg` with the index.
                Ok(_) => match (&mut changed, buffer.get(20..24)) {
                    (Some(changed), Some(&[a, b, c, d])) => {
                        changed.insert(u32::from_ne_bytes([a, b, c, d]));
                    }
                    _ => changed = None,
                },
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changed = None,
                Err(_) => return changed,
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
    fn loopback_is_found_and_a_missing_device_is_not() {
        let link = find("lo").unwrap();
        assert!(link.index > 0 && link.mtu > 0 && !link.is_veth && link.program.is_none());
        assert_eq!(at(link.index).unwrap(), link);
        assert!(all().unwrap().contains(&link));
        assert_eq!(find("no-such-dev").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn late_answer_to_an_earlier_request_is_ignored() {
        let lo = find("lo").unwrap();
        let questions = Questions::open().unwrap();
        let mut lost = LinkMessage::default();
        lost.header.index = i32::MAX as u32;
        send(&questions.socket, lost, 0, 0).unwrap();
        assert_eq!(questions.at(lo.index).unwrap(), lo);
    }
}
