//! Devices for AF_XDP.

use std::os::fd::RawFd;
use std::process::{Command, Stdio};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use vhost_user_net::sys::bpf::{Hook, Link, Program};
use vhost_user_net::sys::link;

use super::{examine, is_fixed, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip, make_veth, output};
use crate::support::{eventually, needs_program, needs_root};

/// Creates a veth set up as documented: `veth0` for the daemon, `veth1` for the host.
fn enter_namespace_with_good_veth() {
    enter_new_namespace();
    make_veth(1);
    shell("ethtool -K veth1 tx off");
}

/// r0 = XDP_PASS; exit
fn foreign_program(name: &str) -> Program {
    Program::load(name, &[0x2_0000_00b7, 0x95]).unwrap()
}

#[test]
fn veth_set_up_as_documented_passes() {
    needs_root!("veth_set_up_as_documented_passes");
    enter_namespace_with_good_veth();
    let lines = examine(&["--af-xdp=veth0"]);
    let about = |line: &&super::Line| line.what == "veth0" && line.check != "firewall";
    assert!(lines.iter().filter(about).count() > 6, "{lines:#?}");
    assert!(lines.iter().filter(about).all(|line| line.status == "PASS"), "{lines:#?}");
    assert!(line(&lines, "firewall", "WARN").why.contains("--anti-spoofing=on"));
}

#[test]
fn printed_command_creates_a_missing_device() {
    needs_root!("printed_command_creates_a_missing_device");
    enter_new_namespace();
    let arguments = ["--af-xdp=tenant-number-1", "--mtu=3000"];
    is_fixed("device", "FAIL", &arguments);
    let lines = examine(&arguments);
    assert_eq!(lines.iter().filter(|line| line.status == "FAIL").count(), 0, "{lines:#?}");
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon opens it");
}

#[test]
fn printed_command_brings_a_device_up() {
    needs_root!("printed_command_brings_a_device_up");
    enter_namespace_with_good_veth();
    ip("link set veth0 down");
    is_fixed("device", "FAIL", &["--af-xdp=veth0"]);
}

#[test]
fn printed_command_corrects_a_devices_mtu() {
    needs_root!("printed_command_corrects_a_devices_mtu");
    enter_namespace_with_good_veth();
    ip("link set veth0 mtu 1400");
    is_fixed("mtu", "FAIL", &["--af-xdp=veth0"]);
    ip("link set veth1 mtu 1400");
    let wrong = is_fixed("mtu", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("from the guest"), "{wrong:?}");
    ip("link set veth0 mtu 9000");
    let wrong = is_fixed("mtu", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("3806"), "{wrong:?}");
    assert!(output("ip", "link show veth0").contains("mtu 1500"));
    let lines = examine(&["--af-xdp=veth0", "--mtu=9000"]);
    assert_eq!(line(&lines, "mtu", "FAIL").fix, None, "only the operator can lower the port's MTU");
}

#[test]
fn printed_command_turns_off_the_veth_peers_offloads() {
    needs_root!("printed_command_turns_off_the_veth_peers_offloads");
    needs_program!("printed_command_turns_off_the_veth_peers_offloads", "ethtool");
    enter_new_namespace();
    make_veth(1);
    let wrong = is_fixed("offloads", "FAIL", &["--af-xdp=veth0"]);
    assert_eq!(wrong.fix.as_deref(), Some("ethtool -K veth1 tx off"));
}

#[test]
fn printed_command_keeps_vlan_tags_in_frames() {
    needs_root!("printed_command_keeps_vlan_tags_in_frames");
    needs_program!("printed_command_keeps_vlan_tags_in_frames", "ethtool");
    enter_namespace_with_good_veth();
    // In the driver the program restores the tags. Doctor leaves no program attached.
    line(&examine(&["--af-xdp=veth0"]), "vlan-tags", "PASS");
    assert!(!output("ip", "-d link show veth0").contains("prog/xdp"));
    let wrong = is_fixed("vlan-tags", "FAIL", &["--af-xdp=veth0,attach=generic"]);
    let fix = "ethtool -K veth1 txvlan off tx-vlan-stag-hw-insert off";
    assert_eq!(wrong.fix.as_deref(), Some(fix));
    ip("link add mv0 link veth1 type macvlan mode bridge");
    let lines = examine(&["--af-xdp=mv0,attach=generic"]);
    assert_eq!(line(&lines, "vlan-tags", "WARN").fix, None, "no setting changes it");
}

