//! Cases 21 to 30: rings of a hostile guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;

use crate::support::driver::{
    Card, HEADER, INDIRECT, INDIRECT_FLAG, MRG_RXBUF, NEXT, Options, Ring, WRITE,
};
use crate::support::eventually;
use crate::support::frontend::addresses;
use crate::support::guest::Ram;
use crate::support::hostile::Scene;

/// Writes descriptors to `table`, from entry 0: address, length, flags, next.
fn write_table(ring: &Ring, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
        ring.write_descriptor(table, index, *address, *length, *flags, *next);
    }
}

/// Makes a chain available that starts at descriptor 0 of the tx ring.
fn offer(card: &mut Card, descriptors: &[(u64, u32, u16, u16)]) {
    let ring = &mut card.tx[0];
    write_table(ring, ring.descriptors, descriptors);
    ring.offer_head(0);
    ring.publish();
}

/// Lets a guest break its tx ring. Checks that the queue pair stops with a log line that contains `why`, and
/// works again after the guest's reset and over a new connection.
#[track_caller]
fn breaks(scene: &Scene, why: &str, break_it: impl FnOnce(&mut Card)) {
    let mut card = scene.card();
    card.check_echo(20);
    break_it(&mut card);
    card.tx[0].kick.write(1).unwrap();
    eventually(&format!("the frontend is told: {why}"), || card.tx[0].error.read().is_ok());
    scene.says(why);
    // The pair stays broken until a reset, and then resumes at its index.
    for index in 0..2 {
        card.frontend.get_vring_base(index);
    }
}

#[test]
fn hostile_21_buffers_outside_memory_break_the_pair() {
    let scene = Scene::new(21);
    let end = scene.card().ram.size;
    for (address, length) in [
        (1 << 50, 100),
        (end, 1),
        (end - 50, 100),
        (0, u32::MAX),
        (u64::MAX - 10, 100),
        (u64::MAX, u32::MAX),
    ] {
        breaks(&scene, "lies outside guest memory", |card| offer(card, &[(address, length, 0, 0)]));
    }
    // Two regions are adjacent in guest addresses, but not in this process.
    let mut card = scene.card();
    let next = Ram::new(end, 0x10_0000);
    card.frontend.add_mem_reg(&next);
    let start = end - 50;
    card.ram.write(start, &[[0; HEADER].as_slice(), &[4; 38]].concat());
    next.write(next.base, &[6; 100]);
    card.tx[0].add(&[(start, 150)], false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [[4; 38].as_slice(), &[6; 100]].concat());
    drop(card);
    scene.ends("B; a buffer over a border is served in two pieces");
}

#[test]
fn hostile_22_index_out_of_range_breaks_the_pair() {
    let scene = Scene::new(22);
    for jump in [257, 1000, 0x8000, 0xffff] {
        breaks(&scene, "available index", |card| {
            let ring = &mut card.tx[0];
            ring.avail_index = ring.avail_index.wrapping_add(jump);
            ring.publish();
        });
    }
    for head in [256, 1000, 0xffff] {
        breaks(&scene, &format!("descriptor head {head} out of range"), |card| {
            card.tx[0].offer_head(head);
            card.tx[0].publish();
        });
    }
    scene.ends("B");
}

#[test]
fn hostile_23_duplicate_heads_and_ring_overlaps_are_contained() {
    let scene = Scene::new(23);
    breaks(&scene, "is already in flight", |card| {
        let area = card.tx[0].buffer_area();
        let head = card.tx[0].add(&[(area, 100)], false).unwrap();
        card.tx[0].offer_head(head);
        card.tx[0].publish();
    });
    // The parts of a ring overlap each other, the other ring and the buffers.
    let card = scene.card();
    let (rx, tx) = (&card.rx[0], &card.tx[0]);
    let buffers = tx.buffer_area();
    let places = [
        (tx.descriptors, tx.descriptors, tx.descriptors),
        (tx.descriptors, tx.descriptors, tx.avail),
        (tx.descriptors, tx.avail & !3, tx.avail & !3),
        (tx.descriptors, rx.used, tx.avail),
        (rx.descriptors, rx.used, rx.avail),
        (buffers, buffers + 0x20, buffers + 0x40),
    ];
    drop(card);
    for (descriptors, used, avail) in places {
        let mut card = scene.card();
        card.frontend.get_vring_base(1);
        let place = addresses(1, 0, descriptors, used, avail);
        card.frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
        card.frontend.event(FrontendReq::SET_VRING_KICK, 1, Some(&card.tx[0].kick));
        for number in 0..50u16 {
            card.ram.store((avail & !1) + 2, number.wrapping_mul(7));
            card.tx[0].kick.write(1).unwrap();
            std::thread::sleep(Duration::from_micros(200));
        }
        card.frontend.get_vring_base(1);
    }
    scene.ends("B at worst, and only its own memory is written");
}

