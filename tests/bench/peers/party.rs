//! The backends that are compared: each on a device of its own, on processor 1.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use vmm_sys_util::tempdir::TempDir;

use super::vhost_net;
use crate::af_xdp::veth;
use crate::measure::backend_processor;
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::network::{ip, output};
use crate::support::testpmd::Testpmd;

/// What a backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// This daemon, with these options.
    Ours(&'static [&'static str]),
    /// This daemon on a card with zero copy, `eth0` of the emulated machine, whose wire leads to `eth1`.
    OnCard,
    /// The plain backend.
    Plain,
    /// The kernel's.
    VhostNet,
    /// DPDK's testpmd, `net_vhost` and a driver for the device.
    Dpdk(&'static str),
    /// Open vSwitch with DPDK, and a driver for the device.
    Ovs(&'static str),
}

/// A backend to be compared.
#[derive(Debug, Clone, Copy)]
pub(super) struct Contestant {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Whether its device is a TAP; else it is one end of a veth.
    pub(super) tap: bool,
    /// Whether it looks for frames all the time rather than to sleep.
    pub(super) polls: bool,
}

/// How long our own looks for frames before it sleeps, where it is to poll.
const BUSY_POLL: &str = "--busy-poll=10000";

/// All of them.
pub(super) const CONTESTANTS: [Contestant; 9] = [
    VHOST_NET,
    Contestant { name: "vhost-user-net, TAP", kind: Kind::Ours(&[]), tap: true, polls: false },
    Contestant { name: "plain backend, TAP", kind: Kind::Plain, tap: true, polls: false },
    Contestant { name: "DPDK, TAP", kind: Kind::Dpdk("net_tap"), tap: true, polls: true },
    Contestant { name: "vhost-user-net, AF_XDP", kind: Kind::Ours(&[]), tap: false, polls: false },
    Contestant { name: "DPDK, AF_XDP", kind: Kind::Dpdk("net_af_xdp"), tap: false, polls: true },
    Contestant { name: "OVS-DPDK, AF_XDP", kind: Kind::Ovs("net_af_xdp"), tap: false, polls: true },
    Contestant {
        name: "vhost-user-net, TAP, --busy-poll",
        kind: Kind::Ours(&[BUSY_POLL]),
        tap: true,
        polls: true,
    },
    Contestant {
        name: "vhost-user-net, AF_XDP, --busy-poll",
        kind: Kind::Ours(&[BUSY_POLL]),
        tap: false,
        polls: true,
    },
];

const VHOST_NET: Contestant =
    Contestant { name: "vhost-net, TAP", kind: Kind::VhostNet, tap: true, polls: false };

/// Those whose instructions are counted.
pub(super) const COUNTED: [Contestant; 7] = [
    VHOST_NET,
    Contestant { name: "vhost-user-net, TAP", kind: Kind::Ours(&[]), tap: true, polls: false },
    Contestant {
        name: "vhost-user-net, TAP, writev",
        kind: Kind::Ours(&["--tx-method=writev"]),
        tap: true,
        polls: false,
    },
    Contestant {
        name: "vhost-user-net, TAP, --busy-poll=0",
        kind: Kind::Ours(&["--busy-poll=0"]),
        tap: true,
        polls: false,
    },
    Contestant { name: "vhost-user-net, AF_XDP", kind: Kind::Ours(&[]), tap: false, polls: false },
    Contestant {
        name: "vhost-user-net, AF_XDP, zero copy",
        kind: Kind::OnCard,
        tap: false,
        polls: false,
    },
    Contestant { name: "plain backend, TAP", kind: Kind::Plain, tap: true, polls: false },
];

/// A running backend.
pub(super) struct Party {
    pub(super) contestant: Contestant,
    pub(super) number: u8,
    program: Program,
    socket: PathBuf,
    /// How long it took until it could be connected to.
    pub(super) started_in: Duration,
    _directory: TempDir,
}

enum Program {
    Ours(Daemon),
    /// A mode of this benchmark's.
    Bench(Child),
    Dpdk(Testpmd),
    Ovs(Ovs),
}

impl Party {
    /// Starts the backend; `number` is one that no other has.
    pub(super) fn start(contestant: Contestant, number: u8) -> Self {
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        let mut socket = directory.as_path().join("socket");
        let device = device(contestant, number);
        if contestant.kind == Kind::OnCard {
            take_cards();
        } else if contestant.tap {
            // DPDK makes its device itself, with flags of its own.
            if !matches!(contestant.kind, Kind::Dpdk(_)) {
                ip(&format!("tuntap add dev {device} mode tap vnet_hdr"));
            }
        } else {
            veth(&format!("party{number}"));
        }
        let started = Instant::now();
        let program = match contestant.kind {
            Kind::Ours(_) | Kind::OnCard => {
                let options = if let Kind::Ours(options) = contestant.kind { options } else { &[] };
                let port = if contestant.tap { "tap" } else { "af-xdp" };
                let port = format!("--{port}={device}");
                let affinity = format!("--cpu-affinity={}", backend_processor());
                let all: Vec<&str> =
                    [&*port, &affinity].into_iter().chain(options.to_vec()).collect();
                let daemon = Daemon::start(&all);
                socket = daemon.socket();
                Program::Ours(daemon)
            }
            Kind::Plain => Program::Bench(bench("--plain-backend", &socket, &device)),
            Kind::VhostNet => Program::Bench(bench("--vhost-net", &socket, &device)),
            Kind::Dpdk(driver) => {
                let device = format!("{driver}0,iface={device}");
                Program::Dpdk(Testpmd::backend("1", &socket, &device))
            }
            Kind::Ovs(driver) => {
                let device = format!("{driver}0,iface={device}");
                Program::Ovs(Ovs::start(directory.as_path(), &socket, &device))
            }
        };
        eventually("the backend listens", || socket.exists());
        let started_in = started.elapsed();
        let party =
            Party { contestant, number, program, socket, started_in, _directory: directory };
        let wire = party.wire();
        ip(&format!("link set {wire} up"));
        if !contestant.tap {
            // What goes through a veth comes with its checksums left undone.
            output("ethtool", &format!("-K {wire} tx off"));
        }
        ip(&format!("address add {}/24 dev {wire}", party.host_address()));
        ip(&format!("neighbour add {} lladdr {} dev {wire}", party.guest_address(), party.mac()));
        party.pause();
        party
    }

    /// Where the backend listens.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The device at the host's end: what the guest sends arrives there, and what is sent there goes
    /// to the guest.
    pub(super) fn wire(&self) -> String {
        match self.contestant {
            Contestant { kind: Kind::OnCard, .. } => CARDS[1].into(),
            Contestant { tap: true, .. } => device(self.contestant, self.number),
            Contestant { tap: false, .. } => format!("party{}1", self.number),
        }
    }

    pub(super) fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    pub(super) fn guest_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 2)
    }

    /// The guest's, which testpmd has too.
    pub(super) fn mac(&self) -> &'static str {
        "52:54:00:77:00:02"
    }

    fn process(&self) -> u32 {
        match &self.program {
            Program::Ours(daemon) => daemon.process(),
            Program::Bench(child) => child.id(),
            Program::Dpdk(testpmd) => testpmd.process(),
            Program::Ovs(ovs) => ovs.switch.id(),
        }
    }

    /// On-CPU nanoseconds of all its threads, and of those of the kernel's that serve it.
    pub(super) fn cpu(&self) -> u64 {
        let threads = vhost_net::kernel_threads(self.process());
        threads.into_iter().chain([self.process()]).map(crate::support::cpu_nanoseconds).sum()
    }

    /// Ticks (10 ms) in user space, and in the kernel, as it samples them.
    pub(super) fn ticks(&self) -> [u64; 2] {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        [11, 12].map(|field| fields[field].parse().unwrap())
    }

    /// Memory that is its own, and all that it has mapped, in KiB.
    pub(super) fn memory(&self) -> [u64; 2] {
        memory_of(self.process())
    }

    /// Has it stand still, if it does not by itself.
    pub(super) fn pause(&self) {
        if self.contestant.polls {
            self.signal(Signal::SIGSTOP);
        }
    }

    /// Has it go on.
    pub(super) fn resume(&self) {
        if self.contestant.polls {
            self.signal(Signal::SIGCONT);
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process() as i32), signal).unwrap();
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.resume();
        if let Program::Bench(child) = &mut self.program {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A process's memory that is its own, no file's and no guest's, and all that it has mapped, in KiB.
pub(super) fn memory_of(process: u32) -> [u64; 2] {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let value = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let huge = value("HugetlbPages:");
    [value("RssAnon:") + huge, value("VmRSS:") + huge]
}

/// Starts this benchmark in another mode, as a backend.
fn bench(mode: &str, socket: &Path, device: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([mode.as_ref(), socket.as_os_str(), device.as_ref()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// The cards of the emulated machine: the first has zero copy.
const CARDS: [&str; 2] = ["eth0", "eth1"];

/// Moves them into this thread's network namespace.
fn take_cards() {
    for card in CARDS {
        let process = std::process::id();
        let words = format!("--net=/proc/{}/ns/net ip link set {card} netns {process}", getppid());
        assert_eq!(output("nsenter", &words), "");
        // The guest's address is not its own.
        ip(&format!("link set {card} promisc on up"));
    }
}

fn device(contestant: Contestant, number: u8) -> String {
    match contestant {
        Contestant { kind: Kind::OnCard, .. } => CARDS[0].into(),
        Contestant { tap: true, .. } => format!("tap{number}"),
        Contestant { tap: false, .. } => format!("party{number}0"),
    }
}

/// Open vSwitch: its database and its switch, which has one bridge between the two ports.
struct Ovs {
    database: Child,
    switch: Child,
}

const SWITCH: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";

impl Ovs {
    fn start(directory: &Path, socket: &Path, device: &str) -> Self {
        let path = |name: &str| directory.join(name).display().to_string();
        let command = |program: &str, words: &[&str]| {
            let mut command = Command::new(program);
            command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
            let log = fs::File::options().create(true).append(true).open(path("log")).unwrap();
            command.stderr(log);
            for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
                command.env(name, directory);
            }
            command
        };
        let run = |program: &str, words: &[&str]| {
            let status = command(program, words).status().unwrap();
            let log = || fs::read_to_string(path("log")).unwrap();
            assert!(status.success(), "{program} {words:?}: {}", log());
        };
        let (file, remote) = (path("database"), format!("unix:{}", path("database.sock")));
        run("ovsdb-tool", &["create", &file, "/usr/share/openvswitch/vswitch.ovsschema"]);
        let listen = format!("--remote=p{remote}");
        let database = command("ovsdb-server", &[&file, &listen]).spawn().unwrap();
        eventually("the database listens", || UnixStream::connect(path("database.sock")).is_ok());
        let set = |words: &[&str]| {
            let database = format!("--db={remote}");
            run("ovs-vsctl", &[&[&*database, "--timeout=20"], words].concat());
        };
        set(&["--no-wait", "init"]);
        let name = socket.file_name().unwrap().to_str().unwrap();
        set(&[
            "--no-wait",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:pmd-cpu-mask=0x2",
            "other_config:dpdk-socket-mem=256",
            "other_config:dpdk-extra=--no-pci",
        ]);
        let switch = command(SWITCH, &[&remote]).spawn().unwrap();
        set(&["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"]);
        let devargs = format!("options:dpdk-devargs={device}");
        set(&["add-port", "br0", "out", "--", "set", "Interface", "out", "type=dpdk", &devargs]);
        set(&["add-port", "br0", name, "--", "set", "Interface", name, "type=dpdkvhostuser"]);
        let bridge = path("br0.mgmt");
        run("ovs-ofctl", &["del-flows", &bridge]);
        for (from, to) in [("out", name), (name, "out")] {
            let flow = format!("in_port={from},actions=output:{to}");
            run("ovs-ofctl", &["add-flow", &bridge, &flow]);
        }
        Ovs { database, switch }
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        for child in [&mut self.switch, &mut self.database] {
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// Why a contestant can't take part, if it can't.
pub(super) fn missing(contestant: &Contestant) -> Option<&'static str> {
    match contestant.kind {
        Kind::Dpdk(_) if !is_installed("dpdk-testpmd") => Some("dpdk-testpmd is not installed"),
        Kind::Ovs(_) if !Path::new(SWITCH).exists() => {
            Some("openvswitch-switch-dpdk is not installed")
        }
        Kind::Ovs(_) if free_huge_pages() < OVS_HUGE_PAGES => {
            Some("there are no 256 MiB of huge pages for it")
        }
        Kind::OnCard if !zero_copy_is_there() => Some("no card here has zero copy"),
        Kind::VhostNet if !Path::new("/dev/vhost-net").exists() => {
            Some("there is no /dev/vhost-net")
        }
        _ => None,
    }
}

/// Whether this is the emulated machine, and its kernel's driver has zero copy: virtio_net's of Linux 6.18.
fn zero_copy_is_there() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next(), numbers.next());
    Path::new("/work/.command").exists() && version >= (Some(6), Some(18))
}

/// Huge pages of 2 MiB that its packets take.
const OVS_HUGE_PAGES: u64 = 128;

fn free_huge_pages() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.map_or(0, |number| number.trim().parse().unwrap())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).exists())
}
