//! The host's network devices: names, kinds, owners and other users. Each test has its own network namespace.

use std::fs::{self, File, OpenOptions};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use vhost_user_net::policy::Filter;
use vhost_user_net::port::TapState;
use vhost_user_net::port::tap::{TapQueue, TxMethod};
use vhost_user_net::sys::tap::Queue;
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{Card, GUEST_CSUM, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{
    Wire, enter_namespace_with_tap, enter_namespace_with_veth, enter_new_namespace,
    enter_quiet_namespace, ip, output, wait_for_carrier,
};
use crate::support::traffic::{check_both_ways, datagram, frame};
use crate::support::{eventually, needs_program, needs_root};

const CONTROL: &str = "control = \"{}/control\"\n";
/// A name too long for anything but an alternative name.
const LONG: &str = "network-card-of-the-first-machine";

fn card(daemon: &Daemon, port: &str, pairs: u32) -> Card {
    let options = Options { pairs, ..Options::default() };
    Card::start(Frontend::new(daemon.connect_to(port)), options)
}

/// Waits until frames pass a TAP that the daemon created, whose state the kernel does not report.
fn wait_for_frames(wire: &Wire, card: &mut Card) {
    eventually("frames come through", || {
        wire.send(&frame(0, 60));
        card.try_receive(0).is_some()
    });
    thread::sleep(Duration::from_millis(50));
    while card.try_receive(0).is_some() {}
}

#[test]
fn tap_is_found_by_alternative_name() {
    needs_root!("tap_is_found_by_alternative_name");
    enter_namespace_with_tap(true);
    ip("tuntap add dev tap1 mode tap vnet_hdr");
    ip("link set tap1 up");
    for (device, name) in [("tap0", LONG), ("tap0", "first"), ("tap1", "second")] {
        ip(&format!("link property add dev {device} altname {name}"));
    }
    let file = format!(
        "{CONTROL}[[port]]\nsocket-path = \"{{}}/one\"\ntap = \"{LONG}\"\nqueue-pairs = 2\n"
    );
    let daemon = Daemon::with_config(&file, "one");
    let mut cards = card(&daemon, "one", 2);
    wait_for_carrier("tap0");
    cards.send(0, &frame(1, 60));
    assert_eq!(Wire::open("tap0").receive(0), None, "it was opened too late");
    let report = daemon.show(LONG);
    assert_eq!(
        (&report["host"], &report["device"]["name"]),
        (&format!("tap {LONG}").into(), &"tap0".into())
    );

    let add = |name: &str, tap: &str, pairs: &str| {
        let socket = format!("--socket-path={}", daemon.path(name).display());
        daemon.ctl(&["add", &socket, &format!("--tap={tap}"), &format!("--queue-pairs={pairs}")])
    };
    let added = add("two", "second", "1");
    assert!(added.status.success(), "{added:?}");
    wait_for_carrier("tap1");
    check_both_ways(&Wire::open("tap1"), &mut card(&daemon, "two", 1), 100);
    assert_eq!(daemon.show("second")["device"]["name"], "tap1");
    // Whatever it is called, it is another port's.
    let refused = String::from_utf8(add("three", "first", "2").stderr).unwrap();
    assert!(refused.contains(&format!("port {LONG} uses the same device")), "{refused}");
    // It is the file's port still.
    let before = daemon.show(LONG)["connections"].clone();
    daemon.ask(&["reload"]);
    assert_eq!(daemon.show(LONG)["connections"], before);
}

#[test]
fn one_device_under_two_names_is_refused() {
    needs_root!("one_device_under_two_names_is_refused");
    enter_namespace_with_tap(true);
    ip("link property add dev tap0 altname first");
    let ports =
        ["tap0", "first"].map(|tap| port(tap, &format!("tap = \"{tap}\"\nqueue-pairs = 2")));
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let file = directory.as_path().join("config");
    let ports = ports.concat().replace("{}", &directory.as_path().display().to_string());
    fs::write(&file, ports).unwrap();
    let output = program().args(["run", "--config"]).arg(file).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("port tap0 uses the same device under another name"), "{said}");
}

