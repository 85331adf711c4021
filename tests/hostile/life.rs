//! Cases 40 to 50: fairness, life cycle, AF_XDP and operators' input.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use super::set_flags;
use crate::support::daemon::{Daemon, program};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::{Frontend, region};
use crate::support::guest::Ram;
use crate::support::hostile::{Refilling, Scene, note};
use crate::support::network::{Wire, ip};
use crate::support::traffic::{Check, Flood, check_canaries, check_reset, frame, plant_canaries};
use crate::support::{eventually, needs_program, needs_root, one_at_a_time};

#[test]
fn hostile_40_self_refilling_ring_starves_no_other_port() {
    let _alone = one_at_a_time();
    let scene = Scene::new(40);
    let card = scene.card();
    let flood = Refilling::start(card);
    std::thread::sleep(Duration::from_secs(2));
    let card = flood.stop();
    println!("{} frames from the flooding guest", card.tx[0].used_index);
    drop(card);
    scene.ends("the loop yields after 64 frames; how long others wait is in the benchmark");
}

#[test]
fn hostile_41_worker_sleeps_with_too_few_buffers() {
    let scene = Scene::new(41);
    // Three buffers of 100 bytes, and frames of 1000 bytes.
    let mut card =
        Card::prepare(scene.frontend(), Options { buffer: 100, size: 8, ..Options::default() });
    card.fill_from(0, 5);
    card.run();
    for slot in 0..4 {
        card.queue_tx(0, slot, &[0; HEADER], &[1; 1000]);
    }
    card.tx[0].publish();
    std::thread::sleep(Duration::from_millis(100));
    let before = scene.worker_nanoseconds();
    std::thread::sleep(Duration::from_millis(500));
    let used = scene.worker_nanoseconds() - before;
    assert!(used < 20_000_000, "{used} ns of half a second");
    drop(card);
    scene.ends("sleeps until there are enough");
}

#[test]
fn hostile_42_ring_stopped_in_a_flood_is_not_written() {
    let _alone = one_at_a_time();
    let scene = Scene::new(42);
    for _ in 0..20 {
        let card = scene.card();
        let ram = card.ram.clone();
        let [rx, tx] = [&card.rx[0], &card.tx[0]].map(|ring| ring.used + 2);
        let mut frontend = Frontend::new(card.frontend.stream.try_clone().unwrap());
        let flood = Refilling::start(card);
        std::thread::sleep(Duration::from_millis(10));
        for (index, used) in [(1, tx), (0, rx)] {
            let base = frontend.get_vring_base(index);
            assert_eq!(base, u32::from(ram.load(used)), "the exact index of ring {index}");
        }
        let after = [rx, tx].map(|used| ram.load(used));
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!([rx, tx].map(|used| ram.load(used)), after, "nothing moves after the reply");
        flood.stop();
    }
    scene.ends("exact index, and no write after the reply");
}

#[test]
fn hostile_43_nothing_is_written_after_reset_or_disconnect() {
    needs_root!("hostile_43_nothing_is_written_after_reset_or_disconnect");
    let _alone = one_at_a_time();
    let scene = Scene::on_tap(43);
    let mut card = scene.card();
    let flood = Flood::start("tap0");
    let mut check = Check::default();
    for _ in 0..100 {
        check.wait(&mut card, 0, 20);
        check_reset(&mut card, &mut check, 3);
    }
    // The frontend disconnects in a burst, and the guest's memory stays.
    for _ in 0..20 {
        check.wait(&mut card, 0, 20);
        card.frontend.stream.shutdown(Shutdown::Both).unwrap();
        // The reply shows that the daemon has released the previous frontend.
        let mut next = scene.frontend();
        next.get(FrontendReq::GET_FEATURES);
        check.take(&mut card, 0);
        plant_canaries(&card, 0);
        check_canaries(&card, 0, 3);
        card.resume(next);
    }
    drop((flood, card));
    scene.ends("no write after a reset or a disconnect");
}

