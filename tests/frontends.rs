//! Frontends other than QEMU and cloud-hypervisor. They pass the control virtqueue on, create as many rings
//! as the backend offers, and use optional parts of the specification.

mod guests;
mod sockets;
mod user_mode_linux;

use std::io::{Read, pipe};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend as Stock, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{
    Card, EVENT_IDX, HEADER, INDIRECT, INDIRECT_FLAG, NEXT, Options, Ring, WRITE, footprint,
};
use crate::support::frontend::{Frontend, pair, region};
use crate::support::guest::{FRONTEND_BASE, Ram};
use crate::support::traffic::frame;
use crate::support::{SOON, eventually};

const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

/// Replies of the control virtqueue.
const OK: u8 = 0;
const ERR: u8 = 1;

/// A driver's control virtqueue, and the buffer of its current command.
struct Control {
    ram: Arc<Ram>,
    ring: Ring,
    area: u64,
}

impl Control {
    fn new(ram: &Arc<Ram>, index: u32, base: u64, event_idx: bool) -> Self {
        let ring = Ring::new(ram, index, base, 64, event_idx);
        Control { ram: ram.clone(), area: ring.buffer_area(), ring }
    }

    /// Makes a chain of `pieces` available: buffers with bytes, or one writable byte for the reply.
    fn offer(&mut self, pieces: &[Option<&[u8]>], indirect: bool) {
        let table = if indirect { self.area + 0x800 } else { self.ring.descriptors };
        for (at, piece) in (0..).zip(pieces) {
            let address = self.area + 64 * u64::from(at);
            self.ram.write(address, piece.unwrap_or(&[0xaa]));
            let next = if usize::from(at) + 1 < pieces.len() { NEXT } else { 0 };
            let flags = next | if piece.is_none() { WRITE } else { 0 };
            let length = piece.map_or(1, |bytes| bytes.len() as u32);
            self.ring.write_descriptor(table, at, address, length, flags, at + 1);
        }
        if indirect {
            let (place, length) = (self.ring.descriptors, 16 * pieces.len() as u32);
            self.ring.write_descriptor(place, 0, table, length, INDIRECT_FLAG, 0);
        }
        self.ring.want_call();
        self.ring.offer_head(0);
        self.ring.publish();
    }

    /// Waits until the command is used. Returns the bytes written and the reply.
    #[track_caller]
    fn answer(&mut self, pieces: &[Option<&[u8]>], indirect: bool) -> (u32, u8) {
        self.offer(pieces, indirect);
        let mut used = None;
        eventually("the command is used", || {
            used = self.ring.next_used();
            used.is_some()
        });
        let (head, written) = used.unwrap();
        assert_eq!(head, 0);
        eventually("the driver is called", || self.ring.call.read().is_ok());
        let last = pieces.iter().position(Option::is_none).unwrap_or(0) as u64;
        (written, self.ram.read(self.area + 64 * last, 1)[0])
    }

    /// Sends a command as Linux does: class and number, data, and a byte for the reply.
    #[track_caller]
    fn command(&mut self, class: u8, number: u8, data: &[u8]) -> u8 {
        let (written, answer) = self.answer(&[Some(&[class, number]), Some(data), None], false);
        assert_eq!(written, 1);
        answer
    }
}

/// Starts a daemon, and a guest whose frontend passes the control virtqueue on.
fn with_control(pairs: u32, features: u64) -> (Daemon, Card, Control) {
    let port = port("one", &format!("loopback = true\nqueue-pairs = {pairs}"));
    let daemon = Daemon::with_config(&format!("control = \"{{}}/control\"\n{port}"), "one");
    let options = Options { features: features | CTRL_VQ, pairs, ..Options::default() };
    let mut card = Card::prepare(Frontend::new(daemon.connect_to("one")), options);
    card.fill();
    let index = if features & MQ == 0 { 2 } else { 2 * pairs };
    let base = footprint(options.size, 2048) * u64::from(2 * pairs);
    let mut control = Control::new(&card.ram, index, base, features & EVENT_IDX != 0);
    control.ring.start(&mut card.frontend, 0);
    // Linux sets the number of its queue pairs while it probes: before rings are enabled, with some.
    assert_eq!(control.command(4, 0, &[1, 0]), OK);
    card.frontend.enable(index, true);
    (daemon, card, control)
}

