//! Cases 1 to 20, 51, 53, 54 and 66: messages on the vhost-user socket.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::signal::Signal;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use vhost::vhost_user::message::FrontendReq;
use vhost_user_net::sys::socket::connect_now;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::set_flags;
use crate::support::SOON;
use crate::support::driver::{Card, HEADER, LOG_ALL, Options, PROTOCOL, VERSION_1};
use crate::support::eventually;
use crate::support::frontend::{
    Frontend, NEED_REPLY, addresses, dev_null, header, inflight, pair, region,
};
use crate::support::guest::{FRONTEND_BASE, Ram, memfd};
use crate::support::hostile::Scene;

/// Payload of ADD_MEM_REG and REM_MEM_REG.
fn one_region(guest: u64, size: u64, frontend: u64, offset: u64) -> Vec<u8> {
    [0, guest, size, frontend, offset].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn hostile_01_invalid_bytes_close_the_connection() {
    let scene = Scene::new(1);
    let get_features = u32::from(FrontendReq::GET_FEATURES);
    let mut wrong: Vec<Vec<u8>> = vec![
        header(get_features, 0, 0),
        header(get_features, 2, 0),
        header(get_features, 1 | 4, 0),
        header(get_features, 0x101, 0),
        header(0, 1, 0),
        header(45, 1, 0),
        header(get_features, 1, usize::MAX),
        header(get_features, 1, 8),
        header(FrontendReq::SET_FEATURES.into(), 1, 7),
        header(FrontendReq::SET_MEM_TABLE.into(), 1, 9),
        // This message requires one descriptor.
        header(FrontendReq::SET_BACKEND_REQ_FD.into(), 1, 0),
    ];
    for bytes in &mut wrong {
        bytes.extend([0; 64]);
        let mut frontend = scene.frontend();
        let _ = frontend.stream.write_all(bytes);
        assert!(frontend.is_closed(), "{bytes:?}");
    }
    scene.says("connection closed: header flags 0x0 are not allowed");
    scene.ends("R: the connection is closed, the next one served");
}

#[test]
fn hostile_02_incomplete_message_times_out() {
    let scene = Scene::new(2);
    let mut frontend = scene.frontend();
    for byte in header(FrontendReq::GET_FEATURES.into(), 1, 0) {
        frontend.send_raw(&[byte]);
        std::thread::sleep(Duration::from_millis(2));
    }
    frontend.reply(FrontendReq::GET_FEATURES);
    // Further bytes do not extend the deadline.
    let started = Instant::now();
    for byte in header(FrontendReq::SET_FEATURES.into(), 1, 8) {
        if frontend.stream.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    assert!(frontend.is_closed());
    assert!(started.elapsed() < Duration::from_secs(15));
    scene.says("took longer than 5 s to send a whole message");
    scene.ends("R: put together if it comes in time, else closed after 5 s");
}

#[test]
fn hostile_03_port_listens_after_disconnect_at_any_byte() {
    let scene = Scene::new(3);
    let ram = Ram::new(0, 0x10_0000);
    let mut table = pair(1, 0);
    table.extend(region(&ram));
    let number = |code: FrontendReq, value: u64| {
        let mut bytes = header(code.into(), 1, 8);
        bytes.extend(value.to_ne_bytes());
        bytes
    };
    let (kick, call) = (event(), event());
    let mut handshake: Vec<(Vec<u8>, Vec<RawFd>)> = vec![
        (header(FrontendReq::GET_FEATURES.into(), 1, 0), vec![]),
        (header(FrontendReq::SET_OWNER.into(), 1, 0), vec![]),
        (number(FrontendReq::SET_FEATURES, VERSION_1), vec![]),
        (
            [header(FrontendReq::SET_MEM_TABLE.into(), 1, table.len()), table].concat(),
            vec![ram.file.as_raw_fd()],
        ),
        ([header(FrontendReq::SET_VRING_NUM.into(), 1, 8), pair(0, 256)].concat(), vec![]),
        (
            {
                let place = addresses(0, 0, 0, 0x3000, 0x2000);
                [header(FrontendReq::SET_VRING_ADDR.into(), 1, place.len()), place].concat()
            },
            vec![],
        ),
        (number(FrontendReq::SET_VRING_CALL, 0), vec![call.as_raw_fd()]),
        (number(FrontendReq::SET_VRING_KICK, 0), vec![kick.as_raw_fd()]),
    ];
    handshake
        .push(([header(FrontendReq::GET_VRING_BASE.into(), 1, 8), pair(0, 0)].concat(), vec![]));
    let length: usize = handshake.iter().map(|(bytes, _)| bytes.len()).sum();
    for cut in 0..=length {
        let frontend = scene.frontend();
        let mut left = cut;
        for (bytes, descriptors) in &handshake {
            let part = &bytes[..bytes.len().min(left)];
            if part.is_empty() {
                break;
            }
            frontend.stream.send_with_fds(&[part], descriptors).unwrap();
            left -= part.len();
        }
    }
    scene.ends("clean, listening again");
}

#[test]
fn hostile_04_truncated_descriptors_are_refused_and_closed() {
    let scene = Scene::new(4);
    let (mut reader, writer) = std::io::pipe().unwrap();
    for count in [33, 253] {
        let mut frontend = scene.frontend();
        let bytes = header(FrontendReq::GET_FEATURES.into(), 1, 0);
        let many = vec![writer.as_raw_fd(); count];
        frontend.stream.send_with_fds(&[&bytes[..]], &many).unwrap();
        assert!(frontend.is_closed(), "{count} descriptors");
    }
    drop(writer);
    // End of file on the pipe shows that no copy of its other end is open.
    assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    scene.says("connection closed");
    scene.ends("R: closed, none of the descriptors stays open");
}

#[test]
fn hostile_05_unexpected_descriptors_close_the_connection() {
    let scene = Scene::new(5);
    let ram = Ram::new(0, 0x1000);
    let mut table = pair(1, 0);
    table.extend(region(&ram));
    let mut added = vec![0; 8];
    added.extend(region(&ram));
    let messages = [
        (FrontendReq::GET_FEATURES, vec![], 0),
        (FrontendReq::SET_OWNER, vec![], 0),
        (FrontendReq::SET_FEATURES, VERSION_1.to_ne_bytes().to_vec(), 0),
        (FrontendReq::SET_MEM_TABLE, table, 1),
        (FrontendReq::SET_VRING_NUM, pair(0, 256), 0),
        (FrontendReq::SET_VRING_BASE, pair(0, 0), 0),
        (FrontendReq::GET_VRING_BASE, pair(0, 0), 0),
        (FrontendReq::SET_VRING_ADDR, addresses(0, 0, 0, 0x3000, 0x2000), 0),
        (FrontendReq::SET_VRING_KICK, vec![0; 8], 1),
        (FrontendReq::SET_VRING_CALL, vec![0; 8], 1),
        (FrontendReq::SET_VRING_ERR, vec![0; 8], 1),
        (FrontendReq::SET_VRING_ENABLE, pair(0, 1), 0),
        (FrontendReq::ADD_MEM_REG, added, 1),
        (FrontendReq::SET_BACKEND_REQ_FD, vec![], 1),
        (FrontendReq::GET_CONFIG, vec![0; 12], 0),
    ];
    let null = dev_null();
    for (code, payload, due) in &messages {
        for count in [0, 1, 2, 32] {
            if count == *due {
                continue;
            }
            let mut frontend = scene.frontend();
            let mut bytes = header((*code).into(), 1 | NEED_REPLY, payload.len());
            bytes.extend(payload);
            let many = vec![null.as_raw_fd(); count];
            frontend.stream.send_with_fds(&[&bytes[..]], &many).unwrap();
            assert!(frontend.is_closed(), "{code:?} with {count} descriptors");
        }
    }
    scene.says("has a wrong number of descriptors, 2");
    scene.ends("R: closed, all of them closed");
}

#[test]
fn hostile_06_repeated_requests_leak_nothing() {
    const TIMES: usize = 100_000;
    let scene = Scene::new(6);
    let mut frontend = scene.frontend();
    frontend.begin();
    frontend.set_features(VERSION_1 | PROTOCOL);
    let (ram, kick) = (Ram::new(0, 0x10_0000), event());
    frontend.set_mem_table(&[&ram]);
    let mut table = pair(1, 0);
    table.extend(region(&ram));
    let place = addresses(0, 0, 0, 0x3000, 0x2000);
    frontend.ask(FrontendReq::SET_VRING_NUM, &pair(0, 256), &[]);
    frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
    let before = scene.daemon.resources();
    // Without NEED_REPLY, as fast as the daemon reads. Memory and sessions cost more, so fewer of them.
    for _ in 0..TIMES {
        frontend.send(FrontendReq::SET_VRING_NUM, &pair(1, 256));
    }
    for _ in 0..TIMES {
        // The daemon does not offer this message, and must still close its descriptor.
        frontend.send_with(FrontendReq::SET_LOG_FD, 0, &[], &[kick.as_raw_fd()]);
    }
    for _ in 0..TIMES / 10 {
        let fds = [ram.file.as_raw_fd()];
        frontend.send_with(FrontendReq::SET_MEM_TABLE, 0, &table, &fds);
        frontend.send_with(FrontendReq::SET_VRING_KICK, 0, &[0; 8], &[kick.as_raw_fd()]);
    }
    frontend.get(FrontendReq::GET_FEATURES);
    let after = scene.daemon.resources();
    // One session runs now, with its epoll, its kick and its memory file.
    assert!(after.0 <= before.0 + 3, "{} descriptors after {}", after.0, before.0);
    assert!(after.2 <= before.2 + 1024, "{} kB after {}", after.2, before.2);
    drop(frontend);
    scene.ends("bounded memory and descriptors");
}

#[test]
fn hostile_07_wrong_order_and_unoffered_features_are_refused() {
    let scene = Scene::new(7);
    let mut frontend = scene.frontend();
    let offered = frontend.begin();
    frontend.refused(FrontendReq::SET_FEATURES, &(offered | 1 << 34).to_ne_bytes(), &[]);
    frontend.refused(FrontendReq::SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes(), &[]);
    let kick = event();
    let try_kick = |frontend: &mut Frontend| {
        frontend.refused(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_raw_fd()]);
    };
    try_kick(&mut frontend);
    frontend.set_features(VERSION_1 | PROTOCOL);
    try_kick(&mut frontend);
    frontend.ask(FrontendReq::SET_VRING_NUM, &pair(0, 256), &[]);
    try_kick(&mut frontend);
    frontend.ask(FrontendReq::SET_VRING_ADDR, &addresses(0, 0, 0, 0x2000, 0x1000), &[]);
    try_kick(&mut frontend);
    let ram = Ram::new(0, 0x10_0000);
    frontend.set_mem_table(&[&ram]);
    frontend.ask(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_raw_fd()]);
    frontend.refused(FrontendReq::SET_FEATURES, &VERSION_1.to_ne_bytes(), &[]);
    scene.says("refused: ring 0 was started before SET_FEATURES");
    drop(frontend);
    scene.ends("R: refused with the reason, the connection lives");
}

