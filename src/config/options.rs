//! Options of a port, on the command line or in the file, and their conversion into a configuration.

mod changes;
mod values;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::net_backend::NetBackend;
use super::{Host, PortConfig};
use crate::endpoint::Frontend;
use crate::net_config::{MAX_QUEUE_PAIRS, MIN_MTU, MacAddress};
use crate::policy::{AllowedSources, Filter, Limit};
use crate::port::af_xdp::{AfXdp, Attach, Mode};
use crate::port::tap::TxMethod;
use crate::sys::device::MAX_ALTERNATIVE_NAME as MAX_NAME;
use crate::sys::socket::MAX_PATH;

pub use changes::PortChanges;
use values::{ByteSize, CpuList, Prefix, on_or_off};

/// Headings of the options' groups in the help.
const FRONTEND: &str = "Frontend";
const HOST_SIDE: &str = "Host side";
const POLICY: &str = "Policy";
pub(crate) const OPERATION: &str = "Operation";
const TUNING: &str = "Tuning";
/// Longest name of a port in bytes.
const MAX_PORT_NAME: usize = 63;
const DEFAULT_MTU: u16 = 1500;
/// Highest VLAN ID (IEEE 802.1Q).
const MAX_VLAN: u16 = 4094;

/// Options of a port, each present or omitted. Options of the command line and keys of the file have the
/// same names and meanings.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct PortOptions {
    /// Listen on this unix socket for the VMM.
    #[arg(long, value_name = "PATH", group = "frontend", help_heading = FRONTEND)]
    socket_path: Option<PathBuf>,
    /// Let this group connect to --socket-path too [default: by the umask].
    #[arg(long, value_name = "GROUP", requires = "socket_path", help_heading = FRONTEND, hide_short_help = true)]
    socket_group: Option<String>,
    /// Use this inherited descriptor: a unix socket that listens or is connected.
    #[arg(long, value_name = "N", group = "frontend", help_heading = FRONTEND, hide_short_help = true)]
    fd: Option<RawFd>,
    /// Connect to the VMM's unix socket.
    ///
    /// Reconnect after 5 ms, doubling to 500 ms.
    #[arg(long, value_name = "PATH", group = "frontend", help_heading = FRONTEND)]
    connect: Option<PathBuf>,

    /// Move frames through this TAP; create it if missing.
    #[arg(long, value_name = "NAME", group = "host", help_heading = HOST_SIDE)]
    tap: Option<String>,
    /// Use these inherited descriptors of a TAP's queues, one for each queue pair.
    #[arg(long, value_name = "N[,N…]", group = "host", value_delimiter = ',', help_heading = HOST_SIDE, hide_short_help = true)]
    tap_fd: Vec<RawFd>,
    /// Move frames through AF_XDP sockets of this device.
    ///
    /// The value is NAME[,KEY=VALUE…]. queue=N: use this queue for the first queue pair, and the next ones
    /// for the others [default: 0].
    /// mode=auto|copy|zero-copy: have the kernel or the driver move frames [default: auto].
    /// attach=auto|native|generic: run the XDP program here [default: auto]. steer=mac: steer frames
    /// for --mac to the queue by a flow rule.
    #[arg(long, value_name = "NAME[,…]", group = "host", help_heading = HOST_SIDE)]
    af_xdp: Option<AfXdp>,
    /// Return each frame to the guest that sent it.
    #[arg(long, group = "host", help_heading = HOST_SIDE, hide_short_help = true)]
    loopback: bool,
    /// Take the value of cloud-hypervisor's own vhost_user_net backend.
    ///
    /// Keys: socket, client, tap, num_queues, mac and mtu. queue_size is ignored; ip, mask and
    /// host_mac are refused.
    #[arg(long, value_name = "KEY=VALUE[,…]", groups = ["frontend", "host"], help_heading = FRONTEND, hide_short_help = true)]
    #[serde(skip)]
    net_backend: Option<NetBackend>,

    /// Serve this many queue pairs, 1 to 128 [default: 1, or one per --tap-fd].
    #[arg(long, value_name = "N", help_heading = FRONTEND, hide_short_help = true)]
    queue_pairs: Option<u16>,
    /// Set the device's MAC address [default: the VMM's].
    #[arg(long, value_name = "MAC", help_heading = FRONTEND, hide_short_help = true)]
    mac: Option<MacAddress>,
    /// Set the device's MTU in bytes, 68 or more [default: 1500].
    #[arg(long, value_name = "N", help_heading = FRONTEND, hide_short_help = true)]
    mtu: Option<u16>,
    /// Drop frames from other addresses than --mac, --source-mac and --source-ip [default: off].
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set, help_heading = POLICY, hide_short_help = true)]
    anti_spoofing: Option<bool>,
    /// Let the guest send from these MAC addresses too [default: none].
    #[arg(long, value_name = "MAC[,…]", value_delimiter = ',', help_heading = POLICY, hide_short_help = true)]
    source_mac: Vec<MacAddress>,
    /// Let the guest send from these IP prefixes only [default: any].
    #[arg(long, value_name = "PREFIX[,…]", value_delimiter = ',', help_heading = POLICY, hide_short_help = true)]
    source_ip: Vec<Prefix>,
    /// Let the guest tag frames for these VLANs, 1 to 4094, with --anti-spoofing=on [default: none].
    #[arg(long, value_name = "N[,…]", value_delimiter = ',', help_heading = POLICY, hide_short_help = true)]
    vlan: Vec<u16>,
    /// Drop frames of the guest that these rules deny [default: none].
    ///
    /// Rules name protocols, ports and prefixes: "deny tcp dport 25; allow udp to 192.0.2.0/24;
    /// default deny". The first rule that a frame matches decides.
    #[arg(long, value_name = "RULES", help_heading = POLICY, hide_short_help = true)]
    tx_filter: Option<Filter>,
    /// Drop frames to the guest that these rules deny [default: none].
    #[arg(long, value_name = "RULES", help_heading = POLICY, hide_short_help = true)]
    rx_filter: Option<Filter>,
    /// Limit what the guest sends, by bits, packets or both, as 100mbit,10kpps [default: none].
    ///
    /// Bits count as on the wire. burst=BYTES and packet-burst=N limit what goes at once after a pause
    /// [default: 10 ms of the rate].
    #[arg(long, value_name = "RATE", help_heading = POLICY, hide_short_help = true)]
    tx_limit: Option<Limit>,
    /// Limit what the guest receives, as --tx-limit does what it sends [default: none].
    #[arg(long, value_name = "RATE", help_heading = POLICY, hide_short_help = true)]
    rx_limit: Option<Limit>,
    /// Set the link state; off stops traffic in both directions [default: on].
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set, help_heading = POLICY, hide_short_help = true)]
    link: Option<bool>,
    /// Name the port in messages [default: the host device's name].
    #[arg(long, value_name = "NAME", help_heading = OPERATION, hide_short_help = true)]
    name: Option<String>,
    /// Offer the guest GSO frames [default: on].
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set, help_heading = TUNING, hide_short_help = true)]
    guest_tso: Option<bool>,
    /// Offer the reset of single rings, for ethtool -G and XDP sockets [default: off].
    #[arg(long, value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set, help_heading = TUNING, hide_short_help = true)]
    ring_reset: Option<bool>,
    /// Refuse guest memory whose file could be truncated [default: off].
    #[arg(long, num_args = 0..=1, default_missing_value = "on", value_name = "on|off", value_parser = on_or_off(), hide_possible_values = true, action = clap::ArgAction::Set, help_heading = POLICY, hide_short_help = true)]
    require_sealed_memory: Option<bool>,
    /// Map at most this many bytes of the VMM's memory, as 512m, 64g or 1t [default: twice the
    /// host's RAM, at least 64g].
    ///
    /// Guest memory, dirty log and inflight buffer count.
    #[arg(long, value_name = "SIZE", help_heading = POLICY, hide_short_help = true)]
    max_memory: Option<ByteSize>,
    /// Busy-poll this many µs before sleeping; 0 disables polling [default: up to 100 µs for a
    /// guest's reply, at most 1/16 of the time].
    #[arg(long, value_name = "MICROSECONDS", help_heading = TUNING, hide_short_help = true)]
    busy_poll: Option<u32>,
    /// Write bursts of frames to the TAP by this method [default: auto].
    #[arg(long, value_name = "METHOD", value_enum, help_heading = TUNING, hide_short_help = true)]
    tx_method: Option<TxMethod>,
    /// Run the queue pairs' threads on these CPUs, as 2,4-7, in turn [default: any].
    #[arg(long, value_name = "LIST", help_heading = TUNING, hide_short_help = true)]
    cpu_affinity: Option<CpuList>,
}