#[test]
fn control_virtqueue_is_answered() {
    for (pairs, features) in [
        (1, Options::default().features | MQ),
        (1, Options::default().features & !EVENT_IDX),
        (3, Options::default().features | MQ),
    ] {
        let (daemon, mut card, mut control) = with_control(pairs, features);
        card.run();
        card.check_echo(300);
        for number in 1..=pairs as u8 {
            assert_eq!(control.command(4, 0, &[number, 0]), OK, "{number} of {pairs} pairs");
        }
        assert_eq!(control.command(4, 0, &[0, 0]), ERR);
        assert_eq!(control.command(4, 0, &[pairs as u8 + 1, 0]), ERR);
        assert_eq!(control.command(4, 1, &[0; 40]), ERR, "RSS is not offered");
        assert_eq!(control.command(3, 0, &[0]), OK, "the acknowledgement of an announcement");
        for class in [0, 1, 2, 5, 6, 255] {
            assert_eq!(control.command(class, 0, &[1]), ERR, "class {class}");
        }
        card.check_echo(300);
        assert!(daemon.log().contains("control virtqueue started"), "{}", daemon.log());
        // A reset stops it where it stands, and the next driver is answered as well.
        let stopped_at = card.frontend.get_vring_base(control.ring.index);
        assert_eq!(stopped_at, u32::from(control.ring.used_index));
        control.ring.start(&mut card.frontend, 0);
        assert_eq!(control.command(4, 0, &[1, 0]), OK);
    }
}

#[test]
fn control_virtqueue_without_mq_is_ring_2() {
    let (_daemon, mut card, mut control) = with_control(2, Options::default().features);
    for ring in [&card.rx[0], &card.tx[0]] {
        ring.start(&mut card.frontend, 0);
        card.frontend.enable(ring.index, true);
    }
    card.check_echo(300);
    assert_eq!(control.command(0, 0, &[1]), ERR);
    // Rings of the second pair do not disturb it: ring 3 has no ring 2 beside it.
    let tx = &card.tx[1];
    tx.start(&mut card.frontend, 0);
    card.frontend.enable(tx.index, true);
    assert_eq!(control.command(3, 0, &[0]), OK);
    card.check_echo(300);
}

#[test]
fn control_virtqueue_survives_takeover() {
    let (mut daemon, mut card, mut control) = with_control(1, Options::default().features | MQ);
    card.run();
    daemon.upgrade();
    assert_eq!(control.command(4, 0, &[1, 0]), OK);
    card.check_echo(100);
    // A card without one is told to the next as well.
    drop((card, control));
    let mut plain = Card::prepare(Frontend::new(daemon.connect_to("one")), Options::default());
    plain.fill();
    plain.run();
    daemon.upgrade();
    plain.check_echo(100);
}

#[test]
fn control_command_in_any_layout_is_completed() {
    let features = Options::default().features | MQ | INDIRECT;
    let (_daemon, mut card, mut control) = with_control(1, features);
    card.run();
    let (set, ack): (&[u8], &[u8]) = (&[4, 0, 1, 0], &[3, 0]);
    for indirect in [false, true] {
        assert_eq!(control.answer(&[Some(set), None], indirect), (1, OK));
        assert_eq!(control.answer(&[Some(ack), None], indirect), (1, OK));
        let bytes: Vec<Option<&[u8]>> = set.chunks(1).map(Some).chain([None, None]).collect();
        assert_eq!(control.answer(&bytes, indirect), (1, OK), "byte by byte, and room behind");
        assert_eq!(control.answer(&[Some(&[4]), None], indirect), (1, ERR));
        assert_eq!(control.answer(&[None], indirect), (1, ERR), "no command");
        assert_eq!(control.answer(&[Some(set)], indirect).0, 0, "no room for an answer");
        assert_eq!(control.answer(&[Some(&[4, 0, 1, 0, 0]), None], indirect), (1, OK));
    }
    card.check_echo(300);
    // What the specification forbids stops the queue pair, as on its other rings.
    control.offer(&[None, Some(set)], false);
    eventually("the error descriptor is signalled", || control.ring.error.read().is_ok());
}

