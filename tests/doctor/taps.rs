//! TAP devices that are missing, made wrongly, or behind something that is too narrow.

use std::os::unix::fs::symlink;
use std::process::Command;

use vmm_sys_util::tempdir::TempDir;

use super::{
    enter_new_mounts, examine, examine_by, is_mended, is_mended_for, is_right, line, shell,
};
use crate::support::daemon::{Daemon, program};
use crate::support::network::{enter_new_namespace, ip, output};
use crate::support::{eventually, needs_program, needs_root};

/// Runs doctor as a user without rights, but the one to read: the program may lie where only root may
/// look.
const NOBODY: [&str; 5] = [
    "setpriv",
    "--reuid=65534",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
];

#[test]
fn a_missing_tap_is_made_by_the_command_that_is_printed() {
    needs_root!("a_missing_tap_is_made_by_the_command_that_is_printed");
    enter_new_namespace();
    let arguments = ["--tap=tap0", "--queue-pairs=2", "--mtu=9000"];
    let wrong = is_mended("tap", "WARN", &arguments);
    assert!(wrong.why.contains("the daemon makes it"), "{wrong:?}");
    let mut daemon = Daemon::start(&arguments);
    assert!(daemon.is_alive(), "and the daemon takes it");
    let lines = examine(&arguments);
    assert_eq!(lines.iter().filter(|line| line.status == "FAIL").count(), 0, "{lines:#?}");
}

#[test]
fn a_missing_tap_fails_for_who_can_not_make_it() {
    needs_root!("a_missing_tap_fails_for_who_can_not_make_it");
    enter_new_namespace();
    is_mended_for(&NOBODY, "tap", "FAIL", &["--tap=tap0"]);
    assert!(output("ip", "-d link show tap0").contains("user nobody"));
}

#[test]
fn a_tap_of_a_wrong_user_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tap_of_a_wrong_user_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("link add br0 type bridge");
    ip("tuntap add dev tap0 mode tap vnet_hdr user 1234");
    ip("link set tap0 master br0 up");
    let wrong = is_mended_for(&NOBODY, "tap-owner", "FAIL", &["--tap=tap0"]);
    assert!(wrong.why.contains("user 1234"), "{wrong:?}");
    assert!(output("ip", "link show tap0").contains("master br0"), "it stays in its bridge");
    let root = examine(&["--tap=tap0"]);
    assert!(line(&root, "tap-owner", "PASS").why.contains("CAP_NET_ADMIN"), "{root:#?}");
}

#[test]
fn a_tap_without_its_header_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tap_without_its_header_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap");
    is_mended("tap-header", "WARN", &["--tap=tap0"]);
}

#[test]
fn a_tap_with_too_few_queues_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tap_with_too_few_queues_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    let arguments = ["--tap=tap0", "--queue-pairs=2"];
    is_mended("tap-queues", "FAIL", &arguments);
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon takes it");
}

#[test]
fn a_tap_that_is_down_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tap_that_is_down_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    is_mended("tap-state", "FAIL", &["--tap=tap0"]);
}

#[test]
fn a_name_with_a_command_in_it_is_a_name_in_the_cure() {
    needs_root!("a_name_with_a_command_in_it_is_a_name_in_the_cure");
    enter_new_namespace();
    ip("tuntap add dev $(reboot);'x mode tap vnet_hdr");
    is_mended("tap-state", "FAIL", &["--tap=$(reboot);'x"]);
}

#[test]
fn a_tap_with_a_small_mtu_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tap_with_a_small_mtu_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link add br0 type bridge");
    ip("link set tap0 mtu 1400 master br0 up");
    let wrong = is_mended("tap-mtu", "FAIL", &["--tap=tap0"]);
    assert!(wrong.why.contains("br0 drops longer frames"), "{wrong:?}");
    assert!(output("ip", "link show tap0").contains("mtu 1500"));
    ip("link set tap0 nomaster");
    is_mended("tap-mtu", "WARN", &["--tap=tap0", "--mtu=9000"]);
}

#[test]
fn offloads_that_were_turned_off_are_turned_on_by_the_command_that_is_printed() {
    needs_root!("offloads_that_were_turned_off_are_turned_on_by_the_command_that_is_printed");
    needs_program!("offloads_that_were_turned_off_are_turned_on", "ethtool");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    let lines = examine(&["--tap=tap0"]);
    line(&lines, "offloads", "PASS");
    shell("ethtool -K tap0 tx off tso off sg off");
    let wrong = is_mended("offloads", "WARN", &["--tap=tap0"]);
    assert!(wrong.why.contains("tx-scatter-gather"), "{wrong:?}");
}

#[test]
fn offloads_that_a_daemon_left_off_are_nobodys_choice() {
    needs_root!("offloads_that_a_daemon_left_off_are_nobodys_choice");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    drop(Daemon::start(&["--tap=tap0"]));
    line(&examine(&["--tap=tap0"]), "offloads", "PASS");
}

