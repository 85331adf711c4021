//! Case 73: call descriptors that block under load.

use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use super::set_flags;
use crate::support::driver::{EVENT_IDX, Options};
use crate::support::frontend::Frontend;
use crate::support::hostile::{Refilling, Scene};
use crate::support::{eventually, one_at_a_time};

/// An eventfd whose counter is at its maximum: a write to it blocks, once [`set_flags`] has said so.
fn full() -> EventFd {
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    full
}

#[test]
fn hostile_73_call_descriptor_is_replaced_while_a_worker_blocks() {
    let _alone = one_at_a_time();
    let scene = Scene::new(73);
    // Without EVENT_IDX the guest is called for each burst, so the worker blocks nearly all the time.
    let features = Options::default().features & !EVENT_IDX;
    let card = scene.card_with(Options { features, ..Options::default() });
    card.tx[0].want_call();
    let mut frontend = Frontend::new(card.frontend.stream.try_clone().unwrap());
    let flood = Refilling::start(card);
    let mut longest = Duration::ZERO;
    for _ in 0..100 {
        let full = full();
        let asked = Instant::now();
        frontend.event(FrontendReq::SET_VRING_CALL, 1, Some(&full));
        longest = longest.max(asked.elapsed());
        set_flags(&full, OFlag::empty());
        std::thread::sleep(Duration::from_millis(3));
    }
    println!("SET_VRING_CALL took {longest:?} at most");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    let usable = EventFd::new(0).unwrap();
    frontend.event(FrontendReq::SET_VRING_CALL, 1, Some(&usable));
    eventually("the guest is called", || usable.read().is_ok());
    drop((frontend, flood.stop()));
    scene.ends("answered within 500 ms, however often the worker blocks");
}
