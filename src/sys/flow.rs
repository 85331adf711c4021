//! Steering of received frames to a NIC's queues by the flow rules of `linux/ethtool.h`, and the NIC's filter
//! of unicast addresses.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;
use super::device;

const ETHTOOL_GRXCLSRLCNT: u32 = 0x2e;
const ETHTOOL_GRXCLSRULE: u32 = 0x2f;
const ETHTOOL_GRXCLSRLALL: u32 = 0x30;
const ETHTOOL_SRXCLSRLDEL: u32 = 0x31;
const ETHTOOL_SRXCLSRLINS: u32 = 0x32;
/// Flag and location by which the driver chooses the location of a new rule.
const RX_CLS_LOC_SPECIAL: u64 = 0x8000_0000;
const RX_CLS_LOC_ANY: u32 = 0xffff_ffff;
/// Flow type of rules on the Ethernet header.
const ETHER_FLOW: u32 = 0x12;
/// Maximum number of a NIC's rules that this module reads: an odd number, so that [`Request`] has no padding.
const MOST: usize = 1025;

/// `ethtool_rx_flow_spec`, with an Ethernet header in the unions.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FlowSpec {
    flow_type: u32,
    destination: [u8; 6],
    rest: [u8; 46],
    extension: [u8; 20],
    destination_mask: [u8; 6],
    rest_mask: [u8; 46],
    extension_mask: [u8; 20],
    queue: u64,
    location: u32,
}

/// `ethtool_rxnfc`, with space for the locations of [`MOST`] rules.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Request {
    command: u32,
    flow_type: u32,
    data: u64,
    rule: FlowSpec,
    count: u32,
    locations: [u32; MOST],
}

impl Request {
    fn new(command: u32) -> Box<Self> {
        // SAFETY: the fields are integers and arrays of integers, for which all zeros is a value.
        let mut request: Box<Self> = Box::new(unsafe { mem::zeroed() });
        request.command = command;
        request
    }
}

/// A flow rule that steers frames for a MAC address to a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Destination MAC address of the frames.
    pub address: [u8; 6],
    /// Index of the queue.
    pub queue: u64,
    /// Location in the NIC's table, which identifies the rule.
    pub location: u32,
}

/// Access to the flow rules of a NIC.
#[derive(Debug)]
pub struct Rules {
    socket: OwnedFd,
    device: u32,
}

impl Rules {
    /// Opens a socket for the rules of the device with index `device`.
    pub fn of(device: u32) -> io::Result<Self> {
        Ok(Rules { socket: device::control_socket()?, device })
    }

