//! The daemon with another C library and other allocators than it was built with. Their system calls must be
//! allowed in the sandbox too, or the kernel kills the process.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::daemon::{Daemon, port, program};
use crate::support::debian::{libraries, succeed};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_with_tap, ip, make_veth, wait_for_carrier};
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_program, needs_root, skip};

const RELEASE: &str = "trixie";
const PACKAGES: &str =
    "libc6,libgcc-s1,libjemalloc2,libtcmalloc-minimal4t64,?narrow(?name(^libmimalloc[0-9.]+$))";
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const ALLOCATORS: [&str; 3] = ["libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libmimalloc.so.3"];

fn mount(words: &[&str]) {
    succeed(Command::new("mount").args(words));
}

/// Moves this thread to a mount namespace in which `tree` has the daemon's other files. The mounts end with
/// the thread, and `tree` must outlive them.
fn enter(tree: &Path, preloaded: &str) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(&["--make-rprivate", "/"]);
    let program = PathBuf::from(program().get_program());
    for directory in ["/proc", "/sys", "/dev", "/tmp", program.parent().unwrap().to_str().unwrap()]
    {
        let place = tree.join(directory.trim_start_matches('/'));
        std::fs::create_dir_all(&place).unwrap();
        mount(&["--bind", directory, place.to_str().unwrap()]);
    }
    let place = tree.join("dev/net");
    mount(&["--bind", "/dev/net", place.to_str().unwrap()]);
    let list = tree.join("etc/ld.so.preload");
    std::fs::write(&list, "").unwrap();
    if !preloaded.is_empty() {
        // Others use the tree with another list.
        let own = vmm_sys_util::tempfile::TempFile::new().unwrap();
        std::fs::write(own.as_path(), format!("{LIBRARIES}/{preloaded}")).unwrap();
        mount(&["--bind", own.as_path().to_str().unwrap(), list.to_str().unwrap()]);
    }
}

fn card(daemon: &Daemon, name: &str) -> Card {
    let mut card = Card::start(Frontend::new(daemon.connect_to(name)), Options::default());
    card.send(0, &[0; 5]);
    card
}

/// Exercises all functions of the daemon with the libraries of `tree`.
fn check(test: &str, preloaded: &str) {
    let tree = match libraries(RELEASE, PACKAGES) {
        Ok(tree) => tree,
        Err(why) => return skip(test, &why),
    };
    enter_namespace_with_tap(false);
    make_veth(1);
    enter(&tree, preloaded);
    let common = "control = \"{}/control\"\nmetrics = \"{}/metrics\"\nseccomp = \"kill\"\n";
    let text = common.to_owned()
        + &port("one", "loopback = true")
        + &port("two", "tap = \"tap0\"\nrx-filter = \"deny udp dport 53; default allow\"");
    let with_socket = text.clone() + &port("three", "af-xdp = \"veth0\"");
    let chroot = ["chroot", tree.to_str().unwrap()];
    let mut daemon = Daemon::with_config_under(&chroot, &with_socket, "three");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.process())).unwrap();
    let library = if preloaded.is_empty() { "libc.so.6" } else { preloaded };
    let own = tree.join(&LIBRARIES[1..]).join(library).canonicalize().unwrap();
    assert!(maps.contains(own.to_str().unwrap()), "{maps}");

    check_af_xdp(&daemon);
    check_operators(&daemon, &with_socket);
    // Sockets can't change hands.
    daemon.write_config(&text);
    daemon.signal(Signal::SIGHUP);
    eventually("the port is removed", || !daemon.path("three").exists());
    let mut loopback = card(&daemon, "one");
    loopback.check_echo(50);
    let mut next = Command::new("chroot");
    next.arg(&tree).arg(program().get_program()).args(["run", "--take-over", "--config"]);
    let next = next.arg(daemon.path("config")).stderr(daemon.open_log()).spawn().unwrap();
    daemon.become_successor(next);
    eventually("the new daemon has taken over", || {
        daemon.log().contains("daemon: took over ports=")
    });
    loopback.check_echo(50);
    drop(loopback);
    check_operators(&daemon, &text);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success(), "{}", daemon.log());
}

/// Tests frames, filters, and a recreated device, whose program a sandboxed thread loads.
fn check_af_xdp(daemon: &Daemon) {
    let mut veth = card(daemon, "three");
    check_both_ways(&Wire::open("veth1"), &mut veth, 200);
    daemon.ask(&["set", "three", "--rx-filter=deny tcp dport 25; default allow"]);
    ip("link del veth0");
    make_veth(1);
    eventually("the port works again", || daemon.log().contains("works again"));
    check_both_ways(&Wire::open("veth1"), &mut veth, 100);
}

/// Sends every query and change of operators, under traffic.
fn check_operators(daemon: &Daemon, text: &str) {
    let [mut loopback, mut tap] = ["one", "two"].map(|name| card(daemon, name));
    loopback.check_echo(200);
    wait_for_carrier("tap0");
    let captured = || daemon.log().matches("capture started by an operator").count();
    let (before, file) = (captured(), daemon.path("capture"));
    let mut capture = program();
    capture.arg("ctl").arg("--control").arg(daemon.path("control"));
    capture.args(["capture", "two", "-w"]).arg(file).stderr(Stdio::null());
    let mut capture = capture.spawn().unwrap();
    eventually("the capture runs", || captured() > before);
    check_both_ways(&Wire::open("tap0"), &mut tap, 200);
    kill(Pid::from_raw(capture.id() as i32), Signal::SIGINT).unwrap();
    assert!(capture.wait().unwrap().success());
    let socket = format!("--socket-path={}", daemon.path("four").display());
    for words in [
        &["list"][..],
        &["show", "two"],
        &["metrics"],
        &["set", "two", "--tx-limit=1gbit", "--rx-filter=deny tcp dport 25; default allow"],
        &["set", "one", "--link=off"],
        &["set", "one", "--link=on"],
        &["add", "--name=four", &socket, "--loopback"],
    ] {
        daemon.ask(words);
    }
    card(daemon, "four").check_echo(50);
    daemon.ask(&["remove", "four"]);
    // The helper reads the file again, with a port more.
    daemon.write_config(&(text.to_owned() + &port("five", "loopback = true")));
    daemon.signal(Signal::SIGHUP);
    eventually("the daemon listens", || UnixStream::connect(daemon.path("five")).is_ok());
    card(daemon, "five").check_echo(50);
    daemon.write_config(text);
    daemon.signal(Signal::SIGHUP);
    eventually("it is removed", || !daemon.path("five").exists());
    loopback.check_echo(50);
}

#[test]
fn daemon_serves_with_the_libc_of_another_release() {
    const TEST: &str = "daemon_serves_with_the_libc_of_another_release";
    needs_root!(TEST);
    needs_program!(TEST, "mmdebstrap");
    check(TEST, "");
}

#[test]
fn daemon_serves_with_other_allocators() {
    const TEST: &str = "daemon_serves_with_other_allocators";
    needs_root!(TEST);
    needs_program!(TEST, "mmdebstrap");
    for allocator in ALLOCATORS {
        // Each in a thread of its own, with which its mounts go.
        let checked = std::thread::spawn(move || check(TEST, allocator)).join();
        assert!(checked.is_ok(), "{allocator}");
    }
}