impl PortOptions {
    /// Returns these options, with `defaults` for omitted ones. Options that name a frontend, a host side or
    /// one device have no default.
    pub(super) fn or(self, defaults: &Self) -> Self {
        PortOptions {
            socket_group: self.socket_group.or_else(|| defaults.socket_group.clone()),
            queue_pairs: self.queue_pairs.or(defaults.queue_pairs),
            mtu: self.mtu.or(defaults.mtu),
            anti_spoofing: self.anti_spoofing.or(defaults.anti_spoofing),
            tx_filter: self.tx_filter.or_else(|| defaults.tx_filter.clone()),
            rx_filter: self.rx_filter.or_else(|| defaults.rx_filter.clone()),
            tx_limit: self.tx_limit.or(defaults.tx_limit),
            rx_limit: self.rx_limit.or(defaults.rx_limit),
            link: self.link.or(defaults.link),
            guest_tso: self.guest_tso.or(defaults.guest_tso),
            ring_reset: self.ring_reset.or(defaults.ring_reset),
            require_sealed_memory: self.require_sealed_memory.or(defaults.require_sealed_memory),
            max_memory: self.max_memory.or(defaults.max_memory),
            busy_poll: self.busy_poll.or(defaults.busy_poll),
            tx_method: self.tx_method.or(defaults.tx_method),
            cpu_affinity: self.cpu_affinity.or_else(|| defaults.cpu_affinity.clone()),
            ..self
        }
    }