#[test]
fn hostile_08_nonexistent_ring_is_refused() {
    let scene = Scene::new(8);
    let mut frontend = scene.frontend();
    let offered = frontend.begin();
    for index in [4, 5, 0xff, 0xffff, 0x10000, 0x10001, u32::MAX] {
        frontend.refused(FrontendReq::SET_VRING_NUM, &pair(index, 256), &[]);
        frontend.refused(FrontendReq::SET_VRING_BASE, &pair(index, 0), &[]);
        frontend.refused(FrontendReq::SET_VRING_ENABLE, &pair(index, 1), &[]);
        frontend.refused(FrontendReq::SET_VRING_ADDR, &addresses(index, 0, 0, 0, 0), &[]);
    }
    let call = event();
    let payload = 7u64.to_ne_bytes();
    frontend.refused(FrontendReq::SET_VRING_CALL, &payload, &[call.as_raw_fd()]);
    // QEMU with more queues than the port has does not ask for a reply.
    frontend.send_with(FrontendReq::SET_VRING_CALL, 0, &payload, &[call.as_raw_fd()]);
    assert_eq!(frontend.get(FrontendReq::GET_FEATURES), offered, "the connection lives");
    // GET_VRING_BASE has no error reply, so the daemon closes the connection.
    frontend.send(FrontendReq::GET_VRING_BASE, &pair(4, 0));
    assert!(frontend.is_closed());
    scene.says("there is no ring 4");
    scene.ends("R: refused; GET_VRING_BASE closes the connection");
}

