//! Cases 57 to 59: frontends that delay a take-over, and new daemons that fail, die or hang.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{
    CSUM, Card, GUEST_CSUM, GUEST_TSO, HOST_TSO, LOG_ALL, Options, PROTOCOL,
};
use crate::support::frontend::{Frontend, header};
use crate::support::guest::memfd;
use crate::support::hostile::note;
use crate::support::network::{Wire, enter_quiet_namespace, ip, output, wait_for_carrier};
use crate::support::tracer::{Counts, Strike, Traced, Window};
use crate::support::traffic::{check_both_ways, frame, tcp_frame};
use crate::support::{eventually, needs_root, one_at_a_time};

const CONTROL: &str = "control = \"{}/control\"\n";

/// Connects a frontend that negotiates all protocol features.
fn begin(daemon: &Daemon) -> Frontend {
    let mut frontend = Frontend::new(daemon.connect_to("evil"));
    frontend.begin();
    frontend.set_features(Options::default().features);
    let features = frontend.get(FrontendReq::GET_PROTOCOL_FEATURES);
    frontend.ask(FrontendReq::SET_PROTOCOL_FEATURES, &features.to_ne_bytes(), &[]);
    frontend
}

/// Negotiates protocol features again, without a feature that is in use.
fn drop_feature(frontend: &mut Frontend, bit: u32) {
    let rest = frontend.get(FrontendReq::GET_PROTOCOL_FEATURES) & !(1 << bit);
    frontend.ask(FrontendReq::SET_PROTOCOL_FEATURES, &rest.to_ne_bytes(), &[]);
}

/// A value that a frontend holds during the take-over.
type Held = Box<dyn std::any::Any>;
/// A function that prepares the obstacle.
type Obstacle = fn(&Daemon) -> Held;

