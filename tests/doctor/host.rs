//! The rest of the host: VMs that run, huge pages, limits, sysctls.

use std::process::{Child, Command, Stdio};

use vmm_sys_util::tempdir::TempDir;

use super::{Line, enter_new_mounts, examine, examine_by, is_mended, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip};
use crate::support::{eventually, needs_program, needs_root};

/// A VM that does not run its guest.
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

    /// What doctor says of it, once it has made its memory.
    fn line(&self) -> Line {
        let what = format!("memory of qemu-system-x86_64 (process {})", self.0.id());
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
        found.as_ref().is_some_and(|line| line.why.contains("its 192 MiB"))
    });
    found.unwrap()
}

#[test]
fn a_vm_that_does_not_share_its_memory_is_mended_by_the_command_that_is_printed() {
    const TEST: &str =
        "a_vm_that_does_not_share_its_memory_is_mended_by_the_command_that_is_printed";
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
fn vm_that_waits_for_its_socket_is_not_judged_yet() {
    needs_root!("vm_that_waits_for_its_socket_is_not_judged_yet");
    needs_program!("vm_that_waits_for_its_socket_is_not_judged_yet", "qemu-system-x86_64");
    let daemon = Daemon::spawn(&["--loopback", "--connect={}"]);
    let socket = daemon.directory().join("waits");
    let waits = format!("{},server=on,wait=on", socket.display());
    let backend = "memory-backend-memfd,id=mem,size=192M,share=on";
    let qemu = Qemu::start(&waits, &["-object", backend, "-machine", "memory-backend=mem"]);
    eventually("it waits", || socket.exists());
    let what = format!("memory of qemu-system-x86_64 (process {})", qemu.0.id());
    let found = examine(&[]).into_iter().find(|line| line.what == what).unwrap();
    assert_eq!((&found.status[..], &found.fix), ("WARN", &None), "{found:?}");
    assert!(found.why.contains("its guest's 192 MiB are not seen yet"), "{found:?}");
    // It goes on once the daemon finds it, and is judged then.
    std::os::unix::fs::symlink(&socket, daemon.socket()).unwrap();
    assert_eq!(qemu.line().status, "PASS");
}

#[test]
fn memory_that_could_be_cut_is_warned_of() {
    needs_root!("memory_that_could_be_cut_is_warned_of");
    needs_program!("memory_that_could_be_cut_is_warned_of", "qemu-system-x86_64");
    let daemon = Daemon::start(&["--loopback"]);
    let socket = daemon.socket().display().to_string();
    let backend = "memory-backend-memfd,id=mem,size=192M,share=on,seal=off";
    let qemu = Qemu::start(&socket, &["-object", backend, "-machine", "memory-backend=mem"]);
    let found = qemu.line();
    assert_eq!(found.status, "WARN", "{found:?}");
    assert!(found.why.contains("not sealed"), "{found:?}");
}

#[test]
fn too_few_descriptors_are_mended_by_the_command_that_is_printed() {
    needs_root!("too_few_descriptors_are_mended_by_the_command_that_is_printed");
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
fn huge_pages_are_set_aside_by_the_command_that_is_printed() {
    needs_root!("huge_pages_are_set_aside_by_the_command_that_is_printed");
    enter_new_mounts();
    // The machine's are everybody's: a directory that looks like them stands in their place.
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let root = directory.as_path().display();
    shell(&format!(
        "mkdir -p {root}/node0/hugepages/hugepages-2048kB && cd \
         {root}/node0/hugepages/hugepages-2048kB && echo 0 > nr_hugepages && ln -s nr_hugepages \
         free_hugepages && mount --bind {root} /sys/devices/system/node"
    ));
    let wrong = is_mended("hugepages", "WARN", &[]);
    assert_eq!(wrong.what, "huge pages of node0");
}

#[test]
fn bridge_netfilter_is_turned_off_by_the_command_that_is_printed() {
    needs_root!("bridge_netfilter_is_turned_off_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("link add br0 type bridge");
    if !std::path::Path::new("/proc/sys/net/bridge").exists() {
        let test = "bridge_netfilter_is_turned_off_by_the_command_that_is_printed";
        return crate::support::skip(test, "the kernel has no br_netfilter");
    }
    shell("sysctl -qw net.bridge.bridge-nf-call-iptables=1");
    is_mended("bridge-netfilter", "WARN", &[]);
}

#[test]
fn small_tcp_buffers_are_raised_by_the_command_that_is_printed() {
    needs_root!("small_tcp_buffers_are_raised_by_the_command_that_is_printed");
    enter_new_namespace();
    shell(
        "sysctl -qw net.ipv4.tcp_wmem='4096 16384 212992' net.ipv4.tcp_rmem='4096 131072 6291456'",
    );
    let wrong = is_mended("tcp-buffers", "WARN", &[]);
    assert!(wrong.why.contains("this host's own connections"), "{wrong:?}");
}
