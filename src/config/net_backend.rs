//! `--net-backend=KEY=VALUE,…`, the option of cloud-hypervisor's own vhost_user_net: each key stands for an
//! option of this program.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::net_config::MacAddress;

const KEYS: [&str; 10] =
    ["ip", "mask", "mac", "host_mac", "mtu", "socket", "client", "num_queues", "queue_size", "tap"];

/// Values of the keys that this program has an option for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetBackend {
    pub(super) socket: PathBuf,
    /// True to connect to the socket, false to listen on it.
    pub(super) client: bool,
    pub(super) tap: String,
    pub(super) queue_pairs: u16,
    pub(super) mac: Option<MacAddress>,
    pub(super) mtu: Option<u16>,
}

/// Parses the value of a key, if it is present.
fn read<T: FromStr<Err: Display>>(key: &str, value: Option<&str>) -> Result<Option<T>, String> {
    let parse = |value: &str| value.parse().map_err(|error| format!("{key}={value}: {error}"));
    value.map(parse).transpose()
}

impl FromStr for NetBackend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("'{part}' is not of the form key=value"))?;
            if !KEYS.contains(&key) {
                return Err(format!("unknown key '{key}'; use {}", KEYS.join(", ")));
            }
            pairs.push((key, value));
        }
        let get = |key| pairs.iter().rfind(|pair| pair.0 == key).map(|pair| pair.1);
        let tap = get("tap").ok_or("tap is missing; name the device")?.to_owned();
        // The sandboxed daemon may not configure devices; the operator who creates them may.
        let ip: Option<IpAddr> = read("ip", get("ip"))?;
        let mask: Option<IpAddr> = read("mask", get("mask"))?;
        if ip.is_some() || mask.is_some() {
            let ip = ip.map_or("ADDRESS".into(), |ip| ip.to_string());
            let length = match mask {
                Some(IpAddr::V4(mask)) => mask.to_bits().leading_ones(),
                Some(IpAddr::V6(mask)) => mask.to_bits().leading_ones(),
                None => 24,
            };
            return Err(format!(
                "this program does not set ip and mask; leave them out, and run \
                 'ip address add {ip}/{length} dev {tap}'"
            ));
        }
        if let Some(mac) = get("host_mac") {
            return Err(format!(
                "this program does not set host_mac; leave it out, and run \
                 'ip link set dev {tap} address {mac}'"
            ));
        }
        let client = match get("client") {
            Some("on" | "true") => true,
            None | Some("off" | "false") => false,
            Some(other) => return Err(format!("client={other}: write on or off")),
        };
        let queues: u16 = read("num_queues", get("num_queues"))?.unwrap_or(2);
        if queues == 0 || !queues.is_multiple_of(2) {
            return Err(format!("num_queues={queues} is not even; a queue pair has two queues"));
        }
        // Checked, and ignored: the VMM sets the size of the rings, up to 32768.
        let _: Option<u16> = read("queue_size", get("queue_size"))?;
        Ok(NetBackend {
            socket: get("socket").ok_or("socket is missing; name its path")?.into(),
            client,
            tap,
            queue_pairs: queues / 2,
            mac: read("mac", get("mac"))?,
            mtu: read("mtu", get("mtu"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_backend_keys_become_options() {
        let text = "mac=52:54:00:00:00:01,mtu=9000,socket=/run/a,client=on,num_queues=4,\
                    queue_size=256,tap=vmtap0";
        let expected = NetBackend {
            socket: "/run/a".into(),
            client: true,
            tap: "vmtap0".into(),
            queue_pairs: 2,
            mac: Some("52:54:00:00:00:01".parse().unwrap()),
            mtu: Some(9000),
        };
        assert_eq!(text.parse(), Ok(expected));
        let least: NetBackend = "socket=/run/a,tap=vmtap0".parse().unwrap();
        assert_eq!((least.client, least.queue_pairs, least.mac), (false, 1, None));
    }

    #[test]
    fn unsupported_key_is_refused_with_a_command() {
        let cases = [
            ("ip=192.168.100.1,mask=255.255.255.0", "'ip address add 192.168.100.1/24 dev t'"),
            ("ip=2001:db8::1,mask=ffff:ffff::", "'ip address add 2001:db8::1/32 dev t'"),
            ("host_mac=52:54:00:00:00:01", "'ip link set dev t address 52:54:00:00:00:01'"),
            ("num_queues=3", "num_queues=3"),
            ("client=maybe", "client=maybe"),
            ("lane=1", "'lane'"),
            ("mac", "'mac'"),
        ];
        for (keys, named) in cases {
            let error = format!("socket=/run/a,tap=t,{keys}").parse::<NetBackend>().unwrap_err();
            assert!(error.contains(named), "{keys}: {error}");
        }
        assert!("socket=/run/a".parse::<NetBackend>().unwrap_err().contains("tap"));
        assert!("tap=t".parse::<NetBackend>().unwrap_err().contains("socket"));
    }
}