/// Obstacles to a take-over: name, whether the frontend must keep its connection, and preparation.
const OBSTACLES: &[(&str, bool, Obstacle)] = &[
    ("memory's file shrunk", false, |daemon| {
        let card = card(daemon, "evil", Options::default());
        card.ram.file.set_len(0x1000).unwrap();
        Box::new(card)
    }),
    ("log's file shrunk", false, |daemon| {
        let mut card = card(daemon, "evil", Options::default());
        let log = memfd(1 << 20);
        assert!(card.frontend.set_log_base(1 << 20, 0, &log));
        card.frontend.set_features(card.options.features | LOG_ALL);
        log.set_len(0).unwrap();
        Box::new((card, log))
    }),
    ("inflight buffer's file shrunk", false, |daemon| {
        let mut frontend = begin(daemon);
        let buffer = memfd(1 << 20);
        let payload = crate::support::frontend::inflight(1 << 20, 0, 2, 256);
        frontend.ask(FrontendReq::SET_INFLIGHT_FD, &payload, &[buffer.as_raw_fd()]);
        buffer.set_len(0).unwrap();
        Box::new(frontend)
    }),
    ("MTU set, then its feature dropped", true, |daemon| {
        let mut frontend = begin(daemon);
        frontend.ask(FrontendReq::NET_SET_MTU, &1400_u64.to_ne_bytes(), &[]);
        drop_feature(&mut frontend, 4);
        Box::new(frontend)
    }),
    ("nine regions, then their feature dropped", true, |daemon| {
        let mut frontend = begin(daemon);
        let file = memfd(64 << 12);
        for index in 0..9_u64 {
            let numbers = [0, index << 12, 4096, 0x5555_0000_0000 + (index << 12), index << 12];
            let payload = numbers.map(u64::to_ne_bytes).concat();
            frontend.ask(FrontendReq::ADD_MEM_REG, &payload, &[file.as_raw_fd()]);
        }
        drop_feature(&mut frontend, 15);
        Box::new(frontend)
    }),
    ("a log, then its feature dropped", true, |daemon| {
        let mut card = card(daemon, "evil", Options::default());
        let log = memfd(1 << 20);
        assert!(card.frontend.set_log_base(1 << 20, 0, &log));
        drop_feature(&mut card.frontend, 1);
        Box::new((card, log))
    }),
    ("a status, then its feature dropped", true, |daemon| {
        let mut frontend = begin(daemon);
        frontend.ask(FrontendReq::SET_STATUS, &15_u64.to_ne_bytes(), &[]);
        drop_feature(&mut frontend, 16);
        Box::new(frontend)
    }),
    ("a channel for requests, then its feature dropped", true, |daemon| {
        let mut frontend = begin(daemon);
        let (channel, kept) = UnixStream::pair().unwrap();
        frontend.ask(FrontendReq::SET_BACKEND_REQ_FD, &[], &[channel.as_raw_fd()]);
        drop_feature(&mut frontend, 5);
        Box::new((frontend, kept))
    }),
    ("a channel that can't be passed", true, |daemon| {
        let mut frontend = begin(daemon);
        let (channel, kept) = UnixStream::pair().unwrap();
        frontend.ask(FrontendReq::SET_BACKEND_REQ_FD, &[], &[channel.as_raw_fd()]);
        nest(&kept);
        Box::new((frontend, kept))
    }),
    ("half a message", false, |daemon| {
        let frontend = begin(daemon);
        let mut stream = frontend.stream;
        stream.write_all(&header(FrontendReq::GET_FEATURES.into(), 1, 0)[..5]).unwrap();
        Box::new(stream)
    }),
    ("replies not read", false, |daemon| {
        let mut stream = begin(daemon).stream;
        stream.set_nonblocking(true).unwrap();
        let request = header(FrontendReq::GET_FEATURES.into(), 1, 0).repeat(100);
        while stream.write(&request).is_ok() {}
        Box::new(stream)
    }),
    ("messages without end", true, |daemon| {
        let mut frontend = begin(daemon);
        let held = ShutOnDrop(frontend.stream.try_clone().unwrap());
        std::thread::spawn(move || {
            let code = FrontendReq::GET_FEATURES;
            loop {
                frontend.send(code, &[]);
                if frontend.try_reply(code).is_none() {
                    return;
                }
            }
        });
        Box::new(held)
    }),
    ("a connection that can't be passed", false, |daemon| {
        let stream = begin(daemon).stream;
        // The daemon reads an incomplete message that has a descriptor. So the sockets wait where the
        // daemon does not read: after requests whose replies the frontend does not read.
        stream.set_nonblocking(true).unwrap();
        let request = header(FrontendReq::GET_FEATURES.into(), 1, 0).repeat(100);
        while (&stream).write(&request).is_ok() {}
        nest(&stream);
        Box::new(stream)
    }),
];

/// A connection that a thread uses, shut down on drop.
struct ShutOnDrop(UnixStream);

impl Drop for ShutOnDrop {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// Sends a socket with a socket in flight, which has a socket in flight, and so on.
fn nest(stream: &UnixStream) {
    let (mut inner, mut kept) = UnixStream::pair().unwrap();
    for _ in 0..8 {
        let (outer, its_end) = UnixStream::pair().unwrap();
        if its_end.send_with_fd(&b"x"[..], inner.as_raw_fd()).is_err() {
            break;
        }
        // The kernel keeps sockets in flight open.
        (inner, kept) = (outer, its_end);
    }
    let _ = stream.send_with_fd(&b"x"[..], inner.as_raw_fd());
    drop(kept);
}

fn card(daemon: &Daemon, port: &str, options: Options) -> Card {
    Card::start(Frontend::new(daemon.connect_to(port)), options)
}

#[test]
fn hostile_57_no_frontend_prevents_a_takeover() {
    for (what, keeps, veto) in OBSTACLES {
        let ports = port("good", "loopback = true") + &port("evil", "loopback = true");
        let mut daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "evil");
        let mut good = card(&daemon, "good", Options::default());
        good.check_echo(20);
        let held = veto(&daemon);
        daemon.upgrade();
        good.check_echo(20);
        let state = || daemon.show("evil")["state"].as_str().unwrap().to_owned();
        let connected = || state() != "waiting";
        println!("{what}: {}", state());
        assert!(daemon.show("good")["state"] == "running", "{what}");
        if *keeps {
            assert!(connected(), "{what}: {}", daemon.log());
        } else {
            eventually("the frontend is disconnected", || !connected());
        }
        drop(held);
        // The next frontend is served.
        eventually("the frontend has gone", || !connected());
        card(&daemon, "evil", Options::default()).check_echo(20);
    }
    note(57, "C");
}