#[test]
fn hostile_44_daemon_stops_and_resumes_under_attack() {
    let _alone = one_at_a_time();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut scene = Scene::new(44);
        let mut card = scene.card();
        // The worker blocks in a write to a call descriptor.
        let full = EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        card.frontend.event(FrontendReq::SET_VRING_CALL, 1, Some(&full));
        set_flags(&full, OFlag::empty());
        card.tx[0].want_call();
        let flood = Refilling::start(card);
        std::thread::sleep(Duration::from_millis(50));
        if signal == Signal::SIGHUP {
            // A reload succeeds whatever tenants do.
            scene.daemon.signal(signal);
            scene.daemon_says(" failures=0");
        }
        let started = Instant::now();
        scene.daemon.signal(if signal == Signal::SIGHUP { Signal::SIGTERM } else { signal });
        assert!(scene.daemon.wait().success(), "{signal}");
        assert!(started.elapsed() < Duration::from_secs(1), "{signal}: {:?}", started.elapsed());
        flood.stop();
        scene.stopped();
    }
    // The daemon is killed repeatedly, and the frontend reconnects.
    let mut daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    for _ in 0..100 {
        // The driver asserts that no head is used twice.
        card.check_echo(70);
        for slot in 0..20 {
            card.queue_tx(0, slot, &[0; HEADER], &[slot as u8; 60]);
        }
        card.tx[0].publish();
        daemon.kill();
        let started = Instant::now();
        daemon.run(&["--loopback"]);
        daemon.wait_until_it_listens();
        card.resume(Frontend::new(daemon.connect()));
        for _ in 0..20 {
            card.receive(0);
        }
        eventually("all are used", || {
            while card.tx[0].take_used().is_some() {}
            card.tx[0].used_index == card.tx[0].avail_index
        });
        // Frames in flight at the kill may arrive twice.
        while card.try_receive(0).is_some() {}
        assert!(started.elapsed() < Duration::from_secs(1));
    }
    note(44, "ends within a second; resumes, and nothing is used twice");
}

#[test]
fn hostile_45_exhausted_host_costs_one_port() {
    needs_program!("hostile_45_exhausted_host_costs_one_port", "prlimit");
    let scene = Scene::new(45);
    let process = format!("--pid={}", scene.daemon.process());
    let limit = |what: String| {
        assert!(Command::new("prlimit").args([&process, &what]).status().unwrap().success());
    };
    // Descriptors: open ones stay open, and no new one fits below the limit.
    // The port needs a moment to close the last frontend's descriptors.
    std::thread::sleep(Duration::from_millis(200));
    limit(format!("--nofile={}:", scene.daemon.lowest_free_descriptor()));
    let waiting = scene.daemon.connect_to("attacked");
    std::thread::sleep(Duration::from_millis(300));
    scene.daemon_says("cannot accept a connection: Too many open files");
    limit("--nofile=1024:".into());
    assert_ne!(Frontend::new(waiting).get(FrontendReq::GET_FEATURES), 0);
    // A session that lacks a descriptor for epoll starts when one is free.
    let mut card = scene.card();
    limit("--nofile=4:".into());
    card.frontend.enable(1, false);
    scene.says("cannot watch its descriptors: Too many open files");
    card.frontend.enable(1, true);
    limit("--nofile=1024:".into());
    card.check_echo(100);
    drop(card);
    // Address space.
    let mut frontend = scene.frontend();
    frontend.begin();
    let large = Ram::new(0, 64 << 30);
    limit(format!("--as={}:", 32u64 << 30));
    let payload = [vec![0; 8], region(&large)].concat();
    frontend.refused(FrontendReq::ADD_MEM_REG, &payload, &[large.file.as_raw_fd()]);
    limit("--as=unlimited:".into());
    scene.says("ADD_MEM_REG refused: map its file");
    drop(frontend);
    scene.ends("refused or tried again, the others run on");

    // Standard error is a pipe without a reader, or a full disk.
    let (reader, writer) = std::io::pipe().unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for stderr in [Stdio::from(writer), Stdio::from(full)] {
        let mut daemon = Daemon::start_with_stderr(stderr, &["--loopback", "--log-level=trace"]);
        for _ in 0..50 {
            let mut frontend = Frontend::new(daemon.connect());
            frontend.begin();
            for index in 0..100 {
                frontend.refused(FrontendReq::SET_VRING_NUM, &[index; 8], &[]);
            }
        }
        Card::start(Frontend::new(daemon.connect()), Options::default()).check_echo(500);
        daemon.signal(Signal::SIGTERM);
        let started = Instant::now();
        assert!(daemon.wait().success());
        assert!(started.elapsed() < Duration::from_secs(1));
    }
    drop(reader);
}