#[test]
fn printed_command_stops_a_lower_device_joining_frames() {
    needs_root!("printed_command_stops_a_lower_device_joining_frames");
    needs_program!("printed_command_stops_a_lower_device_joining_frames", "ethtool");
    enter_namespace_with_good_veth();
    ip("link add br0 type bridge");
    ip("link set veth0 master br0");
    ip("link set br0 up");
    shell("ethtool -K veth0 gro on");
    // The check applies in generic mode only: here the driver runs the program.
    let own = examine(&["--af-xdp=veth0"]);
    assert!(!own.iter().any(|line| line.check == "joined-frames"), "{own:#?}");
    let wrong = is_fixed("joined-frames", "WARN", &["--af-xdp=br0"]);
    assert_eq!(wrong.fix.as_deref(), Some("ethtool -K veth0 gro off"));
}

#[test]
fn printed_command_adds_missing_queues() {
    needs_root!("printed_command_adds_missing_queues");
    needs_program!("printed_command_adds_missing_queues", "ethtool");
    enter_new_namespace();
    make_veth(4);
    shell("ethtool -L veth0 rx 1 tx 1; ethtool -L veth1 rx 1 tx 1; ethtool -K veth1 tx off");
    let arguments = ["--af-xdp=veth0,queue=1", "--queue-pairs=2"];
    is_fixed("queues", "FAIL", &arguments);
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon opens them");
    let lines = examine(&["--af-xdp=veth0,queue=7"]);
    assert_eq!(line(&lines, "queues", "FAIL").fix, None, "the driver's maximum is lower");
}

#[test]
fn driver_without_xdp_is_recognized() {
    needs_root!("driver_without_xdp_is_recognized");
    enter_new_namespace();
    ip("link add dummy0 type ifb");
    ip("link set dummy0 up");
    let lines = examine(&["--af-xdp=dummy0"]);
    assert!(line(&lines, "xdp", "WARN").why.contains("generic"), "{lines:#?}");
    line(&lines, "zero-copy", "PASS");
    let lines = examine(&["--af-xdp=dummy0,mode=zero-copy,attach=native"]);
    line(&lines, "xdp", "FAIL");
    line(&lines, "zero-copy", "FAIL");
}

#[test]
fn steering_without_flow_rules_fails() {
    needs_root!("steering_without_flow_rules_fails");
    enter_namespace_with_good_veth();
    let lines = examine(&["--af-xdp=veth0"]);
    line(&lines, "steering", "PASS");
    // Steering requires --mac, which doctor reads from a file.
    let directory = vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/vhost-user-net-test-");
    let directory = directory.unwrap();
    let file = directory.as_path().join("config");
    let contents = format!(
        "[[port]]\nsocket-path = \"{}/s\"\naf-xdp = \"veth0,steer=mac\"\nmac = \
         \"02:00:00:00:00:01\"\nanti-spoofing = true\n",
        directory.as_path().display()
    );
    std::fs::write(&file, contents).unwrap();
    let lines = examine(&[&format!("--config={}", file.display())]);
    line(&lines, "steering", "FAIL");
    line(&lines, "firewall", "PASS");
    line(&lines, "socket", "PASS");
}

#[test]
fn printed_command_detaches_a_foreign_xdp_program() {
    needs_root!("printed_command_detaches_a_foreign_xdp_program");
    enter_namespace_with_good_veth();
    attach_by_netlink("veth0", foreign_program("by_netlink"), "by_netlink");
    let wrong = is_fixed("xdp-program", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("'by_netlink'"), "{wrong:?}");
    assert!(Daemon::start(&["--af-xdp=veth0"]).is_alive(), "and the daemon attaches its own");
}