#[test]
fn takeover_leaves_a_stuck_port_behind() {
    for thread in ["evil", "evil/0"] {
        let ports = port("good", "loopback = true") + &port("evil", "loopback = true");
        let mut daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "evil");
        let mut good = card(&daemon, "good", Options::default());
        let evil = card(&daemon, "evil", Options::default());
        good.check_echo(20);
        let stuck = daemon.thread(thread);
        ptrace::attach(stuck).unwrap();
        waitpid(stuck, Some(WaitPidFlag::__WALL)).unwrap();
        let successor = daemon.start_successor();
        eventually("the new daemon has taken over", || daemon.log().contains("daemon: took over"));
        // A traced process exits only after its tracer has waited for it.
        waitpid(stuck, Some(WaitPidFlag::__WALL)).unwrap();
        daemon.become_successor(successor);
        good.check_echo(20);
        drop(evil);
        card(&daemon, "evil", Options::default()).check_echo(20);
    }
}

/// A daemon with guests on TAPs of all kinds.
struct TapGuests {
    daemon: Daemon,
    multi: Card,
    single: Card,
    old: Card,
    _unlinked: Card,
    echo: Card,
    wires: [Wire; 3],
    settings: String,
}

const TAPS: [&str; 4] = ["multi", "single", "old", "unlinked"];

impl TapGuests {
    fn build() -> Self {
        enter_quiet_namespace();
        for tap in TAPS {
            let several = if tap == "multi" { " multi_queue" } else { "" };
            ip(&format!("tuntap add dev {tap} mode tap vnet_hdr{several}"));
            ip(&format!("link set {tap} up"));
        }
        let mut ports = CONTROL.to_owned();
        for tap in TAPS {
            let more = match tap {
                "multi" => "queue-pairs = 2\nrx-filter = \"deny tcp dport 7; default allow\"",
                "unlinked" => "link = false",
                _ => "",
            };
            ports += &port(tap, &format!("tap = \"{tap}\"\n{more}"));
        }
        ports += &port("echo", "loopback = true");
        let daemon = Daemon::with_config(&ports, "echo");
        let usual = Options::default();
        let offloads = usual.features | CSUM | GUEST_CSUM | HOST_TSO | GUEST_TSO;
        let multi = card(&daemon, "multi", Options { pairs: 2, ..usual });
        let single = card(&daemon, "single", Options { features: offloads, ..usual });
        let old = card(&daemon, "old", Options { features: PROTOCOL, ..usual });
        let _unlinked = card(&daemon, "unlinked", usual);
        let echo = card(&daemon, "echo", usual);
        TAPS[..3].iter().for_each(|tap| wait_for_carrier(tap));
        let wires = ["multi", "single", "old"].map(Wire::open);
        let mut guests = TapGuests {
            daemon,
            multi,
            single,
            old,
            _unlinked,
            echo,
            wires,
            settings: String::new(),
        };
        guests.settings = Self::settings();
        guests.check("at the beginning");
        guests
    }

    /// Returns the TAPs' offloads and carriers.
    fn settings() -> String {
        let carrier =
            |tap| fs::read_to_string(format!("/sys/class/net/{tap}/carrier")).unwrap_or_default();
        TAPS.map(|tap| output("ethtool", &format!("-k {tap}")) + &carrier(tap)).concat()
    }

