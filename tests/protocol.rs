//! vhost-user messages: the sequences of QEMU and cloud-hypervisor, and requests that are refused.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::daemon::Daemon;
use crate::support::driver::{Card, EVENT_IDX, HEADER, MRG_RXBUF, Options, PROTOCOL, VERSION_1};
use crate::support::eventually;
use crate::support::frontend::{
    Frontend, NEED_REPLY, PROTOCOL_FEATURES, addresses, inflight, pair, region,
};
use crate::support::guest::Ram;

const OPTIONS: &[&str] =
    &["--loopback", "--queue-pairs=2", "--mac=52:54:00:00:00:01", "--log-level=debug"];

fn connected() -> (Daemon, Frontend) {
    let daemon = Daemon::start(OPTIONS);
    let frontend = Frontend::new(daemon.connect());
    (daemon, frontend)
}

/// Sends QEMU's messages before DRIVER_OK, as recorded from QEMU 10 with two queue pairs.
fn qemu_realize(frontend: &mut Frontend, calls: &[EventFd]) -> u64 {
    let offered = frontend.get(FrontendReq::GET_FEATURES);
    let protocol = frontend.get(FrontendReq::GET_PROTOCOL_FEATURES);
    // QEMU has no use for CONFIG here.
    let protocol = protocol & !(1 << 9);
    frontend.send(FrontendReq::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes());
    assert_eq!(frontend.get(FrontendReq::GET_QUEUE_NUM), 5);
    assert_eq!(frontend.get(FrontendReq::GET_MAX_MEM_SLOTS), 509);
    let (channel, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    frontend.ask(FrontendReq::SET_BACKEND_REQ_FD, &[], &[channel.as_raw_fd()]);
    for pair_index in 0..2u32 {
        frontend.send(FrontendReq::SET_OWNER, &[]);
        assert_eq!(frontend.get(FrontendReq::GET_FEATURES), offered);
        for index in [2 * pair_index, 2 * pair_index + 1] {
            let payload = u64::from(index).to_ne_bytes();
            frontend.send_with(
                FrontendReq::SET_VRING_CALL,
                0,
                &payload,
                &[calls[index as usize].as_raw_fd()],
            );
            let error = EventFd::new(EFD_NONBLOCK).unwrap();
            frontend.send_with(FrontendReq::SET_VRING_ERR, 0, &payload, &[error.as_raw_fd()]);
        }
    }
    qemu_reset(frontend);
    offered
}

/// Sends QEMU's messages at each device reset. The first reset precedes SET_FEATURES.
fn qemu_reset(frontend: &mut Frontend) {
    frontend.send(FrontendReq::RESET_DEVICE, &[]);
    for (index, enable) in [(0, 1), (1, 1), (2, 0), (3, 0)] {
        frontend.ask(FrontendReq::SET_VRING_ENABLE, &pair(index, enable), &[]);
    }
}

/// Sends QEMU's messages at DRIVER_OK, for the rings of `card`.
fn qemu_driver_ok(card: &mut Card, first_start: bool, bases: &[u16; 4]) {
    let features = card.options.features;
    let frontend = &mut card.frontend;
    frontend.ask(FrontendReq::NET_SET_MTU, &1500u64.to_ne_bytes(), &[]);
    frontend.ask(FrontendReq::SET_VRING_ENABLE, &pair(0, 1), &[]);
    frontend.send(FrontendReq::SET_FEATURES, &features.to_ne_bytes());
    assert_eq!(frontend.get(FrontendReq::GET_STATUS), 0);
    frontend.send(FrontendReq::SET_STATUS, &8u64.to_ne_bytes());
    if first_start {
        frontend.add_mem_reg(&card.ram);
    }
    for ring in card.rx.iter().zip(&card.tx).flat_map(|(rx, tx)| [rx, tx]) {
        let base = bases[ring.index as usize];
        frontend.send(FrontendReq::SET_VRING_NUM, &pair(ring.index, ring.size.into()));
        frontend.send(FrontendReq::SET_VRING_BASE, &pair(ring.index, base.into()));
        let place = addresses(ring.index, 0, ring.descriptors, ring.used, ring.avail);
        frontend.send(FrontendReq::SET_VRING_ADDR, &place);
        for (code, event) in
            [(FrontendReq::SET_VRING_KICK, &ring.kick), (FrontendReq::SET_VRING_CALL, &ring.call)]
        {
            frontend.send_with(code, 0, &u64::from(ring.index).to_ne_bytes(), &[event.as_raw_fd()]);
        }
    }
    frontend.send(FrontendReq::SET_FEATURES, &features.to_ne_bytes());
    assert_eq!(frontend.get(FrontendReq::GET_STATUS), 8);
    frontend.send(FrontendReq::SET_STATUS, &0xfu64.to_ne_bytes());
}

/// Creates a guest with rings and memory, without any message to the daemon.
fn unannounced(frontend: Frontend, options: Options) -> Card {
    let nobody = Daemon::start(OPTIONS);
    let mut card = Card::prepare(Frontend::new(nobody.connect()), options);
    card.frontend = frontend;
    card
}

#[test]
fn qemu_message_sequences_are_served() {
    let (daemon, mut frontend) = connected();
    let calls: Vec<EventFd> = (0..4).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let offered = qemu_realize(&mut frontend, &calls);
    let options = Options { pairs: 2, ..Options::default() };
    assert_eq!(offered & options.features, options.features);

    // Start.
    let mut card = unannounced(frontend, options);
    card.fill();
    qemu_driver_ok(&mut card, true, &[0; 4]);
    card.check_echo(300);

    // The driver asks for its second pair: SET_VRING_ENABLE is all that comes.
    card.frontend.enable(2, true);
    card.frontend.enable(3, true);
    card.send(1, &[7; 100]);
    assert_eq!(card.receive(1)[HEADER..], [7; 100]);
    card.frontend.enable(2, false);
    card.frontend.enable(3, false);
    card.send(1, &[8; 100]);
    card.check_echo(10);
    assert!(card.try_receive(1).is_none(), "a disabled ring gets nothing");

    // Hotplug: no ring message follows.
    let more = Ram::new(1 << 32, 0x10_0000);
    card.frontend.add_mem_reg(&more);
    card.check_echo(300);
    more.write(1 << 32, &[0; HEADER]);
    more.write((1 << 32) + HEADER as u64, &[9; 64]);
    card.tx[0].add(&[(1 << 32, (HEADER + 64) as u32)], false).unwrap();
    card.tx[0].publish();
    assert_eq!(card.receive(0)[HEADER..], [9; 64], "frames come from the new memory");
    card.tx[0].wait_used();
    let mut payload = vec![0; 8];
    payload.extend(region(&more));
    card.frontend.ask(FrontendReq::REM_MEM_REG, &payload, &[]);
    card.check_echo(100);

    // Guest reset: rings stop where they stand, the device is reset a few times, and starts again
    // without its memory being told once more.
    for ring in [0u32, 1, 2, 3] {
        let base = card.frontend.get_vring_base(ring);
        let side = if ring % 2 == 0 { &card.rx } else { &card.tx };
        let used = card.ram.load(side[ring as usize / 2].used + 2);
        assert_eq!(base, u32::from(used), "ring {ring}");
    }
    card.frontend.send(FrontendReq::SET_STATUS, &0u64.to_ne_bytes());
    for _ in 0..3 {
        qemu_reset(&mut card.frontend);
    }
    let (frontend, ram) = (card.frontend, card.ram);
    let mut card = unannounced(frontend, options);
    card.ram = ram.clone();
    for (index, ring) in
        card.rx.iter_mut().zip(&mut card.tx).flat_map(|(rx, tx)| [rx, tx]).enumerate()
    {
        let base = index as u64 * (ram.size / 4);
        *ring = crate::support::driver::Ring::new(&ram, index as u32, base, 256, true);
    }
    card.fill();
    qemu_driver_ok(&mut card, false, &[0; 4]);
    card.check_echo(300);

    // Stop, and another QEMU.
    for ring in 0..4 {
        card.frontend.get_vring_base(ring);
    }
    card.frontend.send(FrontendReq::SET_STATUS, &0u64.to_ne_bytes());
    drop(card);
    let mut frontend = Frontend::new(daemon.connect());
    assert_eq!(qemu_realize(&mut frontend, &calls), offered, "the offer does not shrink");
    let mut card = unannounced(frontend, options);
    card.fill();
    qemu_driver_ok(&mut card, true, &[0; 4]);
    card.check_echo(100);
}

/// Sends cloud-hypervisor's messages at boot and at DRIVER_OK: all with NEED_REPLY, rings filled before their
/// set-up, the available index as base, and all rings enabled.
fn cloud_hypervisor_start(frontend: Frontend, pairs: u32, reconnect: Option<Card>) -> Card {
    let features = VERSION_1 | EVENT_IDX | MRG_RXBUF | PROTOCOL;
    let options = Options { pairs, features, ..Options::default() };
    let mut card = match reconnect {
        Some(mut card) => {
            card.frontend = frontend;
            card
        }
        None => {
            let mut card = unannounced(frontend, options);
            card.fill();
            card
        }
    };
    let rings = 2 * pairs;
    let frontend = &mut card.frontend;
    frontend.send(FrontendReq::SET_OWNER, &[]);
    let offered = frontend.get(FrontendReq::GET_FEATURES);
    assert_eq!(offered & features, features);
    frontend.send(FrontendReq::SET_PROTOCOL_FEATURES, &PROTOCOL_FEATURES.to_ne_bytes());
    frontend.ask(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[]);
    frontend.set_mem_table(&[&card.ram]);
    for index in 0..rings {
        frontend.ask(FrontendReq::SET_VRING_NUM, &pair(index, 256), &[]);
    }
    for ring in card.rx.iter().zip(&card.tx).flat_map(|(rx, tx)| [rx, tx]) {
        let place = addresses(ring.index, 0, ring.descriptors, ring.used, ring.avail);
        frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
        frontend.ask(FrontendReq::SET_VRING_BASE, &pair(ring.index, ring.avail_index.into()), &[]);
        if ring.index != 1 {
            // Queues without an interrupt vector get no call descriptor at all.
            frontend.event(FrontendReq::SET_VRING_CALL, ring.index, Some(&ring.call));
        }
        frontend.event(FrontendReq::SET_VRING_KICK, ring.index, Some(&ring.kick));
    }
    for index in 0..rings {
        frontend.enable(index, true);
    }
    card
}

#[test]
fn cloud_hypervisor_message_sequences_are_served() {
    let (mut daemon, mut frontend) = connected();
    // At boot it reads exactly 17 bytes of configuration space.
    frontend.begin();
    let mut request: Vec<u8> = [0u32, 17, 1].iter().flat_map(|word| word.to_ne_bytes()).collect();
    request.extend([0; 17]);
    frontend.send(FrontendReq::GET_CONFIG, &request);
    let reply = frontend.reply(FrontendReq::GET_CONFIG);
    assert_eq!(reply.len(), 12 + 17);
    assert_eq!(reply[12..18], [0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!(reply[20..22], 2u16.to_le_bytes(), "queue pairs");
    drop(frontend);

    // Start, with rx filled before DRIVER_OK: none of those buffers may be lost.
    let frontend = Frontend::new(daemon.connect());
    let mut card = cloud_hypervisor_start(frontend, 2, None);
    card.check_echo(600);
    assert!(daemon.log().contains("differs from the used index"), "the wrong base is logged");

    // Pause and resume.
    for enable in [false, true] {
        for index in 0..4 {
            card.frontend.enable(index, enable);
        }
    }
    card.check_echo(100);

    // Hotplug.
    let more = Ram::new(1 << 32, 0x10_0000);
    card.frontend.add_mem_reg(&more);
    card.check_echo(100);

    // Reset: disabled and stopped, ring by ring; and started again.
    for index in 0..4 {
        card.frontend.enable(index, false);
        card.frontend.get_vring_base(index);
    }
    for ring in card.rx.iter().zip(&card.tx).flat_map(|(rx, tx)| [rx, tx]) {
        ring.start(&mut card.frontend, ring.avail_index);
        card.frontend.enable(ring.index, true);
    }
    card.check_echo(100);

    // The daemon is killed with frames on their way; no GET_PROTOCOL_FEATURES comes again.
    daemon.kill();
    daemon.run(OPTIONS);
    eventually("the daemon listens again", || {
        std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok()
    });
    let frontend = Frontend::new(daemon.connect());
    let mut card = cloud_hypervisor_start(frontend, 2, Some(card));
    card.check_echo(600);
}

#[test]
fn vhost_crate_frontend_is_served() {
    use vhost::VhostBackend;
    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
    use vhost::vhost_user::{Frontend as StockFrontend, VhostUserFrontend};
    use vhost::{VhostUserMemoryRegionInfo, VringConfigData};

    let daemon = Daemon::start(OPTIONS);
    let mut stock = StockFrontend::connect(daemon.socket(), 4).unwrap();
    stock.set_owner().unwrap();
    let options = Options::default();
    let offered = stock.get_features().unwrap();
    assert_eq!(offered & options.features, options.features);
    stock.set_features(options.features).unwrap();
    let protocol = stock.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ));
    stock.set_protocol_features(protocol & !VhostUserProtocolFeatures::REPLY_ACK).unwrap();
    assert_eq!(stock.get_queue_num().unwrap(), 5);
    let (_, config) = stock.get_config(0, 17, VhostUserConfigFlags::WRITABLE, &[0; 17]).unwrap();
    assert_eq!(config[..6], [0x52, 0x54, 0, 0, 0, 1]);

    let (_other, unused) = connected();
    let mut card = unannounced(unused, options);
    card.fill();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: card.ram.size,
        userspace_addr: crate::support::guest::FRONTEND_BASE,
        mmap_offset: 0,
        mmap_handle: card.ram.file.as_raw_fd(),
    };
    stock.set_mem_table(&[region]).unwrap();
    for ring in [&card.rx[0], &card.tx[0]] {
        let index = ring.index as usize;
        let base = crate::support::guest::FRONTEND_BASE;
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: base + ring.descriptors,
            used_ring_addr: base + ring.used,
            avail_ring_addr: base + ring.avail,
            log_addr: None,
        };
        stock.set_vring_num(index, ring.size).unwrap();
        stock.set_vring_addr(index, &config).unwrap();
        stock.set_vring_base(index, 0).unwrap();
        stock.set_vring_call(index, &ring.call).unwrap();
        stock.set_vring_kick(index, &ring.kick).unwrap();
        stock.set_vring_enable(index, true).unwrap();
    }
    card.check_echo(300);
    let base = stock.get_vring_base(1).unwrap();
    assert_eq!(base, u32::from(card.ram.load(card.tx[0].used + 2)));
}