#[test]
fn hostile_09_bad_sizes_and_running_ring_changes_are_refused() {
    let scene = Scene::new(9);
    let mut card = scene.card();
    let frontend = &mut card.frontend;
    for size in [0, 3, 100, 32769, 65536, u32::MAX] {
        frontend.refused(FrontendReq::SET_VRING_NUM, &pair(2, size), &[]);
    }
    frontend.ask(FrontendReq::SET_VRING_NUM, &pair(2, 32768), &[]);
    frontend.refused(FrontendReq::SET_VRING_BASE, &pair(2, 65536), &[]);
    // The addresses and size of a running ring cannot change.
    frontend.refused(FrontendReq::SET_VRING_NUM, &pair(0, 128), &[]);
    frontend.refused(FrontendReq::SET_VRING_BASE, &pair(0, 1), &[]);
    frontend.refused(FrontendReq::SET_VRING_ADDR, &addresses(0, 0, 0, 0x4000, 0x1000), &[]);
    card.check_echo(100);
    scene.says("ring 0 is running");
    drop(card);
    scene.ends("R: refused, and the running ring runs on");
}

#[test]
fn hostile_10_region_larger_than_its_file_is_refused() {
    let scene = Scene::new(10);
    let mut frontend = scene.frontend();
    frontend.begin();
    let ram = Ram::new(0, 0x1000);
    let fd = [ram.file.as_raw_fd()];
    for [guest, size, offset] in [
        [0, 0x2000, 0],
        [0, 0x1000, 0x1000],
        [0, 0x1000, u64::MAX - 10],
        [u64::MAX - 10, 0x1000, 0],
        [0, 0, 0],
        [0, 1 << 63, 0],
        [0, u64::MAX, 0],
    ] {
        frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(guest, size, 0, offset), &fd);
        let table = [pair(1, 0), one_region(guest, size, 0, offset)[8..].to_vec()].concat();
        frontend.refused(FrontendReq::SET_MEM_TABLE, &table, &fd);
    }
    frontend.add_mem_reg(&ram);
    scene.says("it ends at byte 8192 of a file of 4096 bytes");
    drop(frontend);
    scene.ends("R: refused before it is mapped");
}