    /// Checks traffic and settings, which must be as at the beginning.
    #[track_caller]
    fn check(&mut self, when: &str) {
        assert_eq!(Self::settings(), self.settings, "{when}");
        let [multi, single, old] = &self.wires;
        self.echo.check_echo(10);
        check_both_ways(single, &mut self.single, 4);
        let (header, bytes) = tcp_frame(1900, 1448);
        let received = || output("ip", "-s link show single");
        let before = received().lines().nth(3).unwrap().trim().to_owned();
        self.single.send_with(0, &header, &bytes);
        let count = |line: &str| line.split(' ').next().unwrap().parse::<usize>().unwrap();
        let after = received().lines().nth(3).unwrap().trim().to_owned();
        assert_eq!(count(&after) - count(&before), bytes.len(), "{when}: segmentation");
        while single.receive_any(1).is_some() {}
        self.old.send_with(0, &[0; 10], &frame(1, 100));
        assert_eq!(old.receive(1000), Some(frame(1, 100)), "{when}: old, to the host");
        old.send(&frame(2, 100));
        let (head, length) = self.old.rx[0].wait_used();
        let at = self.old.rx_buffer(0, head) + 10;
        assert_eq!(length, 110, "{when}: old");
        assert_eq!(self.old.ram.read(at, 100), frame(2, 100), "{when}: old, to the guest");
        self.old.post(0, at - 10);
        self.old.rx[0].publish();
        for pair in 0..2 {
            self.multi.send(pair, &frame(pair, 100));
            assert_eq!(multi.receive(1000), Some(frame(pair, 100)), "{when}: multi, to the host");
        }
        // These flows hash to both queues.
        let flow = |number: u16| {
            let (_, mut bytes) = tcp_frame(100, 1448);
            bytes[34..36].copy_from_slice(&(1000 + number).to_be_bytes());
            bytes
        };
        (0..16).for_each(|number| multi.send(&flow(number)));
        // The filter denies this one.
        let mut denied = flow(0);
        denied[36..38].copy_from_slice(&7_u16.to_be_bytes());
        multi.send(&denied);
        let mut came = [0, 0];
        eventually("frames come on both queues", || {
            for (pair, came) in came.iter_mut().enumerate() {
                while self.multi.try_receive(pair).is_some() {
                    *came += 1;
                }
            }
            came[0] + came[1] == 16
        });
        assert!(came[0] > 0 && came[1] > 0, "{when}: {came:?}");
        while multi.receive_any(1).is_some() {}
        assert!((0..2).all(|pair| self.multi.try_receive(pair).is_none()), "{when}: filter");
    }

    fn successor(&self, window: Window, strike: Strike, nth: usize) -> Traced {
        Traced::start(&self.daemon.successor(), self.daemon.open_log(), window, strike, nth)
    }

    /// Waits until the old daemon serves all ports.
    fn has_resumed(&self) {
        eventually("the ports are resumed", || {
            let shown = self.daemon.ctl(&["set", "echo", "--tx-limit=none"]);
            shown.status.success()
        });
    }
}

/// Reports whether a system call touches state that both daemons share, or needs a limited resource.
fn shares(number: u64, arguments: [u64; 3]) -> bool {
    match number {
        // mmap of guest memory.
        9 => arguments[2] & 2 != 0 && arguments[1] > 1 << 20,
        // ioctl, sendto, sendmsg, recvmsg, listen, setsockopt, io_uring_setup, clone3.
        _ => [16, 44, 46, 47, 50, 54, 425, 435].contains(&number),
    }
}

/// Window from the request for the ports to the request to release them.
const TAKE_OVER: Window = Window { from: "hand-over", to: "let-go", counts: shares };

#[test]
fn hostile_58_killed_new_daemon_changes_nothing() {
    needs_root!("hostile_58_killed_new_daemon_changes_nothing");
    let _alone = one_at_a_time();
    let mut guests = TapGuests::build();
    let mut killed = 0;
    for nth in 0.. {
        let mut successor = guests.successor(TAKE_OVER, Strike::Kill, nth);
        let ended = successor.run(|| !guests.daemon.is_alive());
        let Some(call) = successor.struck else {
            assert!(!ended, "{}", guests.daemon.log());
            guests.daemon.become_successor(successor.release());
            break;
        };
        successor.kill();
        guests.has_resumed();
        guests.check(&format!("killed before call {nth}, {call}"));
        killed += 1;
    }
    println!("killed before each of {killed} system calls");
    assert!(killed > 30, "{killed}");
    guests.check("at the end");
    note(58, "C");
}

