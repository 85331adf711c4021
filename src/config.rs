//! The command line, and what it means once it is checked.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};
use log::LevelFilter;

use crate::net_config::{MIN_MTU, MacAddress};
use crate::sys::socket::MAX_PATH;
use crate::sys::tap::MAX_NAME;

/// Queue pairs of a port at the most: virtio allows 32768, a frontend names rings with 8 bits.
pub const MAX_QUEUE_PAIRS: u16 = 128;

/// Gives a virtual machine its virtio network card over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "vhost-user-net", version, max_term_width = 100)]
#[command(group = ArgGroup::new("frontend").required(true))]
#[command(group = ArgGroup::new("host").required(true))]
struct Arguments {
    /// Listen on this unix socket for the VMM.
    #[arg(long, value_name = "PATH", group = "frontend")]
    socket_path: Option<PathBuf>,
    /// Use this inherited descriptor: a unix socket that listens, or is connected.
    #[arg(long, value_name = "N", group = "frontend")]
    fd: Option<RawFd>,
    /// Connect to the VMM's unix socket, again and again for ever.
    #[arg(long, value_name = "PATH", group = "frontend")]
    connect: Option<PathBuf>,

    /// Move frames to and from this TAP device, which is made if it is missing.
    #[arg(long, value_name = "NAME", group = "host")]
    tap: Option<String>,
    /// Use these inherited descriptors of a TAP device's queues, one for each queue pair.
    #[arg(long, value_name = "N[,N…]", group = "host", value_delimiter = ',')]
    tap_fd: Vec<RawFd>,
    /// Move frames through AF_XDP sockets on this device's queues, from N on one for each queue
    /// pair, with the guest's memory as theirs. mode: whether its driver reads and writes that
    /// memory itself; attach: where the XDP program runs; steer=mac: bring frames for --mac to the
    /// queue by a flow rule.
    #[arg(long, value_name = "NAME[,queue=N][,mode=auto|copy|zero-copy][,attach=auto|native|generic][,steer=mac]", group = "host", value_parser = parse_af_xdp)]
    af_xdp: Option<AfXdp>,
    /// Return each frame to the guest that sent it: for trying out a VMM or a driver.
    #[arg(long, group = "host")]
    loopback: bool,

    /// Pairs of receive and transmit queues [default: 1, or one per --tap-fd].
    #[arg(long, value_name = "N")]
    queue_pairs: Option<u16>,
    /// The card's MAC address, for a VMM that leaves it to us.
    #[arg(long, value_name = "MAC")]
    mac: Option<MacAddress>,
    /// The card's MTU in bytes; frames up to the TAP's own MTU pass in any case.
    #[arg(long, value_name = "N", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(i64::from(MIN_MTU)..))]
    mtu: u16,
    /// Whether the guest may be given unsegmented frames. Turn it off for guests that forward
    /// frames, or attach XDP programs.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = on_or_off, action = clap::ArgAction::Set)]
    guest_tso: bool,
    /// Whether the guest may reset single rings (ethtool -G, XDP sockets). The VMM must pass that
    /// on to us; QEMU up to 10.2 does not.
    #[arg(long, value_name = "on|off", default_value = "off", value_parser = on_or_off, action = clap::ArgAction::Set)]
    ring_reset: bool,
    /// Look for work this long before going to sleep.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    busy_poll: u32,
    /// How bursts of frames are written to the TAP: auto measures at the start which is cheaper.
    #[arg(long, value_name = "METHOD", value_enum, default_value_t = TxMethod::Auto)]
    tx_method: TxMethod,
    /// Processors for the queue pairs' threads, as 2,4-7: the first pair runs on the first, and
    /// so on, around.
    #[arg(long, value_name = "LIST", value_parser = parse_cpu_list)]
    cpu_affinity: Option<CpuList>,
    /// off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
    /// Print what this program can do, as QEMU's conventions ask for, and exit.
    #[arg(long)]
    print_capabilities: bool,
}

/// Where the frontend comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frontend {
    /// Listen at a path.
    Listen(PathBuf),
    /// An inherited descriptor.
    Inherited(RawFd),
    /// Connect to a path.
    Connect(PathBuf),
}

/// Where frames go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A TAP device by name.
    Tap(String),
    /// Inherited queues of a TAP device.
    TapDescriptors(Vec<RawFd>),
    /// AF_XDP sockets on a network device's queues.
    AfXdp(AfXdp),
    /// Back to the guest.
    Loopback,
}

