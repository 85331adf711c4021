//! Devices for AF_XDP.

use std::os::fd::RawFd;
use std::process::{Command, Stdio};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use vhost_user_net::sys::bpf::{Hook, Link, Program};
use vhost_user_net::sys::link;

use super::{examine, is_mended, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip, make_veth, output};
use crate::support::{eventually, needs_program, needs_root};

/// A veth that is as it should be: `veth0` for the daemon, `veth1` the host's.
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
fn a_veth_as_the_documentation_makes_it_passes() {
    needs_root!("a_veth_as_the_documentation_makes_it_passes");
    enter_namespace_with_good_veth();
    let lines = examine(&["--af-xdp=veth0"]);
    let about = |line: &&super::Line| line.what == "device veth0";
    assert!(lines.iter().filter(about).count() > 6, "{lines:#?}");
    assert!(lines.iter().filter(about).all(|line| line.status == "PASS"), "{lines:#?}");
    assert!(line(&lines, "firewall", "WARN").why.contains("--anti-spoofing=on"));
}

#[test]
fn a_missing_device_is_made_by_the_command_that_is_printed() {
    needs_root!("a_missing_device_is_made_by_the_command_that_is_printed");
    enter_new_namespace();
    let arguments = ["--af-xdp=tenant-number-1", "--mtu=3000"];
    is_mended("device", "FAIL", &arguments);
    let lines = examine(&arguments);
    assert_eq!(lines.iter().filter(|line| line.status == "FAIL").count(), 0, "{lines:#?}");
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon takes it");
}

#[test]
fn a_device_that_is_down_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_device_that_is_down_is_mended_by_the_command_that_is_printed");
    enter_namespace_with_good_veth();
    ip("link set veth0 down");
    is_mended("device", "FAIL", &["--af-xdp=veth0"]);
}

#[test]
fn an_mtu_that_is_too_small_or_too_large_is_mended_by_the_command_that_is_printed() {
    needs_root!("an_mtu_that_is_too_small_or_too_large_is_mended_by_the_command_that_is_printed");
    enter_namespace_with_good_veth();
    ip("link set veth0 mtu 1400");
    is_mended("mtu", "FAIL", &["--af-xdp=veth0"]);
    ip("link set veth1 mtu 1400");
    let wrong = is_mended("mtu", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("from the guest"), "{wrong:?}");
    ip("link set veth0 mtu 9000");
    let wrong = is_mended("mtu", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("3806"), "{wrong:?}");
    assert!(output("ip", "link show veth0").contains("mtu 1500"));
    let lines = examine(&["--af-xdp=veth0", "--mtu=9000"]);
    assert_eq!(line(&lines, "mtu", "FAIL").fix, None, "that is for the operator to lower");
}

#[test]
fn open_checksums_at_the_other_end_are_mended_by_the_command_that_is_printed() {
    needs_root!("open_checksums_at_the_other_end_are_mended_by_the_command_that_is_printed");
    needs_program!("open_checksums_at_the_other_end_are_mended", "ethtool");
    enter_new_namespace();
    make_veth(1);
    let wrong = is_mended("offloads", "FAIL", &["--af-xdp=veth0"]);
    assert_eq!(wrong.fix.as_deref(), Some("ethtool -K veth1 tx off"));
}

#[test]
fn lost_vlan_tags_are_mended_by_the_command_that_is_printed() {
    needs_root!("lost_vlan_tags_are_mended_by_the_command_that_is_printed");
    needs_program!("lost_vlan_tags_are_mended_by_the_command_that_is_printed", "ethtool");
    enter_namespace_with_good_veth();
    // In the driver the tags are put back, by a program of which nothing is left.
    line(&examine(&["--af-xdp=veth0"]), "vlan-tags", "PASS");
    assert!(!output("ip", "-d link show veth0").contains("prog/xdp"));
    let wrong = is_mended("vlan-tags", "FAIL", &["--af-xdp=veth0,attach=generic"]);
    let fix = "ethtool -K veth1 txvlan off tx-vlan-stag-hw-insert off";
    assert_eq!(wrong.fix.as_deref(), Some(fix));
    ip("link add mv0 link veth1 type macvlan mode bridge");
    let lines = examine(&["--af-xdp=mv0,attach=generic"]);
    assert_eq!(line(&lines, "vlan-tags", "WARN").fix, None, "the kernel does it itself");
}