    /// Returns these options with absolute paths.
    pub fn absolute(self) -> Self {
        let own = self.expand_net_backend();
        // Fails for an empty path, which is refused later.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        PortOptions {
            socket_path: own.socket_path.map(absolute),
            connect: own.connect.map(absolute),
            ..own
        }
    }

    /// Returns these options with --net-backend replaced by the options that it stands for.
    fn expand_net_backend(mut self) -> Self {
        let Some(backend) = self.net_backend.take() else { return self };
        let place = if backend.client { &mut self.connect } else { &mut self.socket_path };
        *place = Some(backend.socket);
        PortOptions {
            tap: Some(backend.tap),
            queue_pairs: self.queue_pairs.or(Some(backend.queue_pairs)),
            mac: self.mac.or(backend.mac),
            mtu: self.mtu.or(backend.mtu),
            ..self
        }
    }

    /// Returns the configuration of the port that the options describe.
    ///
    /// # Errors
    /// An option is wrong or missing. The line names the first mistake.
    pub fn check(mut self) -> Result<PortConfig, String> {
        self = self.expand_net_backend();
        let options = self.clone();
        let name = self.name.map(port_name).transpose()?;
        let frontend = match (self.socket_path, self.fd, self.connect) {
            (Some(path), None, None) => Frontend::Listen(socket_path(path)?),
            (None, Some(fd), None) => Frontend::Inherited(fd),
            (None, None, Some(path)) => Frontend::Connect(socket_path(path)?),
            _ => return Err("specify exactly one of socket-path, fd or connect".into()),
        };
        let queues_given = u16::try_from(self.tap_fd.len()).unwrap_or(u16::MAX);
        let queue_pairs = self.queue_pairs.unwrap_or(queues_given.max(1));
        if queue_pairs == 0 || queue_pairs > MAX_QUEUE_PAIRS {
            return Err(format!(
                "queue-pairs={queue_pairs} is not between 1 and {MAX_QUEUE_PAIRS}"
            ));
        }
        let host = match (self.tap, self.af_xdp, self.loopback, queues_given) {
            (Some(name), None, false, 0) => Host::Tap(device_name(&name)?),
            (None, Some(af_xdp), false, 0) => Host::AfXdp(af_xdp),
            (None, None, true, 0) => Host::Loopback,
            (None, None, false, 1..) => Host::TapDescriptors(self.tap_fd),
            _ => return Err("specify exactly one of tap, tap-fd, af-xdp or loopback".into()),
        };
        match &host {
            Host::TapDescriptors(_) if queues_given != queue_pairs => {
                return Err(format!(
                    "queue-pairs={queue_pairs} but tap-fd names {queues_given} queues: \
                     each pair needs one"
                ));
            }
            Host::AfXdp(af_xdp) if af_xdp.steer && self.mac.is_none() => {
                return Err("steer=mac requires the guest's address; set mac".into());
            }
            Host::AfXdp(af_xdp) if af_xdp.steer && queue_pairs > 1 => {
                return Err(format!(
                    "steer=mac steers all frames to one queue, and queue-pairs={queue_pairs}; use one queue \
                     pair"
                ));
            }
            _ => {}
        }
        let anti_spoofing = self.anti_spoofing.unwrap_or(false);
        let macs: Vec<MacAddress> = self.mac.into_iter().chain(self.source_mac).collect();
        if anti_spoofing && macs.is_empty() {
            return Err("anti-spoofing requires the guest's address; set mac or source-mac".into());
        }
        let sources = macs.len() > usize::from(self.mac.is_some()) || !self.source_ip.is_empty();
        if !anti_spoofing && (sources || !self.vlan.is_empty()) {
            return Err("source-mac, source-ip and vlan require anti-spoofing; turn it on".into());
        }
        if let Some(vlan) = self.vlan.iter().find(|vlan| !(1..=MAX_VLAN).contains(*vlan)) {
            return Err(format!("vlan={vlan} is not between 1 and {MAX_VLAN}"));
        }
        let addresses = self.source_ip.into_iter().map(|Prefix(net)| net).collect();
        let allowed_sources = anti_spoofing.then(|| AllowedSources {
            macs: set_of(macs),
            addresses: set_of(addresses),
            vlans: set_of(self.vlan),
        });
        let rx_filter = self.rx_filter.unwrap_or_default();
        if host == Host::Loopback && !rx_filter.is_none() {
            return Err("loopback does not support rx-filter; use tx-filter".into());
        }
        let mtu = self.mtu.unwrap_or(DEFAULT_MTU);
        if mtu < MIN_MTU {
            return Err(format!("mtu={mtu} is less than {MIN_MTU}, the minimum of IPv4"));
        }
        Ok(PortConfig {
            options,
            name,
            frontend,
            socket_group: self.socket_group,
            host,
            queue_pairs,
            mac: self.mac,
            mtu,
            allowed_sources,
            tx_filter: self.tx_filter.unwrap_or_default(),
            rx_filter,
            rx_limit: self.rx_limit.unwrap_or_default(),
            tx_limit: self.tx_limit.unwrap_or_default(),
            link: self.link.unwrap_or(true),
            guest_tso: self.guest_tso.unwrap_or(true),
            ring_reset: self.ring_reset.unwrap_or(false),
            require_sealed_memory: self.require_sealed_memory.unwrap_or(false),
            max_memory: self.max_memory.map(|ByteSize(bytes)| bytes),
            busy_poll: self.busy_poll.map(|time| Duration::from_micros(time.into())),
            tx_method: self.tx_method.unwrap_or(TxMethod::Auto),
            cpu_affinity: self.cpu_affinity.map_or_else(Vec::new, |list| list.0),
        })
    }
}