/// crosvm creates exactly as many rings as the backend offers, and accepts all features.
#[test]
fn frontend_that_uses_all_offered_rings_is_served() {
    let daemon = Daemon::start(&["--loopback", "--queue-pairs=2"]);
    let mut frontend = Stock::from_stream(daemon.connect(), 8);
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_features(offered & !VhostUserVirtioFeatures::LOG_ALL.bits()).unwrap();
    let rings = frontend.get_queue_num().unwrap() as u32;
    assert_eq!(rings, 5, "two queue pairs, and the commands");
    let each = footprint(64, 2048);
    let ram = Arc::new(Ram::new(0, (each * u64::from(rings)).next_multiple_of(0x1000)));
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: ram.size,
        userspace_addr: FRONTEND_BASE,
        mmap_offset: 0,
        mmap_handle: ram.file.as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).unwrap();
    let mut data: Vec<Ring> = (0..rings - 1)
        .map(|index| Ring::new(&ram, index, u64::from(index) * each, 64, true))
        .collect();
    let last = rings - 1;
    let mut control = Control::new(&ram, last, u64::from(last) * each, true);
    let rx_buffer = data[2].buffer_area();
    data[2].add(&[(rx_buffer, 2048)], true).unwrap();
    data[2].publish();
    for (index, ring) in data.iter().chain([&control.ring]).enumerate() {
        let place = VringConfigData {
            queue_max_size: 64,
            queue_size: 64,
            flags: 0,
            desc_table_addr: FRONTEND_BASE + ring.descriptors,
            used_ring_addr: FRONTEND_BASE + ring.used,
            avail_ring_addr: FRONTEND_BASE + ring.avail,
            log_addr: None,
        };
        frontend.set_vring_num(index, 64).unwrap();
        frontend.set_vring_addr(index, &place).unwrap();
        frontend.set_vring_base(index, 0).unwrap();
        frontend.set_vring_call(index, &ring.call).unwrap();
        frontend.set_vring_kick(index, &ring.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }
    assert_eq!(control.command(4, 0, &[2, 0]), OK);
    let (tx_buffer, frame) = (data[3].buffer_area(), vec![7; HEADER + 60]);
    ram.write(tx_buffer, &[vec![0; HEADER], frame[HEADER..].to_vec()].concat());
    data[3].add(&[(tx_buffer, frame.len() as u32)], false).unwrap();
    data[3].publish();
    assert_eq!(data[2].wait_used().1, frame.len() as u32);
    assert_eq!(ram.read(rx_buffer, frame.len())[HEADER..], frame[HEADER..]);
    assert_eq!(control.command(0, 0, &[1]), ERR);
}

/// User-mode Linux always sends a table with two entries.
#[test]
fn memory_table_with_unused_entries_is_accepted() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
    let table = |rooms: usize| {
        let mut payload = pair(1, 0);
        payload.extend(region(&card.ram));
        payload.resize(8 + 32 * rooms, 0xff);
        payload
    };
    for rooms in [2, 8] {
        let fds = [card.ram.file.as_raw_fd()];
        card.frontend.ask(FrontendReq::SET_MEM_TABLE, &table(rooms), &fds);
    }
    let too_long = table(9);
    card.fill();
    card.run();
    card.check_echo(300);
    card.frontend.send_with(FrontendReq::SET_MEM_TABLE, 0, &too_long, &[card.ram.file.as_raw_fd()]);
    assert!(card.frontend.is_closed());
}

