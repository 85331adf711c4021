//! What a frame costs in executed instructions, the kernel's included: in a machine of one processor whose
//! clock is its count of them. `tests/bench/vhost-net` starts it.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use epoll::{ControlOptions, Event, Events};

use super::cases::Measurements;
use super::own_guest::{Count, LONG_TX, PAYLOAD, compare_with_own_guests, send_over_and_over};
use super::party::{Kind, Party};
use super::report::Report;
use crate::af_xdp::{Load, live_sender};
use crate::measure::{frame, received, sent};
use crate::support::driver::{Card, GUEST_CSUM, GUEST_TSO, HEADER, Options};
use crate::support::network::{ETHERTYPE, Wire};
use crate::support::traffic::tcp_frame;
use crate::tap;

/// Lengths of frames in bytes.
const LENGTHS: [usize; 3] = [64, 512, 1500];
/// Frames that come at a time, and of those of 64 KiB.
const BURST: usize = 128;
const LONG_BURST: usize = 16;
/// From the end of a burst to the next: the backend is done with it by then.
const PAUSE: Duration = Duration::from_millis(2);

/// Keeps a guest and a host busy; returns what counts the frames that the backend has moved.
type Serve = dyn Fn(&Party, Card, &mut Load) -> Count;

struct Case {
    name: String,
    options: Options,
    serve: Box<Serve>,
}

fn case(
    name: impl Into<String>,
    options: Options,
    serve: impl Fn(&Party, Card, &mut Load) -> Count + 'static,
) -> Case {
    Case { name: name.into(), options, serve: Box::new(serve) }
}

/// Counts them for these parties, if `is_wanted` says so of the case.
pub(super) fn count(parties: &[Party], is_wanted: impl Fn(&str) -> bool, report: &mut Report) {
    let parties: Vec<&Party> = parties.iter().collect();
    let bare_tap = RefCell::new(tap::Bare::new());
    for Case { name, options, serve } in cases().into_iter().filter(|case| is_wanted(&case.name)) {
        let mut bare: Measurements<'_> = Vec::new();
        if let Some(length) = name.strip_prefix("rx ").and_then(|length| length.parse().ok()) {
            let load = move |device: &str| {
                let (mut load, mut send) = (Load::default(), flood(device, length));
                load.run_urgent(move || {
                    send();
                    std::thread::sleep(PAUSE);
                });
                load
            };
            let tap = &bare_tap;
            bare.push(("bare read loop", Box::new(move || tap.borrow_mut().read(load))));
            bare.push((
                "bare io_uring loop, reads",
                Box::new(move || tap.borrow_mut().read_batches(load)),
            ));
        }
        compare_with_own_guests(&name, bare, &parties, options, &*serve, report);
    }
}

fn cases() -> Vec<Case> {
    let options = Options::DEFAULT;
    let plain = |length| [&[0; HEADER][..], &frame(length)].concat();
    let tx = LENGTHS.map(|length| {
        let bytes = plain(length);
        case(format!("tx {length}"), options, move |_, card, load| {
            send_over_and_over(card, &bytes, load)
        })
    });
    let rx = LENGTHS.map(|length| {
        case(format!("rx {length}"), options, move |party, card, load| {
            take_bursts(card, bursts(party, length), load)
        })
    });
    let back = case("loop 64", options, |party, mut card, load| {
        let mut send = bursts(party, 64);
        counted_each(PAUSE, load, move || {
            let returned = return_frames(&mut card);
            want_no_calls(&card);
            send();
            returned
        })
    });
    let (header, long) = tcp_frame(PAYLOAD, 1448);
    let bytes = [header, long].concat();
    // Without the header's last two bytes, `num_buffers`.
    let short = [&bytes[..HEADER - 2], &bytes[HEADER..]].concat();
    let long_tx =
        case("64 KiB tx", LONG_TX, move |_, card, load| send_over_and_over(card, &bytes, load));
    let features = options.features | GUEST_CSUM | GUEST_TSO;
    let long = Options { size: 1024, features, ..options };
    let long_rx = case("64 KiB rx", long, move |party, card, load| {
        let (wire, bytes) = (Wire::open(&party.wire()), short.clone());
        wire.has_header();
        let send = move || {
            (0..LONG_BURST).for_each(|_| _ = wire.try_send(&bytes));
        };
        let _buffers = take_bursts(card, Box::new(send), load);
        let device = party.wire();
        Box::new(move || sent(&device))
    });
    let bytes = plain(64);
    let one_by_one = case("tx 64, one by one", options, move |party, mut card, load| {
        let place = card.tx[0].buffer_area();
        card.ram.write(place, &bytes);
        let length = bytes.len() as u32;
        let _offered = counted_each(PAUSE, load, move || {
            while card.tx[0].take_used().is_some() {}
            want_no_calls(&card);
            card.tx[0].add(&[(place, length)], false).unwrap();
            card.tx[0].publish();
            1
        });
        let device = party.wire();
        Box::new(move || received(&device))
    });
    let answers = case("request and answer", options, answers);
    let all = [back, long_tx, long_rx, one_by_one, answers];
    tx.into_iter().chain(rx).chain(all).collect()
}