#[test]
fn hostile_11_invalid_or_truncated_memory_costs_one_port() {
    let scene = Scene::new(11);
    let mut frontend = scene.frontend();
    frontend.begin();
    let (reader, _writer) = std::io::pipe().unwrap();
    let ram = Ram::new(0, 0x1000);
    let wrong: [OwnedFd; 4] = [
        File::open("/").unwrap().into(),
        reader.into(),
        UnixStream::pair().unwrap().0.into(),
        Epoll::new(EpollCreateFlags::empty()).unwrap().0,
    ];
    for descriptor in &wrong {
        let payload = one_region(0, 0x1000, 0, 0);
        frontend.refused(FrontendReq::ADD_MEM_REG, &payload, &[descriptor.as_raw_fd()]);
    }
    // A regular file may be on a file system that the VMM serves, which can delay each access. So the daemon
    // does not read it.
    let ordinary = concat!(env!("CARGO_TARGET_TMPDIR"), "/ordinary");
    let options = File::options().read(true).write(true).create(true).truncate(true).to_owned();
    let ordinary = options.open(ordinary).unwrap();
    let read_only = File::open(format!("/proc/self/fd/{}", ram.file.as_raw_fd())).unwrap();
    let unread = [ordinary, read_only, File::open("/dev/zero").unwrap()];
    for (number, file) in (1..).zip(&unread) {
        for size in [0, u64::MAX] {
            let payload = one_region(number << 20, size, number << 20, 0);
            frontend.refused(FrontendReq::ADD_MEM_REG, &payload, &[file.as_raw_fd()]);
        }
        let payload = one_region(number << 20, 0x1000, FRONTEND_BASE + (number << 20), 0);
        frontend.ask(FrontendReq::ADD_MEM_REG, &payload, &[file.as_raw_fd()]);
        frontend.ask(FrontendReq::SET_VRING_NUM, &pair(0, 16), &[]);
        let ring = addresses(0, 0, number << 20, number << 20, number << 20);
        frontend.ask(FrontendReq::SET_VRING_ADDR, &ring, &[]);
        frontend.refused(FrontendReq::SET_VRING_KICK, &[0; 8], &[event().as_raw_fd()]);
    }
    drop(frontend);

    // Truncated while the rings run: first the tx buffers, then all memory.
    for all in [false, true] {
        let mut card = scene.card();
        card.check_echo(100);
        card.queue_tx(0, 0, &[0; HEADER], &[1; 100]);
        if all {
            // From here on this process cannot access the memory either.
            card.ram.file.set_len(0).unwrap();
            card.tx[0].kick.write(1).unwrap();
        } else {
            card.ram.file.set_len(card.tx[0].buffer_area()).unwrap();
            card.tx[0].publish();
        }
        eventually("the frontend is told", || card.tx[0].error.read().is_ok());
        scene.says("guest memory is gone");
    }
    scene.ends("R; C: the port stops and says so, the others run on");
}

#[test]
fn hostile_12_overlapping_and_removed_regions_are_refused() {
    let scene = Scene::new(12);
    let mut card = scene.card();
    let size = card.ram.size;
    let other = Ram::new(1 << 32, 0x10_0000);
    let fd = [other.file.as_raw_fd()];
    let frontend = &mut card.frontend;
    // Guest addresses overlap, then frontend addresses.
    frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(size - 0x1000, 0x2000, 1 << 45, 0), &fd);
    let theirs = FRONTEND_BASE + size - 0x1000;
    frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(1 << 40, 0x2000, theirs, 0), &fd);
    let live = [vec![0; 8], region(&card.ram)].concat();
    frontend.refused(FrontendReq::REM_MEM_REG, &live, &[]);
    frontend.refused(FrontendReq::REM_MEM_REG, &one_region(1 << 50, 0x1000, 1 << 50, 0), &[]);
    // Many changes under traffic.
    let added = [vec![0; 8], region(&other)].concat();
    for _ in 0..100 {
        card.frontend.ask(FrontendReq::ADD_MEM_REG, &added, &fd);
        card.check_echo(10);
        card.frontend.ask(FrontendReq::REM_MEM_REG, &added, &[]);
    }
    card.check_echo(100);
    drop(card);

    let mut frontend = scene.frontend();
    frontend.begin();
    let rams: Vec<Ram> = (0..509).map(|slot| Ram::new(slot << 20, 0x1000)).collect();
    rams.iter().for_each(|ram| frontend.add_mem_reg(ram));
    let more = [vec![0; 8], region(&other)].concat();
    frontend.refused(FrontendReq::ADD_MEM_REG, &more, &fd);
    drop(frontend);

    let mut frontend = scene.frontend();
    frontend.begin();
    frontend.set_features(VERSION_1 | PROTOCOL);
    frontend.set_mem_table(&[&Ram::new(0, 0x1_0000)]);
    frontend.ask(FrontendReq::SET_VRING_NUM, &pair(0, 256), &[]);
    for (descriptors, used, avail) in [
        (0xf008, 0x2000, 0x1000),
        (0, 0xf900, 0x1000),
        (0, 0x2000, 0xffff_0000),
        (8, 0x2000, 0x1000),
        (0, 0x2002, 0x1000),
        (0, 0x2000, 0x1001),
    ] {
        frontend.ask(FrontendReq::SET_VRING_ADDR, &addresses(0, 0, descriptors, used, avail), &[]);
        frontend.refused(FrontendReq::SET_VRING_KICK, &[0; 8], &[event().as_raw_fd()]);
    }
    scene.says("all 509 memory slots are taken");
    drop(frontend);
    scene.ends("R: refused, rings and traffic go on");
}