#[test]
fn refused_request_keeps_the_connection() {
    let (_daemon, mut frontend) = connected();
    let offered = frontend.begin();
    for mtu in [0u64, 67, 65536] {
        frontend.refused(FrontendReq::NET_SET_MTU, &mtu.to_ne_bytes(), &[]);
    }
    frontend.refused(FrontendReq::SET_STATUS, &0x100u64.to_ne_bytes(), &[]);
    frontend.refused(FrontendReq::SET_CONFIG, &[0; 12], &[]);
    assert_eq!(frontend.get(FrontendReq::GET_FEATURES), offered, "the connection lives");
}

#[test]
fn acknowledgements_require_reply_ack() {
    let (_daemon, mut frontend) = connected();
    // Not negotiated yet: the flag is ignored, and the next reply belongs to the next request.
    frontend.send_with(FrontendReq::SET_OWNER, NEED_REPLY, &[], &[]);
    assert_ne!(frontend.get(FrontendReq::GET_FEATURES), 0);
}

#[test]
fn hundred_reconnects_leak_nothing() {
    let daemon = Daemon::start(OPTIONS);
    let round = || {
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        card.check_echo(20);
        // This process still maps the memory: the daemon must unmap it.
        let ram = Arc::clone(&card.ram);
        drop(card);
        ram
    };
    (0..5).for_each(|_| drop(round()));
    let settled = || {
        let mut last = Frontend::new(daemon.connect());
        last.get(FrontendReq::GET_FEATURES);
        daemon.resources()
    };
    let before = settled();
    (0..100).for_each(|_| drop(round()));
    let after = settled();
    assert_eq!((after.0, after.1), (before.0, before.1), "descriptors and threads");
    assert!(after.2 < before.2 + 512, "{} kB after {} kB", after.2, before.2);
}

