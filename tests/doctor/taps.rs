//! Checks of TAP devices, of `/dev/net/tun`, and of the MTU behind a TAP.

use std::os::unix::fs::symlink;
use std::process::Command;

use vmm_sys_util::tempdir::TempDir;

use super::{enter_new_mounts, examine, examine_by, is_fixed, is_fixed_for, is_right, line, shell};
use crate::support::daemon::{Daemon, program};
use crate::support::network::{enter_new_namespace, ip, output};
use crate::support::{eventually, needs_program, needs_root};

/// Runs doctor as a user without rights. One capability remains, to read a program in a directory of root's.
const NOBODY: [&str; 5] = [
    "setpriv",
    "--reuid=65534",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
];

#[test]
fn printed_command_creates_a_missing_tap() {
    needs_root!("printed_command_creates_a_missing_tap");
    enter_new_namespace();
    let arguments = ["--tap=tap0", "--queue-pairs=2", "--mtu=9000"];
    let wrong = is_fixed("tap", "WARN", &arguments);
    assert!(wrong.why.contains("the daemon would create it"), "{wrong:?}");
    let mut daemon = Daemon::start(&arguments);
    assert!(daemon.is_alive(), "and the daemon opens it");
    let lines = examine(&arguments);
    assert_eq!(lines.iter().filter(|line| line.status == "FAIL").count(), 0, "{lines:#?}");
}

#[test]
fn missing_tap_fails_without_cap_net_admin() {
    needs_root!("missing_tap_fails_without_cap_net_admin");
    enter_new_namespace();
    is_fixed_for(&NOBODY, "tap", "FAIL", &["--tap=tap0"]);
    assert!(output("ip", "-d link show tap0").contains("user nobody"));
}

#[test]
fn printed_command_gives_a_tap_to_this_user() {
    needs_root!("printed_command_gives_a_tap_to_this_user");
    enter_new_namespace();
    ip("link add br0 type bridge");
    ip("tuntap add dev tap0 mode tap vnet_hdr user 1234");
    ip("link set tap0 master br0 up");
    let wrong = is_fixed_for(&NOBODY, "tap-owner", "FAIL", &["--tap=tap0"]);
    assert!(wrong.why.contains("user 1234"), "{wrong:?}");
    assert!(output("ip", "link show tap0").contains("master br0"), "it stays in its bridge");
    let root = examine(&["--tap=tap0"]);
    assert!(line(&root, "tap-owner", "PASS").why.contains("CAP_NET_ADMIN"), "{root:#?}");
}

#[test]
fn printed_command_adds_the_header_to_a_tap() {
    needs_root!("printed_command_adds_the_header_to_a_tap");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap");
    is_fixed("tap-header", "WARN", &["--tap=tap0"]);
}

#[test]
fn printed_command_makes_a_tap_multi_queue() {
    needs_root!("printed_command_makes_a_tap_multi_queue");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    let arguments = ["--tap=tap0", "--queue-pairs=2"];
    is_fixed("tap-queues", "FAIL", &arguments);
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon opens it");
}

#[test]
fn printed_command_brings_a_tap_up() {
    needs_root!("printed_command_brings_a_tap_up");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    is_fixed("tap-state", "FAIL", &["--tap=tap0"]);
}

#[test]
fn shell_syntax_in_a_name_is_quoted_in_the_printed_command() {
    needs_root!("shell_syntax_in_a_name_is_quoted_in_the_printed_command");
    enter_new_namespace();
    ip("tuntap add dev $(reboot);'x mode tap vnet_hdr");
    is_fixed("tap-state", "FAIL", &["--tap=$(reboot);'x"]);
}

#[test]
fn printed_command_raises_a_taps_mtu() {
    needs_root!("printed_command_raises_a_taps_mtu");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link add br0 type bridge");
    ip("link set tap0 mtu 1400 master br0 up");
    let wrong = is_fixed("tap-mtu", "FAIL", &["--tap=tap0"]);
    assert!(wrong.why.contains("bridge br0 silently drops larger frames"), "{wrong:?}");
    assert!(output("ip", "link show tap0").contains("mtu 1500"));
    ip("link set tap0 nomaster");
    is_fixed("tap-mtu", "WARN", &["--tap=tap0", "--mtu=9000"]);
}

#[test]
fn printed_command_turns_on_scatter_gather_of_a_tap() {
    needs_root!("printed_command_turns_on_scatter_gather_of_a_tap");
    needs_program!("printed_command_turns_on_scatter_gather_of_a_tap", "ethtool");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    let lines = examine(&["--tap=tap0"]);
    line(&lines, "offloads", "PASS");
    shell("ethtool -K tap0 tx off tso off sg off");
    let wrong = is_fixed("offloads", "WARN", &["--tap=tap0"]);
    assert!(wrong.why.contains("tx-scatter-gather"), "{wrong:?}");
}

