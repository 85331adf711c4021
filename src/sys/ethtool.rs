//! Capabilities and settings of a network device, read from the kernel's netlink families `ethtool`
//! (`linux/ethtool_netlink.h`) and `netdev` (`linux/netdev.h`). This module changes no setting.

use std::collections::BTreeSet;
use std::io;

use super::genetlink::{Attributes, Family, nested, number};

/// Commands of the `ethtool` family, in the order of `linux/ethtool_netlink.h`.
const FEATURES_GET: u8 = 11;
const RINGS_GET: u8 = 15;
const CHANNELS_GET: u8 = 17;
const RSS_GET: u8 = 38;
/// Attribute of each request that identifies the device (`ETHTOOL_A_*_HEADER`), and the device's index in it.
const ETHTOOL_HEADER: u16 = 1;
const ETHTOOL_DEVICE_INDEX: u16 = 1;
/// Command of the `netdev` family that reads a device, and attributes of its request and answer.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_A_DEV_XDP_RX_METADATA_FEATURES: u16 = 5;

/// XDP capabilities of a driver: `enum netdev_xdp_act` of `linux/netdev.h`.
pub mod xdp {
    /// Support for XDP programs that drop frames, pass them to the kernel, or send them back.
    pub const BASIC: u64 = 1;
    /// Support for `XDP_REDIRECT`, to AF_XDP sockets among others.
    pub const REDIRECT: u64 = 2;
    /// Support for AF_XDP zero copy: the device reads and writes the socket's UMEM.
    pub const ZERO_COPY: u64 = 8;
    /// Metadata of a frame's VLAN tag for XDP programs (`NETDEV_XDP_RX_METADATA_VLAN_TAG`). This bit is one of
    /// `enum netdev_xdp_rx_metadata`, not of `enum netdev_xdp_act`.
    pub const TELLS_VLAN_TAG: u64 = 4;
}

/// A device's offloads, by the kernel's names (`net/ethtool/common.c`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Offloads that an operator can turn on.
    pub possible: BTreeSet<String>,
    /// Offloads that are requested, active or not.
    pub wanted: BTreeSet<String>,
    /// Offloads that are on.
    pub active: BTreeSet<String>,
}

/// A configured number of ring entries or queues, and its maximum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Configured number.
    pub now: u32,
    /// Maximum number that the driver supports.
    pub most: u32,
}

/// Numbers of a device's queues, by direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Channels {
    /// Queues that receive and send.
    pub combined: Amount,
    /// Queues that only receive.
    pub rx: Amount,
    /// Queues that only send.
    pub tx: Amount,
}

/// A netlink socket for the `ethtool` family.
#[derive(Debug)]
pub struct Ethtool(Family);

impl Ethtool {
    /// Opens the socket.
    ///
    /// # Errors
    /// ENOENT if the kernel lacks the family (`CONFIG_ETHTOOL_NETLINK`).
    pub fn open() -> io::Result<Self> {
        Family::open("ethtool").map(Ethtool)
    }

    fn ask(&self, command: u8, device: u32) -> io::Result<Attributes> {
        let device = nested(ETHTOOL_HEADER, &[number(ETHTOOL_DEVICE_INDEX, device)]);
        self.0.ask(command, &[device])
    }

    /// Reads the offloads of the device with index `device`.
    ///
    /// # Errors
    /// ENODEV if there is no such device.
    pub fn features(&self, device: u32) -> io::Result<Features> {
        let answer = self.ask(FEATURES_GET, device)?;
        let set = |kind| answer.inside(kind).map(|set| names(&set)).unwrap_or_default();
        Ok(Features { possible: set(2), wanted: set(3), active: set(4) })
    }