/// Does `step` each `pause`, before all else; returns what counts what it says.
fn counted_each(
    pause: Duration,
    load: &mut Load,
    mut step: impl FnMut() -> u64 + Send + 'static,
) -> Count {
    let counted = Arc::<AtomicU64>::default();
    let counter = counted.clone();
    load.run_urgent(move || {
        counter.fetch_add(step(), Ordering::Relaxed);
        std::thread::sleep(pause);
    });
    Box::new(move || counted.load(Ordering::Relaxed))
}

/// What sends a burst of frames to a party's guest.
fn bursts(party: &Party, length: usize) -> Box<dyn FnMut() + Send> {
    if party.contestant.tap || party.contestant.kind == Kind::OnCard {
        flood(&party.wire(), length)
    } else {
        let mut send = live_sender(&party.wire(), length);
        Box::new(move || send(BURST as u32))
    }
}

/// The same to a TAP.
fn flood(device: &str, length: usize) -> Box<dyn FnMut() + Send> {
    let (wire, frame) = (Wire::open(device), frame(length));
    Box::new(move || (0..BURST / 32).for_each(|_| wire.flood(&frame)))
}

/// Has bursts come, and the guest take each before the next.
fn take_bursts(mut card: Card, mut send: Box<dyn FnMut() + Send>, load: &mut Load) -> Count {
    // Sends something, for a backend that begins with that.
    card.queue_tx(0, 0, &[0; HEADER], &[0; 5]);
    card.tx[0].publish();
    counted_each(PAUSE, load, move || {
        let taken = card.recycle(0);
        want_no_calls(&card);
        send();
        taken as u64
    })
}

fn want_no_calls(card: &Card) {
    card.rx[0].want_no_call();
    card.tx[0].want_no_call();
}

/// Has the guest send all frames back that have come, from where they lie, and gives it the buffers back of
/// those that were sent; returns how many these are. A chain has the same head in both rings.
fn return_frames(card: &mut Card) -> u64 {
    let mut returned = 0;
    while let Some((head, _)) = card.tx[0].next_used() {
        card.rx[0].offer_head(head);
        returned += 1;
    }
    while let Some((head, length)) = card.rx[0].next_used() {
        let place = card.rx_buffer(0, head);
        let tx = &mut card.tx[0];
        tx.write_descriptor(tx.descriptors, head, place, length, 0, 0);
        tx.offer_head(head);
    }
    card.rx[0].publish();
    card.tx[0].publish();
    returned
}

/// A host that sends a frame and waits for the answer, and a guest that sleeps until one comes.
fn answers(party: &Party, mut card: Card, load: &mut Load) -> Count {
    let wire = Wire::open(&party.wire());
    let mut question = frame(64);
    question[12..14].copy_from_slice(&ETHERTYPE);
    let answered = Arc::<AtomicU64>::default();
    let counter = answered.clone();
    load.run(move || {
        wire.send(&question);
        if wire.receive(100).is_some() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let calls = epoll::create(true).unwrap();
    let call = card.rx[0].call.as_raw_fd();
    epoll::ctl(calls, ControlOptions::EPOLL_CTL_ADD, call, Event::new(Events::EPOLLIN, 0)).unwrap();
    card.tx[0].want_no_call();
    card.rx[0].want_call();
    load.run(move || {
        epoll::wait(calls, 10, &mut [Event::new(Events::empty(), 0)]).unwrap();
        let _ = card.rx[0].call.read();
        loop {
            return_frames(&mut card);
            card.tx[0].want_no_call();
            card.rx[0].want_call();
            // One that came before that calls nobody.
            if !card.rx[0].has_used() {
                break;
            }
        }
    });
    Box::new(move || answered.load(Ordering::Relaxed))
}
