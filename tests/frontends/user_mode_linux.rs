//! User-mode Linux, a guest kernel that is its own frontend.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::daemon::Daemon;
use crate::support::network::{enter_namespace_with_tap, ip};
use crate::support::{needs_program, needs_root};

/// Init script: pings the host, binds the driver again, and pings again.
const INIT: &str = "#!/bin/busybox sh
busybox mount -t sysfs sys /sys
for module in failover net_failover virtio_net; do busybox insmod /$module.ko; done
ping() {
    busybox ip link set eth0 up
    busybox ip address add 10.7.0.2/24 dev eth0
    busybox ping -c 2 -W 5 10.7.0.1 && echo PINGED
}
ping
driver=/sys/bus/virtio/drivers/virtio_net
echo virtio0 >$driver/unbind
echo virtio0 >$driver/bind
ping
busybox poweroff -f
";

/// Packs busybox, the driver's modules and `INIT`.
fn make_initrd(directory: &Path, initrd: &Path) {
    let script = "set -e; mkdir -p bin sys proc dev; cp $(command -v busybox) bin/
        for module in failover net_failover virtio_net; do
            cp $(find /usr/lib/uml/modules -name $module.ko | head -n 1) .
        done
        find . | cpio --quiet -o -H newc";
    fs::create_dir(directory).unwrap();
    fs::write(directory.join("init"), INIT).unwrap();
    fs::set_permissions(directory.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).current_dir(directory);
    assert!(shell.stdout(File::create(initrd).unwrap()).status().unwrap().success());
}

#[test]
fn user_mode_linux_is_served() {
    needs_root!("user_mode_linux_is_served");
    needs_program!("user_mode_linux_is_served", "linux");
    enter_namespace_with_tap(false);
    ip("address add 10.7.0.1/24 dev tap0");
    let daemon = Daemon::start(&["--tap=tap0"]);
    let directory = daemon.directory();
    let (initrd, output) = (directory.join("initrd"), directory.join("output"));
    make_initrd(&directory.join("root"), &initrd);
    let status = Command::new("timeout")
        .args(["--kill-after=1", "60", "linux", "mem=64M", "con=null", "con0=null,fd:1"])
        .arg(format!("initrd={}", initrd.display()))
        .arg(format!("uml_dir={}", directory.join("uml").display()))
        .arg(format!("virtio_uml.device={}:1", daemon.socket().display()))
        .args(["ssl=null", "root=/dev/ram", "rdinit=/init"])
        .stdin(Stdio::null())
        .stdout(File::create(&output).unwrap())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let said = fs::read_to_string(output).unwrap();
    assert_eq!(said.matches("PINGED").count(), 2, "{status}: {said}\n{}", daemon.log());
    assert!(daemon.log().contains("control virtqueue started"), "{}", daemon.log());
}
