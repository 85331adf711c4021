//! Case 68: a thread of one port panics, by a fault point of debug builds (`src/fault_point.rs`).

use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::Daemon;
use crate::support::driver::{Card, HEADER};
use crate::support::frontend::Frontend;
use crate::support::hostile::Scene;
use crate::support::network::{Wire, enter_namespace_with_tap, enter_namespace_with_veth};
use crate::support::traffic::{check_canaries, frame, plant_canaries};
use crate::support::{eventually, needs_root, skip};

/// Fault point: the worker panics after 105 frames, the 100 of the scene's check and five.
const WORKER: &str = "worker:attacked/0:105";

/// Skips a test in builds without fault points.
macro_rules! needs_fault_points {
    ($test:expr) => {
        if !cfg!(debug_assertions) {
            skip($test, "needs a build with debug assertions");
            return;
        }
    };
}

/// Waits until frames are used, and receives them on a loopback port.
#[track_caller]
fn used(scene: &Scene, card: &mut Card, frames: usize) {
    for _ in 0..frames {
        card.tx[0].wait_used();
        if scene.has_no_host() {
            card.receive(0);
        }
    }
}

/// Lets the worker panic with frames in flight both ways. Checks that the frontend and the operator are
/// told, that GET_VRING_BASE returns the used indexes, and that the device writes no buffer.
#[track_caller]
fn panics(scene: &Scene) -> Card {
    let mut card = scene.card();
    let send = |card: &mut Card, count: usize| {
        for slot in 0..count {
            card.queue_tx(0, slot as u64, &[0; HEADER], &frame(slot, 60));
        }
        card.tx[0].publish();
    };
    send(&mut card, 5);
    used(scene, &mut card, 5);
    send(&mut card, 8);
    for ring in [&card.tx[0], &card.rx[0]] {
        eventually("the frontend is told", || ring.error.read().is_ok());
    }
    plant_canaries(&card, 0);
    scene.says("fault point worker");
    scene.says("worker thread panicked (bug)");
    eventually("ctl shows it", || {
        let shown = scene.daemon.show("attacked");
        let fault = shown["queue_pairs"][0]["fault"].as_str().unwrap_or_default().to_owned();
        let explanation = shown["explanation"].as_str().unwrap_or_default().to_owned();
        shown["state"] == "stopped"
            && shown["queue_pairs"][0]["serving"] == false
            && [fault, explanation].iter().all(|text| text.contains("worker thread panicked"))
    });
    let rx = card.ram.load(card.rx[0].used + 2);
    assert_eq!(card.frontend.get_vring_base(1), 5, "the used index of the tx ring");
    assert_eq!(card.frontend.get_vring_base(0), u32::from(rx), "the used index of the rx ring");
    check_canaries(&card, 0, 20);
    card
}

/// Checks that the next session moves the frames that were in flight.
#[track_caller]
fn resumes(scene: &Scene, card: &mut Card) {
    used(scene, card, 8);
    scene.check(card);
}

#[test]
fn hostile_68_worker_panic_costs_one_session() {
    needs_fault_points!("hostile_68_worker_panic_costs_one_session");
    let scene = Scene::failing(68, WORKER, "loopback = true\n", None);
    let mut card = panics(&scene);
    // The guest resets the device.
    card.run();
    resumes(&scene, &mut card);
    assert_eq!(scene.daemon.show("attacked")["state"], "running");
    drop(card);
    scene.ends("B: the next session works");
}

#[test]
fn hostile_68_worker_panic_on_a_tap_reclaims_all_chains() {
    needs_root!("hostile_68_worker_panic_on_a_tap_reclaims_all_chains");
    needs_fault_points!("hostile_68_worker_panic_on_a_tap_reclaims_all_chains");
    enter_namespace_with_tap(false);
    let wire = Some(Wire::open("tap0"));
    let scene = Scene::failing(68, WORKER, "tap = \"tap0\"\n", wire);
    let mut card = panics(&scene);
    // Frames for the guest wait in the device.
    (0..4).for_each(|number| scene.wire().send(&frame(number, 60)));
    check_canaries(&card, 0, 20);
    card.resume(scene.frontend());
    resumes(&scene, &mut card);
    assert_eq!(scene.daemon.show("attacked")["queue_pairs"][0]["mode"], "io-uring");
    drop(card);
    scene.ends("B: the next session works");
}

#[test]
fn hostile_68_worker_panic_on_af_xdp_closes_the_socket() {
    needs_root!("hostile_68_worker_panic_on_af_xdp_closes_the_socket");
    needs_fault_points!("hostile_68_worker_panic_on_af_xdp_closes_the_socket");
    enter_namespace_with_veth(1);
    let wire = Some(Wire::open("veth1"));
    let scene = Scene::failing(68, WORKER, "af-xdp = \"veth0\"\n", wire);
    let mut card = panics(&scene);
    (0..4).for_each(|number| scene.wire().send(&frame(number, 60)));
    check_canaries(&card, 0, 20);
    card.resume(scene.frontend());
    resumes(&scene, &mut card);
    drop(card);
    scene.ends("B: the next session works");
}

#[test]
fn hostile_68_control_panic_ends_one_port() {
    needs_fault_points!("hostile_68_control_panic_ends_one_port");
    // SEND_RARP triggers the panic; no other test sends it to this port.
    let scene = Scene::failing(68, "control:attacked:19", "loopback = true\n", None);
    let mut card = scene.card();
    card.check_echo(10);
    let started = Instant::now();
    assert_eq!(card.frontend.try_ask(FrontendReq::SEND_RARP, &[0; 8], &[]), None, "disconnected");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    scene.says("control thread panicked (bug)");
    eventually("ctl shows it", || {
        let shown = scene.daemon.show("attacked");
        shown["state"] == "ended" && shown["mapped_bytes"] == 0
    });
    assert!(!scene.daemon.path("attacked").exists(), "the socket is removed");
    // An operator can add the port again.
    scene.daemon.ask(&["remove", "attacked"]);
    scene.daemon.ask(&["reload"]);
    drop(card);
    scene.ends("B: a worker serves the next session; C: a control thread's port has ended");

    // The daemon exits with an error when its last port ends so, and a service manager restarts it.
    let mut daemon =
        Daemon::failing_without_file(&["--loopback", "--name=only"], "control:only:19");
    let mut frontend = Frontend::new(daemon.connect());
    frontend.begin();
    assert_eq!(frontend.try_ask(FrontendReq::SEND_RARP, &[0; 8], &[]), None, "disconnected");
    assert_eq!(daemon.wait().code(), Some(1));
}
