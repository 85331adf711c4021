//! Guests whose driver is ours, and costs little: what is measured with them.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::cases::{Measurements, compare, without_busy_poll};
use super::party::Party;
use super::report::{ROUNDS, Report};
use crate::af_xdp;
use crate::measure::{BATCH, Cost, cost, frame, received};
use crate::support::driver::{CSUM, Card, GUEST_CSUM, GUEST_TSO, HEADER, HOST_TSO, Options};
use crate::support::frontend::Frontend;
use crate::support::traffic::tcp_frame;
use crate::tap;

/// Lengths of frames in bytes.
const LENGTHS: [usize; 3] = [64, 512, 1500];
/// Entries of its rings.
const RING: u16 = 1024;

/// What counts the frames that a turn moved.
pub(super) type Count = Box<dyn FnMut() -> u64>;

/// What a case may be about, and a backend not have.
const OFFLOADS: u64 = HOST_TSO | CSUM | GUEST_TSO | GUEST_CSUM;

/// Measures a party with a guest: connects it, and has `serve` keep it going.
fn own_guest_turn(
    party: &Party,
    options: Options,
    serve: impl FnOnce(Card, &mut af_xdp::Load) -> Count,
) -> Option<Cost> {
    party.resume();
    let frontend = Frontend::of_any(UnixStream::connect(party.socket()).unwrap());
    let card = Card::start(frontend, options);
    let lacks = options.features & !card.options.features & OFFLOADS;
    let cost = (lacks == 0).then(|| {
        let mut load = af_xdp::Load::default();
        let count = serve(card, &mut load);
        cost(count, || party.cpu())
    });
    party.pause();
    cost
}

/// Measures bare loops, and parties with guests of ours.
pub(super) fn compare_with_own_guests<'a>(
    case: &str,
    mut all: Measurements<'a>,
    parties: &[&'a Party],
    options: Options,
    serve: impl Fn(&Party, Card, &mut af_xdp::Load) -> Count + Copy + 'a,
    report: &mut Report,
) {
    let turn =
        move |party: &Party| own_guest_turn(party, options, |card, load| serve(party, card, load));
    for &party in parties {
        if turn(party).is_none() {
            report.skip(&format!("{case}: {}", party.contestant.name), "it has no such offload");
            continue;
        }
        all.push((party.contestant.name, Box::new(move || turn(party).expect("as before"))));
    }
    compare(case, all, report);
}

/// Sends frames to the guest as fast as the device's kind allows.
fn flood(party: &Party, length: usize, load: &mut af_xdp::Load) {
    if party.contestant.tap {
        load.flood(&party.wire(), length);
    } else {
        load.send_live(&party.wire(), length);
    }
}

/// Has frames come to the guest, and it take them; returns what counts these.
fn take(party: &Party, mut card: Card, length: usize, load: &mut af_xdp::Load) -> Count {
    // Sends something, for a backend that begins with that.
    card.queue_tx(0, 0, &[0; HEADER], &[0; 5]);
    card.tx[0].publish();
    flood(party, length, load);
    let taken = load.taken_by(card);
    Box::new(move || taken.load(Ordering::Relaxed))
}

/// Frames that come to a guest which takes them at once, and costs next to nothing.
pub(super) fn lean_rx(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let bare_tap = RefCell::new(tap::Bare::new());
    af_xdp::veth("lean");
    let bare_veth = RefCell::new(af_xdp::Bare::on("lean0", false));
    for length in LENGTHS {
        let bare: Measurements<'_> = vec![
            (
                "bare read loop",
                Box::new(|| bare_tap.borrow_mut().read(|tap| af_xdp::Load::flooding(tap, length))),
            ),
            (
                "bare AF_XDP loop",
                Box::new(|| {
                    let _load = af_xdp::Load::start("lean1", length);
                    bare_veth.borrow_mut().receive()
                }),
            ),
        ];
        let serve =
            |party: &Party, card: Card, load: &mut af_xdp::Load| take(party, card, length, load);
        let options = Options { size: RING, ..Options::default() };
        compare_with_own_guests(
            &format!("lean rx {length}"),
            bare,
            &parties,
            options,
            serve,
            report,
        );
    }
}

/// A guest that sends and takes frames at once, as fast as it can.
pub(super) fn both_ways(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    for length in [64, 1500] {
        let serve = |party: &Party, mut card: Card, load: &mut af_xdp::Load| -> Count {
            for slot in 0..u64::from(RING) {
                card.queue_tx(0, slot, &[0; HEADER], &frame(length));
            }
            card.rx[0].want_no_call();
            card.tx[0].want_no_call();
            card.tx[0].publish();
            flood(party, length, load);
            let moved = Arc::<AtomicU64>::default();
            let counter = moved.clone();
            load.run(move || {
                let sent = card.tx[0].recycle();
                if sent > 0 {
                    card.tx[0].publish();
                }
                let taken = card.recycle(0);
                card.rx[0].want_no_call();
                card.tx[0].want_no_call();
                counter.fetch_add((sent + taken) as u64, Ordering::Relaxed);
                if sent + taken == 0 {
                    std::thread::yield_now();
                }
            });
            Box::new(move || moved.load(Ordering::Relaxed))
        };
        let options = Options { size: RING, ..Options::default() };
        compare_with_own_guests(
            &format!("both ways {length}"),
            Vec::new(),
            &parties,
            options,
            serve,
            report,
        );
    }
}