#[test]
fn hostile_46_guest_that_keeps_buffers_stalls_only_itself() {
    needs_root!("hostile_46_guest_that_keeps_buffers_stalls_only_itself");
    let _alone = one_at_a_time();
    let scene = Scene::on_veth(46);
    let mut card = scene.card();
    card.send(0, &[0; 5]);
    let flood = Flood::start("veth1");
    // The kernel may still hold the previous socket.
    let mut check = Check::default();
    check.wait(&mut card, 0, 1);
    // The guest takes no frames: its buffers fill, then the kernel's rings.
    std::thread::sleep(Duration::from_secs(1));
    drop(flood);
    let full = check.received + usize::from(card.options.size);
    eventually("the kept frames arrive", || {
        check.take(&mut card, 0);
        check.received >= full
    });
    drop(card);
    scene.ends("its own buffers, its own sockets; it goes on where it stopped");
}

#[test]
fn hostile_47_port_recovers_from_device_changes() {
    needs_root!("hostile_47_port_recovers_from_device_changes");
    let _alone = one_at_a_time();
    let scene = Scene::on_veth(47);
    let mut card = scene.card();
    card.send(0, &[0; 5]);
    let flood = Flood::start("veth1");
    let mut check = Check::default();
    let changes = [
        "link set veth0 down",
        "link set veth0 up",
        "link set veth0 mtu 1400",
        "link set veth0 mtu 1500",
        "link delete veth0",
        "link add veth0 type veth peer name veth1",
        "link set veth0 up",
        "link set veth1 up",
    ];
    for change in changes {
        check.wait(&mut card, 0, 0);
        ip(change);
        std::thread::sleep(Duration::from_millis(20));
    }
    check.wait(&mut card, 0, 20);
    drop(flood);
    scene.daemon_says("veth0: works again");
    drop(card);
    scene.ends_on(Wire::open("veth1"), "the port is degraded, says so, and comes back");
}

#[test]
fn hostile_48_no_byte_leaks_between_tenants() {
    needs_root!("hostile_48_no_byte_leaks_between_tenants");
    let _alone = one_at_a_time();
    let scene = Scene::on_two_veths(48);
    let mut one = scene.card();
    let mut two = Card::start(Frontend::new(scene.daemon.connect_to("other")), Options::default());
    for card in [&mut one, &mut two] {
        card.send(0, &[0; 5]);
    }
    // Frames for one guest only: the other guest's memory must hold none of them.
    let flood = Flood::start("veth1");
    let mut check = Check::default();
    check.wait(&mut one, 0, 5000);
    drop(flood);
    let memory = two.ram.read(0, two.ram.size as usize);
    let place = memory.windows(14).position(|bytes| bytes == &frame(0, 60)[..14]);
    assert_eq!(place, None, "a frame of another tenant's");
    assert!(two.try_receive(0).is_none());
    drop((one, two));
    scene.ends("each port has a UMEM of its own, and every address is looked up in it");
}

