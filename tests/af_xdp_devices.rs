//! AF_XDP on the devices of real hosts: VLAN tags, MTUs and merged frames, which the kernel and other devices
//! change before the XDP program runs.

use std::process::Command;

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_for, enter_quiet_namespace, ip, output};
use crate::support::traffic::{datagram, frame};
use crate::support::{eventually, needs_program, needs_root};

/// Creates a bridge whose ports are the other ends of tenants' veths. A bridge moves VLAN tags from frames to
/// their metadata.
fn enter_namespace_with_bridge(tenants: &[&str]) {
    enter_quiet_namespace();
    // One that snoops joins a multicast group, and says so to all.
    ip("link add br0 type bridge mcast_snooping 0");
    ip("link set br0 up");
    for name in tenants {
        ip(&format!("link add {name} type veth peer name {name}-br"));
        ip(&format!("link set {name}-br master br0"));
        ip(&format!("link set {name} up"));
        ip(&format!("link set {name}-br up"));
        ethtool(&format!("{name}-br"), "tx off");
    }
}

#[track_caller]
fn ethtool(device: &str, features: &str) {
    let output = output("ethtool", &format!("-K {device} {features}"));
    assert!(!output.contains("Could not") && !output.contains("Cannot"), "{output}");
}

/// Builds a frame with a VLAN tag of this ethertype.
fn tagged(ethertype: u16, tag: u16, number: usize) -> Vec<u8> {
    let frame = frame(number, 100);
    [&frame[..12], &ethertype.to_be_bytes(), &tag.to_be_bytes(), &frame[12..]].concat()
}

/// Tags with a VLAN, a priority only, the largest values, and a provider's ethertype.
const TAGS: [(u16, u16); 4] = [(0x8100, 100), (0x8100, 0xe000), (0x8100, 0xefff), (0x88a8, 100)];

fn card(daemon: &Daemon) -> Card {
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.send(0, &[0; 5]);
    card
}

/// Sends frames with and without tags, and checks that each arrives unchanged.
#[track_caller]
fn check_tags(mut send: impl FnMut(&[u8]), card: &mut Card) {
    for (number, (ethertype, tag)) in TAGS.into_iter().enumerate() {
        send(&tagged(ethertype, tag, number));
        let received = card.receive(0);
        assert_eq!(received[HEADER..], tagged(ethertype, tag, number), "{ethertype:x} {tag}");
        send(&frame(number, 100));
        assert_eq!(card.receive(0)[HEADER..], frame(number, 100));
    }
}

#[test]
fn vlan_tags_cross_bridge_between_guests() {
    needs_root!("vlan_tags_cross_bridge_between_guests");
    needs_program!("vlan_tags_cross_bridge_between_guests", "ethtool");
    enter_namespace_with_bridge(&["vm1", "vm2"]);
    let daemons = ["vm1", "vm2"].map(|name| Daemon::start(&[&format!("--af-xdp={name}")]));
    let [mut one, mut two] = [card(&daemons[0]), card(&daemons[1])];
    check_tags(|frame| one.send(0, frame), &mut two);
    check_tags(|frame| two.send(0, frame), &mut one);
    daemons.iter().for_each(|daemon| assert!(!daemon.log().contains("VLAN"), "{}", daemon.log()));
}

#[test]
fn joining_daemon_filters_and_restores_vlan_tags() {
    needs_root!("joining_daemon_filters_and_restores_vlan_tags");
    needs_program!("joining_daemon_filters_and_restores_vlan_tags", "ethtool");
    enter_namespace_with_bridge(&["lan", "vm1"]);
    ethtool("lan", "tx off");
    let wire = Wire::open("lan");
    let first = Daemon::start(&["--af-xdp=vm1"]);
    check_tags(|frame| wire.send(frame), &mut card(&first));
    // It holds on to the program that is there.
    // Its filter looks behind tags, and does not take them away.
    let filter = "--rx-filter=deny udp; default allow";
    let second = Daemon::start(&["--af-xdp=vm1", filter]);
    assert!(!second.log().contains("program attached"), "{}", second.log());
    drop(first);
    let mut card = card(&second);
    let (_, datagram) = datagram(100);
    wire.send(&[&datagram[..12], &[0x81, 0, 0, 7], &datagram[12..]].concat());
    check_tags(|frame| wire.send(frame), &mut card);
    drop(card);
    eventually("the expected count appears", || second.log().contains("1 dropped (filtered)"));
}

