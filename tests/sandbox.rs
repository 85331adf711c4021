//! The sandbox. ptrace injects system calls that the daemon never makes into its threads, as a guest that
//! controls a thread would make them.

use std::fs;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{
    Wire, enter_namespace_with_veth, enter_quiet_namespace, ip, output, wait_for_carrier,
};
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_root, skip};

const SOCKET: u64 = 41;
const EXECVE: u64 = 59;
const CLONE: u64 = 56;
const OPENAT: u64 = 257;
const SENDTO: u64 = 44;
const CHMOD: u64 = 90;
const LCHOWN: u64 = 94;
const MMAP: u64 = 9;
const AF_INET: u64 = 2;
const SOCK_STREAM: u64 = 1;
const PROT_READ_EXEC: u64 = 5;
const MAP_PRIVATE_ANONYMOUS: u64 = 0x22;

/// Mask of CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK and CAP_BPF.
const FOR_SOCKETS: u64 = 1 << 12 | 1 << 13 | 1 << 14 | 1 << 39;

/// Returns the names and ids of the daemon's threads.
fn threads(daemon: &Daemon) -> Vec<(String, Pid)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.process())).unwrap();
    tasks
        .map(|task| {
            let task = task.unwrap();
            let name = fs::read_to_string(task.path().join("comm")).unwrap();
            let id = task.file_name().to_str().unwrap().parse().unwrap();
            (name.trim().to_owned(), Pid::from_raw(id))
        })
        .collect()
}

/// Returns a field of a thread's `/proc` status.
fn status(daemon: &Daemon, thread: Pid, field: &str) -> String {
    let path = format!("/proc/{}/task/{thread}/status", daemon.process());
    let text = fs::read_to_string(path).unwrap();
    let field = format!("{field}:");
    text.lines().find_map(|line| line.strip_prefix(&field)).unwrap().trim().to_owned()
}

/// Injects a system call into a thread that sleeps in another one. `text` is in its memory, at the argument
/// `TEXT`. Returns the call's result, or the signal that killed the process.
fn inject(thread: Pid, number: u64, arguments: [u64; 4], text: &[u8; 16]) -> Result<i64, Signal> {
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    let wait = || waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    assert!(matches!(wait(), WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..)));
    let mut registers = ptrace::getregs(thread).unwrap();
    // The instruction that it sleeps in.
    registers.rip -= 2;
    let instruction = ptrace::read(thread, registers.rip as *mut _).unwrap();
    assert_eq!(instruction & 0xffff, 0x050f, "no system call");
    let place = registers.rsp - 4096;
    for (offset, word) in (0..).zip(text.chunks(8)) {
        let word = i64::from_le_bytes(word.try_into().unwrap());
        ptrace::write(thread, (place + 8 * offset) as *mut _, word).unwrap();
    }
    let [a, b, c, d] = arguments.map(|argument| if argument == TEXT { place } else { argument });
    (registers.rax, registers.orig_rax) = (number, u64::MAX);
    (registers.rdi, registers.rsi, registers.rdx, registers.r10) = (a, b, c, d);
    (registers.r8, registers.r9) = (u64::MAX, 0);
    ptrace::setregs(thread, registers).unwrap();
    ptrace::step(thread, None).unwrap();
    match wait() {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {
            let result = ptrace::getregs(thread).unwrap().rax as i64;
            // The thread cannot continue from here. The process's exit is visible only after this wait.
            ptrace::kill(thread).unwrap();
            while !matches!(wait(), WaitStatus::Signaled(..) | WaitStatus::Exited(..)) {}
            Ok(result)
        }
        WaitStatus::Signaled(_, signal, _) => Err(signal),
        other => panic!("{other:?}"),
    }
}

/// Argument that stands for the address of the text.
const TEXT: u64 = 0x7e87;

/// Starts a daemon that serves a guest, with all its threads asleep.
fn serving(options: &[&str]) -> (Daemon, Card) {
    let daemon = Daemon::start(options);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.send(0, &[0; 5]);
    std::thread::sleep(std::time::Duration::from_millis(100));
    (daemon, card)
}

