//! DPDK's virtio-user driver as the guest, on a TAP and on AF_XDP. It swaps each frame's MAC addresses and
//! sends it back, so every frame passes in both directions.

use std::collections::HashMap;

use crate::support::daemon::Daemon;
use crate::support::network::{
    Wire, enter_namespace_with_veth, enter_new_namespace, enter_quiet_namespace, output,
};
use crate::support::testpmd::Testpmd;
use crate::support::{eventually, needs_program, needs_root, one_at_a_time};

const HOST: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 1];
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 2];
const FLOWS: usize = 8;

/// Builds a numbered IPv4/UDP frame of one of the flows.
fn frame(number: usize) -> Vec<u8> {
    let length = 60 + number * 17 % 1455;
    let mut frame: Vec<u8> = (0..length).map(|at| (number * 31 + at) as u8).collect();
    frame[..6].copy_from_slice(&GUEST);
    frame[6..12].copy_from_slice(&HOST);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].fill(0);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    frame[34..36].copy_from_slice(&(5000 + (number % FLOWS) as u16).to_be_bytes());
    frame[36..38].copy_from_slice(&9u16.to_be_bytes());
    frame[38..42].copy_from_slice(&[0; 4]);
    frame[42..50].copy_from_slice(&(number as u64).to_le_bytes());
    frame
}

/// Starts a daemon on a TAP, and checks the traffic.
fn on_tap(queues: u16, size: u16, device: &str) {
    enter_quiet_namespace();
    let daemon = Daemon::start(&["--tap=tap0", &format!("--queue-pairs={queues}")]);
    let testpmd = Testpmd::start(&daemon.socket(), queues, size, device);
    check(testpmd, &Wire::open("tap0"));
    for pair in 0..queues {
        eventually("its traffic is counted", || {
            let log = daemon.log();
            let prefix = format!("tap0/{pair}: tx ");
            let moved = log.lines().filter_map(|line| line.split_once(&prefix)).next_back();
            moved.is_some_and(|(_, rest)| !rest.starts_with("0 frames"))
        });
    }
}

/// Starts a daemon on one end of a veth, and checks that the traffic passes without copies.
fn on_af_xdp(queues: u16, size: u16, device: &str) {
    enter_namespace_with_veth(queues.into());
    let daemon = Daemon::start(&["--af-xdp=veth0", &format!("--queue-pairs={queues}")]);
    let testpmd = Testpmd::start(&daemon.socket(), queues, size, device);
    check(testpmd, &Wire::open("veth1"));
    eventually("its traffic is counted", || daemon.log().contains("veth0/0: tx "));
    // DPDK's buffers take any frame, and its frames are in one piece.
    assert!(!daemon.log().contains("copied"), "{}", daemon.log());
}

/// Checks AF_XDP with buffers of 1 KiB, which hold no frame of 1500 bytes.
fn on_af_xdp_with_small_buffers(queues: u16, size: u16, device: &str) {
    enter_namespace_with_veth(queues.into());
    let daemon = Daemon::start(&["--af-xdp=veth0", &format!("--queue-pairs={queues}")]);
    let options = ["--mbuf-size=1152", "--enable-scatter"];
    let testpmd = Testpmd::start_with("0-1", &daemon.socket(), queues, size, device, &options);
    check(testpmd, &Wire::open("veth1"));
    eventually("copies are counted", || daemon.log().contains("copied (unsuitable_buffer)"));
}

