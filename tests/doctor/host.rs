//! Checks of running VMs, huge pages, limits and sysctls.

use std::process::{Child, Command, Stdio};

use vmm_sys_util::tempdir::TempDir;

use super::{Line, enter_new_mounts, examine, examine_by, is_fixed, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip};
use crate::support::{eventually, needs_program, needs_root};

/// A QEMU process whose guest is paused.
struct Qemu(Child);

impl Qemu {
    fn start(socket: &str, memory: &[&str]) -> Self {
        let chardev = format!("socket,id=c,path={socket}");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "192"]);
        command.args(["-chardev", &chardev, "-netdev", "vhost-user,id=n,chardev=c"]);
        command.args(["-device", "virtio-net-pci,netdev=n"]).args(memory);
        Qemu(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Returns doctor's finding about this VM, once QEMU has mapped the guest's memory.
    fn line(&self) -> Line {
        let what = format!("qemu-system-x86_64 (pid {})", self.0.id());
        find(&what)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn find(what: &str) -> Line {
    let mut found = None;
    eventually("doctor sees the VM's memory", || {
        found = examine(&[]).into_iter().find(|line| line.what == what);
        found.as_ref().is_some_and(|line| line.why.contains("guest memory (192 MiB)"))
    });
    found.unwrap()
}

#[test]
fn printed_command_starts_a_vm_with_shared_memory() {
    const TEST: &str = "printed_command_starts_a_vm_with_shared_memory";
    needs_root!(TEST);
    needs_program!(TEST, "qemu-system-x86_64");
    let daemon = Daemon::start(&["--loopback"]);
    let socket = daemon.socket().display().to_string();
    let backend = "memory-backend-ram,id=mem,size=192M";
    for memory in [&[][..], &["-object", backend, "-machine", "memory-backend=mem"]] {
        let private = Qemu::start(&socket, memory);
        let wrong = private.line();
        assert_eq!(wrong.status, "FAIL", "{wrong:?}");
        drop(private);
        let script = format!("exec {}", wrong.fix.as_deref().unwrap());
        let shared = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let shared = Qemu(shared.unwrap());
        let right = shared.line();
        assert_eq!(right.status, "PASS", "{right:?}");
        assert!(right.why.contains("sealed"), "{right:?}");
        super::show(&wrong, &right);
    }
}

#[test]
fn vm_that_waits_for_its_socket_only_warns() {
    needs_root!("vm_that_waits_for_its_socket_only_warns");
    needs_program!("vm_that_waits_for_its_socket_only_warns", "qemu-system-x86_64");
    let daemon = Daemon::spawn(&["--loopback", "--connect={}"]);
    let socket = daemon.directory().join("waits");
    let waits = format!("{},server=on,wait=on", socket.display());
    let backend = "memory-backend-memfd,id=mem,size=192M,share=on";
    let qemu = Qemu::start(&waits, &["-object", backend, "-machine", "memory-backend=mem"]);
    eventually("QEMU listens", || socket.exists());
    let what = format!("qemu-system-x86_64 (pid {})", qemu.0.id());
    let found = examine(&[]).into_iter().find(|line| line.what == what).unwrap();
    assert_eq!((&found.status[..], &found.fix), ("WARN", &None), "{found:?}");
    assert!(found.why.contains("has not mapped its 192 MiB of guest memory yet"), "{found:?}");
    // QEMU continues once the daemon connects, and maps the guest's memory.
    std::os::unix::fs::symlink(&socket, daemon.socket()).unwrap();
    assert_eq!(qemu.line().status, "PASS");
}

#[test]
fn unsealed_guest_memory_warns() {
    needs_root!("unsealed_guest_memory_warns");
    needs_program!("unsealed_guest_memory_warns", "qemu-system-x86_64");
    let daemon = Daemon::start(&["--loopback"]);
    let socket = daemon.socket().display().to_string();
    let backend = "memory-backend-memfd,id=mem,size=192M,share=on,seal=off";
    let qemu = Qemu::start(&socket, &["-object", backend, "-machine", "memory-backend=mem"]);
    let found = qemu.line();
    assert_eq!(found.status, "WARN", "{found:?}");
    assert!(found.why.contains("not sealed"), "{found:?}");
}

#[test]
fn printed_command_raises_the_descriptor_limit() {
    needs_root!("printed_command_raises_the_descriptor_limit");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    for (limit, status) in [("--nofile=12", "FAIL"), ("--nofile=32", "WARN")] {
        let limited = ["prlimit", &format!("{limit}:")];
        let (_, before) = examine_by(&limited, &["--tap=tap0"]);
        let wrong = line(&before, "descriptors", status);
        let script = format!("{} && exec \"$0\" \"$@\"", wrong.fix.as_deref().unwrap());
        let (_, after) =
            examine_by(&[limited[0], limited[1], "sh", "-c", &script], &["--tap=tap0"]);
        is_right(wrong, &after);
    }
}

#[test]
fn printed_command_reserves_huge_pages() {
    needs_root!("printed_command_reserves_huge_pages");
    enter_new_mounts();
    // All tests share the machine's huge pages, so a directory with the same files replaces them.
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let root = directory.as_path().display();
    shell(&format!(
        "mkdir -p {root}/node0/hugepages/hugepages-2048kB && cd \
         {root}/node0/hugepages/hugepages-2048kB && echo 0 > nr_hugepages && ln -s nr_hugepages \
         free_hugepages && mount --bind {root} /sys/devices/system/node"
    ));
    let wrong = is_fixed("hugepages", "WARN", &[]);
    assert_eq!(wrong.what, "node0");
}

#[test]
fn printed_command_turns_off_bridge_netfilter() {
    needs_root!("printed_command_turns_off_bridge_netfilter");
    enter_new_namespace();
    ip("link add br0 type bridge");
    if !std::path::Path::new("/proc/sys/net/bridge").exists() {
        let test = "printed_command_turns_off_bridge_netfilter";
        return crate::support::skip(test, "the kernel has no br_netfilter");
    }
    shell("sysctl -qw net.bridge.bridge-nf-call-iptables=1");
    is_fixed("bridge-netfilter", "WARN", &[]);
}

#[test]
fn printed_command_raises_tcp_buffers() {
    needs_root!("printed_command_raises_tcp_buffers");
    enter_new_namespace();
    shell(
        "sysctl -qw net.ipv4.tcp_wmem='4096 16384 212992' net.ipv4.tcp_rmem='4096 131072 6291456'",
    );
    let wrong = is_fixed("tcp-buffers", "WARN", &[]);
    assert!(wrong.why.contains("this host's own connections"), "{wrong:?}");
}