/// AF_XDP sockets on a network device's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AfXdp {
    /// The device's name.
    pub name: String,
    /// Queue of the first queue pair; the others follow it.
    pub queue: u16,
    /// Who moves frames between the device and the guest's memory.
    pub mode: Mode,
    /// Where the XDP program runs.
    pub attach: Attach,
    /// Whether the card is to bring frames for the guest's address to the queue.
    pub steer: bool,
}

/// Who moves frames between the device and the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// The device if its driver can, else the kernel.
    Auto,
    /// The kernel, by copying.
    Copy,
    /// The device.
    ZeroCopy,
}

/// Where the XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    /// In the driver if it can, else in the kernel's generic code.
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's generic code.
    Generic,
}

/// How bursts of frames are written to a TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TxMethod {
    /// Whichever is found cheaper at the start.
    Auto,
    /// One io_uring submission for a burst; an error where it is not permitted.
    IoUring,
    /// One system call for each frame.
    Writev,
}

/// A list of processors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// Everything that the daemon is told at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the frontend comes from.
    pub frontend: Frontend,
    /// Where frames go.
    pub host: Host,
    /// Pairs of rings.
    pub queue_pairs: u16,
    /// The card's address, if it is ours to set.
    pub mac: Option<MacAddress>,
    /// The card's MTU in bytes.
    pub mtu: u16,
    /// Whether the guest may be given unsegmented frames.
    pub guest_tso: bool,
    /// Whether the guest may reset single rings.
    pub ring_reset: bool,
    /// How long to look for work before going to sleep.
    pub busy_poll: Duration,
    /// How bursts of frames are written to a TAP.
    pub tx_method: TxMethod,
    /// Processors for the workers.
    pub cpu_affinity: Option<CpuList>,
    /// What is logged.
    pub log_level: LevelFilter,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Run with this configuration.
    Run(Config),
    /// Print this to standard output and exit with success.
    Print(String),
}

/// `--print-capabilities` of QEMU's backend program conventions.
const CAPABILITIES: &str = "{\"type\": \"net\", \"features\": []}\n";

/// Reads a command line, program name first.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<Invocation, String> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // By QEMU's conventions it stands alone, so nothing else is required beside it.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print(CAPABILITIES.into()));
    }
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments.check().map(Invocation::Run),
        Err(error) if !error.use_stderr() => Ok(Invocation::Print(error.render().to_string())),
        Err(error) => Err(one_line(&error)),
    }
}

/// clap explains itself in a paragraph; the log has lines.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    lines.fold(first, |text, line| format!("{text} {line}")) + "; try --help"
}

impl Arguments {
    fn check(self) -> Result<Config, String> {
        let frontend = match (self.socket_path, self.fd, self.connect) {
            (Some(path), _, _) => Frontend::Listen(socket_path(path)?),
            (_, Some(fd), _) => Frontend::Inherited(fd),
            (_, _, Some(path)) => Frontend::Connect(socket_path(path)?),
            (None, None, None) => unreachable!("clap requires one of the group"),
        };
        let queues_given = u16::try_from(self.tap_fd.len()).unwrap_or(u16::MAX);
        let queue_pairs = self.queue_pairs.unwrap_or(queues_given.max(1));
        if queue_pairs == 0 || queue_pairs > MAX_QUEUE_PAIRS {
            return Err(format!(
                "--queue-pairs={queue_pairs} is not between 1 and {MAX_QUEUE_PAIRS}"
            ));
        }
        let host = match (self.tap, self.af_xdp) {
            (Some(name), _) => Host::Tap(device_name(&name)?),
            (None, Some(af_xdp)) if af_xdp.steer && self.mac.is_none() => {
                return Err("steer=mac needs the guest's address: --mac".into());
            }
            (None, Some(af_xdp)) if af_xdp.steer && queue_pairs > 1 => {
                return Err(format!(
                    "steer=mac brings all frames to one queue, which does not go with \
                     --queue-pairs={queue_pairs}"
                ));
            }
            (None, Some(af_xdp)) => Host::AfXdp(af_xdp),
            _ if self.loopback => Host::Loopback,
            _ if queues_given == queue_pairs => Host::TapDescriptors(self.tap_fd),
            _ => {
                return Err(format!(
                    "--queue-pairs={queue_pairs} but --tap-fd names {queues_given} queues: \
                     each pair needs one"
                ));
            }
        };
        if let Some(number) = named_twice(&frontend, &host) {
            return Err(format!("descriptor {number} is named twice"));
        }
        Ok(Config {
            frontend,
            host,
            queue_pairs,
            mac: self.mac,
            mtu: self.mtu,
            guest_tso: self.guest_tso,
            ring_reset: self.ring_reset,
            busy_poll: Duration::from_micros(self.busy_poll.into()),
            tx_method: self.tx_method,
            cpu_affinity: self.cpu_affinity,
            log_level: self.log_level,
        })
    }
}

