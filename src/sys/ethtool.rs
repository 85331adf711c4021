//! What a network device can do and how it is set up, as the kernel's netlink families `ethtool`
//! (`linux/ethtool_netlink.h`) and `netdev` (`linux/netdev.h`) tell. Nothing is changed here.

use std::collections::BTreeSet;
use std::io;

use super::genetlink::{Attributes, Family, nested, number};

/// Commands of the `ethtool` family, in the order of `linux/ethtool_netlink.h`.
const FEATURES_GET: u8 = 11;
const RINGS_GET: u8 = 15;
const CHANNELS_GET: u8 = 17;
const RSS_GET: u8 = 38;
/// The attribute in each question that names the device (`ETHTOOL_A_*_HEADER`), and its index there.
const ETHTOOL_HEADER: u16 = 1;
const ETHTOOL_DEVICE_INDEX: u16 = 1;
/// The `netdev` family's one question of interest, and attributes of its answer.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_A_DEV_XDP_RX_METADATA_FEATURES: u16 = 5;

/// `enum netdev_xdp_act` of `linux/netdev.h`: what a driver can do with XDP.
pub mod xdp {
    /// Run a program, which may drop frames, pass them on, or send them back.
    pub const BASIC: u64 = 1;
    /// Redirect frames, to AF_XDP sockets among others.
    pub const REDIRECT: u64 = 2;
    /// Have the device read and write an AF_XDP socket's memory.
    pub const ZERO_COPY: u64 = 8;
    /// Tell a program of a frame's VLAN tag (`NETDEV_XDP_RX_METADATA_VLAN_TAG`): of what a driver
    /// tells programs, not of what it does.
    pub const TELLS_VLAN_TAG: u64 = 4;
}

/// Offloads by the kernel's names for them (`net/ethtool/common.c`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Those that can be switched on.
    pub possible: BTreeSet<String>,
    /// Those that somebody wants.
    pub wanted: BTreeSet<String>,
    /// Those that are on.
    pub active: BTreeSet<String>,
}

/// How many there are of something, and how many there can be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Now.
    pub now: u32,
    /// At the most.
    pub most: u32,
}

/// Queues, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Channels {
    /// For both ways.
    pub combined: Amount,
    /// Which only receive.
    pub rx: Amount,
    /// Which only send.
    pub tx: Amount,
}

/// The `ethtool` family, open for questions.
#[derive(Debug)]
pub struct Ethtool(Family);

impl Ethtool {
    /// Opens it.
    ///
    /// # Errors
    /// ENOENT if the kernel has none (`CONFIG_ETHTOOL_NETLINK`).
    pub fn open() -> io::Result<Self> {
        Family::open("ethtool").map(Ethtool)
    }

    fn ask(&self, command: u8, device: u32) -> io::Result<Attributes> {
        let device = nested(ETHTOOL_HEADER, &[number(ETHTOOL_DEVICE_INDEX, device)]);
        self.0.ask(command, &[device])
    }

    /// The offloads of the device of that index.
    ///
    /// # Errors
    /// ENODEV without such a device.
    pub fn features(&self, device: u32) -> io::Result<Features> {
        let answer = self.ask(FEATURES_GET, device)?;
        let set = |kind| answer.inside(kind).map(|set| names(&set)).unwrap_or_default();
        Ok(Features { possible: set(2), wanted: set(3), active: set(4) })
    }

    /// Entries of its receive rings and of its transmit rings.
    ///
    /// # Errors
    /// EOPNOTSUPP if its driver has no rings to speak of.
    pub fn rings(&self, device: u32) -> io::Result<(Amount, Amount)> {
        let answer = self.ask(RINGS_GET, device)?;
        let amount = |most, now| Amount {
            now: answer.number(now).unwrap_or(0),
            most: answer.number(most).unwrap_or(0),
        };
        Ok((amount(2, 6), amount(5, 9)))
    }

    /// Its queues.
    ///
    /// # Errors
    /// EOPNOTSUPP if its driver does not tell.
    pub fn channels(&self, device: u32) -> io::Result<Channels> {
        let answer = self.ask(CHANNELS_GET, device)?;
        let amount = |most, now| Amount {
            now: answer.number(now).unwrap_or(0),
            most: answer.number(most).unwrap_or(0),
        };
        Ok(Channels { rx: amount(2, 6), tx: amount(3, 7), combined: amount(5, 9) })
    }

    /// Queues that its receive hashing brings frames to.
    ///
    /// # Errors
    /// EOPNOTSUPP if it has no such table.
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

/// The names in a bit set (`ETHTOOL_A_BITSET_*`). Without a mask, all that are listed are set.
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

/// What the driver of the device of that index can do with XDP: bits of [`xdp`].
///
/// # Errors
/// ENOENT if the kernel can't tell (before Linux 6.3), ENODEV without such a device.
pub fn xdp_features(device: u32) -> io::Result<u64> {
    driver_features(device, NETDEV_A_DEV_XDP_FEATURES)
}

/// Whether its driver tells an XDP program of VLAN tags that it keeps beside frames.
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
    fn the_loopback_device_has_offloads_and_neither_rings_nor_queues() {
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
