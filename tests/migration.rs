//! Migration: the dirty log marks each page that the device writes, and the destination announces the
//! guest's address.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, LOG_ALL, Options};
use crate::support::frontend::{Frontend, pair};
use crate::support::guest::memfd;
use crate::support::network::{enter_namespace_for, wait_for_carrier};
use crate::support::traffic::{check_both_ways, frame};
use crate::support::{eventually, needs_root};

const PAGE: usize = 4096;

/// A dirty log and its guest memory.
struct Log {
    file: File,
    bytes: usize,
}

impl Log {
    fn of(card: &Card) -> Self {
        let bytes = (card.ram.size as usize).div_ceil(PAGE * 8);
        Log { file: memfd(bytes as u64), bytes }
    }

    /// Returns the marked pages, and clears the log.
    fn take(&self) -> Vec<usize> {
        let mut bits = vec![0; self.bytes];
        self.file.read_exact_at(&mut bits, 0).unwrap();
        self.file.write_all_at(&vec![0; self.bytes], 0).unwrap();
        (0..self.bytes * 8).filter(|page| bits[page / 8] & 1 << (page % 8) != 0).collect()
    }
}

/// Returns the areas that only the device writes, rx buffers and used rings: page numbers and contents.
fn device_pieces(card: &Card) -> Vec<(usize, Vec<u8>)> {
    let used = card.rx.iter().chain(&card.tx).map(|ring| ring.used_area());
    let buffers = card.rx.iter().map(|ring| {
        (ring.buffer_area(), u64::from(card.options.size) * u64::from(card.options.buffer))
    });
    let pieces = used.chain(buffers).flat_map(|(start, length)| {
        let (start, end) = (start as usize, (start + length) as usize);
        (start / PAGE..end.div_ceil(PAGE)).map(move |page| {
            let (from, to) = ((page * PAGE).max(start), ((page + 1) * PAGE).min(end));
            (page, card.ram.read(from as u64, to - from))
        })
    });
    pieces.collect()
}

/// Checks that each page that the device has changed is marked, and no page that it cannot write.
#[track_caller]
fn check_marked(card: &Card, before: &[(usize, Vec<u8>)], marked: &[usize]) {
    let after = device_pieces(card);
    let changed = before.iter().zip(&after).filter(|(before, after)| before != after);
    let changed: Vec<usize> = changed.map(|((page, _), _)| *page).collect();
    assert!(changed.len() > 2, "{changed:?}");
    for page in &changed {
        assert!(marked.contains(page), "page {page} was written and is not marked: {marked:?}");
    }
    for page in marked {
        let is_own = after.iter().any(|(own, _)| own == page);
        assert!(is_own, "page {page} is not the device's to write");
    }
}

/// Stops the rings. After the reply the daemon marks no page.
fn stop(card: &mut Card) {
    card.frontend.get_vring_base(0);
    card.frontend.get_vring_base(1);
}

#[track_caller]
fn check_echo_is_logged(card: &mut Card, log: &Log) {
    log.take();
    let before = device_pieces(card);
    card.check_echo(40);
    stop(card);
    check_marked(card, &before, &log.take());
    card.run();
}

fn loopback() -> (Daemon, Card) {
    let daemon = Daemon::start(&["--loopback"]);
    // Rings and buffers in pages of their own.
    let options = Options { size: 256, ..Options::default() };
    let card = Card::start(Frontend::new(daemon.connect()), options);
    (daemon, card)
}

#[test]
fn dirty_log_marks_exactly_the_written_pages() {
    let (_daemon, mut card) = loopback();
    let log = Log::of(&card);
    card.check_echo(50);
    assert!(card.frontend.set_log_base(log.bytes as u64, 0, &log.file));
    card.check_echo(50);
    assert_eq!(log.take(), [0_usize; 0], "noted before LOG_ALL");
    let logging = card.options.features | LOG_ALL;
    for _ in 0..5 {
        card.frontend.set_features(logging);
        check_echo_is_logged(&mut card, &log);
        // A cancelled migration.
        card.frontend.set_features(card.options.features);
        log.take();
        card.check_echo(50);
        assert_eq!(log.take(), [0_usize; 0], "noted though it was switched off");
    }
}