#[test]
fn hostile_13_invalid_or_truncated_dirty_log_costs_one_port() {
    let scene = Scene::new(13);
    let mut card = scene.card();
    card.check_echo(50);
    let logging = card.options.features | LOG_ALL;
    // Before a log is set.
    card.frontend.refused(FrontendReq::SET_FEATURES, &logging.to_ne_bytes(), &[]);
    card.frontend.refused(FrontendReq::SET_LOG_FD, &[], &[event().as_raw_fd()]);
    drop(card);
    let log = memfd(0x1000);
    let all = 0x1000;
    for (size, offset, file, said) in [
        (0, 0, &log, "the region is empty"),
        (all, u64::MAX - 10, &log, "beyond 64 bits"),
        (all, 1, &log, "it ends at byte 4097 of a file of 4096 bytes"),
        (1 << 62, 0, &log, "it ends at byte"),
        (all, 0, &dev_null(), "its descriptor is no memory"),
    ] {
        let mut frontend = scene.frontend();
        frontend.begin();
        frontend.try_set_log_base(size, offset, file);
        assert!(frontend.is_closed(), "{said}");
        scene.says(said);
    }
    // A log too short for guest memory is refused, and nothing is marked.
    let mut card = scene.card();
    assert!(card.frontend.set_log_base(2, 0, &log));
    card.frontend.refused(FrontendReq::SET_FEATURES, &logging.to_ne_bytes(), &[]);
    scene.says("the dirty log has no bits for all memory");
    card.check_echo(50);
    // Logging starts and stops under traffic, with a new log each time.
    assert!(card.frontend.set_log_base(all, 0, &log));
    for _ in 0..20 {
        card.frontend.set_features(logging);
        card.check_echo(20);
        assert!(card.frontend.set_log_base(all, 0, &log));
        card.check_echo(20);
        card.frontend.set_features(card.options.features);
        card.check_echo(20);
    }
    // A log that is truncated while the daemon writes it.
    card.frontend.set_features(logging);
    card.check_echo(20);
    log.set_len(0).unwrap();
    card.send(0, &[0; 60]);
    scene.says("memory is gone");
    drop(card);
    scene.ends("R: refused, and nothing out of bounds; B: when the log is cut");
}

#[test]
fn hostile_14_inflight_buffer_content_is_not_trusted() {
    let scene = Scene::new(14);
    // GET_INFLIGHT_FD has no error reply, so the daemon closes the connection.
    for (rings, size) in [(0, 256), (5, 256), (u16::MAX, 1), (2, 0), (2, u16::MAX)] {
        let mut frontend = scene.frontend();
        frontend.begin();
        assert!(frontend.get_inflight_fd(rings, size).is_none(), "{rings} rings of {size}");
    }
    scene.says("an inflight buffer for 0 rings of 256 descriptors: the port has 4");
    let mut card = scene.card();
    card.check_echo(20);
    let memory = memfd(0x4000);
    let whole = 2 * (16 + 16 * 256) as u64 + 128;
    for (length, offset, rings, size, file) in [
        (0, 0, 2, 256, &memory),
        (whole, u64::MAX - 5, 2, 256, &memory),
        (whole, 0x4000, 2, 256, &memory),
        (whole, 1, 2, 256, &memory),
        (u64::MAX, 0, 2, 32768, &memory),
        (whole, 0, 0, 256, &memory),
        (whole, 0, 9, 1, &memory),
        (whole, 0, 2, 256, &dev_null()),
    ] {
        let payload = inflight(length, offset, rings, size);
        card.frontend.refused(FrontendReq::SET_INFLIGHT_FD, &payload, &[file.as_raw_fd()]);
    }
    // The daemon accepts a buffer of false content, and ignores the content.
    let lies = memfd(whole);
    std::os::unix::fs::FileExt::write_all_at(&lies, &vec![0xff; whole as usize], 0).unwrap();
    let payload = inflight(whole, 0, 2, 256);
    card.frontend.ask(FrontendReq::SET_INFLIGHT_FD, &payload, &[lies.as_raw_fd()]);
    card.check_echo(200);
    // A buffer that is truncated while the daemon writes it.
    lies.set_len(0).unwrap();
    card.send(0, &[0; 60]);
    scene.says("memory is gone");
    drop(card);
    scene.ends("R: refused, and nothing that it holds is believed; B: when it is cut");
}