#[test]
fn hostile_59_hanging_new_daemon_changes_nothing() {
    needs_root!("hostile_59_hanging_new_daemon_changes_nothing");
    let _alone = one_at_a_time();
    let mut guests = TapGuests::build();
    for nth in [0, 5, 20, 40, 60, 80] {
        let mut successor = guests.successor(TAKE_OVER, Strike::Stop, nth);
        let ended = successor.run(|| !guests.daemon.is_alive());
        if successor.struck.is_none() {
            assert!(!ended);
            guests.daemon.become_successor(successor.release());
            continue;
        }
        let stopped = Instant::now();
        guests.has_resumed();
        assert!(stopped.elapsed() < Duration::from_secs(4), "{:?}", stopped.elapsed());
        guests.check(&format!("stopped before call {nth}"));
        // The new daemon resumes too late.
        successor.go_on();
        assert!(successor.run(|| false), "it has not ended");
        assert!(guests.daemon.is_alive(), "{}", guests.daemon.log());
        guests.check(&format!("stopped before call {nth}, and gone on"));
    }
    // SIGTERM during a take-over ends both daemons.
    let mut successor = guests.successor(TAKE_OVER, Strike::Stop, 50);
    assert!(!successor.run(|| false));
    let asked = Instant::now();
    guests.daemon.signal(Signal::SIGTERM);
    assert!(guests.daemon.wait().success());
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    successor.go_on();
    assert!(successor.run(|| false), "it has not ended");
    assert!(guests.daemon.log().contains("the old daemon was told to stop"));
    note(59, "C");
}

#[test]
fn takeover_survives_lack_of_descriptors_and_threads() {
    needs_root!("takeover_survives_lack_of_descriptors_and_threads");
    let _alone = one_at_a_time();
    let mut guests = TapGuests::build();
    let (mut failed, mut succeeded) = (0, 0);
    let errors: &[(Errno, Counts)] = &[
        (Errno::EMFILE, |number, [_, command, _]| {
            [47, 53, 290, 291, 425].contains(&number) || number == 72 && command == 1030
        }),
        (Errno::EAGAIN, |number, _| number == 435),
        (Errno::ENOMEM, |number, arguments| number == 9 && shares(number, arguments)),
        (Errno::EPERM, |number, _| [16, 50, 54, 427].contains(&number)),
    ];
    for (error, counts) in errors {
        let window = Window { counts: *counts, ..TAKE_OVER };
        for nth in 0.. {
            let mut successor = guests.successor(window, Strike::Fail(*error), nth);
            let ended = successor.run(|| !guests.daemon.is_alive());
            let struck = successor.struck;
            if ended {
                let _ = successor.child.wait();
                assert!(guests.daemon.is_alive(), "nobody serves after {error} of {struck:?}");
                failed += 1;
            } else {
                guests.daemon.become_successor(successor.release());
                succeeded += 1;
            }
            guests.has_resumed();
            guests.check(&format!("{error} of call {nth}, {struck:?}"));
            if struck.is_none() {
                break;
            }
        }
    }
    println!("{failed} take-overs failed, {succeeded} did not");
    assert!(failed > 10 && succeeded >= errors.len());
    // The descriptor limit itself.
    let mut limit = 8;
    loop {
        let options = [&format!("--nofile={limit}:{limit}")];
        let mut command = std::process::Command::new("prlimit");
        let successor = guests.daemon.successor();
        command.args(options).arg(successor.get_program()).args(successor.get_args());
        let mut child = command.stderr(guests.daemon.open_log()).spawn().unwrap();
        let mut ended = None;
        eventually("either ends", || {
            ended = child.try_wait().unwrap();
            ended.is_some() || !guests.daemon.is_alive()
        });
        if ended.is_none() {
            guests.daemon.become_successor(child);
            break;
        }
        assert!(guests.daemon.is_alive(), "nobody serves with {limit} descriptors");
        guests.has_resumed();
        guests.check(&format!("a limit of {limit} descriptors"));
        limit += 3;
    }
    assert!(limit > 20, "{limit}");
    guests.has_resumed();
    guests.check(&format!("taken over with {limit} descriptors"));
}