/// Returns a list sorted and without repetitions.
fn set_of<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort_unstable();
    list.dedup();
    list
}

/// Checks a port's name, which messages, paths and metrics contain verbatim.
fn port_name(name: String) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty()
        || name.len() > MAX_PORT_NAME
        || name.starts_with('.')
        || !name.chars().all(plain)
    {
        return Err(format!(
            "{name:?} is not a valid port name; use 1 to {MAX_PORT_NAME} letters, digits, -, _ and ., \
             without . at the start"
        ));
    }
    Ok(name)
}

/// Checks the length of a unix socket's path.
pub(super) fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(format!(
            "socket path {} has {length} bytes; use at most {MAX_PATH}, the limit of unix sockets",
            path.display()
        ));
    }
    if length == 0 {
        return Err("the socket path is empty; name a path".into());
    }
    Ok(path)
}

/// Checks that the kernel accepts a device's name (`dev_valid_name`). With `%`, the kernel would number the
/// device.
pub(crate) fn device_name(name: &str) -> Result<String, String> {
    let bad = name.is_empty()
        || name.len() > MAX_NAME
        || name == "."
        || name == ".."
        || name.contains(|c: char| {
            c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control()
        });
    if bad {
        return Err(format!(
            "{name:?} is not a valid device name; use 1 to {MAX_NAME} bytes without /, :, % or blanks"
        ));
    }
    Ok(name.to_owned())
}

impl From<AfXdp> for String {
    fn from(af_xdp: AfXdp) -> Self {
        let AfXdp { name, queue, mode, attach, steer } = af_xdp;
        let value = |value: Option<clap::builder::PossibleValue>| {
            value.map_or(String::new(), |value| value.get_name().to_owned())
        };
        let (mode, attach) = (value(mode.to_possible_value()), value(attach.to_possible_value()));
        let steer = if steer { ",steer=mac" } else { "" };
        format!("{name},queue={queue},mode={mode},attach={attach}{steer}")
    }
}

impl FromStr for AfXdp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut parsed = AfXdp {
            name: device_name(parts.next().unwrap_or_default())?,
            queue: 0,
            mode: Mode::Auto,
            attach: Attach::Auto,
            steer: false,
        };
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("'{part}' is not of the form key=value"))?;
            let one_of = |choices: &str| format!("'{value}' is not a valid {key}; write {choices}");
            match key {
                "queue" => {
                    parsed.queue = value.parse().map_err(|_| one_of("a number up to 65535"))?;
                }
                "mode" => {
                    parsed.mode = <Mode as clap::ValueEnum>::from_str(value, false)
                        .map_err(|_| one_of("auto, copy or zero-copy"))?;
                }
                "attach" => {
                    parsed.attach = <Attach as clap::ValueEnum>::from_str(value, false)
                        .map_err(|_| one_of("auto, native or generic"))?;
                }
                "steer" if value == "mac" => parsed.steer = true,
                "steer" => return Err(one_of("mac")),
                _ => return Err(format!("unknown key '{key}'; use queue, mode, attach or steer")),
            }
        }
        if parsed.mode == Mode::ZeroCopy && parsed.attach == Attach::Generic {
            return Err("mode=zero-copy requires the driver; remove attach=generic".into());
        }
        Ok(parsed)
    }
}

impl TryFrom<String> for AfXdp {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