/// Opens descriptors that are no eventfd. Also returns the other ends of pipes and sockets.
fn no_eventfds() -> Vec<(&'static str, OwnedFd)> {
    let (at_its_end, _) = std::io::pipe().unwrap();
    let (_, without_reader) = std::io::pipe().unwrap();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
    vec![
        ("a file", memfd(0x1000).into()),
        ("a device", dev_null().into()),
        ("an epoll instance", Epoll::new(EpollCreateFlags::empty()).unwrap().0),
        ("a timer", timer.as_fd().try_clone_to_owned().unwrap()),
        ("a socket", UnixStream::pair().unwrap().0.into()),
        ("a pipe at its end", at_its_end.into()),
        ("a pipe without reader", without_reader.into()),
    ]
}

#[test]
fn hostile_15_kick_descriptor_other_than_eventfd_is_refused() {
    let scene = Scene::new(15);
    let mut card = scene.card();
    for (what, descriptor) in no_eventfds() {
        for index in [0u64, 1] {
            let payload = index.to_ne_bytes();
            let fds = [descriptor.as_raw_fd()];
            let answer = card.frontend.try_ask(FrontendReq::SET_VRING_KICK, &payload, &fds);
            assert_eq!(answer, Some(false), "{what}");
        }
    }
    card.check_echo(100);
    scene.says("not an eventfd");
    drop(card);
    scene.ends("R: refused, the ring keeps the one that it has");
}

#[test]
fn hostile_16_stolen_kicks_delay_only_their_own_vmm() {
    let scene = Scene::new(16);
    let mut card = scene.card();
    let stop = Arc::<AtomicBool>::default();
    let thief = {
        let (stop, kick) = (stop.clone(), card.tx[0].kick.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut stolen = 0;
            while !stop.load(Ordering::Relaxed) {
                stolen += u64::from(kick.read().is_ok());
                for flags in [OFlag::empty(), OFlag::O_NONBLOCK] {
                    set_flags(&kick, flags);
                }
            }
            stolen
        })
    };
    // A VMM that reads its own kick waits for the next one.
    let mut kicks = 0;
    for _ in 0..100 {
        card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
        card.tx[0].publish();
        eventually("the frame is taken", || {
            card.tx[0].kick.write(1).unwrap();
            kicks += 1;
            card.tx[0].take_used().is_some()
        });
        card.receive(0);
    }
    stop.store(true, Ordering::Relaxed);
    println!("{kicks} kicks, {} stolen", thief.join().unwrap());
    set_flags(&card.tx[0].kick, OFlag::O_NONBLOCK);
    card.check_echo(100);
    drop(card);
    scene.ends("whoever steals its own kicks waits for the next; nothing more");
}

#[test]
fn hostile_17_blocking_call_stalls_only_its_queue_pair() {
    let scene = Scene::new(17);
    let mut card = scene.card();
    for (what, descriptor) in no_eventfds() {
        for code in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR] {
            let fds = [descriptor.as_raw_fd()];
            let answer = card.frontend.try_ask(code, &[0; 8], &fds);
            // MSG_DONTWAIT makes a write to a unix socket non-blocking.
            assert_eq!(answer, Some(what == "a socket"), "{what}");
        }
    }
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    for index in [0, 1] {
        card.frontend.event(FrontendReq::SET_VRING_CALL, index, Some(&full));
        card.frontend.event(FrontendReq::SET_VRING_ERR, index, Some(&full));
    }
    // The VMM makes the descriptor blocking again after the daemon made it non-blocking.
    set_flags(&full, OFlag::empty());
    card.rx[0].want_call();
    card.tx[0].want_call();
    card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
    card.tx[0].publish();
    std::thread::sleep(Duration::from_millis(50));
    // The port's own worker blocks in each write. The daemon still answers every request of the port.
    let started = Instant::now();
    card.frontend.event(FrontendReq::SET_VRING_CALL, 1, Some(&full));
    let good = event();
    for index in [0, 1] {
        card.frontend.event(FrontendReq::SET_VRING_CALL, index, Some(&good));
    }
    card.receive(0);
    card.tx[0].wait_used();
    card.check_echo(100);
    for index in [0, 1] {
        card.frontend.event(FrontendReq::SET_VRING_CALL, index, Some(&full));
    }
    card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
    card.tx[0].publish();
    card.frontend.get_vring_base(1);
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(card);
    scene.ends("R for what is no eventfd and no socket; a full one holds up its own queue pair at the most");
}