#[test]
fn new_dirty_log_replaces_the_old_one() {
    let (_daemon, mut card) = loopback();
    let logs = [Log::of(&card), Log::of(&card)];
    assert!(card.frontend.set_log_base(logs[0].bytes as u64, 0, &logs[0].file));
    card.frontend.set_features(card.options.features | LOG_ALL);
    for pass in 1..10 {
        card.check_echo(20);
        let (log, last) = (&logs[pass % 2], &logs[(pass + 1) % 2]);
        log.take();
        assert!(card.frontend.set_log_base(log.bytes as u64, 0, &log.file));
        // The frontend reads it now, as cloud-hypervisor does at each pass.
        assert!(!last.take().is_empty());
        check_echo_is_logged(&mut card, log);
        assert_eq!(
            last.take(),
            [0_usize; 0],
            "the old log was written after the new one was taken"
        );
    }
}

#[test]
fn dirty_log_marks_tap_and_veth_frames() {
    needs_root!("dirty_log_marks_tap_and_veth_frames");
    for host in ["--tap=tap0", "--af-xdp=veth0"] {
        let wire = enter_namespace_for(host);
        let daemon = Daemon::start(&[host]);
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        if host.contains("tap") {
            wait_for_carrier("tap0");
        }
        check_both_ways(&wire, &mut card, 100);
        let log = Log::of(&card);
        assert!(card.frontend.set_log_base(log.bytes as u64, 0, &log.file));
        card.frontend.set_features(card.options.features | LOG_ALL);
        check_both_ways(&wire, &mut card, 100);
        log.take();
        let before = device_pieces(&card);
        for number in 0..100 {
            wire.send(&frame(number, 60 + number * 13));
            card.receive(0);
        }
        stop(&mut card);
        check_marked(&card, &before, &log.take());
    }
}

#[test]
fn migrated_guest_is_announced_to_its_network() {
    needs_root!("migrated_guest_is_announced_to_its_network");
    let address = [0x52, 0x54, 0, 0, 2, 1];
    let mut payload = address.to_vec();
    payload.extend([0, 0]);
    let is_announcement = |frame: &[u8]| {
        frame.len() == 60
            && frame[..6] == [0xff; 6]
            && frame[6..12] == address
            && frame[12..14] == [0x80, 0x35]
            && frame[20..22] == [0, 3]
            && frame[22..28] == address
            && frame[32..38] == address
    };
    for host in ["--tap=tap0", "--af-xdp=veth0"] {
        let wire = enter_namespace_for(host);
        let rules = ["--anti-spoofing=on", "--mac=52:54:00:00:02:01"];
        let daemon = Daemon::start(&[host, rules[0], rules[1], "--tx-limit=1pps,packet-burst=2"]);
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        card.frontend.ask(FrontendReq::SEND_RARP, &payload, &[]);
        let seen = std::iter::from_fn(|| wire.receive_any(1000)).find(|it| is_announcement(it));
        assert!(seen.is_some(), "{host}: nothing is announced");
        // Not another's, and not more than the port may send.
        card.frontend.refused(FrontendReq::SEND_RARP, &[0x52, 0x54, 0, 0, 2, 9, 0, 0], &[]);
        let says = |what: &str| eventually(what, || daemon.log().contains(what));
        says("52:54:00:00:02:09 is not the guest's address");
        for _ in 0..10 {
            let _ = card.frontend.try_ask(FrontendReq::SEND_RARP, &payload, &[]);
        }
        says("the port's tx limit");
    }
    let daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.frontend.refused(FrontendReq::SEND_RARP, &payload, &[]);
}

/// Transfers a device state. Returns the daemon's result.
fn transfer(frontend: &mut Frontend, load: bool, pipe: &impl AsRawFd) -> u64 {
    let payload = [u32::from(load), 0].map(u32::to_ne_bytes).concat();
    frontend.send_with(FrontendReq::SET_DEVICE_STATE_FD, 0, &payload, &[pipe.as_raw_fd()]);
    let reply = frontend.reply(FrontendReq::SET_DEVICE_STATE_FD);
    u64::from_ne_bytes(reply.try_into().unwrap())
}