/// Returns the heads in flight by a ring's part of an inflight buffer.
fn in_flight(buffer: &File, ring: u64) -> Vec<u16> {
    let length = (16 + 16 * 256_usize).next_multiple_of(64);
    let mut part = vec![0; length];
    buffer.read_exact_at(&mut part, ring * length as u64).unwrap();
    assert_eq!(part[8..12], [1, 0, 0, 1], "version 1, 256 descriptors");
    (0..256).filter(|head| part[16 + 16 * usize::from(*head)] == 1).collect()
}

#[test]
fn inflight_buffer_marks_chains_in_flight() {
    let mut daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    let (length, buffer) = card.frontend.get_inflight_fd(2, 256).unwrap();
    let payload = inflight(length, 0, 2, 256);
    card.frontend.ask(FrontendReq::SET_INFLIGHT_FD, &payload, &[buffer.as_raw_fd()]);
    card.check_echo(300);
    // Of the buffers that are available some may not be taken yet; all that was sent is used.
    let available = usize::from(card.rx[0].avail_index.wrapping_sub(card.rx[0].used_index));
    let taken = in_flight(&buffer, 0).len();
    assert!(taken > available / 2 && taken <= available, "{taken} of {available}");
    assert_eq!(in_flight(&buffer, 1), [0_u16; 0]);
    // The next daemon gets it from the frontend, and loses and repeats nothing.
    daemon.kill();
    daemon.run(&["--loopback"]);
    daemon.wait_until_it_listens();
    card.resume(Frontend::new(daemon.connect()));
    card.frontend.ask(FrontendReq::SET_INFLIGHT_FD, &payload, &[buffer.as_raw_fd()]);
    card.check_echo(300);
    card.frontend.get_vring_base(0);
    card.frontend.get_vring_base(1);
    assert_eq!(
        in_flight(&buffer, 0),
        [0_u16; 0],
        "nothing is in flight when the rings have stopped"
    );
}