#[test]
fn hostile_18_kick_storm_costs_one_thread() {
    let scene = Scene::new(18);
    let card = scene.card();
    let started = Instant::now();
    let mut kicks = 0;
    while started.elapsed() < Duration::from_secs(1) {
        for ring in [&card.rx[0], &card.tx[0]] {
            let _ = ring.kick.write(1);
            kicks += 1;
        }
    }
    println!("{kicks} kicks in a second");
    drop(card);
    // The frontend never kicks this ring.
    let mut card = scene.card();
    card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
    std::thread::sleep(Duration::from_millis(200));
    assert!(card.tx[0].take_used().is_none());
    card.tx[0].publish();
    card.tx[0].wait_used();
    drop(card);
    scene.ends("bounded CPU, others are served");
}

#[test]
fn hostile_19_further_connections_wait_or_are_refused() {
    let scene = Scene::new(19);
    let mut first = scene.card();
    let mut second = scene.frontend();
    second.send(FrontendReq::GET_FEATURES, &[]);
    second.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(second.try_reply(FrontendReq::GET_FEATURES).is_none());
    // The listener's backlog fills up.
    let crowd: Vec<_> =
        (0..1000).map_while(|_| connect_now(&scene.daemon.path("attacked")).ok()).collect();
    println!("{} connections wait", crowd.len());
    first.check_echo(200);
    drop(first);
    second.stream.set_read_timeout(Some(SOON)).unwrap();
    assert!(second.try_reply(FrontendReq::GET_FEATURES).is_some());
    drop((second, crowd));
    for _ in 0..1000 {
        drop(scene.frontend());
    }
    scene.ends("queued behind the one that is served, refused when the queue is full");
}

#[test]
fn hostile_20_messages_of_unnegotiated_features_are_refused() {
    let scene = Scene::new(20);
    let mut frontend = scene.frontend();
    // Offered, but not negotiated.
    frontend.send_with(FrontendReq::NET_SET_MTU, NEED_REPLY, &1500u64.to_ne_bytes(), &[]);
    let offered = frontend.begin();
    let null = dev_null();
    for code in [
        FrontendReq::SET_LOG_FD,
        FrontendReq::IOTLB_MSG,
        FrontendReq::SET_VRING_ENDIAN,
        FrontendReq::VRING_KICK,
        FrontendReq::POSTCOPY_LISTEN,
        FrontendReq::CLOSE_CRYPTO_SESSION,
    ] {
        frontend.refused(code, &[0; 8], &[null.as_raw_fd()]);
    }
    assert_eq!(frontend.get(FrontendReq::GET_FEATURES), offered, "the connection lives");
    drop(frontend);
    for code in [FrontendReq::POSTCOPY_ADVISE, FrontendReq::CREATE_CRYPTO_SESSION] {
        let mut frontend = scene.frontend();
        frontend.begin();
        frontend.send(code, &[]);
        assert!(frontend.is_closed(), "{code:?}");
    }
    scene.says("POSTCOPY_ADVISE: its protocol feature was not offered");
    scene.ends("R: refused, or closed where the answer could not say no");
}

/// Creates sparse memory. The kernel allocates no page before the first access.
fn sparse(size: u64) -> File {
    memfd(size)
}

#[test]
fn hostile_51_sparse_files_do_not_fill_the_address_space() {
    const TABLE: FrontendReq = FrontendReq::SET_MEM_TABLE;
    let scene = Scene::limited(51, "max-memory = \"1g\"\n");
    let mut frontend = scene.frontend();
    frontend.begin();
    let file = sparse(1 << 46);
    let fd = [file.as_raw_fd()];
    let table = |size: u64| [pair(1, 0), one_region(0, size, 0, 0)[8..].to_vec()].concat();
    for size in [1 << 46, 1 << 40, (1 << 30) + 1] {
        frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(0, size, 0, 0), &fd);
        frontend.refused(TABLE, &table(size), &fd);
        assert!(!frontend.set_log_base_or_close(size, &file));
        frontend = scene.frontend();
        frontend.begin();
    }
    // Tables that reach the limit replace each other.
    for _ in 0..5 {
        frontend.ask(TABLE, &table(1 << 30), &fd);
    }
    frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(1 << 40, 1, 1 << 40, 0), &fd);
    frontend.refused(TABLE, &table((1 << 30) + 1), &fd);
    // Unmapped memory frees the limit, in this session and for the next one.
    frontend.ask(FrontendReq::REM_MEM_REG, &one_region(0, 1 << 30, 0, 0), &[]);
    for region in 0..64 {
        let place = one_region(region << 24, 1 << 24, region << 24, 0);
        frontend.ask(FrontendReq::ADD_MEM_REG, &place, &fd);
    }
    frontend.refused(FrontendReq::ADD_MEM_REG, &one_region(1 << 40, 1, 1 << 40, 0), &fd);
    for _ in 0..5 {
        drop(frontend);
        frontend = scene.frontend();
        frontend.begin();
        frontend.ask(TABLE, &table(1 << 30), &fd);
    }
    scene.says("would exceed max-memory, 1073741824 bytes; raise max-memory");
    drop(frontend);
    scene.ends("R before it is mapped; by default at twice the host's RAM, and 64 GiB");
}