/// A hundred thousand frames a second: one in this time,
pub(super) const PACE: Duration = Duration::from_micros(10);
/// and so many at a time.
const BURSTS: [u16; 2] = [BATCH as u16, 1];

/// Frames that the guest sends at a steady rate.
pub(super) fn paced(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let tap = RefCell::new(tap::Bare::new());
    let bytes = [&[0; HEADER][..], &frame(64)].concat();
    for burst in BURSTS {
        let pace = PACE * u32::from(burst);
        let mut bare: Measurements<'_> = Vec::new();
        if usize::from(burst) == BATCH {
            let measure = || tap.borrow_mut().write_batches_woken(&bytes, pace);
            bare.push(("bare io_uring loop", Box::new(measure)));
        }
        let serve = |party: &Party, mut card: Card, load: &mut af_xdp::Load| -> Count {
            let tx = &card.tx[0];
            for head in 0..RING {
                let place = tx.buffer_area() + 2048 * u64::from(head);
                card.ram.write(place, &bytes);
                tx.write_descriptor(tx.descriptors, head, place, bytes.len() as u32, 0, 0);
            }
            tx.want_no_call();
            load.run_each(pace, move || {
                // All of it: what is not moved here would be dropped, and the connection with it.
                let card = &mut card;
                let tx = &mut card.tx[0];
                let done = card.ram.load(tx.used + 2);
                tx.used_index = done;
                tx.want_no_call();
                if tx.avail_index.wrapping_sub(done) <= RING - burst {
                    (0..burst).for_each(|_| tx.offer_head(tx.avail_index % RING));
                    tx.publish();
                }
            });
            let wire = party.wire();
            Box::new(move || received(&wire))
        };
        let options = Options { size: RING, ..Options::default() };
        let case = if burst == 1 { "paced tx 64, one by one" } else { "paced tx 64" };
        compare_with_own_guests(case, bare, &parties, options, serve, report);
    }
}

/// Payload of a frame that is to be cut.
pub(super) const PAYLOAD: usize = 65_000;

/// Backends that are started for one measurement have numbers from here on.
const FRESH: u8 = 100;

/// A guest that sends such frames.
pub(super) const LONG_TX: Options = Options {
    size: 64,
    buffer: 66 << 10,
    features: Options::DEFAULT.features | CSUM | HOST_TSO,
    ..Options::DEFAULT
};

/// Has the guest send its frames, header and all, as often as there is room; returns what counts those that
/// were used.
pub(super) fn send_over_and_over(mut card: Card, bytes: &[u8], load: &mut af_xdp::Load) -> Count {
    let options = card.options;
    let tx = &mut card.tx[0];
    for slot in 0..u64::from(options.size) {
        let place = tx.buffer_area() + slot * u64::from(options.buffer);
        card.ram.write(place, bytes);
        tx.add(&[(place, bytes.len() as u32)], false).unwrap();
    }
    tx.want_no_call();
    tx.publish();
    let moved = Arc::<AtomicU64>::default();
    let counter = moved.clone();
    load.run(move || {
        let card = &mut card;
        let sent = card.tx[0].recycle();
        if sent == 0 {
            std::thread::yield_now();
            return;
        }
        counter.fetch_add(sent as u64, Ordering::Relaxed);
        card.tx[0].publish();
        card.tx[0].want_no_call();
    });
    Box::new(move || moved.load(Ordering::Relaxed))
}

/// Frames of 64 KiB, which the backend or the host cuts.
pub(super) fn segments(parties: &[Party], report: &mut Report) {
    let parties = without_busy_poll(parties);
    let tap = RefCell::new(tap::Bare::new());
    let (header, frame) = tcp_frame(PAYLOAD, 1448);
    let bytes = [header, frame].concat();
    let bare: Measurements<'_> =
        vec![("bare write loop", Box::new(|| tap.borrow_mut().write(&bytes)))];
    let options = LONG_TX;
    let serve =
        |_: &Party, card: Card, load: &mut af_xdp::Load| send_over_and_over(card, &bytes, load);
    compare_with_own_guests("64 KiB tx", bare, &parties, options, serve, report);
    for party in parties.iter().filter(|party| party.contestant.tap && !party.contestant.polls) {
        // One that has done nothing else: the kernel divides all of a process's time by its samples.
        let contestant = party.contestant;
        let fresh = Party::start(contestant, FRESH + party.number);
        for _ in 0..2 * ROUNDS {
            own_guest_turn(&fresh, options, |card, load| serve(&fresh, card, load));
        }
        let [user, kernel] = fresh.ticks().map(|ticks| ticks as f64);
        let share = 100.0 * user / (user + kernel);
        report.add("64 KiB tx, in user space", contestant.name, "%", vec![share]);
    }
}