    /// Reads the numbers of entries in each receive ring and in each transmit ring.
    ///
    /// # Errors
    /// EOPNOTSUPP if the driver reports no rings.
    pub fn rings(&self, device: u32) -> io::Result<(Amount, Amount)> {
        let answer = self.ask(RINGS_GET, device)?;
        let amount = |most, now| Amount {
            now: answer.number(now).unwrap_or(0),
            most: answer.number(most).unwrap_or(0),
        };
        Ok((amount(2, 6), amount(5, 9)))
    }

    /// Reads the numbers of queues.
    ///
    /// # Errors
    /// EOPNOTSUPP if the driver reports no queues.
    pub fn channels(&self, device: u32) -> io::Result<Channels> {
        let answer = self.ask(CHANNELS_GET, device)?;
        let amount = |most, now| Amount {
            now: answer.number(now).unwrap_or(0),
            most: answer.number(most).unwrap_or(0),
        };
        Ok(Channels { rx: amount(2, 6), tx: amount(3, 7), combined: amount(5, 9) })
    }

    /// Reads the RSS indirection table: the queues to which receive hashing steers frames.
    ///
    /// # Errors
    /// EOPNOTSUPP if the device has no such table.
    pub fn hashed_queues(&self, device: u32) -> io::Result<BTreeSet<u32>> {
        const INDIRECTION: u16 = 4;
        let table = self.ask(RSS_GET, device)?.bytes(INDIRECTION).unwrap_or_default();
        if table.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let (entries, _) = table.as_chunks();
        Ok(entries.iter().copied().map(u32::from_ne_bytes).collect())
    }
}

/// Returns the names of the set bits in a bit set (`ETHTOOL_A_BITSET_*`). Without a mask, all listed bits are
/// set.
fn names(set: &Attributes) -> BTreeSet<String> {
    const NO_MASK: u16 = 1;
    const BITS: u16 = 3;
    const NAME: u16 = 2;
    const VALUE: u16 = 3;
    let all = set.bytes(NO_MASK).is_some();
    let bits = set.inside(BITS).unwrap_or_default();
    let is_set = |bit: &Attributes| all || bit.bytes(VALUE).is_some();
    bits.each().filter(|(_, bit)| is_set(bit)).filter_map(|(_, bit)| bit.text(NAME)).collect()
}

/// Reads the XDP capabilities of the driver of the device with index `device`, as bits of [`xdp`].
///
/// # Errors
/// ENOENT before Linux 6.3, which lacks the `netdev` family; ENODEV if there is no such device.
pub fn xdp_features(device: u32) -> io::Result<u64> {
    driver_features(device, NETDEV_A_DEV_XDP_FEATURES)
}

/// Returns true if the driver gives XDP programs the VLAN tags that the device has removed from frames.
///
/// # Errors
/// As [`xdp_features`]; `InvalidData` before Linux 6.7.
pub fn tells_vlan_tags(device: u32) -> io::Result<bool> {
    let told = driver_features(device, NETDEV_A_DEV_XDP_RX_METADATA_FEATURES)?;
    Ok(told & xdp::TELLS_VLAN_TAG != 0)
}

fn driver_features(device: u32, attribute: u16) -> io::Result<u64> {
    let answer =
        Family::open("netdev")?.ask(NETDEV_CMD_DEV_GET, &[number(NETDEV_A_DEV_IFINDEX, device)])?;
    answer
        .long(attribute)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel does not say"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_offloads_and_neither_rings_nor_queues() {
        let device = crate::sys::link::find("lo").unwrap().index;
        let ethtool = Ethtool::open().unwrap();
        let features = ethtool.features(device).unwrap();
        assert!(features.active.contains("tx-scatter-gather"), "{features:?}");
        let without = |error: io::Error| error.raw_os_error() == Some(libc::EOPNOTSUPP);
        assert!(ethtool.rings(device).is_err_and(without));
        assert!(ethtool.channels(device).is_err_and(without));
        assert!(ethtool.hashed_queues(device).is_err_and(without));
        assert_eq!(xdp_features(device).unwrap() & xdp::ZERO_COPY, 0);
    }
}