#[test]
fn forbidden_call_in_any_thread_kills_the_process() {
    needs_root!("forbidden_call_in_any_thread_kills_the_process");
    enter_namespace_with_veth(1);
    let calls = [
        ("execve", EXECVE, [TEXT, 0, 0, 0]),
        ("clone", CLONE, [0; 4]),
        ("openat", OPENAT, [u64::MAX - 99, TEXT, 0, 0]),
        ("socket", SOCKET, [AF_INET, SOCK_STREAM, 0, 0]),
        ("mmap", MMAP, [0, 4096, PROT_READ_EXEC, MAP_PRIVATE_ANONYMOUS]),
    ];
    for (host, worker, control) in
        [("--loopback", "loopback/0", "loopback"), ("--af-xdp=veth0", "veth0/0", "veth0")]
    {
        for thread in ["vhost-user-net", "log", control, worker] {
            for (name, number, arguments) in calls {
                let (mut daemon, _card) = serving(&[host]);
                let found = threads(&daemon).into_iter().find(|(name, _)| name == thread);
                let (_, id) = found.unwrap_or_else(|| panic!("{:?}", threads(&daemon)));
                let result = inject(id, number, arguments, b"/etc/hostname\0\0\0");
                assert_eq!(result, Err(Signal::SIGSYS), "{name} in {thread} of {host}");
                eventually("the whole process ends", || !daemon.is_alive());
            }
        }
    }
}

#[test]
fn foreign_addresses_and_files_are_unreachable() {
    needs_root!("foreign_addresses_and_files_are_unreachable");
    enter_namespace_with_veth(1);
    // The fifth argument of each is an address.
    let sendto = ("sendto", SENDTO, [u64::MAX, TEXT, 16, 0]);
    let chmod = ("chmod", CHMOD, [TEXT, 0o644, 0, 0]);
    let lchown = ("lchown", LCHOWN, [TEXT, 0, 0, 0]);
    for (host, thread, (name, number, arguments)) in [
        ("--loopback", "loopback/0", sendto),
        ("--af-xdp=veth0", "veth0/0", sendto),
        ("--loopback", "loopback", sendto),
        ("--loopback", "loopback", chmod),
        ("--loopback", "loopback", lchown),
        ("--loopback", "vhost-user-net", sendto),
        ("--loopback", "vhost-user-net", chmod),
        ("--loopback", "vhost-user-net", lchown),
    ] {
        let (daemon, _card) = serving(&[host]);
        let found = threads(&daemon).into_iter().find(|(name, _)| name == thread);
        let result = inject(found.unwrap().1, number, arguments, b"/etc/hostname\0\0\0");
        assert_eq!(result, Err(Signal::SIGSYS), "{name} in {thread} of {host}");
    }
}

#[test]
fn daemon_that_can_add_ports_is_sandboxed() {
    needs_root!("daemon_that_can_add_ports_is_sandboxed");
    let calls = [
        ("execve", EXECVE, [TEXT, 0, 0, 0]),
        ("openat", OPENAT, [u64::MAX - 99, TEXT, 0, 0]),
        ("socket", SOCKET, [AF_INET, SOCK_STREAM, 0, 0]),
        ("mmap", MMAP, [0, 4096, PROT_READ_EXEC, MAP_PRIVATE_ANONYMOUS]),
    ];
    for thread in ["vhost-user-net", "log", "one", "one/0", "two", "two/0"] {
        for (name, number, arguments) in calls {
            let file = "control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true");
            let mut daemon = Daemon::with_config(&file, "one");
            let socket = format!("--socket-path={}", daemon.path("two").display());
            daemon.ask(&["add", "--name=two", &socket, "--loopback"]);
            // A thread names itself, and then gives up what it may.
            let find = || threads(&daemon).into_iter().find(|(name, _)| name == thread);
            eventually("the thread has its name", || find().is_some());
            let (_, id) = find().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            let result = inject(id, number, arguments, b"/etc/hostname\0\0\0");
            assert_eq!(result, Err(Signal::SIGSYS), "{name} in {thread}");
            eventually("the whole process ends", || !daemon.is_alive());
        }
    }
}