#[test]
fn counters_and_limits_move_with_the_guest() {
    let daemon = |limit: &str| {
        let file = "control = \"{}/control\"\n".to_owned()
            + &port("one", &format!("loopback = true\ntx-limit = \"{limit}\""));
        Daemon::with_config(&file, "one")
    };
    let (here, there) = (daemon("100pps,packet-burst=100"), daemon("100pps,packet-burst=100"));
    let mut card = Card::start(Frontend::new(here.connect_to("one")), Options::default());
    card.check_echo(90);
    let (mut state, pipe) = std::io::pipe().unwrap();
    // Not while rings run.
    let payload = [0_u32, 0].map(u32::to_ne_bytes).concat();
    let mut other = Card::start(Frontend::new(there.connect_to("one")), Options::default());
    other.frontend.send_with(FrontendReq::SET_DEVICE_STATE_FD, 0, &payload, &[pipe.as_raw_fd()]);
    assert!(other.frontend.is_closed());
    drop(other);

    stop(&mut card);
    assert_eq!(transfer(&mut card.frontend, false, &pipe), 0x100, "by the frontend's descriptor");
    drop(pipe);
    assert_eq!(card.frontend.get(FrontendReq::CHECK_DEVICE_STATE), 0);
    let mut text = String::new();
    state.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"version\":1"), "{text}");

    let mut frontend = Frontend::new(there.connect_to("one"));
    frontend.begin();
    // What is none, or of another version, is refused, and nothing changes.
    for (wrong, said) in [("", "EOF"), ("{", "EOF"), ("{\"version\":7}", "version 7")] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(wrong.as_bytes()).unwrap();
        drop(writer);
        assert_eq!(transfer(&mut frontend, true, &reader), 0x100);
        assert_eq!(frontend.get(FrontendReq::CHECK_DEVICE_STATE), 1);
        eventually(said, || there.log().contains(said));
    }
    assert_eq!(frontend.get(FrontendReq::CHECK_DEVICE_STATE), 1, "nothing has begun");
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(text.as_bytes()).unwrap();
    drop(writer);
    assert_eq!(transfer(&mut frontend, true, &reader), 0x100);
    assert_eq!(frontend.get(FrontendReq::CHECK_DEVICE_STATE), 0);
    assert_eq!(there.show("one")["tx_frames"], 90);
    drop(frontend);
    // What was used up there is used up here: of the burst of 100 some ten are left.
    let started = std::time::Instant::now();
    let mut card = Card::start(Frontend::new(there.connect_to("one")), Options::default());
    card.check_echo(60);
    let spared = started.elapsed().as_millis();
    assert!(spared >= 200, "60 frames took {spared} ms: the bucket was full");
    assert_eq!(there.show("one")["tx_frames"], 150);
}

#[test]
fn ring_whose_memory_has_not_arrived_stays_stopped() {
    let daemon = Daemon::with_config(&port("one", "loopback = true"), "one");
    let frontend = Frontend::new(daemon.connect_to("one"));
    let mut card = Card::prepare(frontend, Options::default());
    card.rx[0].start(&mut card.frontend, 0);
    card.frontend.get_vring_base(0);
    // As after a post-copy migration: the ring has been used, and its pages are still elsewhere.
    let table = 16 * i64::from(card.options.size);
    assert_eq!((card.rx[0].descriptors, table), (0, PAGE as i64));
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&card.ram.file, hole, 0, table).unwrap();
    card.frontend.ask(FrontendReq::SET_VRING_BASE, &pair(0, 7), &[]);
    let kick = card.rx[0].kick.as_raw_fd();
    card.frontend.refused(FrontendReq::SET_VRING_KICK, &0_u64.to_ne_bytes(), &[kick]);
    eventually("the log has the line", || {
        daemon.log().contains("post-copy migration is not supported")
    });
    // An access would allocate a page, which then never arrives from the source.
    let data = lseek(&card.ram.file, 0, Whence::SeekData).unwrap();
    assert_eq!(data, table);
}