/// Checks that every frame sent to the guest comes back once, unchanged except for its addresses, in the
/// order of its flow.
fn check(mut testpmd: Testpmd, wire: &Wire) {
    testpmd.command("set fwd macswap");
    testpmd.command("start");
    // A queue is busy for some 30 ms after its last socket: frames pass the daemon by.
    for number in (1 << 20)..(1 << 20) + FLOWS {
        let is_it = |received: Vec<u8>| {
            let place = received.get(42..50);
            received[6..12] == GUEST && place == Some(&(number as u64).to_le_bytes())
        };
        eventually("a first frame of each flow comes back", || {
            wire.send(&frame(number));
            std::iter::from_fn(|| wire.receive_any(2)).any(is_it)
        });
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    while wire.receive_any(5).is_some() {}

    const COUNT: usize = 5000;
    const WINDOW: usize = 64;
    let (mut sent, mut back) = (0, 0);
    let mut last = HashMap::new();
    while back < COUNT {
        while sent < COUNT && sent - back < WINDOW {
            wire.send(&frame(sent));
            sent += 1;
        }
        let mut received =
            wire.receive_any(2000).unwrap_or_else(|| panic!("{back} of {sent} came back"));
        if received[6..12] != GUEST {
            continue;
        }
        assert_eq!(received[..6], HOST);
        let number = usize::from_le_bytes(received[42..50].try_into().unwrap());
        received[..6].copy_from_slice(&GUEST);
        received[6..12].copy_from_slice(&HOST);
        assert!(received == frame(number), "frame {number} has changed");
        let before = last.insert(number % FLOWS, number);
        let expected = before.map_or(number % FLOWS, |before| before + FLOWS);
        assert_eq!(number, expected, "a flow's frames are out of order, lost or doubled");
        back += 1;
    }
    assert!(testpmd.counter("RX-packets") >= COUNT as u64);
    testpmd.command("stop");
}

macro_rules! testpmd {
    ($($name:ident: $host:ident, $queues:expr, $size:expr, $device:expr;)*) => {$(
        #[test]
        fn $name() {
            needs_root!(stringify!($name));
            needs_program!(stringify!($name), "dpdk-testpmd");
            let _alone = one_at_a_time();
            $host($queues, $size, $device);
        }
    )*};
}

testpmd! {
    split_mergeable_256: on_tap, 1, 256, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    split_mergeable_1024: on_tap, 1, 1024, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    split_256: on_tap, 1, 256, "mrg_rxbuf=0,in_order=0,packed_vq=0";
    split_1024: on_tap, 1, 1024, "mrg_rxbuf=0,in_order=0,packed_vq=0";
    in_order_mergeable_256: on_tap, 1, 256, "mrg_rxbuf=1,in_order=1,packed_vq=0";
    in_order_mergeable_1024: on_tap, 1, 1024, "mrg_rxbuf=1,in_order=1,packed_vq=0";
    in_order_256: on_tap, 1, 256, "mrg_rxbuf=0,in_order=1,packed_vq=0";
    in_order_1024: on_tap, 1, 1024, "mrg_rxbuf=0,in_order=1,packed_vq=0";
    two_queues_mergeable_256: on_tap, 2, 256, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    two_queues_mergeable_1024: on_tap, 2, 1024, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    two_queues_256: on_tap, 2, 256, "mrg_rxbuf=0,in_order=0,packed_vq=0";
    two_queues_1024: on_tap, 2, 1024, "mrg_rxbuf=0,in_order=0,packed_vq=0";
    two_queues_in_order_mergeable_256: on_tap, 2, 256, "mrg_rxbuf=1,in_order=1,packed_vq=0";
    two_queues_in_order_mergeable_1024: on_tap, 2, 1024, "mrg_rxbuf=1,in_order=1,packed_vq=0";
    two_queues_in_order_256: on_tap, 2, 256, "mrg_rxbuf=0,in_order=1,packed_vq=0";
    two_queues_in_order_1024: on_tap, 2, 1024, "mrg_rxbuf=0,in_order=1,packed_vq=0";
    af_xdp_mergeable_256: on_af_xdp, 1, 256, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    af_xdp_mergeable_1024: on_af_xdp, 1, 1024, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    af_xdp_256: on_af_xdp, 1, 256, "mrg_rxbuf=0,in_order=0,packed_vq=0";
    af_xdp_in_order_1024: on_af_xdp, 1, 1024, "mrg_rxbuf=0,in_order=1,packed_vq=0";
    af_xdp_two_queues_mergeable_256: on_af_xdp, 2, 256, "mrg_rxbuf=1,in_order=0,packed_vq=0";
    af_xdp_small_buffers_256: on_af_xdp_with_small_buffers, 1, 256, "mrg_rxbuf=1,in_order=0,packed_vq=0";
}

#[test]
fn testpmd_flood_arrives_to_the_last_frame() {
    needs_root!("testpmd_flood_arrives_to_the_last_frame");
    needs_program!("testpmd_flood_arrives_to_the_last_frame", "dpdk-testpmd");
    let _alone = one_at_a_time();
    enter_new_namespace();
    let daemon = Daemon::start(&["--tap=tap0"]);
    let mut testpmd =
        Testpmd::start(&daemon.socket(), 1, 1024, "mrg_rxbuf=1,in_order=0,packed_vq=0");
    testpmd.command("set fwd txonly");
    testpmd.command("start");
    std::thread::sleep(std::time::Duration::from_secs(1));
    testpmd.command("stop");
    let sent = testpmd.counter("TX-packets");
    assert!(sent > 10_000, "{sent}");
    // What testpmd counts is in the ring, and must leave it without another kick.
    let expected = format!("{} {sent} ", sent * 64);
    eventually("every frame is moved", || {
        let text = output("ip", "-s link show tap0");
        let words: Vec<&str> = text.split_whitespace().collect();
        words.join(" ").contains(&expected)
    });
    drop(testpmd);
    let logged = format!("tap0/0: tx {sent} frames, {} bytes", sent * 64);
    eventually("and counted", || daemon.log().contains(&logged));
}