#[test]
fn a_lower_device_that_joins_frames_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_lower_device_that_joins_frames_is_mended_by_the_command_that_is_printed");
    needs_program!("a_lower_device_that_joins_frames_is_mended", "ethtool");
    enter_namespace_with_good_veth();
    ip("link add br0 type bridge");
    ip("link set veth0 master br0");
    ip("link set br0 up");
    shell("ethtool -K veth0 gro on");
    // What joins frames of a device whose driver runs the program is the device itself.
    let own = examine(&["--af-xdp=veth0"]);
    assert!(!own.iter().any(|line| line.check == "joined-frames"), "{own:#?}");
    let wrong = is_mended("joined-frames", "WARN", &["--af-xdp=br0"]);
    assert_eq!(wrong.fix.as_deref(), Some("ethtool -K veth0 gro off"));
}

#[test]
fn missing_queues_are_made_by_the_command_that_is_printed() {
    needs_root!("missing_queues_are_made_by_the_command_that_is_printed");
    needs_program!("missing_queues_are_made_by_the_command_that_is_printed", "ethtool");
    enter_new_namespace();
    make_veth(4);
    shell("ethtool -L veth0 rx 1 tx 1; ethtool -L veth1 rx 1 tx 1; ethtool -K veth1 tx off");
    let arguments = ["--af-xdp=veth0,queue=1", "--queue-pairs=2"];
    is_mended("queues", "FAIL", &arguments);
    assert!(Daemon::start(&arguments).is_alive(), "and the daemon takes them");
    let lines = examine(&["--af-xdp=veth0,queue=7"]);
    assert_eq!(line(&lines, "queues", "FAIL").fix, None, "it can't have so many");
}

#[test]
fn a_driver_without_xdp_is_known_by_what_it_says() {
    needs_root!("a_driver_without_xdp_is_known_by_what_it_says");
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
fn steering_where_there_are_no_rules_fails() {
    needs_root!("steering_where_there_are_no_rules_fails");
    enter_namespace_with_good_veth();
    let lines = examine(&["--af-xdp=veth0"]);
    line(&lines, "steering", "PASS");
    // It takes --mac, which doctor has from a file.
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
fn a_foreign_program_is_detached_by_the_command_that_is_printed() {
    needs_root!("a_foreign_program_is_detached_by_the_command_that_is_printed");
    enter_namespace_with_good_veth();
    attach_by_netlink("veth0", foreign_program("by_netlink"), "by_netlink");
    let wrong = is_mended("xdp-program", "FAIL", &["--af-xdp=veth0"]);
    assert!(wrong.why.contains("'by_netlink'"), "{wrong:?}");
    assert!(Daemon::start(&["--af-xdp=veth0"]).is_alive(), "and the daemon attaches its own");
}

#[test]
fn a_process_that_holds_a_foreign_program_is_named() {
    needs_root!("a_process_that_holds_a_foreign_program_is_named");
    enter_namespace_with_good_veth();
    let device = link::find("veth0").unwrap().index;
    let program = foreign_program("by_link");
    let link = Link::attach(&program, device, Hook::Native).unwrap();
    let lines = examine(&["--af-xdp=veth0"]);
    let wrong = line(&lines, "xdp-program", "FAIL");
    let fix = format!("kill {}", std::process::id());
    assert_eq!(wrong.fix, Some(fix), "'xdp off' does not take it from the link's holder");
    // Which ends this process, too; the kernel does no more than this then.
    drop(link);
    // A process that another test is just starting has it, too, until it runs its own program.
    eventually("nobody holds it", || {
        let lines = examine(&["--af-xdp=veth0"]);
        !lines.iter().any(|line| line.check == wrong.check && line.status == "FAIL")
    });
    is_right(wrong, &examine(&["--af-xdp=veth0"]));
}

#[test]
fn the_daemons_own_program_is_known() {
    needs_root!("the_daemons_own_program_is_known");
    enter_namespace_with_good_veth();
    let _daemon = Daemon::start(&["--af-xdp=veth0"]);
    let lines = examine(&["--af-xdp=veth0"]);
    assert!(line(&lines, "xdp-program", "PASS").why.contains("the daemon's"), "{lines:#?}");
}

#[test]
fn too_little_locked_memory_is_mended_by_the_command_that_is_printed() {
    needs_root!("too_little_locked_memory_is_mended_by_the_command_that_is_printed");
    needs_program!("too_little_locked_memory_is_mended", "setpriv");
    enter_namespace_with_good_veth();
    let limited = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock"];
    let (_, before) = super::examine_by(&limited, &["--af-xdp=veth0"]);
    let wrong = line(&before, "locked-memory", "FAIL");
    let may_raise = Command::new("prlimit").args(["--memlock=unlimited", "true"]).status();
    if !may_raise.unwrap().success() {
        // Not even root may here: what is left is the capability.
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
    assert_eq!(status.unwrap().code(), Some(1), "nor can the daemon start");
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

/// The number of this process's descriptor of the program of that name.
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