#[test]
fn refused_port_keeps_the_device_filter() {
    needs_root!("refused_port_keeps_the_device_filter");
    enter_namespace_with_veth(1);
    ip("link property add dev veth0 altname first");
    let filter = "af-xdp = \"veth0\"\nrx-filter = \"deny udp; default allow\"";
    let daemon = Daemon::with_config(&(CONTROL.to_owned() + &port("one", filter)), "one");
    let (wire, mut card) = (Wire::open("veth1"), card(&daemon, "one", 1));
    check_both_ways(&wire, &mut card, 20);
    let socket = format!("--socket-path={}", daemon.path("two").display());
    let refused = daemon.ctl(&["add", &socket, "--af-xdp=first"]);
    let refused = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.contains("port one uses the same device under another name"), "{refused}");
    wire.send(&datagram(40).1);
    wire.send(&frame(7, 60));
    assert_eq!(card.receive(0)[HEADER..], frame(7, 60), "a datagram is denied");
}

#[test]
fn refused_port_keeps_the_tap_offloads() {
    needs_root!("refused_port_keeps_the_tap_offloads");
    needs_program!("refused_port_keeps_the_tap_offloads", "ethtool");
    enter_namespace_with_tap(true);
    ip("link property add dev tap0 altname first");
    let file = CONTROL.to_owned() + &port("one", "tap = \"tap0\"\nqueue-pairs = 2");
    let daemon = Daemon::with_config(&file, "one");
    let features = Options::default().features | GUEST_CSUM;
    let options = Options { features, ..Options::default() };
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), options);
    wait_for_carrier("tap0");
    check_both_ways(&Wire::open("tap0"), &mut card, 20);
    let offloads = || output("ethtool", "-k tap0");
    let before = offloads();
    assert!(before.contains("tx-checksumming: on"), "{before}");
    let socket = format!("--socket-path={}", daemon.path("two").display());
    let refused = daemon.ctl(&["add", &socket, "--tap=first", "--queue-pairs=2"]);
    let refused = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.contains("port one uses the same device under another name"), "{refused}");
    assert_eq!(offloads(), before);
}

#[test]
fn renamed_tap_stays_with_its_port() {
    needs_root!("renamed_tap_stays_with_its_port");
    enter_quiet_namespace();
    let file = |more: &str| CONTROL.to_owned() + &port("one", &format!("tap = \"tap0\"\n{more}"));
    // The daemon makes it.
    let daemon = Daemon::with_config(&file("queue-pairs = 2"), "one");
    let mut first = card(&daemon, "one", 1);
    ip("link set tap0 name moved0");
    // Another device has the name.
    ip("tuntap add dev tap0 mode tap vnet_hdr multi_queue");
    let wire = Wire::open("moved0");
    wait_for_frames(&wire, &mut first);
    check_both_ways(&wire, &mut first, 100);
    assert_eq!(daemon.show("one")["device"]["name"], "moved0");
    daemon.write_config(&file("queue-pairs = 3\nmtu = 1400"));
    daemon.ask(&["reload"]);
    assert_eq!(daemon.show("one")["device"]["name"], "moved0");
    assert!(output("ip", "link show moved0").contains("mtu 1400"));
    let decoy = output("ip", "-d link show tap0");
    assert!(decoy.contains("mtu 1500") && decoy.contains("numqueues 0"), "{decoy}");
    let mut second = card(&daemon, "one", 1);
    wait_for_frames(&wire, &mut second);
    check_both_ways(&wire, &mut second, 100);
}

