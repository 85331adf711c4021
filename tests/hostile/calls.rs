//! Cases 73 and 74: blocking call descriptors, under load and in many queue pairs.

use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use super::set_flags;
use crate::support::driver::{Card, EVENT_IDX, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::guest::Ram;
use crate::support::hostile::{Refilling, Scene};
use crate::support::{eventually, one_at_a_time};

/// Queue pairs of case 74.
const PAIRS: u32 = 16;

/// Creates an eventfd with its maximum count. A write blocks once [`set_flags`] has cleared O_NONBLOCK.
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

/// Starts a guest with 16 queue pairs, whose workers all block in a write to a call descriptor.
fn blocked(scene: &Scene) -> Card {
    let features = Options::default().features & !EVENT_IDX;
    let options = Options { features, pairs: PAIRS, size: 16, ..Options::default() };
    let mut card = scene.card_with(options);
    for index in 0..2 * PAIRS {
        let full = full();
        card.frontend.event(FrontendReq::SET_VRING_CALL, index, Some(&full));
        set_flags(&full, OFlag::empty());
    }
    for pair in 0..PAIRS as usize {
        card.rx[pair].want_call();
        card.tx[pair].want_call();
        card.queue_tx(pair, 0, &[0; HEADER], &[1; 60]);
        card.tx[pair].publish();
    }
    std::thread::sleep(Duration::from_millis(100));
    card
}

#[test]
fn hostile_74_many_blocked_workers_end_together() {
    let _alone = one_at_a_time();
    let scene = Scene::of_pairs(74, PAIRS);
    let within_a_second = |what: &str, asked: Instant| {
        println!("{what}: {:?}", asked.elapsed());
        assert!(asked.elapsed() < Duration::from_secs(1), "{what}: {:?}", asked.elapsed());
    };
    for code in [FrontendReq::RESET_DEVICE, FrontendReq::RESET_OWNER] {
        let mut card = blocked(&scene);
        let asked = Instant::now();
        card.frontend.ask(code, &[], &[]);
        within_a_second(&format!("{code:?}"), asked);
    }
    let mut card = blocked(&scene);
    let asked = Instant::now();
    card.frontend.ask(FrontendReq::NET_SET_MTU, &1400_u64.to_ne_bytes(), &[]);
    within_a_second("NET_SET_MTU", asked);
    drop(card);

    let mut card = blocked(&scene);
    let asked = Instant::now();
    let ram = Ram::new(1 << 40, 0x20_0000);
    card.frontend.add_mem_reg(&ram);
    within_a_second("ADD_MEM_REG", asked);
    drop(card);

    let mut card = blocked(&scene);
    for index in 0..2 * PAIRS {
        let asked = Instant::now();
        card.frontend.get_vring_base(index);
        within_a_second(&format!("GET_VRING_BASE {index}"), asked);
    }
    drop(card);

    let card = blocked(&scene);
    let asked = Instant::now();
    drop(card);
    scene.frontend().get(FrontendReq::GET_FEATURES);
    within_a_second("disconnect", asked);
    scene.ends("all end within a second");
}
