//! Operators' mistakes on the command line: one line of error, the exit code, and no files left behind.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use nix::sys::signal::Signal;
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::{Daemon, program};
use crate::support::network::{enter_new_namespace, ip, output};
use crate::support::{eventually, needs_root};

/// Runs the program until it exits. Returns its exit code and its standard error.
fn run(arguments: &[&str]) -> (i32, String) {
    let output = program().args(arguments).arg("--log-level=error").output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn fails(arguments: &[&str], named: &[&str]) {
    let (code, text) = run(arguments);
    assert_ne!(code, 0, "{arguments:?}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for named in named {
        assert!(text.contains(named), "{arguments:?} should name {named}: {text}");
    }
}

#[test]
fn capabilities_are_printed_in_qemu_format() {
    let output = program().arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "{\"type\": \"net\", \"features\": []}\n"
    );
}

#[test]
fn help_is_printed_to_standard_output() {
    let output = program().arg("--help").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(String::from_utf8(output.stdout).unwrap().contains("--socket-path"));
}

#[test]
fn invalid_options_are_named() {
    fails(&["--loopback", "--socket-path=x", "--no-such-option"], &["--no-such-option"]);
    fails(&["--loopback"], &["--socket-path"]);
    fails(&["--loopback", "--socket-path=x", "--queue-pairs=0"], &["queue-pairs=0"]);
    fails(&["--loopback", "--socket-path=x", "--cpu-affinity=5000"], &["5000"]);
    fails(&["--loopback", "--socket-path=x", "--cpu-affinity=999"], &["CPU 999"]);
}

#[test]
fn invalid_socket_path_is_refused() {
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = |name: &str| format!("--socket-path={}/{name}", directory.as_path().display());
    fails(&["--loopback", &path(&"x".repeat(100))], &["107"]);
    fails(&["--loopback", &path("missing/socket")], &["missing/socket", "directory"]);

    fs::write(directory.as_path().join("file"), "precious").unwrap();
    fails(&["--loopback", &path("file")], &["file", "not a socket"]);
    assert_eq!(fs::read(directory.as_path().join("file")).unwrap(), b"precious");

    let listener = UnixListener::bind(directory.as_path().join("live")).unwrap();
    fails(&["--loopback", &path("live")], &["live", "another process"]);
    drop(listener);

    let left: Vec<_> = fs::read_dir(directory.as_path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "only what was there before: {left:?}");
}

#[test]
fn unwritable_directory_is_named() {
    // For root too: sysfs takes no sockets.
    fails(&["--loopback", "--socket-path=/sys/socket"], &["/sys/socket"]);
}

#[test]
fn inherited_descriptor_must_be_a_socket() {
    fails(&["--loopback", "--fd=77"], &["77"]);
    fails(&["--loopback", "--fd=1"], &["standard stream"]);
    let output = std::process::Command::new("sh")
        .args(["-c", "exec \"$0\" --loopback --fd=5 5</dev/null"])
        .arg(program().get_program())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(text.contains("/dev/null is no socket"), "{text}");
}

#[test]
fn stale_socket_is_replaced_and_own_one_removed() {
    let mut daemon = Daemon::start(&["--loopback"]);
    daemon.kill();
    assert!(daemon.socket().exists(), "a killed daemon leaves its socket");
    daemon.run(&["--loopback"]);
    eventually("the daemon listens again", || {
        std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok()
    });
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!daemon.socket().exists());
}

#[test]
fn foreign_socket_at_the_path_is_kept_at_exit() {
    let mut daemon = Daemon::start(&["--loopback"]);
    fs::remove_file(daemon.socket()).unwrap();
    let _theirs = UnixListener::bind(daemon.socket()).unwrap();
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(daemon.socket().exists());
}

#[test]
fn unsuitable_taps_are_refused_with_reason() {
    needs_root!("unsuitable_taps_are_refused_with_reason");
    enter_new_namespace();
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let socket = format!("--socket-path={}/socket", directory.as_path().display());

    ip("tuntap add dev single mode tap vnet_hdr");
    fails(
        &[&socket, "--tap=single", "--queue-pairs=2"],
        &["one queue", "multi_queue", "ip tuntap add"],
    );
    ip("link add veth0 type veth peer name veth1");
    fails(&[&socket, "--tap=veth0"], &["veth0", "not a TAP"]);
    fails(&[&socket, "--tap=name-that-is-too-long"], &["15 bytes"]);
    fails(&[&socket, "--tap-fd=9"], &["9"]);

    let busy = Daemon::start(&["--tap=single"]);
    fails(&[&socket, "--tap=single"], &["single", "another process"]);
    drop(busy);
    assert_eq!(fs::read_dir(directory.as_path()).unwrap().count(), 0, "no socket is left");
}

#[test]
fn missing_tap_is_created_and_removed_at_exit() {
    needs_root!("missing_tap_is_created_and_removed_at_exit");
    enter_new_namespace();
    let mut daemon = Daemon::start(&["--tap=made0", "--mtu=9000"]);
    assert!(output("ip", "link show made0").contains("UP"));
    assert!(output("ip", "link show made0").contains("mtu 9000"));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(output("ip", "link show made0").contains("does not exist"));
}

#[test]
fn existing_tap_keeps_its_state() {
    needs_root!("existing_tap_keeps_its_state");
    enter_new_namespace();
    ip("tuntap add dev many mode tap vnet_hdr multi_queue");
    let mut daemon = Daemon::start(&["--tap=many"]);
    assert!(!output("ip", "link show many").contains(",UP"), "its state is the operator's");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(output("ip", "link show many").contains("many"), "and so is its life");
}