#[test]
fn tap_without_index_from_older_daemon_is_looked_up() {
    needs_root!("tap_without_index_from_older_daemon_is_looked_up");
    enter_namespace_with_tap(true);
    let queue = || Queue::open("tap0", true).unwrap();
    let filter = Filter::default();
    let prepared = TapQueue::prepare(vec![queue()], TxMethod::Writev, &filter).unwrap();
    let state = prepared[0].state();
    assert!(state.index.is_some());
    let mut told = serde_json::to_value(&state).unwrap();
    // Daemons before did not tell it.
    told.as_object_mut().unwrap().remove("index").unwrap();
    let told: TapState = serde_json::from_value(told).unwrap();
    let passed = queue();
    ip("link set tap0 down");
    ip("link set tap0 name moved0");
    let queues = vec![passed.into()];
    let adopted = TapQueue::of_predecessor(queues, &told, TxMethod::Writev, &filter).unwrap();
    assert_eq!(adopted[0].state().index, state.index);
}

#[test]
fn renamed_af_xdp_device_stays_with_its_port() {
    needs_root!("renamed_af_xdp_device_stays_with_its_port");
    enter_namespace_with_veth(1);
    ip(&format!("link property add dev veth0 altname {LONG}"));
    for name in ["veth0", LONG] {
        let file = CONTROL.to_owned() + &port("one", &format!("af-xdp = \"{name}\""));
        let daemon = Daemon::with_config(&file, "one");
        let wire = Wire::open("veth1");
        check_both_ways(&wire, &mut card(&daemon, "one", 1), 100);
        ip("link set veth0 name moved0");
        ip("link property del dev moved0 altname network-card-of-the-first-machine");
        // Others have its names.
        ip("link add veth0 type veth peer name veth2");
        ip(&format!("link property add dev veth0 altname {LONG}"));
        ip("link set veth0 up");
        ip("link set veth2 up");
        check_both_ways(&wire, &mut card(&daemon, "one", 1), 100);
        assert_eq!(daemon.show("one")["device"]["name"], "moved0");
        ip("link delete veth0");
        ip("link set moved0 name veth0");
        ip(&format!("link property add dev veth0 altname {LONG}"));
    }
}

/// Creates a macvtap on one end of a veth in a new namespace. Returns its queue and the other end.
fn macvtap(kind: &str) -> Option<(File, Wire)> {
    enter_namespace_with_veth(1);
    let made = Command::new("ip")
        .args(["link", "add", "link", "veth0", "name", "macvtap0", "type"])
        .args(kind.split(' '))
        .status();
    if !made.unwrap().success() {
        return None;
    }
    ip("link set macvtap0 up");
    let index = output("ip", "-o link show macvtap0").split(':').next().unwrap().to_owned();
    // The file system of devices need not have it in this namespace.
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let mounted = directory.as_path().display().to_string();
    let script =
        format!("mount -t sysfs s {mounted} && cat {mounted}/class/net/macvtap0/tap{index}/dev");
    let shown = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let (major, minor) = shown.trim().split_once(':').expect("its numbers");
    let path = directory.as_path().join("tap");
    let number = makedev(major.parse().unwrap(), minor.parse().unwrap());
    mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, number).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    Some((file, Wire::open("veth1")))
}