    /// Sends a request to the driver, which overwrites it with the answer.
    fn ask(&self, request: &mut Request) -> io::Result<()> {
        let mut named = device::request(&device::name(self.device)?)?;
        named.ifr_ifru.ifru_data = (&raw mut *request).cast();
        // SAFETY: SIOCETHTOOL reads and writes an `ethtool_rxnfc`, followed by `count` locations. `locations`
        // sets `count` to at most MOST, which Request has space for; in all other requests `count` is 0. The
        // request is borrowed through the call.
        unsafe { check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL, &mut named))? };
        Ok(())
    }

    /// Reads the rules that match on the destination address only.
    ///
    /// # Errors
    /// EOPNOTSUPP if the driver has no flow rules; `OutOfMemory` if the NIC has more than 1025.
    pub fn list(&self) -> io::Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for location in self.locations()?.0 {
            let mut request = Request::new(ETHTOOL_GRXCLSRULE);
            request.rule.location = location;
            self.ask(&mut request)?;
            let FlowSpec { destination, queue, .. } = request.rule;
            if matches_only(&request.rule, destination) {
                rules.push(Rule { address: destination, queue, location });
            }
        }
        Ok(rules)
    }

    /// Reads the locations of all rules, and chooses the location for a new one.
    fn locations(&self) -> io::Result<(Vec<u32>, u32)> {
        let mut counts = Request::new(ETHTOOL_GRXCLSRLCNT);
        self.ask(&mut counts)?;
        let special = counts.data & RX_CLS_LOC_SPECIAL != 0;
        let mut all = Request::new(ETHTOOL_GRXCLSRLALL);
        all.count = counts.count;
        if all.count as usize > MOST {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "it has too many flow rules"));
        }
        self.ask(&mut all)?;
        let taken = all.locations[..(all.count as usize).min(MOST)].to_vec();
        let size = (all.data & !RX_CLS_LOC_SPECIAL) as u32;
        let free = (0..size).find(|location| !taken.contains(location));
        Ok((taken, if special { RX_CLS_LOC_ANY } else { free.unwrap_or(RX_CLS_LOC_ANY) }))
    }

    /// Inserts a rule that steers frames for `address` to `queue`.
    ///
    /// # Errors
    /// EOPNOTSUPP or EINVAL if the driver does not support such a rule; ENOSPC if its table is full.
    pub fn insert(&self, address: [u8; 6], queue: u64) -> io::Result<Rule> {
        let mut request = Request::new(ETHTOOL_SRXCLSRLINS);
        request.rule.flow_type = ETHER_FLOW;
        request.rule.destination = address;
        request.rule.destination_mask = [0xff; 6];
        request.rule.queue = queue;
        request.rule.location = self.locations()?.1;
        self.ask(&mut request)?;
        Ok(Rule { address, queue, location: request.rule.location })
    }

    /// Deletes a rule.
    pub fn delete(&self, rule: &Rule) -> io::Result<()> {
        let mut request = Request::new(ETHTOOL_SRXCLSRLDEL);
        request.rule.location = rule.location;
        self.ask(&mut request)
    }
}

/// Returns true if the rule matches on this destination address only.
fn matches_only(rule: &FlowSpec, address: [u8; 6]) -> bool {
    rule.flow_type == ETHER_FLOW
        && rule.destination == address
        && rule.destination_mask == [0xff; 6]
        && rule.rest_mask == [0; 46]
        && rule.extension_mask == [0; 20]
}

/// A unicast address that a network device accepts besides its own. The kernel removes the address when the
/// value is dropped or the process exits.
#[derive(Debug)]
pub struct AddressFilter {
    _socket: OwnedFd,
}

impl AddressFilter {
    /// Adds `address` to the addresses of the device with index `device`.
    ///
    /// # Errors
    /// EPERM without CAP_NET_RAW; EOPNOTSUPP if the device has no such filter; ENOSPC if its filter is full.
    pub fn new(device: u32, address: [u8; 6]) -> io::Result<Self> {
        /// `packet_mreq` of `linux/if_packet.h`.
        #[repr(C)]
        struct Membership {
            device: libc::c_int,
            kind: u16,
            length: u16,
            address: [u8; 8],
        }
        let mut membership = Membership {
            device: device as libc::c_int,
            kind: libc::PACKET_MR_UNICAST as u16,
            length: address.len() as u16,
            address: [0; 8],
        };
        membership.address[..6].copy_from_slice(&address);
        // SAFETY: the kernel has just created the descriptor, which has no other owner. The membership lives
        // through the call, and has the length given. (Protocol 0: the socket receives no frames.)
        unsafe {
            let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let socket = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, flags, 0))?);
            check(libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const membership).cast(),
                mem::size_of::<Membership>() as libc::socklen_t,
            ))?;
            Ok(AddressFilter { _socket: socket })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_the_kernels_layout() {
        assert_eq!(mem::offset_of!(Request, rule), 16);
        assert_eq!(mem::offset_of!(Request, rule.queue), 16 + 152);
        assert_eq!(mem::offset_of!(Request, rule.location), 16 + 160);
        assert_eq!(mem::offset_of!(Request, count), 184);
        assert_eq!(mem::offset_of!(Request, locations), 188);
    }
}