#[test]
fn files_are_unreachable_without_seccomp() {
    needs_root!("files_are_unreachable_without_seccomp");
    for thread in ["vhost-user-net", "log", "loopback", "loopback/0"] {
        let (daemon, _card) = serving(&["--loopback", "--seccomp=none"]);
        assert!(daemon.log().contains("system calls are not filtered"), "{}", daemon.log());
        if daemon.log().contains("the kernel has no landlock") {
            skip("files_are_unreachable_without_seccomp", "the kernel has no landlock");
            return;
        }
        let (_, id) = threads(&daemon).into_iter().find(|(name, _)| name == thread).unwrap();
        let arguments = [u64::MAX - 99, TEXT, 0, 0];
        let result = inject(id, OPENAT, arguments, b"/etc/hostname\0\0\0");
        assert_eq!(result, Ok(-(Errno::EACCES as i64)), "{thread}");
    }
}

#[test]
fn threads_have_and_report_no_capabilities() {
    needs_root!("threads_have_and_report_no_capabilities");
    enter_namespace_with_veth(1);
    let some = "CAP_BPF CAP_IPC_LOCK CAP_NET_ADMIN CAP_NET_RAW";
    for (host, kept, said) in [("--loopback", 0, "none"), ("--af-xdp=veth0", FOR_SOCKETS, some)] {
        let (daemon, _card) = serving(&[host]);
        assert_eq!(threads(&daemon).len(), 4);
        for (name, id) in threads(&daemon) {
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                let have = u64::from_str_radix(&status(&daemon, id, set), 16).unwrap();
                assert_eq!(have, kept, "{set} of {name}");
            }
            for set in ["CapInh", "CapAmb"] {
                assert_eq!(status(&daemon, id, set), "0000000000000000", "{set} of {name}");
            }
            assert_eq!(status(&daemon, id, "NoNewPrivs"), "1", "{name}");
            assert_eq!(status(&daemon, id, "Seccomp"), "2", "{name}");
        }
        let log = daemon.log();
        let line = format!("sandbox: user 0, capabilities: {said}; ");
        assert!(log.contains(&line), "{log}");
    }
}

#[test]
fn daemon_serves_as_another_user() {
    needs_root!("daemon_serves_as_another_user");
    let options = ["--user=nobody", "--group=nogroup"];
    let check = |daemon: &Daemon, wire: &str, kept: u64| {
        // Over several connections: all that they need is there.
        for _ in 0..3 {
            let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
            check_both_ways(&Wire::open(wire), &mut card, 100);
        }
        for (name, id) in threads(daemon) {
            let all = |number| format!("{number}\t{number}\t{number}\t{number}");
            assert_eq!(status(daemon, id, "Uid"), all(65534), "{name}");
            assert_eq!(status(daemon, id, "Gid"), all(65534), "{name}");
            assert_eq!(status(daemon, id, "Groups"), "65534", "{name}");
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                let have = u64::from_str_radix(&status(daemon, id, set), 16).unwrap();
                assert_eq!(have, kept, "{set} of {name}");
            }
        }
    };
    enter_quiet_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    let daemon = Daemon::start(&[&["--tap=tap0"][..], &options].concat());
    wait_for_carrier("tap0");
    check(&daemon, "tap0", 0);
    drop(daemon);
    enter_namespace_with_veth(1);
    let daemon = Daemon::start(&[&["--af-xdp=veth0"][..], &options].concat());
    check(&daemon, "veth1", FOR_SOCKETS);
    drop(daemon);
    assert!(!output("ip", "-d link show veth0").contains("prog/xdp"), "nothing is left behind");
}

#[test]
fn unknown_users_are_named() {
    for (option, said) in [
        ("--user=nobody-at-all", "there is no user nobody-at-all"),
        ("--group=nobody-at-all", "there is no group nobody-at-all"),
    ] {
        let mut daemon = Daemon::spawn(&["--loopback", option]);
        assert_eq!(daemon.wait().code(), Some(1));
        assert!(daemon.log().contains(said), "{}", daemon.log());
        assert!(!daemon.socket().exists());
    }
}