/// A descriptor that --fd and --tap-fd name more than once.
fn named_twice(frontend: &Frontend, host: &Host) -> Option<RawFd> {
    let mut numbers = match host {
        Host::TapDescriptors(numbers) => numbers.clone(),
        Host::Tap(_) | Host::AfXdp(_) | Host::Loopback => Vec::new(),
    };
    if let Frontend::Inherited(number) = frontend {
        numbers.push(*number);
    }
    numbers.sort_unstable();
    numbers.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(format!(
            "socket path {} has {length} bytes: a unix socket's path has {MAX_PATH} at the most",
            path.display()
        ));
    }
    if length == 0 {
        return Err("the socket path is empty".into());
    }
    Ok(path)
}

/// A name that the kernel takes (`dev_valid_name`); `%` would make it number the device.
fn device_name(name: &str) -> Result<String, String> {
    let bad = name.is_empty()
        || name.len() > MAX_NAME
        || name == "."
        || name == ".."
        || name.contains(|c: char| {
            c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control()
        });
    if bad {
        return Err(format!(
            "{name:?} is no name for a network device: 1 to {MAX_NAME} bytes without /, :, % or blanks"
        ));
    }
    Ok(name.to_owned())
}

fn parse_af_xdp(text: &str) -> Result<AfXdp, String> {
    let mut parts = text.split(',');
    let mut parsed = AfXdp {
        name: device_name(parts.next().unwrap_or_default())?,
        queue: 0,
        mode: Mode::Auto,
        attach: Attach::Auto,
        steer: false,
    };
    for part in parts {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("'{part}' is not of the form key=value"))?;
        let one_of = |choices: &str| format!("'{value}' is no {key}: write {choices}");
        match key {
            "queue" => {
                parsed.queue = value.parse().map_err(|_| one_of("a number up to 65535"))?;
            }
            "mode" => {
                parsed.mode =
                    Mode::from_str(value, false).map_err(|_| one_of("auto, copy or zero-copy"))?;
            }
            "attach" => {
                parsed.attach = Attach::from_str(value, false)
                    .map_err(|_| one_of("auto, native or generic"))?;
            }
            "steer" if value == "mac" => parsed.steer = true,
            "steer" => return Err(one_of("mac")),
            _ => return Err(format!("'{key}' is none of queue, mode, attach and steer")),
        }
    }
    if parsed.mode == Mode::ZeroCopy && parsed.attach == Attach::Generic {
        return Err("mode=zero-copy needs the driver: it does not go with attach=generic".into());
    }
    Ok(parsed)
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".into()),
    }
}

