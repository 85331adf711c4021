//! Configuration space of the virtio-net device, `virtio_net_config` (virtio 1.3, section 5.1.4).
//!
//! Only cloud-hypervisor reads it: exactly the first 17 bytes, which are all fields of a device without RSS. QEMU has
//! a configuration space of its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of the space in bytes: mac, status, max_virtqueue_pairs, mtu, speed, duplex.
pub const LENGTH: usize = 17;

/// Smallest MTU of a virtio-net device, in bytes: IPv4's (RFC 791).
pub const MIN_MTU: u16 = 68;

/// Highest number of queue pairs. Virtio allows 32768, but vhost-user numbers rings with 8 bits.
pub const MAX_QUEUE_PAIRS: u16 = 128;

const LINK_UP: u16 = 1;
/// Value of `speed` for an unknown speed (virtio 1.3, section 5.1.4.2).
const UNKNOWN_SPEED: u32 = u32::MAX;
/// Value of `duplex` for an unknown duplex mode.
const UNKNOWN_DUPLEX: u8 = u8::MAX;

/// A unicast Ethernet address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong =
            || format!("'{text}' is no MAC address: write six bytes like 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!("'{text}' is a multicast address: use a unicast address"));
        }
        Ok(MacAddress(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The fields of the configuration space that differ from port to port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// MAC address of the virtio-net device. It is zero if the frontend sets the address.
    pub mac: MacAddress,
    /// Number of the port's queue pairs.
    pub queue_pairs: u16,
    /// MTU in bytes, without the Ethernet header.
    pub mtu: u16,
    /// Link state: true for up.
    pub link: bool,
}

impl NetConfig {
    /// Returns the whole space.
    pub fn to_bytes(self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0..6].copy_from_slice(&self.mac.0);
        let status = if self.link { LINK_UP } else { 0 };
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        bytes[12..16].copy_from_slice(&UNKNOWN_SPEED.to_le_bytes());
        bytes[16] = UNKNOWN_DUPLEX;
        bytes
    }

    /// Returns the `size` bytes at `offset`, or `None` if they reach beyond the space.
    pub fn read(self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let start = offset as usize;
        let end = start.checked_add(size as usize)?;
        self.to_bytes().get(start..end).map(<[u8]>::to_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_is_laid_out_as_the_specification_has_it() {
        let mac = "52:54:00:12:34:56".parse().unwrap();
        let config = NetConfig { mac, queue_pairs: 2, mtu: 9000, link: true };
        assert_eq!(
            config.to_bytes(),
            [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0, 0x28, 0x23, 255, 255, 255, 255, 255]
        );
        assert_eq!(config.read(10, 2), Some(vec![0x28, 0x23]));
    }

    #[test]
    fn reads_beyond_the_space_are_refused() {
        let config =
            NetConfig { mac: MacAddress::default(), queue_pairs: 1, mtu: 1500, link: true };
        for (offset, size) in [(0, 18), (17, 1), (u32::MAX, u32::MAX), (16, 2)] {
            assert_eq!(config.read(offset, size), None);
        }
        assert_eq!(config.read(17, 0), Some(vec![]));
    }

    #[test]
    fn mac_addresses_are_read_or_explained() {
        assert_eq!(
            "52:54:00:12:34:56".parse::<MacAddress>().unwrap().to_string(),
            "52:54:00:12:34:56"
        );
        for wrong in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5g",
            "01:00:5e:00:00:01",
            "+2:54:00:12:34:56:",
        ] {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
    }
}