#[test]
fn hostile_24_empty_descriptors_are_dropped_or_break_the_pair() {
    let scene = Scene::new(24);
    let mut card = scene.card();
    let area = card.tx[0].buffer_area();
    for pieces in [&[(area, 0)][..], &[(area, 0), (area + 64, 0)], &[(1 << 50, 0)]] {
        card.tx[0].add(pieces, false).unwrap();
        card.tx[0].publish();
        card.tx[0].wait_used();
    }
    // Empty descriptors between others are ignored.
    card.ram.write(area, &[[0; HEADER].as_slice(), &[9; 60]].concat());
    let pieces = [(area, 0), (area, 12), (area + 5, 0), (area + 12, 60), (area, 0)];
    card.tx[0].add(&pieces, false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [9; 60]);
    drop(card);
    scene.says("3 dropped (too_short)");
    scene.ends("D; without bytes the address does not matter");
}

#[test]
fn hostile_25_chain_without_a_frame_is_dropped() {
    let scene = Scene::new(25);
    let mut card = scene.card();
    for length in [1, 5, 11, 12] {
        let area = card.tx[0].buffer_area();
        card.tx[0].add(&[(area, length)], false).unwrap();
        card.tx[0].publish();
        card.tx[0].wait_used();
    }
    card.check_echo(20);
    drop(card);
    scene.says("4 dropped (too_short)");
    scene.ends("D");
}

#[test]
fn hostile_26_scattered_header_is_accepted() {
    let scene = Scene::new(26);
    let mut card = scene.card();
    let area = card.tx[0].buffer_area();
    card.ram.write(area, &[[0; HEADER].as_slice(), &[3; 60]].concat());
    let mut pieces: Vec<(u64, u32)> = (0..12).map(|byte| (area + byte, 1)).collect();
    pieces.push((area + 12, 60));
    card.tx[0].add(&pieces, false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [3; 60]);
    card.tx[0].wait_used();
    card.tx[0].add_indirect(&[(area, 7), (area + 7, 65)], false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [3; 60]);
    drop(card);
    scene.ends("works");
}

#[test]
fn hostile_27_concurrently_changed_fields_are_read_once() {
    let scene = Scene::new(27);
    let started = Instant::now();
    let mut rounds = 0;
    while started.elapsed() < Duration::from_secs(3) {
        let mut card = scene.card_with(Options { size: 64, ..Options::default() });
        let stop = Arc::<AtomicBool>::default();
        let ram = card.ram.clone();
        // All fields of the tx ring that a guest writes, and header and frame.
        let parts = [
            (card.tx[0].descriptors, 64 * 16),
            (card.tx[0].avail + 4, 64 * 2),
            (card.tx[0].buffer_area(), 64),
        ];
        let (stopped, seed) = (stop.clone(), rounds);
        let flipper = std::thread::spawn(move || {
            let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed;
            while !stopped.load(Ordering::Relaxed) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let (start, length) = parts[(state % 3) as usize];
                // Most values are near valid ones, which reach more of the code.
                let value = (state >> 40) as u8 & if state & 8 == 0 { 0xff } else { 7 };
                ram.write(start + (state >> 8) % length, &[value]);
            }
        });
        let until = Instant::now() + Duration::from_millis(30);
        while Instant::now() < until {
            card.ram.store(card.tx[0].avail + 2, card.ram.load(card.tx[0].used + 2) + 8);
            card.tx[0].kick.write(1).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
        card.frontend.get_vring_base(1);
        rounds += 1;
    }
    println!("{rounds} rounds");
    scene.ends("R, B or D only");
}