#[test]
fn ownerless_tap_is_mended_by_the_command_that_is_printed() {
    needs_root!("ownerless_tap_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    is_mended("tap-owner", "WARN", &["--tap=tap0"]);
    assert!(output("ip", "-d link show tap0").contains("user root"));
}

#[test]
fn router_advertisements_are_refused_by_the_command_printed() {
    needs_root!("router_advertisements_are_refused_by_the_command_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link add br0 type bridge");
    ip("link set tap0 up");
    is_mended("tap-advertisements", "WARN", &["--tap=tap0"]);
    shell("sysctl -qw net.ipv6.conf.tap0.accept_ra=1; ip link set tap0 master br0");
    line(&examine(&["--tap=tap0"]), "tap-advertisements", "PASS");
}

#[test]
fn tap_is_found_by_its_alternative_name() {
    needs_root!("tap_is_found_by_its_alternative_name");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr user root");
    ip("link property add dev tap0 altname vm-net0");
    is_mended("tap-state", "FAIL", &["--tap=vm-net0"]);
    let _daemon = Daemon::start(&["--tap=vm-net0"]);
    line(&examine(&["--tap=vm-net0"]), "tap-use", "PASS");
}

#[test]
fn macvtap_by_name_is_told_how_to_be_passed() {
    needs_root!("macvtap_by_name_is_told_how_to_be_passed");
    enter_new_namespace();
    ip("link add veth0 type veth peer name veth1");
    ip("link add link veth0 name macvtap0 type macvtap");
    assert!(line(&examine(&["--tap=macvtap0"]), "tap", "FAIL").why.contains("--tap-fd=3"));
}

#[test]
fn a_tap_that_another_program_has_is_freed_by_the_command_that_is_printed() {
    needs_root!("a_tap_that_another_program_has_is_freed_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    let ours = Daemon::start(&["--tap=tap0"]);
    let lines = examine(&["--tap=tap0"]);
    let open = line(&lines, "tap-use", "PASS");
    assert!(open.why.contains(&ours.process().to_string()), "{open:?}");
    drop(ours);

    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = |name: &str| directory.as_path().join(name).display().to_string();
    symlink(program().get_program(), path("theirs")).unwrap();
    let socket = format!("--socket-path={}", path("socket"));
    let mut theirs = Command::new(path("theirs"))
        .args([&socket[..], "--tap=tap0", "--log-level=error"])
        .spawn()
        .unwrap();
    eventually("it has the TAP", || {
        examine(&["--tap=tap0"]).iter().any(|line| line.check == "tap-use")
    });
    let before = examine(&["--tap=tap0"]);
    let wrong = line(&before, "tap-use", "FAIL");
    assert_eq!(wrong.fix, Some(format!("kill {}", theirs.id())));
    assert!(wrong.why.contains("theirs"), "{wrong:?}");
    shell(wrong.fix.as_deref().unwrap());
    theirs.wait().unwrap();
    is_right(wrong, &examine(&["--tap=tap0"]));
}

#[test]
fn what_is_no_tap_is_not_taken_for_one() {
    needs_root!("what_is_no_tap_is_not_taken_for_one");
    enter_new_namespace();
    ip("link add veth0 type veth peer name veth1");
    ip("tuntap add dev tun0 mode tun");
    assert!(line(&examine(&["--tap=veth0"]), "tap", "FAIL").why.contains("a veth"));
    assert!(line(&examine(&["--tap=tun0"]), "tap", "FAIL").why.contains("not a TAP"));
}

#[test]
fn a_tunnel_in_the_guests_bridge_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_tunnel_in_the_guests_bridge_is_mended_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("link add veth0 type veth peer name veth1");
    ip("link set veth0 up");
    ip("link set veth1 up");
    ip("link add br0 type bridge");
    ip("link add vx0 type vxlan id 5 dstport 4789 remote 192.0.2.9 dev veth0");
    ip("link set vx0 master br0 up");
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 master br0 up");
    let before = examine(&["--tap=tap0"]);
    assert!(line(&before, "tunnel", "PASS").why.contains("50 bytes"), "{before:#?}");
    let wrong = line(&before, "path-mtu", "FAIL").clone();
    assert_eq!(wrong.what, "path through vx0");
    assert!(wrong.why.contains("--mtu=1450"), "{wrong:?}");
    shell(wrong.fix.as_deref().unwrap());
    is_right(&wrong, &examine(&["--tap=tap0", "--mtu=1450"]));

    ip("link set veth0 mtu 1400");
    let wrong = is_mended("tunnel", "WARN", &["--tap=tap0", "--mtu=1350"]);
    assert!(wrong.why.contains("fragments"), "{wrong:?}");
    assert!(output("ip", "link show vx0").contains("mtu 1350"));
}

#[test]
fn a_missing_tun_device_is_made_by_the_command_that_is_printed() {
    needs_root!("a_missing_tun_device_is_made_by_the_command_that_is_printed");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    enter_new_mounts();
    shell("mount -t tmpfs -o dev tmpfs /dev/net");
    is_mended("tun", "FAIL", &["--tap=tap0"]);
    assert_eq!(line(&examine(&[]), "tun", "PASS").what, "/dev/net/tun");
}

#[test]
fn a_tun_device_that_is_roots_alone_is_opened_by_the_command_that_is_printed() {
    const TEST: &str = "a_tun_device_that_is_roots_alone_is_opened_by_the_command_that_is_printed";
    needs_root!(TEST);
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr user 65534");
    enter_new_mounts();
    shell("mount -t tmpfs -o dev,mode=755 tmpfs /dev/net; mknod -m 600 /dev/net/tun c 10 200");
    is_mended_for(&NOBODY, "tun", "FAIL", &["--tap=tap0"]);
    let (_, lines) = examine_by(&NOBODY, &["--tap=tap0"]);
    line(&lines, "tap-owner", "PASS");
}