#[test]
fn hostile_49_control_socket_takes_only_valid_requests() {
    needs_root!("hostile_49_control_socket_takes_only_valid_requests");
    const LIST: &[u8] = b"{\"version\":1,\"command\":\"list\"}\n";
    let scene = Scene::operated(49);
    let path = scene.daemon.path("control");
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = stream.write_all(bytes);
        let mut reply = String::new();
        let _ = BufReader::new(stream).read_line(&mut reply);
        reply
    };
    let good = |reply: &str| reply.contains("\"ok\":[") && reply.contains("attacked");
    assert!(good(&ask(LIST)));
    // Deep JSON, bad UTF-8, other versions and commands, and values that are too long.
    let deep = "[".repeat(10_000) + "\n";
    let unknown = b"{\"version\":1,\"command\":\"show\",\"port\":\"../\\n\",\"x\":1}\n";
    for (bytes, kind) in [
        (deep.as_bytes(), "bad-request"),
        (b"{\"version\":1,\"command\":\"l\xffst\"}\n", "bad-request"),
        (b"\n", "bad-request"),
        (b"{\"version\":2,\"command\":\"list\"}\n", "bad-version"),
        (b"{\"version\":1,\"command\":\"dance\"}\n", "bad-request"),
        (unknown, "bad-request"),
        (b"{\"version\":1,\"command\":\"show\",\"port\":\"../\\n\"}\n", "no-such-port"),
    ] {
        let reply = ask(bytes);
        assert!(reply.contains(&format!("\"kind\":\"{kind}\"")), "{kind}: {reply}");
    }
    // An endless line: the daemon disconnects the client long before 1 GB.
    let mut stream = UnixStream::connect(&path).unwrap();
    let chunk = [b'x'; 0x10000];
    let sent = (0..0x4000).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(sent < 100, "{sent} chunks were taken");
    scene.daemon_says("control socket: client disconnected: a request has more than");
    // A client that reads no replies: the daemon serves other clients.
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(LIST).is_ok() {}
    assert!(good(&ask(LIST)));
    // A thousand silent clients: the daemon disconnects the oldest.
    let idle: Vec<UnixStream> = (0..1000).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert!(good(&ask(LIST)));
    drop((idle, deaf));
    // Another user, who has permission on the socket's file.
    for (file, mode) in [(scene.daemon.directory(), 0o755), (path.as_path(), 0o666)] {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    }
    let script = "my $s = IO::Socket::UNIX->new($ARGV[0]) or die $!; print <$s>";
    let output = Command::new("perl")
        .args(["-MIO::Socket::UNIX", "-e", script])
        .arg(&path)
        .uid(65534)
        .output()
        .unwrap();
    let reply = String::from_utf8_lossy(&output.stdout);
    assert!(reply.contains("not-allowed") && reply.contains("65534"), "{output:?}");
    eventually("the control socket's clients are gone", || good(&ask(LIST)));
    scene.ends("R");
}

#[test]
fn hostile_50_names_cannot_be_paths_lines_or_links() {
    let scene = Scene::new(50);
    // A file name with a line break.
    let forged = "x\n[2026-01-01T00:00:00Z WARN ] quiet: forged";
    let name = std::ffi::CString::new(forged).unwrap();
    let memory = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC).unwrap();
    let mut frontend = scene.frontend();
    frontend.begin();
    frontend.refused(FrontendReq::SET_VRING_CALL, &[0; 8], &[memory.as_raw_fd()]);
    scene.says("memfd:x\\n[2026");
    assert!(!scene.daemon.log().lines().any(|line| line.starts_with("[2026-01-01")));
    drop(frontend);

    let directory = scene.daemon.directory();
    let refused = |port: &str, said: &str| {
        let file = scene.daemon.path("names");
        fs::write(&file, format!("[[port]]\nloopback = true\n{port}\n")).unwrap();
        let output = program().args(["run", "--config"]).arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(said), "{port}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    };
    let socket = format!("socket-path = \"{}/s\"\n", directory.display());
    for name in ["../x", "a/b", "a\\nb", "a b", "", ".", "a\\\"} 1", "é", &"n".repeat(64)] {
        refused(&format!("{socket}name = \"{name}\""), "is not a valid port name");
    }
    refused(&format!("socket-path = \"/{}\"", "x".repeat(107)), "at most 107");
    refused("socket-path = \"\"", "is empty");
    // A link at the socket's path, in a directory that all users can write to.
    let target = scene.daemon.path("target");
    fs::write(&target, "precious").unwrap();
    for to in [target.clone(), scene.daemon.path("attacked"), scene.daemon.path("nowhere")] {
        let link = scene.daemon.path("link");
        let _ = fs::remove_file(&link);
        symlink(&to, &link).unwrap();
        refused(&format!("socket-path = \"{}\"", link.display()), "a file that is not a socket");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "the link stays");
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    scene.ends("R, in one line");
}