#[test]
fn vlan_tag_loss_is_logged_with_fix_command() {
    needs_root!("vlan_tag_loss_is_logged_with_fix_command");
    needs_program!("vlan_tag_loss_is_logged_with_fix_command", "ethtool");
    enter_namespace_with_bridge(&["lan", "vm1"]);
    ethtool("lan", "tx off");
    let wire = Wire::open("lan");
    // The kernel gives its generic code no way to a tag.
    let daemon = Daemon::start(&["--af-xdp=vm1,attach=generic"]);
    let mut guest = card(&daemon);
    wire.send(&tagged(0x8100, 100, 2));
    assert_eq!(guest.receive(0)[HEADER..], frame(2, 100), "without its tag");
    let fix = "ethtool -K vm1-br txvlan off tx-vlan-stag-hw-insert off";
    let log = daemon.log();
    assert!(log.contains("VLAN tags are lost") && log.contains(fix), "{log}");
    drop((guest, daemon));
    ethtool("vm1-br", fix.strip_prefix("ethtool -K vm1-br ").unwrap());
    let daemon = Daemon::start(&["--af-xdp=vm1,attach=generic"]);
    let mut guest = card(&daemon);
    check_tags(|frame| wire.send(frame), &mut guest);
    assert!(!daemon.log().contains("VLAN"), "{}", daemon.log());
    // The offload is enabled again while the port runs.
    ethtool("vm1-br", "txvlan on");
    eventually("the log has the line", || daemon.log().contains("ethtool -K vm1-br txvlan off'"));
}

#[test]
fn unavoidable_vlan_tag_loss_is_logged() {
    needs_root!("unavoidable_vlan_tag_loss_is_logged");
    enter_namespace_with_bridge(&["lan"]);
    ip("link add mv0 link lan type macvlan mode bridge");
    ip("link set mv0 up");
    let daemon = Daemon::start(&["--af-xdp=mv0,attach=generic"]);
    assert!(daemon.log().contains("the tags of mv0 beside frames; use a veth"), "{}", daemon.log());
}

#[test]
fn vlan_tag_loss_from_other_namespace_is_logged() {
    needs_root!("vlan_tag_loss_from_other_namespace_is_logged");
    enter_namespace_with_bridge(&["vm1"]);
    let mut other = Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let id = other.id().to_string();
    eventually("there is another namespace", || network(&id) != network("thread-self"));
    ip(&format!("link set vm1-br netns {id}"));
    let daemon = Daemon::start(&["--af-xdp=vm1,attach=generic"]);
    let log = daemon.log();
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(log.contains("VLAN tags may be lost; the other end of the veth may keep"), "{log}");
    assert!(log.contains("'ethtool -K NAME txvlan off tx-vlan-stag-hw-insert off' there"), "{log}");
}

/// Sends NET_SET_MTU. Reports whether the daemon accepted it.
fn ask_for_mtu(frontend: &mut Frontend, mtu: u64) -> bool {
    frontend.try_ask(FrontendReq::NET_SET_MTU, &mtu.to_ne_bytes(), &[]).unwrap()
}

/// Returns the MTU of the configuration space, bytes 10 and 11.
fn configured_mtu(frontend: &mut Frontend) -> u16 {
    let request = [10_u32, 2, 0].map(u32::to_ne_bytes).concat();
    frontend.send(FrontendReq::GET_CONFIG, &[&request[..], &[0; 2]].concat());
    let reply = frontend.reply(FrontendReq::GET_CONFIG);
    u16::from_le_bytes(reply[12..14].try_into().unwrap())
}

#[test]
fn mtu_above_limit_is_refused_and_guest_served() {
    needs_root!("mtu_above_limit_is_refused_and_guest_served");
    let wire = enter_namespace_for("--af-xdp=veth0");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut guest = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    for mtu in [9000, 3807, 65535, 65536, 67, u64::MAX] {
        assert!(!ask_for_mtu(&mut guest.frontend, mtu), "{mtu}");
        let why = format!("cannot set MTU {mtu}: the port carries 68 to 3806; change the VMM's");
        eventually(&why, || daemon.log().contains(&why));
        assert_eq!(configured_mtu(&mut guest.frontend), 1500);
    }
    guest.fill();
    guest.run();
    guest.send(0, &frame(1, 1400));
    assert_eq!(wire.receive(1000).unwrap(), frame(1, 1400));
    // A running port refuses it too. It accepts an MTU that it can carry, even above the device's MTU.
    assert!(!ask_for_mtu(&mut guest.frontend, 9000));
    assert!(ask_for_mtu(&mut guest.frontend, 3806));
    assert_eq!(configured_mtu(&mut guest.frontend), 3806);
    guest.send(0, &frame(2, 1400));
    assert_eq!(wire.receive(1000).unwrap(), frame(2, 1400));
    let said = "af_xdp veth0: MTU differs device=1500 guest=3806";
    eventually(said, || daemon.log().contains(said));
    drop((guest, daemon));
    let refused = crate::af_xdp::refused(&["--af-xdp=veth0", "--mtu=9000"]);
    assert!(refused.contains("cannot carry the port's MTU of 9000 on veth0"), "{refused}");
}

#[test]
fn tap_accepts_any_vmm_mtu() {
    needs_root!("tap_accepts_any_vmm_mtu");
    let _wire = enter_namespace_for("--tap=tap0");
    let daemon = Daemon::start(&["--tap=tap0"]);
    let mut frontend = Frontend::new(daemon.connect());
    frontend.begin();
    assert!([68, 9000, 65535].iter().all(|mtu| ask_for_mtu(&mut frontend, *mtu)));
    assert!([0, 67, 65536].iter().all(|mtu| !ask_for_mtu(&mut frontend, *mtu)));
    assert_eq!(configured_mtu(&mut frontend), 65535);
}