/// Sends a device state. Reports whether the daemon accepted it.
fn load_state(frontend: &mut Frontend, state: &[u8]) -> bool {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let payload = [1_u32, 0].map(u32::to_ne_bytes).concat();
    frontend.send_with(FrontendReq::SET_DEVICE_STATE_FD, 0, &payload, &[reader.as_raw_fd()]);
    frontend.reply(FrontendReq::SET_DEVICE_STATE_FD);
    drop(reader);
    let state = state.to_vec();
    // The daemon may stop reading early.
    let feeder = std::thread::spawn(move || drop(writer.write_all(&state)));
    let loaded = frontend.get(FrontendReq::CHECK_DEVICE_STATE) == 0;
    feeder.join().unwrap();
    loaded
}

#[test]
fn hostile_53_device_state_is_bounded_and_lowers_no_counter() {
    let scene = Scene::operated(53);
    let frames = || scene.daemon.show("attacked")["tx_frames"].as_u64().unwrap();
    let mut frontend = scene.frontend();
    frontend.begin();
    let sent = frames();
    assert!(sent > 0);
    let before = scene.daemon.resources().2;
    let many = format!("{{\"version\":1,\"pairs\":[{}{{}}]}}", "{},".repeat(1_300_000));
    assert!(!load_state(&mut frontend, many.as_bytes()));
    let few = format!("{{\"version\":1,\"pairs\":[{}{{}}]}}", "{},".repeat(1000));
    assert!(!load_state(&mut frontend, few.as_bytes()));
    let after = scene.daemon.resources().2;
    assert!(after < before + 8192, "{after} kB after {before}");
    // A count that would wrap the counter to 0, and one more: neither lowers it.
    for told in [u64::MAX - sent + 1, u64::MAX] {
        let state = format!("{{\"version\":1,\"pairs\":[{{\"tx\":{{\"frames\":{told}}}}}]}}");
        assert!(load_state(&mut frontend, state.as_bytes()));
        assert!(frames() >= sent && frames() <= 1 << 56, "{} frames", frames());
    }
    let owed = format!("{{\"version\":1,\"tx_debt\":{{\"bytes\":{0},\"packets\":{0}}}}}", u64::MAX);
    assert!(load_state(&mut frontend, owed.as_bytes()));
    drop(frontend);
    scene.ends("R: at most 8 KiB for each queue pair; counters stay, and below 2^56");
}

#[test]
fn hostile_54_dirty_log_of_huge_buffers_delays_no_stop() {
    const GIB: u64 = 1 << 30;
    let scene = Scene::new(54);
    let mut card = Card::prepare(scene.frontend(), Options::default());
    let file = sparse(4 * GIB);
    let (place, fd) = (one_region(4 * GIB, 4 * GIB, 1 << 40, 0), [file.as_raw_fd()]);
    card.frontend.ask(FrontendReq::ADD_MEM_REG, &place, &fd);
    for _ in 0..card.options.size {
        card.post_pieces(0, &[(4 * GIB, u32::MAX)]);
    }
    card.rx[0].publish();
    card.run();
    let log = memfd(8 * GIB / 4096 / 8);
    assert!(card.frontend.set_log_base(8 * GIB / 4096 / 8, 0, &log));
    card.frontend.set_features(card.options.features | LOG_ALL);
    // The worker pops all buffers of the ring.
    std::thread::sleep(Duration::from_millis(200));
    let started = Instant::now();
    card.frontend.get_vring_base(0);
    card.frontend.get_vring_base(1);
    let time = started.elapsed();
    assert!(time < Duration::from_millis(500), "the stop took {time:?}");
    drop(card);
    scene.ends("a stop within half a second: at most 128 KiB of a chain are marked");
}

#[test]
fn hostile_66_sent_sigbus_is_ignored_truncation_contained() {
    let scene = Scene::new(66);
    for _ in 0..3 {
        scene.daemon.signal(Signal::SIGBUS);
        std::thread::sleep(Duration::from_millis(50));
        let mut card = scene.card();
        card.check_echo(10);
        card.ram.file.set_len(0).unwrap();
        card.tx[0].kick.write(1).unwrap();
        scene.says("guest memory is gone");
        drop(card);
    }
    scene.ends("a sent SIGBUS is ignored; truncated memory stops its own port only");
}
