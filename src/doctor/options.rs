//! The requirements to check: from the command line and the configuration file, else each TAP and NIC of
//! the host.

use std::path::PathBuf;

use crate::config::{Config, Host, PortConfig, device_name};
use crate::endpoint::Frontend;
use crate::net_config::MacAddress;
use crate::port::af_xdp::{AfXdp, Attach, Mode};

use super::network::Network;

/// Default MTU of a port, in bytes.
const DEFAULT_MTU: u16 = 1500;
/// The user that QEMU runs as under libvirt, on Debian and Ubuntu.
const LIBVIRT_USER: &str = "libvirt-qemu";

/// Command line of `doctor`.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Check what the ports of this file need.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check this TAP device.
    #[arg(long, value_name = "NAME", value_parser = device_name)]
    pub tap: Vec<String>,
    /// Check this device for AF_XDP.
    ///
    /// The value is that of the daemon's --af-xdp.
    #[arg(long, value_name = "NAME[,…]")]
    pub af_xdp: Vec<AfXdp>,
    /// Check that the daemon can create a socket at this path.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Vec<PathBuf>,
    /// Check --tap and --af-xdp for this many queue pairs, 1 to 128.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub queue_pairs: u16,
    /// Check for this MTU in bytes, 68 or more [default: the file's, else 1500].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,
    /// Check the rights of this user, as which QEMU runs [default: libvirt-qemu, if it exists].
    #[arg(long, value_name = "USER")]
    pub qemu_user: Option<String>,
    /// Print the findings in JSON.
    #[arg(long)]
    pub json: bool,
}

/// The part of a port's configuration that places requirements on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) host: Host,
    pub(super) pairs: u16,
    pub(super) mtu: u16,
    pub(super) mac: Option<MacAddress>,
    pub(super) cpus: Vec<usize>,
    pub(super) busy_poll: bool,
    pub(super) anti_spoofing: bool,
    pub(super) require_sealed_memory: bool,
    /// True if the operator named the port's device, on the command line or in the file.
    pub(super) named: bool,
}

/// A socket that the daemon is to create.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) path: PathBuf,
    /// The `socket-group` of the port.
    pub(super) group: Option<String>,
}

/// All requirements on the host.
#[derive(Debug)]
pub(super) struct Requirements {
    pub(super) ports: Vec<Port>,
    pub(super) sockets: Vec<Socket>,
    pub(super) qemu_user: Option<String>,
    /// Largest MTU of the ports, in bytes.
    pub(super) mtu: u16,
}

impl Port {
    fn new(host: Host, options: &Options, named: bool) -> Self {
        Port {
            host,
            pairs: options.queue_pairs,
            mtu: options.mtu.unwrap_or(DEFAULT_MTU),
            mac: None,
            cpus: Vec::new(),
            busy_poll: false,
            anti_spoofing: false,
            require_sealed_memory: false,
            named,
        }
    }

    fn of(config: PortConfig, options: &Options) -> Self {
        Port {
            host: config.host,
            pairs: config.queue_pairs,
            mtu: options.mtu.unwrap_or(config.mtu),
            mac: config.mac,
            cpus: config.cpu_affinity,
            busy_poll: config.busy_poll.is_some_and(|time| !time.is_zero()),
            anti_spoofing: config.allowed_sources.is_some(),
            require_sealed_memory: config.require_sealed_memory,
            named: true,
        }
    }
}

impl Requirements {
    /// Collects the ports and sockets of `options` and `config`. If there are none, each TAP and each NIC
    /// of the host becomes a port.
    pub(super) fn new(mut options: Options, config: Option<Config>, network: &Network) -> Self {
        let paths = std::mem::take(&mut options.socket_path).into_iter();
        let mut sockets: Vec<Socket> = paths.map(|path| Socket { path, group: None }).collect();
        let taps = std::mem::take(&mut options.tap);
        let devices = std::mem::take(&mut options.af_xdp);
        let mut ports = Vec::new();
        ports.extend(taps.into_iter().map(|name| Port::new(Host::Tap(name), &options, true)));
        ports.extend(devices.into_iter().map(|it| Port::new(Host::AfXdp(it), &options, true)));
        for port in config.into_iter().flat_map(|config| config.ports) {
            if let Frontend::Listen(path) = &port.frontend {
                sockets.push(Socket { path: path.clone(), group: port.socket_group.clone() });
            }
            ports.push(Port::of(port, &options));
        }
        if ports.is_empty() && sockets.is_empty() {
            for link in &network.links {
                if link.tun.as_ref().is_some_and(|tun| tun.is_tap) {
                    ports.push(Port::new(Host::Tap(link.name.clone()), &options, false));
                } else if link.parent.is_some() {
                    let plain = AfXdp {
                        name: link.name.clone(),
                        queue: 0,
                        mode: Mode::Auto,
                        attach: Attach::Auto,
                        steer: false,
                    };
                    ports.push(Port::new(Host::AfXdp(plain), &options, false));
                }
            }
        }
        let exists = |name: &str| matches!(nix::unistd::User::from_name(name), Ok(Some(_)));
        let libvirt = || Some(LIBVIRT_USER.to_owned()).filter(|name| exists(name));
        let mtu = ports.iter().map(|port| port.mtu).max().or(options.mtu).unwrap_or(DEFAULT_MTU);
        Requirements { ports, sockets, qemu_user: options.qemu_user.or_else(libvirt), mtu }
    }

    /// Returns the ports on AF_XDP, with their device options.
    pub(super) fn af_xdp(&self) -> impl Iterator<Item = (&Port, &AfXdp)> {
        self.ports.iter().filter_map(|port| match &port.host {
            Host::AfXdp(af_xdp) => Some((port, af_xdp)),
            _ => None,
        })
    }

    /// Returns whether the operator named a port on a TAP.
    pub(super) fn names_a_tap(&self) -> bool {
        let is_tap = |port: &Port| matches!(port.host, Host::Tap(_) | Host::TapDescriptors(_));
        self.ports.iter().any(|port| port.named && is_tap(port))
    }

    /// Returns whether the operator named a port on AF_XDP.
    pub(super) fn names_af_xdp(&self) -> bool {
        self.af_xdp().any(|(port, _)| port.named)
    }
}