#[test]
fn mtu_mismatch_with_device_is_logged_once() {
    needs_root!("mtu_mismatch_with_device_is_logged_once");
    for (port, kind, device) in
        [("--tap=tap0", "tap", "tap0"), ("--af-xdp=veth0", "af_xdp", "veth0")]
    {
        let _wire = enter_namespace_for(port);
        let daemon = Daemon::start(&[port]);
        let mut said = Vec::new();
        for (mtu, what) in [(1500, ""), (1400, "differs"), (1500, "agrees"), (2000, "differs")] {
            ip(&format!("link set {device} mtu {mtu}"));
            (0..2).for_each(|_| drop(card(&daemon)));
            if !what.is_empty() {
                said.push(format!("{kind} {device}: MTU {what} device={mtu} guest=1500"));
            }
            eventually("the log has the line", || {
                said.iter().all(|line| daemon.log().contains(line))
            });
            assert_eq!(daemon.log().matches(": MTU ").count(), said.len(), "{}", daemon.log());
        }
    }
}

#[test]
fn device_mtu_change_is_followed() {
    needs_root!("device_mtu_change_is_followed");
    let wire = enter_namespace_for("--af-xdp=veth0");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut guest = card(&daemon);
    for mtu in [1500, 3000, 1200, 2000] {
        ["veth0", "veth1"].iter().for_each(|name| ip(&format!("link set {name} mtu {mtu}")));
        let said = format!("device={mtu} guest=1500");
        eventually("the log has the line", || mtu == 1500 || daemon.log().contains(&said));
        // Both ways, as long as the device takes them.
        eventually("frames arrive", || {
            wire.send(&frame(mtu, mtu));
            guest.try_receive(0).is_some_and(|received| received[HEADER..] == frame(mtu, mtu))
        });
        eventually("frames go", || {
            guest.send(0, &frame(mtu, mtu));
            wire.receive(10).is_some_and(|received| received == frame(mtu, mtu))
        });
    }
    assert!(!daemon.log().contains("does not work"), "{}", daemon.log());
}

/// Creates a macvlan, `mv0`, on `veth0`, which receives frames longer than the MTU of `mv0`.
fn enter_namespace_with_macvlan() -> Wire {
    let wire = enter_namespace_for("--af-xdp=veth0");
    ip("link add mv0 link veth0 mtu 1500 type macvlan mode bridge");
    ["veth0", "veth1"].iter().for_each(|name| ip(&format!("link set {name} mtu 9000")));
    ip("link set mv0 up");
    wire
}

#[test]
fn too_long_rx_frames_are_counted_while_port_runs() {
    needs_root!("too_long_rx_frames_are_counted_while_port_runs");
    let wire = enter_namespace_with_macvlan();
    let file =
        "control = \"{}/control\"\n".to_owned() + &port("one", "af-xdp = \"mv0,attach=generic\"");
    let daemon = Daemon::with_config(&file, "one");
    let mut guest = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    guest.send(0, &[0; 5]);
    let to_all = |number: usize, length: usize| [&[0xff; 6], &frame(number, length)[6..]].concat();
    // As long as what has been joined; and then a guest without a buffer, which is something else.
    (0..10).for_each(|number| wire.send(&to_all(number, 8000)));
    wire.send(&to_all(10, 1500));
    assert_eq!(guest.receive(0)[HEADER..], to_all(10, 1500));
    let metrics = || daemon.ask(&["metrics"]);
    let counted = |reason: &str, count: u64| {
        let line = metrics()
            .lines()
            .find(|line| {
                line.starts_with("vhost_user_net_drops_total")
                    && line.contains("direction=\"rx\"")
                    && line.contains(&format!("reason=\"{reason}\""))
            })
            .unwrap_or_default()
            .to_owned();
        line.ends_with(&format!(" {count}"))
    };
    eventually("the expected count appears", || counted("too_long", 10));
    let said = "af_xdp mv0: frames longer than its MTU are lost";
    eventually(said, || daemon.log().contains(said));
    (0..2000).for_each(|number| wire.send(&to_all(number, 100)));
    eventually("frames are lost for want of buffers", || !counted("no_room", 0));
    assert!(counted("too_long", 10), "{}", metrics());
}

#[test]
fn lower_devices_that_merge_frames_are_logged() {
    needs_root!("lower_devices_that_merge_frames_are_logged");
    needs_program!("lower_devices_that_merge_frames_are_logged", "ethtool");
    let _wire = enter_namespace_with_macvlan();
    for (state, warned) in [("on", true), ("off", false)] {
        ethtool("veth0", &format!("gro {state}"));
        let daemon = Daemon::start(&["--af-xdp=mv0,attach=generic"]);
        let said =
            "merged frames are lost; veth0 merges received frames; run 'ethtool -K veth0 gro off'";
        assert_eq!(daemon.log().contains(said), warned, "{}", daemon.log());
    }
}