#[test]
fn offloads_that_an_exited_daemon_cleared_pass() {
    needs_root!("offloads_that_an_exited_daemon_cleared_pass");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    drop(Daemon::start(&["--tap=tap0"]));
    line(&examine(&["--tap=tap0"]), "offloads", "PASS");
}

#[test]
fn printed_command_gives_an_unowned_tap_an_owner() {
    needs_root!("printed_command_gives_an_unowned_tap_an_owner");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    is_fixed("tap-owner", "WARN", &["--tap=tap0"]);
    assert!(output("ip", "-d link show tap0").contains("user root"));
}

#[test]
fn printed_command_refuses_router_advertisements() {
    needs_root!("printed_command_refuses_router_advertisements");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link add br0 type bridge");
    ip("link set tap0 up");
    is_fixed("tap-advertisements", "WARN", &["--tap=tap0"]);
    shell("sysctl -qw net.ipv6.conf.tap0.accept_ra=1; ip link set tap0 master br0");
    line(&examine(&["--tap=tap0"]), "tap-advertisements", "PASS");
}

#[test]
fn tap_is_found_by_its_alternative_name() {
    needs_root!("tap_is_found_by_its_alternative_name");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr user root");
    ip("link property add dev tap0 altname vm-net0");
    is_fixed("tap-state", "FAIL", &["--tap=vm-net0"]);
    let _daemon = Daemon::start(&["--tap=vm-net0"]);
    line(&examine(&["--tap=vm-net0"]), "tap-use", "PASS");
}

#[test]
fn macvtap_by_name_fails_and_names_tap_fd() {
    needs_root!("macvtap_by_name_fails_and_names_tap_fd");
    enter_new_namespace();
    ip("link add veth0 type veth peer name veth1");
    ip("link add link veth0 name macvtap0 type macvtap");
    assert!(line(&examine(&["--tap=macvtap0"]), "tap", "FAIL").why.contains("--tap-fd=3"));
}

#[test]
fn printed_command_stops_the_program_that_uses_a_tap() {
    needs_root!("printed_command_stops_the_program_that_uses_a_tap");
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
    eventually("the other program has the TAP", || {
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
fn other_devices_are_not_taken_for_taps() {
    needs_root!("other_devices_are_not_taken_for_taps");
    enter_new_namespace();
    ip("link add veth0 type veth peer name veth1");
    ip("tuntap add dev tun0 mode tun");
    assert!(line(&examine(&["--tap=veth0"]), "tap", "FAIL").why.contains("a veth"));
    assert!(line(&examine(&["--tap=tun0"]), "tap", "FAIL").why.contains("not a TAP"));
}

#[test]
fn printed_commands_fit_the_mtus_of_tap_and_tunnel() {
    needs_root!("printed_commands_fit_the_mtus_of_tap_and_tunnel");
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
    assert_eq!(wrong.what, "vx0");
    assert!(wrong.why.contains("--mtu=1450"), "{wrong:?}");
    shell(wrong.fix.as_deref().unwrap());
    is_right(&wrong, &examine(&["--tap=tap0", "--mtu=1450"]));

    ip("link set veth0 mtu 1400");
    let wrong = is_fixed("tunnel", "WARN", &["--tap=tap0", "--mtu=1350"]);
    assert!(wrong.why.contains("fragmented"), "{wrong:?}");
    assert!(output("ip", "link show vx0").contains("mtu 1350"));
}

#[test]
fn printed_command_creates_dev_net_tun() {
    needs_root!("printed_command_creates_dev_net_tun");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    enter_new_mounts();
    shell("mount -t tmpfs -o dev tmpfs /dev/net");
    is_fixed("tun", "FAIL", &["--tap=tap0"]);
    assert_eq!(line(&examine(&[]), "tun", "PASS").what, "/dev/net/tun");
}

#[test]
fn printed_command_opens_dev_net_tun_to_all_users() {
    const TEST: &str = "printed_command_opens_dev_net_tun_to_all_users";
    needs_root!(TEST);
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr user 65534");
    enter_new_mounts();
    shell("mount -t tmpfs -o dev,mode=755 tmpfs /dev/net; mknod -m 600 /dev/net/tun c 10 200");
    is_fixed_for(&NOBODY, "tun", "FAIL", &["--tap=tap0"]);
    let (_, lines) = examine_by(&NOBODY, &["--tap=tap0"]);
    line(&lines, "tap-owner", "PASS");
}