fn parse_cpu_list(text: &str) -> Result<CpuList, String> {
    let number =
        |text: &str| text.parse::<usize>().map_err(|_| format!("'{text}' is no processor number"));
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if last < first || last >= libc::CPU_SETSIZE as usize {
            return Err(format!("'{part}' is no range of processors"));
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Config, String> {
        let all = ["vhost-user-net"].iter().chain(arguments).map(Into::into);
        match parse(all)? {
            Invocation::Run(config) => Ok(config),
            Invocation::Print(text) => panic!("{text}"),
        }
    }

    #[test]
    fn a_socket_and_a_tap_are_enough() {
        let config = read(&["--socket-path=/run/a", "--tap=vnet0"]).unwrap();
        assert_eq!(config.frontend, Frontend::Listen("/run/a".into()));
        assert_eq!(config.host, Host::Tap("vnet0".into()));
        assert_eq!((config.queue_pairs, config.mtu, config.guest_tso), (1, 1500, true));
    }

    #[test]
    fn every_option_is_understood() {
        let config = read(&[
            "--connect=/run/a",
            "--tap-fd=7,8",
            "--mac=52:54:00:00:00:01",
            "--mtu=9000",
            "--guest-tso=off",
            "--busy-poll=50",
            "--cpu-affinity=1,3-4",
            "--log-level=debug",
        ])
        .unwrap();
        assert_eq!(config.host, Host::TapDescriptors(vec![7, 8]));
        assert_eq!(config.queue_pairs, 2);
        assert!(!config.guest_tso);
        assert_eq!(config.busy_poll, Duration::from_micros(50));
        assert_eq!(config.cpu_affinity, Some(CpuList(vec![1, 3, 4])));
    }

    #[test]
    fn an_af_xdp_port_is_a_device_and_what_differs_from_the_default() {
        let config = read(&["--socket-path=a", "--af-xdp=eth1"]).unwrap();
        let plain = AfXdp {
            name: "eth1".into(),
            queue: 0,
            mode: Mode::Auto,
            attach: Attach::Auto,
            steer: false,
        };
        assert_eq!(config.host, Host::AfXdp(plain.clone()));
        let option = "--af-xdp=eth1,queue=3,mode=zero-copy,attach=native,steer=mac";
        let config = read(&["--socket-path=a", option, "--mac=52:54:00:00:00:01"]).unwrap();
        let expected =
            AfXdp { queue: 3, mode: Mode::ZeroCopy, attach: Attach::Native, steer: true, ..plain };
        assert_eq!(config.host, Host::AfXdp(expected));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_that_names_it() {
        let long = format!("--socket-path=/{}", "x".repeat(107));
        let cases: &[(&[&str], &str)] = &[
            (&["--tap=a"], "--socket-path"),
            (&["--socket-path=a"], "--tap"),
            (&["--socket-path=a", "--fd=3", "--tap=a"], "--fd"),
            (&["--socket-path=a", "--tap=a", "--loopback"], "--loopback"),
            (&["--socket-path=a", "--tap=a", "--frobnicate"], "--frobnicate"),
            (&[&long, "--tap=a"], "107"),
            (&["--socket-path=a", "--tap=a", "--queue-pairs=0"], "--queue-pairs=0"),
            (&["--socket-path=a", "--tap=a", "--queue-pairs=129"], "128"),
            (&["--socket-path=a", "--tap-fd=5,6", "--queue-pairs=3"], "--tap-fd names 2"),
            (&["--fd=5", "--tap-fd=6,5"], "descriptor 5"),
            (&["--socket-path=a", "--tap=a", "--mac=1:2"], "1:2"),
            (&["--socket-path=a", "--tap=a", "--mtu=67"], "67"),
            (&["--socket-path=a", "--tap=a", "--guest-tso=maybe"], "maybe"),
            (&["--socket-path=a", "--tap=a", "--cpu-affinity=4-2"], "4-2"),
            (&["--socket-path=a", "--tap=a", "--log-level=loud"], "loud"),
            (&["--socket-path=a", "--tap=far/too/long"], "far/too/long"),
            (&["--socket-path=a", "--tap=vnet%d"], "vnet%d"),
            (&["--socket-path=a", "--af-xdp=a/b"], "a/b"),
            (&["--socket-path=a", "--af-xdp=eth1,3"], "'3'"),
            (&["--socket-path=a", "--af-xdp=eth1,queue=x"], "'x'"),
            (&["--socket-path=a", "--af-xdp=eth1,mode=fast"], "'fast'"),
            (&["--socket-path=a", "--af-xdp=eth1,lane=1"], "'lane'"),
            (&["--socket-path=a", "--af-xdp=eth1,mode=zero-copy,attach=generic"], "generic"),
            (&["--socket-path=a", "--af-xdp=eth1,steer=ip"], "'ip'"),
            (&["--socket-path=a", "--af-xdp=eth1,steer=mac"], "--mac"),
            (
                &[
                    "--socket-path=a",
                    "--af-xdp=eth1,steer=mac",
                    "--mac=52:54:00:00:00:01",
                    "--queue-pairs=2",
                ],
                "--queue-pairs=2",
            ),
            (&["--socket-path=a", "--tap=a", "--af-xdp=b"], "--af-xdp"),
        ];
        for (arguments, named) in cases {
            let error = read(arguments).unwrap_err();
            assert!(error.contains(named), "{arguments:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn capabilities_need_no_other_option() {
        let all = ["vhost-user-net", "--print-capabilities"].map(Into::into);
        let Ok(Invocation::Print(text)) = parse(all) else { panic!("not printed") };
        assert!(text.contains("\"type\": \"net\""));
    }
}