#[test]
fn process_that_holds_a_foreign_xdp_program_is_named() {
    needs_root!("process_that_holds_a_foreign_xdp_program_is_named");
    enter_namespace_with_good_veth();
    let device = link::find("veth0").unwrap().index;
    let program = foreign_program("by_link");
    let link = Link::attach(&program, device, Hook::Native).unwrap();
    let lines = examine(&["--af-xdp=veth0"]);
    let wrong = line(&lines, "xdp-program", "FAIL");
    let fix = format!("kill {}", std::process::id());
    assert_eq!(wrong.fix, Some(fix), "'xdp off' does not take it from the link's holder");
    // The printed command would end this test process; closing the link has the same effect.
    drop(link);
    // A process that another test is just starting also holds the link, until its exec.
    eventually("no process holds the link", || {
        let lines = examine(&["--af-xdp=veth0"]);
        !lines.iter().any(|line| line.check == wrong.check && line.status == "FAIL")
    });
    is_right(wrong, &examine(&["--af-xdp=veth0"]));
}

#[test]
fn daemons_own_xdp_program_passes() {
    needs_root!("daemons_own_xdp_program_passes");
    enter_namespace_with_good_veth();
    let _daemon = Daemon::start(&["--af-xdp=veth0"]);
    let lines = examine(&["--af-xdp=veth0"]);
    assert!(line(&lines, "xdp-program", "PASS").why.contains("the daemon's"), "{lines:#?}");
}

#[test]
fn printed_command_raises_the_locked_memory_limit() {
    needs_root!("printed_command_raises_the_locked_memory_limit");
    needs_program!("printed_command_raises_the_locked_memory_limit", "setpriv");
    enter_namespace_with_good_veth();
    let limited = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock"];
    let (_, before) = super::examine_by(&limited, &["--af-xdp=veth0"]);
    let wrong = line(&before, "locked-memory", "FAIL");
    let may_raise = Command::new("prlimit").args(["--memlock=unlimited", "true"]).status();
    if !may_raise.unwrap().success() {
        // Here not even root may raise the limit: only the capability remains.
        return is_right(wrong, &examine(&["--af-xdp=veth0"]));
    }
    let mut in_shell = limited.to_vec();
    let script = format!("{} && exec \"$0\" \"$@\"", wrong.fix.as_deref().unwrap());
    in_shell.extend(["sh", "-c", &script]);
    let (_, after) = super::examine_by(&in_shell, &["--af-xdp=veth0"]);
    is_right(wrong, &after);
}

#[test]
fn missing_capabilities_are_named() {
    needs_root!("missing_capabilities_are_named");
    needs_program!("missing_capabilities_are_named", "setpriv");
    enter_namespace_with_good_veth();
    let few = ["setpriv", "--bounding-set=-net_raw,-sys_admin,-bpf"];
    let (_, lines) = super::examine_by(&few, &["--af-xdp=veth0"]);
    let wrong = line(&lines, "capabilities", "FAIL");
    assert!(wrong.why.contains("CAP_NET_RAW, CAP_BPF"), "{wrong:?}");
    let status = Command::new(few[0])
        .args(&few[1..])
        .arg(crate::support::daemon::program().get_program())
        .args(["--af-xdp=veth0", "--socket-path=/tmp/vhost-user-net-test-none"])
        .stderr(Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(1), "the daemon cannot start either");
    line(&examine(&["--af-xdp=veth0"]), "capabilities", "PASS");
}

/// Attaches a program without a link, as `ip link set … xdp` does.
fn attach_by_netlink(device: &str, program: Program, name: &str) {
    let mut message = LinkMessage::default();
    message.header.index = link::find(device).unwrap().index;
    let descriptor = descriptor_of(name);
    message.attributes.push(LinkAttribute::Xdp(vec![LinkXdp::Fd(descriptor)]));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::SetLink(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.bind_auto().unwrap();
    socket.connect(&SocketAddr::new(0, 0)).unwrap();
    socket.send(&bytes, 0).unwrap();
    let (answer, _) = socket.recv_from_full().unwrap();
    let code = i32::from_ne_bytes(answer[16..20].try_into().unwrap());
    assert_eq!(code, 0, "attach by netlink");
    drop(program);
}

/// Returns this process's descriptor of the BPF program with that name.
fn descriptor_of(name: &str) -> RawFd {
    let numbers = std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let is_it = |number: &RawFd| {
        let info =
            std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:\t"));
        let program = id.and_then(|id| Program::by_id(id.parse().ok()?).ok());
        program.is_some_and(|program| program.info().is_ok_and(|info| info.name == name))
    };
    numbers.filter_map(|it| it.file_name().to_str()?.parse().ok()).find(is_it).unwrap()
}