/// User-mode Linux uses a socket as call descriptor, since its kernel gets no signals for eventfds.
#[test]
fn socket_call_descriptor_is_signalled_without_blocking() {
    let port = port("one", "loopback = true");
    let mut daemon = Daemon::with_config(&format!("control = \"{{}}/control\"\n{port}"), "one");
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    let call = |card: &mut Card, index: u64| {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(SOON)).unwrap();
        let number = index.to_ne_bytes();
        card.frontend.ask(FrontendReq::SET_VRING_CALL, &number, &[theirs.as_raw_fd()]);
        // A call may have been lost while the descriptor was replaced: one comes.
        ours.read_exact(&mut [0; 8]).unwrap();
        ours
    };
    let mut rx = call(&mut card, 0);
    for number in 0..20 {
        card.rx[0].want_call();
        card.send(0, &frame(number, 100));
        let mut bytes = [0; 8];
        rx.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, 1u64.to_ne_bytes());
        assert_eq!(card.receive(0)[HEADER..], frame(number, 100));
    }
    // Without a reader the socket is full after some hundred calls. Then its peer is closed.
    let tx = call(&mut card, 1);
    card.check_echo(3000);
    drop(tx);
    card.check_echo(300);
    daemon.upgrade();
    rx.set_nonblocking(true).unwrap();
    while rx.read(&mut [0; 64]).is_ok() {}
    rx.set_nonblocking(false).unwrap();
    card.rx[0].want_call();
    card.send(0, &frame(1, 100));
    rx.read_exact(&mut [0; 8]).unwrap();
    card.receive(0);
    // A reader of a pipe can block its writer, even against signals, so pipes are refused.
    let (_reader, writer) = pipe().unwrap();
    let (_peer, socket) = UnixStream::pair().unwrap();
    card.frontend.refused(FrontendReq::SET_VRING_CALL, &[0; 8], &[writer.as_raw_fd()]);
    card.frontend.refused(FrontendReq::SET_VRING_ERR, &[0; 8], &[writer.as_raw_fd()]);
    card.frontend.refused(FrontendReq::SET_VRING_KICK, &[0; 8], &[socket.as_raw_fd()]);
    card.check_echo(300);
}

/// User-mode Linux resets by SET_VRING_ENABLE alone.
#[test]
fn disabled_ring_accepts_new_setup() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.check_echo(100);
    let set_num = FrontendReq::SET_VRING_NUM;
    let (size, features) = (u32::from(card.options.size), card.options.features);
    card.frontend.refused(set_num, &pair(0, size), &[]);
    card.frontend.enable(0, false);
    card.frontend.refused(set_num, &pair(1, size), &[]);
    let other = (features & !EVENT_IDX).to_ne_bytes();
    card.frontend.refused(FrontendReq::SET_FEATURES, &other, &[]);
    card.frontend.enable(1, false);
    // The next driver's rings lie elsewhere, and it accepts other features.
    card.options.features = card.frontend.set_features(features & !EVENT_IDX);
    let each = footprint(card.options.size, 2048);
    let ring = |index: u32| {
        let base = u64::from(1 - index) * each;
        Ring::new(&card.ram, index, base, card.options.size, false)
    };
    (card.rx[0], card.tx[0]) = (ring(0), ring(1));
    card.fill();
    card.run();
    card.check_echo(100);
    // Setup without new features.
    (0..2).for_each(|index| card.frontend.enable(index, false));
    let ring = |index: u32| {
        let base = u64::from(index) * each;
        Ring::new(&card.ram, index, base, card.options.size, false)
    };
    (card.rx[0], card.tx[0]) = (ring(0), ring(1));
    card.fill();
    card.run();
    card.check_echo(100);
}