#[test]
fn macvtap_queue_is_served() {
    needs_root!("macvtap_queue_is_served");
    let (queue, wire) = macvtap("macvtap mode passthru").unwrap();
    let control = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let control = control.as_path().join("control").display().to_string();
    let option = format!("--control={control}");
    let daemon = Daemon::inheriting(&["--tap-fd=5", "--name=one", &option], queue.into(), None);
    daemon.wait_until_it_listens();
    let ctl = |words: &[&str]| {
        let mut command = program();
        let output =
            command.args(["ctl", &format!("--control={control}")]).args(words).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let start = || Card::start(Frontend::new(daemon.connect()), Options::default());
    let mut first = start();
    check_both_ways(&wire, &mut first, 500);
    // Its guest is reset.
    first.frontend.get_vring_base(0);
    first.frontend.get_vring_base(1);
    drop(first);
    let mut card = start();
    check_both_ways(&wire, &mut card, 500);
    let (refused, why) = ctl(&["set", "one", "--rx-filter=deny udp; default allow"]);
    assert!(!refused && why.contains("a macvtap takes no filter"), "{why}");
    assert!(ctl(&["set", "one", "--link=off"]).0);
    wire.send(&frame(9, 60));
    thread::sleep(Duration::from_millis(100));
    assert_eq!(card.try_receive(0), None);
    assert!(ctl(&["set", "one", "--link=on"]).0);
    // What came meanwhile does not come now.
    check_both_ways(&wire, &mut card, 500);
}

#[test]
fn rx_filter_on_macvtap_is_refused() {
    needs_root!("rx_filter_on_macvtap_is_refused");
    for kind in ["macvtap mode passthru", "ipvtap mode l2"] {
        let Some((queue, _)) = macvtap(kind) else {
            assert!(kind.starts_with("ipvtap"), "this kernel has no {kind}");
            continue;
        };
        let options = ["--tap-fd=5", "--rx-filter=deny udp; default allow"];
        let mut daemon = Daemon::inheriting(&options, queue.into(), None);
        assert!(!daemon.wait().success());
        let log = daemon.log();
        assert!(log.contains("cannot set rx-filter: a macvtap takes no filter"), "{log}");
    }
}

#[test]
fn macvtap_by_name_is_refused_with_its_file() {
    needs_root!("macvtap_by_name_is_refused_with_its_file");
    let _queue = macvtap("macvtap mode bridge").unwrap();
    let mut daemon = Daemon::spawn(&["--tap=macvtap0"]);
    assert!(!daemon.wait().success());
    let log = daemon.log();
    assert!(log.contains("macvtap0 is a macvtap") && log.contains("3<>/dev/tap"), "{log}");
}

#[test]
fn queues_of_other_processes_are_reported() {
    needs_root!("queues_of_other_processes_are_reported");
    const THEIRS: &str = "other processes have 1 queues of tap tap0";
    enter_namespace_with_tap(true);
    let early = Queue::open("tap0", true).unwrap();
    let file = CONTROL.to_owned() + &port("one", "tap = \"tap0\"\nqueue-pairs = 2");
    let daemon = Daemon::with_config(&file, "one");
    let log_has = |text: &str, times: usize| {
        eventually(text, || daemon.log().matches(text).count() == times);
    };
    log_has(THEIRS, 1);
    assert_eq!(daemon.show("one")["device"]["foreign_queues"], 1);
    drop(early);
    // The kernel tells of this with the next change of the device.
    ip("link set tap0 mtu 1400");
    log_has("other processes have no queues of tap tap0 any more", 1);
    let _late = Queue::open("tap0", true).unwrap();
    log_has(THEIRS, 2);
    let metrics = daemon.ask(&["metrics"]);
    assert!(metrics.contains("vhost_user_net_foreign_queues{port=\"one\"} 1"), "{metrics}");
    // Our own come and go without a word.
    drop(_late);
    ip("link set tap0 mtu 1500");
    log_has("other processes have no queues of tap tap0 any more", 2);
    daemon.write_config(&(CONTROL.to_owned() + &port("one", "tap = \"tap0\"\nqueue-pairs = 4")));
    daemon.ask(&["reload"]);
    thread::sleep(Duration::from_millis(1500));
    log_has(THEIRS, 2);
}

#[test]
fn created_tap_belongs_to_its_user_alone() {
    needs_root!("created_tap_belongs_to_its_user_alone");
    enter_quiet_namespace();
    let daemon = Daemon::start(&["--tap=new0", "--queue-pairs=2"]);
    let mut other = Command::new("setpriv");
    other.args(["--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]);
    other.args(["--ambient-caps=+dac_read_search"]).arg(program().get_program());
    other.args(["--tap=new0", "--queue-pairs=2", "--socket-path=/tmp/vhost-user-net-nobody"]);
    // Without a deadline it would serve.
    let mut child = other.stderr(daemon.open_log()).spawn().unwrap();
    let mut ended = None;
    for _ in 0..500 {
        ended = child.try_wait().unwrap();
        if ended.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    assert!(ended.is_some_and(|status| !status.success()), "nobody has a queue of it");
    assert!(daemon.log().contains("Operation not permitted"), "{}", daemon.log());
    assert!(!daemon.log().contains("has no owner"), "{}", daemon.log());
}

#[test]
fn tap_creation_refuses_an_existing_device() {
    needs_root!("tap_creation_refuses_an_existing_device");
    enter_namespace_with_tap(false);
    // It came after the daemon had looked: its owner is not to be changed.
    let error = Queue::make("tap0", false).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EBUSY));
    drop(Queue::open("tap0", false).unwrap());
    drop(Queue::make("tap1", false).unwrap());
    assert!(!output("ip", "link").contains("tap1"), "it goes with its queue");
}

#[test]
fn tap_without_owner_is_reported_once() {
    needs_root!("tap_without_owner_is_reported_once");
    enter_namespace_with_tap(false);
    let daemon = Daemon::start(&["--tap=tap0"]);
    eventually("it is reported", || daemon.log().contains("tap tap0 has no owner"));
    ip("link set tap0 mtu 1400");
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(daemon.log().matches("has no owner").count(), 1);
}

/// Builds a router advertisement with a default route and a prefix for addresses.
fn router_advertisement() -> Vec<u8> {
    let mut bytes = frame(0, 14 + 40 + 48);
    bytes.truncate(14 + 40 + 48);
    bytes[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
    let (header, message) = bytes[14..].split_at_mut(40);
    header.fill(0);
    header[0] = 0x60;
    (header[5], header[6], header[7]) = (48, 58, 255);
    header[8..24].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    header[24..40].copy_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    message.fill(0);
    (message[0], message[4], message[6]) = (134, 64, 7);
    // Prefix information: 64 bits, on the link, for addresses; valid and preferred for hours.
    let prefix = &mut message[16..48];
    prefix[..4].copy_from_slice(&[3, 4, 64, 0xc0]);
    (prefix[6], prefix[10]) = (0x70, 0x38);
    prefix[16..24].copy_from_slice(&[0x20, 1, 0xd, 0xb8, 0xb, 0xad, 0, 0]);
    let pseudo = [&header[8..40], &[0, 0, 0, 48, 0, 0, 0, 58][..], message].concat();
    let sum = !crate::support::traffic::sum(&pseudo);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

#[test]
fn host_ignores_router_advertisements_of_guest() {
    needs_root!("host_ignores_router_advertisements_of_guest");
    for taken in [true, false] {
        enter_new_namespace();
        if taken {
            // What happens without the daemon's care.
            ip("tuntap add dev new0 mode tap vnet_hdr user root");
            ip("link set new0 up");
        }
        let daemon = Daemon::start(&["--tap=new0"]);
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        wait_for_frames(&Wire::open("new0"), &mut card);
        let given = || output("ip", "-6 addr show dev new0") + &output("ip", "-6 route");
        let advertise = |card: &mut Card| card.send(0, &router_advertisement());
        if taken {
            eventually("the host takes them", || {
                advertise(&mut card);
                given().contains("2001:db8:bad:") && given().contains("default via fe80::1")
            });
        } else {
            (0..20).for_each(|_| advertise(&mut card));
            thread::sleep(Duration::from_millis(200));
            let given = given();
            assert!(!given.contains("2001:db8:bad:") && !given.contains("default via"), "{given}");
        }
    }
}

#[test]
fn device_drops_are_shown_with_their_cause() {
    needs_root!("device_drops_are_shown_with_their_cause");
    for (host, name, wire) in
        [("tap = \"tap0\"", "tap0", "tap0"), ("af-xdp = \"veth0\"", "veth0", "veth1")]
    {
        if name == "tap0" {
            enter_namespace_with_tap(false)
        } else {
            enter_namespace_with_veth(1)
        }
        let file = CONTROL.to_owned() + &port("one", host);
        let daemon = Daemon::with_config(&file, "one");
        let mut card = card(&daemon, "one", 1);
        wait_for_carrier(name);
        let wire = Wire::open(wire);
        check_both_ways(&wire, &mut card, 100);
        assert_eq!(daemon.show("one")["queue_pairs"][0]["rx"]["limited"], 0);
        daemon.ask(&["set", "one", "--rx-limit=1mbit,burst=10k"]);
        let drops = || daemon.show("one")["device"]["rx_drops"].as_u64().unwrap();
        let limited = || daemon.show("one")["queue_pairs"][0]["rx"]["limited"].as_u64().unwrap();
        eventually("the limit takes effect", || {
            (0..200).for_each(|_| wire.try_send(&frame(1, 1000)).unwrap_or_default());
            while card.try_receive(0).is_some_and(|received| received.len() > HEADER) {}
            limited() > 3 && (name != "tap0" || drops() > 100)
        });
        let metrics = daemon.ask(&["metrics"]);
        let counted = metrics
            .contains("vhost_user_net_device_drops_total{direction=\"rx\",port=\"one\"}")
            || metrics.contains("vhost_user_net_device_drops_total{port=\"one\",direction=\"rx\"}");
        assert!(counted, "{metrics}");
    }
}

#[test]
fn port_starts_when_its_device_appears() {
    needs_root!("port_starts_when_its_device_appears");
    enter_quiet_namespace();
    let late = |more: &str| {
        let two = port("two", &format!("af-xdp = \"late0\"\n{more}"));
        CONTROL.to_owned() + &port("one", "loopback = true") + &two
    };
    let mut daemon = Daemon::with_config(&late(""), "one");
    card(&daemon, "one", 1).check_echo(50);
    assert!(daemon.log().contains("two: not started: there is no network device late0"));
    let missing = |count: usize| {
        let metrics = daemon.ask(&["metrics"]);
        metrics.contains(&format!("vhost_user_net_missing_ports {count}\n"))
    };
    assert!(missing(1));
    thread::sleep(Duration::from_millis(2500));
    assert!(daemon.log().matches("no network device late0").count() <= 2, "{}", daemon.log());
    // A reload that cannot start it either changes nothing about that.
    daemon.write_config(&late("mtu = 1400"));
    assert!(!daemon.ctl(&["reload"]).status.success());
    assert!(missing(1));
    // What an operator removes stays away.
    assert!(daemon.ctl(&["remove", "one"]).status.success());
    thread::sleep(Duration::from_millis(1500));
    assert!(!daemon.ask(&["list"]).contains("one"), "{}", daemon.log());
    ip("link add late0 type veth peer name late1");
    ip("link set late0 up");
    ip("link set late1 up");
    eventually("it is started", || missing(0));
    check_both_ways(&Wire::open("late1"), &mut card(&daemon, "two", 1), 100);
    assert_eq!(daemon.show("two")["options"]["mtu"], 1400);
    assert!(daemon.is_alive());
}

#[test]
fn daemon_without_any_device_exits() {
    needs_root!("daemon_without_any_device_exits");
    enter_quiet_namespace();
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let file = directory.as_path().join("config");
    let ports = port("one", "af-xdp = \"late0\"") + &port("two", "af-xdp = \"late1\"");
    fs::write(&file, ports.replace("{}", &directory.as_path().display().to_string())).unwrap();
    let output = program().args(["run", "--config"]).arg(file).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("there is no network device late0"), "{said}");
}
