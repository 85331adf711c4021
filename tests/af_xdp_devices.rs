//! AF_XDP on devices as hosts have them: what the kernel and other devices do to frames on the way to
//! the program, and what of that the guest is spared.

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::Daemon;
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_namespace_for, enter_quiet_namespace, ip, output};
use crate::support::traffic::{datagram, frame};
use crate::support::{eventually, needs_program, needs_root};

/// A bridge with tenants' veths, whose other ends are its ports. A bridge takes VLAN tags out of frames,
/// and keeps them beside.
fn enter_namespace_with_bridge(tenants: &[&str]) {
    enter_quiet_namespace();
    ip("link add br0 type bridge");
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

/// A frame with a tag of this ethertype.
fn tagged(ethertype: u16, tag: u16, number: usize) -> Vec<u8> {
    let frame = frame(number, 100);
    [&frame[..12], &ethertype.to_be_bytes(), &tag.to_be_bytes(), &frame[12..]].concat()
}

/// Tags of a VLAN, of a priority without a VLAN, of both at their largest, and of a provider.
const TAGS: [(u16, u16); 4] = [(0x8100, 100), (0x8100, 0xe000), (0x8100, 0xefff), (0x88a8, 100)];

fn card(daemon: &Daemon) -> Card {
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.send(0, &[0; 5]);
    card
}

/// Sends frames with and without tags, all of which arrive as they were sent.
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
fn vlan_tags_pass_a_bridge_from_guest_to_guest() {
    needs_root!("vlan_tags_pass_a_bridge_from_guest_to_guest");
    needs_program!("vlan_tags_pass_a_bridge_from_guest_to_guest", "ethtool");
    enter_namespace_with_bridge(&["vm1", "vm2"]);
    let daemons = ["vm1", "vm2"].map(|name| Daemon::start(&[&format!("--af-xdp={name}")]));
    let [mut one, mut two] = [card(&daemons[0]), card(&daemons[1])];
    check_tags(|frame| one.send(0, frame), &mut two);
    check_tags(|frame| two.send(0, frame), &mut one);
    daemons.iter().for_each(|daemon| assert!(!daemon.log().contains("VLAN"), "{}", daemon.log()));
}

#[test]
fn vlan_tags_are_filtered_and_put_back_by_whoever_joins() {
    needs_root!("vlan_tags_are_filtered_and_put_back_by_whoever_joins");
    needs_program!("vlan_tags_are_filtered_and_put_back_by_whoever_joins", "ethtool");
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
    eventually("it is counted", || second.log().contains("1 dropped (filtered)"));
}

#[test]
fn lost_vlan_tags_are_warned_of_with_the_command_that_keeps_them() {
    needs_root!("lost_vlan_tags_are_warned_of_with_the_command_that_keeps_them");
    needs_program!("lost_vlan_tags_are_warned_of_with_the_command_that_keeps_them", "ethtool");
    enter_namespace_with_bridge(&["lan", "vm1"]);
    ethtool("lan", "tx off");
    let wire = Wire::open("lan");
    // The kernel gives its generic code no way to a tag.
    let daemon = Daemon::start(&["--af-xdp=vm1,attach=generic"]);
    let mut guest = card(&daemon);
    wire.send(&tagged(0x8100, 100, 2));
    assert_eq!(guest.receive(0)[HEADER..], frame(2, 100), "without its tag");
    let cure = "ethtool -K vm1-br txvlan off tx-vlan-stag-hw-insert off";
    let log = daemon.log();
    assert!(log.contains("VLAN tags are lost") && log.contains(cure), "{log}");
    drop((guest, daemon));
    ethtool("vm1-br", cure.strip_prefix("ethtool -K vm1-br ").unwrap());
    let daemon = Daemon::start(&["--af-xdp=vm1,attach=generic"]);
    check_tags(|frame| wire.send(frame), &mut card(&daemon));
    assert!(!daemon.log().contains("VLAN"), "{}", daemon.log());
    // Somebody turns it on again: the next session says so.
    ethtool("vm1-br", "txvlan on");
    drop(card(&daemon));
    eventually("it is said", || daemon.log().contains("ethtool -K vm1-br txvlan off'"));
}

#[test]
fn vlan_tags_that_nobody_can_keep_are_warned_of() {
    needs_root!("vlan_tags_that_nobody_can_keep_are_warned_of");
    enter_namespace_with_bridge(&["lan"]);
    ip("link add mv0 link lan type macvlan mode bridge");
    ip("link set mv0 up");
    let daemon = Daemon::start(&["--af-xdp=mv0,attach=generic"]);
    assert!(daemon.log().contains("the tags of mv0 beside frames; use a veth"), "{}", daemon.log());
}

/// Has the VMM ask for an MTU; says whether the daemon agreed.
fn ask_for_mtu(frontend: &mut Frontend, mtu: u64) -> bool {
    frontend.try_ask(FrontendReq::NET_SET_MTU, &mtu.to_ne_bytes(), &[]).unwrap()
}

/// Bytes 10 and 11 of the configuration space.
fn configured_mtu(frontend: &mut Frontend) -> u16 {
    let request = [10_u32, 2, 0].map(u32::to_ne_bytes).concat();
    frontend.send(FrontendReq::GET_CONFIG, &[&request[..], &[0; 2]].concat());
    let reply = frontend.reply(FrontendReq::GET_CONFIG);
    u16::from_le_bytes(reply[12..14].try_into().unwrap())
}

#[test]
fn mtu_beyond_af_xdp_is_refused_and_the_guest_is_served() {
    needs_root!("mtu_beyond_af_xdp_is_refused_and_the_guest_is_served");
    let wire = enter_namespace_for("--af-xdp=veth0");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut guest = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    for mtu in [9000, 3807, 65535, 65536, 67, u64::MAX] {
        assert!(!ask_for_mtu(&mut guest.frontend, mtu), "{mtu}");
        let why = format!("cannot set MTU {mtu}: the port carries 68 to 3806; change the VMM's");
        assert!(daemon.log().contains(&why), "{}", daemon.log());
        assert_eq!(configured_mtu(&mut guest.frontend), 1500);
    }
    guest.fill();
    guest.run();
    guest.send(0, &frame(1, 1400));
    assert_eq!(wire.receive(1000).unwrap(), frame(1, 1400));
    // Under way too; and what the port can carry, it does, though the device must be told.
    assert!(!ask_for_mtu(&mut guest.frontend, 9000));
    assert!(ask_for_mtu(&mut guest.frontend, 3806));
    assert_eq!(configured_mtu(&mut guest.frontend), 3806);
    guest.send(0, &frame(2, 1400));
    assert_eq!(wire.receive(1000).unwrap(), frame(2, 1400));
    let log = daemon.log();
    assert!(log.contains("af_xdp veth0: MTU differs device=1500 card=3806"), "{log}");
    drop((guest, daemon));
    let refused = crate::af_xdp::refused(&["--af-xdp=veth0", "--mtu=9000"]);
    assert!(refused.contains("cannot carry the card's MTU of 9000 on veth0"), "{refused}");
}

#[test]
fn any_mtu_of_a_vmm_goes_on_a_tap() {
    needs_root!("any_mtu_of_a_vmm_goes_on_a_tap");
    let _wire = enter_namespace_for("--tap=tap0");
    let daemon = Daemon::start(&["--tap=tap0"]);
    let mut frontend = Frontend::new(daemon.connect());
    frontend.begin();
    assert!([68, 9000, 65535].iter().all(|mtu| ask_for_mtu(&mut frontend, *mtu)));
    assert!([0, 67, 65536].iter().all(|mtu| !ask_for_mtu(&mut frontend, *mtu)));
    assert_eq!(configured_mtu(&mut frontend), 65535);
}

#[test]
fn mtu_that_differs_from_the_device_is_said_once() {
    needs_root!("mtu_that_differs_from_the_device_is_said_once");
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
                said.push(format!("{kind} {device}: MTU {what} device={mtu} card=1500"));
            }
            eventually("it is said", || said.iter().all(|line| daemon.log().contains(line)));
            assert_eq!(daemon.log().matches(": MTU ").count(), said.len(), "{}", daemon.log());
        }
    }
}

#[test]
fn mtu_of_an_af_xdp_device_that_changes_under_way_is_followed() {
    needs_root!("mtu_of_an_af_xdp_device_that_changes_under_way_is_followed");
    let wire = enter_namespace_for("--af-xdp=veth0");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut guest = card(&daemon);
    for mtu in [1500, 3000, 1200, 2000] {
        ["veth0", "veth1"].iter().for_each(|name| ip(&format!("link set {name} mtu {mtu}")));
        let said = format!("device={mtu} card=1500");
        eventually("it is said", || mtu == 1500 || daemon.log().contains(&said));
        // Both ways, as long as the device takes them.
        eventually("frames come", || {
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
