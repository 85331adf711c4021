//! Cases 69 to 71: configuration files that name missing resources, or are no regular files.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::support::daemon::{port, program};
use crate::support::driver::{
    CSUM, Card, GUEST_CSUM, GUEST_TSO, HOST_TSO, MRG_RXBUF, Options, PROTOCOL, VERSION_1,
};
use crate::support::frontend::Frontend;
use crate::support::hostile::{Scene, note};
use crate::support::network::{Wire, enter_namespace_with_tap, enter_namespace_with_veth, ip};
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_root};

/// Writes a file with other options for the attacked port.
fn describe(scene: &Scene, attacked: &str) {
    let ports = port("attacked", attacked) + &port("quiet", "loopback = true\n");
    scene.daemon.write_config(&("control = \"{}/control\"\n".to_owned() + &ports));
}

/// Reloads, which must fail. Returns the error output.
#[track_caller]
fn refused(scene: &Scene) -> String {
    let output = scene.daemon.ctl(&["reload"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

#[test]
fn hostile_69_failed_reload_keeps_the_port() {
    needs_root!("hostile_69_failed_reload_keeps_the_port");
    enter_namespace_with_tap(false);
    let tap = "tap = \"tap0\"\n";
    let scene = Scene::operated_on(69, tap, Some(Wire::open("tap0")));
    let mut card = scene.card();
    scene.check(&mut card);
    let wrong = [
        ("tap = \"tap0\"\ncpu-affinity = \"999\"", "run on CPU 999"),
        ("tap = \"tap0\"\nsocket-group = \"nobody-s\"", "there is no group nobody-s"),
        ("tap = \"lo\"", "not a TAP"),
        ("tap = \"tap0\"\nqueue-pairs = 2", "one queue"),
        ("af-xdp = \"lo\"", "sandbox forbids AF_XDP"),
    ];
    for (rest, why) in wrong {
        describe(&scene, rest);
        let text = refused(&scene);
        assert!(text.contains("attacked: not changed: "), "{text}");
        assert!(text.contains(why), "{rest}: {text}");
        // The VMM is still connected.
        scene.check(&mut card);
    }
    // After SIGHUP the log has the reason.
    scene.daemon.signal(Signal::SIGHUP);
    scene.daemon_says("reload failed attacked: not changed: ");
    scene.check(&mut card);
    drop(card);
    // Without a VMM the socket may move, if the new directory exists.
    let elsewhere = "[[port]]\nname = \"attacked\"\nsocket-path = \"{}/none/socket\"\n";
    let quiet = port("quiet", "loopback = true\n");
    let file = |port: String| "control = \"{}/control\"\n".to_owned() + &port + &quiet;
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    scene.daemon.write_config(&file(elsewhere.to_owned() + tap));
    assert!(refused(&scene).contains("make its directory first"));
    scene.check(&mut scene.card());
    // A valid port replaces this one, and gets its TAP.
    let moved = "[[port]]\nname = \"attacked\"\nsocket-path = \"{}/moved\"\nmtu = 1400\n";
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    scene.daemon.write_config(&file(moved.to_owned() + tap));
    assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced, since socket-path, mtu"));
    assert!(!scene.daemon.path("attacked").exists(), "a socket is left behind");
    let moved = Frontend::new(scene.daemon.connect_to("moved"));
    check_both_ways(scene.wire(), &mut Card::start(moved, Default::default()), 100);
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    describe(&scene, tap);
    assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced"));
    assert!(!scene.daemon.path("moved").exists(), "a socket is left behind");
    scene.ends("R: the port keeps its VMM and its options, and says why");
}

#[test]
fn hostile_69_failed_reload_restarts_the_af_xdp_port() {
    needs_root!("hostile_69_failed_reload_restarts_the_af_xdp_port");
    enter_namespace_with_veth(1);
    let scene = Scene::operated_on(69, "af-xdp = \"veth0\"\n", Some(Wire::open("veth1")));
    scene.check(&mut scene.card());
    // The old port holds the queue until it ends. Only then does the bind fail.
    describe(&scene, "af-xdp = \"veth0,queue=7\"");
    let text = refused(&scene);
    assert!(text.contains("attacked: not changed: "), "{text}");
    assert!(text.contains("started again with its old options"), "{text}");
    scene.check(&mut scene.card());
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    describe(&scene, "af-xdp = \"veth0,mode=copy\"");
    assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced, since af-xdp"));
    scene.check(&mut scene.card());
    scene.ends("R: the port is started again as it was; its VMM reconnects");
}

#[test]
fn hostile_70_change_that_breaks_a_connected_vmm_is_refused() {
    needs_root!("hostile_70_change_that_breaks_a_connected_vmm_is_refused");
    enter_namespace_with_tap(true);
    let rest = "tap = \"tap0\"\nqueue-pairs = 2\nmac = \"52:54:00:00:00:01\"\n";
    let scene = Scene::operated_on(70, rest, Some(Wire::open("tap0")));
    let features = VERSION_1 | PROTOCOL | MRG_RXBUF | CSUM | GUEST_CSUM | HOST_TSO | GUEST_TSO;
    let mut card = scene.card_with(Options { features, ..Options::default() });
    scene.check(&mut card);
    let tap = "tap = \"tap0\"\n";
    let pairs = "queue-pairs = 2\n";
    let wrong = [
        (tap.to_owned(), "queue-pairs while its VMM is connected"),
        (
            format!("{tap}{pairs}guest-tso = false"),
            "guest-tso while its VMM is connected: it has accepted GUEST_TSO4",
        ),
        (format!("{tap}{pairs}max-memory = \"1m\""), "max-memory while its VMM is connected"),
        (
            format!("{tap}{pairs}require-sealed-memory = true"),
            "require-sealed-memory while its VMM is connected",
        ),
    ];
    for (rest, why) in &wrong {
        describe(&scene, rest);
        let text = refused(&scene);
        assert!(text.contains("attacked: not changed: "), "{text}");
        assert!(text.contains(why), "{rest}: {text}");
        scene.check(&mut card);
    }
    // Without a VMM all of these changes succeed.
    drop(card);
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    for (rest, _) in &wrong {
        describe(&scene, rest);
        assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced"), "{rest}");
    }
    describe(&scene, rest);
    assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced"));
    scene.ends("R while a VMM is connected, with the key and the feature");
}

#[test]
fn hostile_70_af_xdp_in_place_of_a_tap_is_refused() {
    needs_root!("hostile_70_af_xdp_in_place_of_a_tap_is_refused");
    enter_namespace_with_veth(1);
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    // A daemon that started with AF_XDP.
    let attacked = "tap = \"tap0\"\n".to_owned();
    let other = port("other", "af-xdp = \"veth0\"\n");
    let mut scene = Scene::operated_on(70, &(attacked + &other), Some(Wire::open("tap0")));
    let features = VERSION_1 | PROTOCOL | MRG_RXBUF | GUEST_CSUM | GUEST_TSO;
    let mut card = scene.card_with(Options { features, ..Options::default() });
    scene.check(&mut card);
    describe(&scene, "af-xdp = \"veth0\"\n");
    let text = refused(&scene);
    let why = "cannot change tap, af-xdp while its VMM is connected: it has accepted GUEST_CSUM";
    assert!(text.contains(why), "{text}");
    scene.check(&mut card);
    drop(card);
    eventually("the port waits for a VMM", || scene.daemon.show("attacked")["state"] == "waiting");
    assert!(scene.daemon.ask(&["reload"]).contains("attacked: replaced, since tap, af-xdp"));
    check_both_ways(&Wire::open("veth1"), &mut scene.card(), 100);
    scene.lives();
    note(70, "R while a VMM is connected, with the key and the feature");
}

/// Runs the program on a file, limited to 5 s and 1 GB. Returns its output.
fn said_of(verb: &[&str], file: &Path) -> String {
    let script = "ulimit -v 1000000; exec timeout 5 \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(program().get_program()).args(verb).arg(file);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{verb:?} {file:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn hostile_71_only_small_regular_files_are_read() {
    let mut scene = Scene::operated(71);
    let (sparse, fifo) = (scene.daemon.path("sparse"), scene.daemon.path("fifo"));
    fs::File::create(&sparse).unwrap().set_len(20 << 30).unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let directory = scene.daemon.directory().to_owned();
    for (file, why) in [
        (sparse.as_path(), "longer than 1048576 bytes"),
        (&fifo, "not a regular file"),
        (Path::new("/dev/zero"), "not a regular file"),
        (&directory, "not a regular file"),
    ] {
        for verb in [&["check-config"][..], &["run", "--config"], &["doctor", "--config"]] {
            assert!(said_of(verb, file).contains(why), "{verb:?} {file:?}");
        }
    }
    // The daemon's helper process refuses such files too.
    for replaced in [&sparse, &fifo] {
        fs::rename(replaced, scene.daemon.path("config")).unwrap();
        let before = scene.daemon.log().matches("no port changed").count();
        scene.daemon.signal(Signal::SIGHUP);
        eventually("the reload is refused", || {
            scene.daemon.log().matches("no port changed").count() > before
        });
    }
    scene.check(&mut scene.card());
    scene.lives();
    note(71, "R: only regular files of up to 1 MiB are read");
}

#[test]
fn hostile_71_all_mistakes_of_a_file_are_reported() {
    let mut scene = Scene::operated(71);
    let file = scene.daemon.path("wrong");
    let directory = scene.daemon.directory().display().to_string();
    fs::write(&file, "mtu = 1\n[[port]]\ntup = 1\nmtu = \"x\"\n[[port]]\nloopback = true\n")
        .unwrap();
    let text = said_of(&["check-config"], &file);
    for said in [":1:1: unknown field `mtu`", ":3:1: unknown field `tup`", ":4:7: mtu: ", ":5:1: "]
    {
        assert!(text.contains(said), "{said}: {text}");
    }
    assert_eq!(text.lines().count(), 4, "{text}");
    let text = said_of(&["run", "--config"], &file);
    assert!(text.contains("3 more mistakes: 'vhost-user-net check-config' names all"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");

    // Resources that this host lacks.
    let port = |rest: &str| format!("[[port]]\n{rest}\n");
    let contents = "user = \"no-such-user\"\ngroup = \"no-such-group\"\n".to_owned()
        + &port(&format!("socket-path = \"{directory}/a\"\ntap = \"lo\""))
        + &port(&format!("socket-path = \"{directory}/none/b\"\nloopback = true"))
        + &port(&format!("socket-path = \"{directory}/config\"\nloopback = true"))
        + &port("name = \"d\"\nsocket-path = \"/sys/d\"\nloopback = true\ncpu-affinity = \"999\"")
        + &port(&format!(
            "name = \"e\"\nsocket-path = \"{directory}/e\"\nsocket-group = \"no-such-group\"\n\
             af-xdp = \"none9\""
        ));
    fs::write(&file, contents).unwrap();
    let text = said_of(&["check-config"], &file);
    for said in [
        "user: there is no user no-such-user",
        "group: there is no group no-such-group",
        ":3:1: tap: lo is a network device, but not a TAP",
        ":6:1: socket-path: directory ",
        ":9:1: name: two ports have the name loopback",
        ":9:1: socket-path: ",
        ":12:1: cpu-affinity: cannot run on CPU 999",
        ":17:1: socket-group: there is no group no-such-group",
        ":17:1: af-xdp: there is no network device none9",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    // A directory that the service creates at its start, and a TAP that the daemon creates.
    let later = port("socket-path = \"/run/none-yet/a\"\ntap = \"none9\"");
    fs::write(&file, later).unwrap();
    let output = program().arg("check-config").arg(&file).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(":1:1: socket-path: directory /run/none-yet: "), "{text}");
    assert!(text.contains("1 ports, nothing wrong"), "{text}");
    scene.lives();
    note(71, "all mistakes at once, with their lines, and what the host does not have");
}