#[test]
fn hostile_28_invalid_indirect_tables_break_the_pair() {
    let scene = Scene::new(28);
    for length in [0, 1, 15, 24, 16 * 257, u32::MAX - 15] {
        breaks(&scene, &format!("indirect table of {length} bytes is not allowed"), |card| {
            let area = card.tx[0].buffer_area();
            offer(card, &[(area, length, INDIRECT_FLAG, 0)]);
        });
    }
    type Table = fn(u64) -> Vec<(u64, u32, u16, u16)>;
    let tables: [(&str, Table); 5] = [
        ("indirect descriptor that is not allowed", |area| vec![(area, 16, INDIRECT_FLAG, 0)]),
        ("next descriptor 2 out of range", |area| vec![(area, 16, NEXT, 1), (area, 16, NEXT, 2)]),
        ("too many descriptors", |area| vec![(area, 16, NEXT, 1), (area, 16, NEXT, 0)]),
        ("wrong VIRTQ_DESC_F_WRITE flag", |area| vec![(area, 16, NEXT, 1), (area, 16, WRITE, 0)]),
        ("lies outside guest memory", |_| vec![(1 << 60, 16, NEXT, 1), (0, 16, 0, 0)]),
    ];
    for (why, table) in tables {
        breaks(&scene, why, |card| {
            let area = card.tx[0].buffer_area();
            write_table(&card.tx[0], area + 0x800, &table(area));
            offer(card, &[(area + 0x800, 32, INDIRECT_FLAG, 0)]);
        });
    }
    breaks(&scene, "indirect descriptor that is not allowed", |card| {
        let area = card.tx[0].buffer_area();
        offer(card, &[(area, 16, INDIRECT_FLAG | NEXT, 1), (area, 16, 0, 0)]);
    });
    breaks(&scene, "outside guest memory", |card| {
        offer(card, &[(1 << 50, 16, INDIRECT_FLAG, 0)]);
    });
    // INDIRECT is not negotiated.
    let mut card = scene.card_with(Options {
        features: Options::default().features & !INDIRECT,
        ..Options::default()
    });
    let area = card.tx[0].buffer_area();
    offer(&mut card, &[(area, 16, INDIRECT_FLAG, 0)]);
    eventually("the frontend is told", || card.tx[0].error.read().is_ok());
    drop(card);
    scene.ends("B");
}

#[test]
fn hostile_29_chains_of_wrong_direction_or_size_are_contained() {
    let scene = Scene::new(29);
    breaks(&scene, "wrong VIRTQ_DESC_F_WRITE flag", |card| {
        let area = card.tx[0].buffer_area();
        offer(card, &[(area, 100, WRITE, 0)]);
    });
    breaks(&scene, "wrong VIRTQ_DESC_F_WRITE flag", |card| {
        let area = card.tx[0].buffer_area();
        offer(card, &[(area, 100, NEXT, 1), (area + 100, 100, WRITE, 0)]);
    });
    // Readable descriptors on the rx ring, whose buffers are not posted yet.
    let mut card = Card::prepare(scene.frontend(), Options::default());
    card.run();
    let area = card.rx[0].buffer_area();
    card.rx[0].add(&[(area, 2048)], false).unwrap();
    card.rx[0].publish();
    card.rx[0].kick.write(1).unwrap();
    eventually("the frontend is told", || card.rx[0].error.read().is_ok());
    drop(card);
    // Buffers around the size of a header: frames go to the next suitable one.
    for merging in [true, false] {
        let all = Options::default().features;
        let features = if merging { all } else { all & !MRG_RXBUF };
        for length in [1, 11, 12, 13] {
            let mut card =
                scene.card_with(Options { features, buffer: length, ..Options::default() });
            for slot in 0..32 {
                card.queue_tx(0, slot, &[0; HEADER], &[slot as u8; 60]);
            }
            card.tx[0].publish();
            let mut sent = 0;
            eventually(&format!("frames go on with buffers of {length} bytes"), || {
                sent += usize::from(card.tx[0].take_used().is_some());
                card.recycle(0);
                sent == 32
            });
        }
    }
    scene.says("dropped (no_room)");
    scene.ends("B; buffers that are too small: D, and no number runs below zero");
}

#[test]
fn hostile_30_loops_and_endless_chains_are_bounded() {
    let scene = Scene::new(30);
    let looping = |card: &mut Card, length: u16, back_to: u16| {
        let area = card.tx[0].buffer_area();
        let chain: Vec<_> = (0..length)
            .map(|index| (area, 1, NEXT, if index + 1 == length { back_to } else { index + 1 }))
            .collect();
        offer(card, &chain);
    };
    for (length, back_to) in [(1, 0), (2, 0), (2, 1), (256, 0), (256, 128), (256, 255)] {
        breaks(&scene, "too many descriptors", |card| looping(card, length, back_to));
    }
    for next in [256, 300, 0xffff] {
        breaks(&scene, &format!("next descriptor {next} out of range"), |card| {
            looping(card, 3, next);
        });
    }
    breaks(&scene, "longer than 4 GiB", |card| {
        let large = Ram::new(1 << 32, 1 << 30);
        card.frontend.add_mem_reg(&large);
        let piece = |index: u16| {
            let flags = if index < 4 { NEXT } else { 0 };
            (large.base, large.size as u32, flags, index + 1)
        };
        offer(card, &[0, 1, 2, 3, 4].map(piece));
    });
    scene.ends("B: bounded, and never taken for a short frame");
}
