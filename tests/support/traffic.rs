//! Test frames between a guest's driver and the host's end of its port.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::driver::{Card, HEADER};
use super::eventually;
use super::guest::Ram;
use super::network::{ETHERTYPE, Wire};

/// Builds a frame of the tests' ethertype that is unique for each number.
pub(crate) fn frame(number: usize, length: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; length.max(60)];
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0, 2, 2]);
    frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 2, 1]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame[14..22].copy_from_slice(&(number as u64).to_le_bytes());
    frame
}

/// Sends frames both ways in bursts, and checks that each arrives once, unchanged and in order.
#[track_caller]
pub(crate) fn check_both_ways(wire: &Wire, card: &mut Card, count: usize) {
    // A larger burst does not fit the packet socket's queue.
    let burst = usize::from(card.options.size / 4).min(64);
    for first in (0..count).step_by(burst) {
        let numbers = first..count.min(first + burst);
        for number in numbers.clone() {
            let slot = (number % burst) as u64;
            card.queue_tx(0, slot, &[0; HEADER], &frame(number, length(number)));
        }
        card.tx[0].publish();
        for number in numbers.clone() {
            let received =
                wire.receive(1000).unwrap_or_else(|| panic!("frame {number} is missing"));
            assert_eq!(received, frame(number, length(number)), "to the host");
        }
        for _ in numbers.clone() {
            card.tx[0].wait_used();
        }
        numbers.clone().for_each(|number| wire.send(&frame(number, length(number))));
        for number in numbers {
            let received = card.receive(0);
            assert_eq!(received[HEADER..], frame(number, length(number)), "to the guest");
        }
    }
    assert_eq!(wire.receive(20), None, "no frame comes twice");
    assert!(card.try_receive(0).is_none());
}

fn length(number: usize) -> usize {
    60 + number * 13 % 1400
}

/// Builds a frame as [`Flood`] sends and [`Check`] expects it.
pub(crate) fn flood_frame(number: usize) -> Vec<u8> {
    frame(number, length(number))
}

/// A thread that sends numbered frames to the guest until the value is dropped. The device may come and go.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    pub(crate) fn start(device: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut wire = None;
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let sent = wire.as_ref().map(|wire: &Wire| wire.try_send(&flood_frame(number)));
                if !matches!(sent, Some(Ok(()))) {
                    // A look-up takes the lock that changes of devices need, so look-ups are rare.
                    std::thread::sleep(Duration::from_millis(10));
                    wire = Wire::try_open(device);
                }
                if number % 16 == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Flood { stop, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// The check of a flood: each frame arrives unchanged, in order and at most once.
#[derive(Debug, Default)]
pub(crate) struct Check {
    next: usize,
    pub(crate) received: usize,
    /// Numbers of all received frames, if their order does not matter.
    seen: Option<HashSet<usize>>,
}

impl Check {
    /// Creates a check that ignores the order of frames.
    pub(crate) fn in_any_order() -> Self {
        Check { seen: Some(HashSet::new()), ..Check::default() }
    }

    /// Takes the frames that have arrived, at most a ring of them. Returns their number.
    #[track_caller]
    pub(crate) fn take(&mut self, card: &mut Card, pair: usize) -> usize {
        let mut taken = 0;
        for _ in 0..card.options.size {
            let Some(received) = card.try_receive(pair) else { break };
            let bytes = &received[HEADER..];
            if bytes.get(12..14) != Some(&ETHERTYPE) {
                continue;
            }
            let number = usize::from_le_bytes(bytes[14..22].try_into().unwrap());
            if let Some(seen) = &mut self.seen {
                assert!(seen.insert(number), "frame {number} came twice");
            } else {
                assert!(number >= self.next, "frame {number} came after {}", self.next - 1);
            }
            let expected = flood_frame(number);
            // assert_eq would print both frames.
            assert!(
                bytes == expected,
                "frame {number} has changed: {} bytes of {}",
                bytes.len(),
                expected.len()
            );
            self.next = number + 1;
            taken += 1;
        }
        self.received += taken;
        taken
    }

    /// Takes the frames that have arrived, and waits for `count` further ones.
    #[track_caller]
    pub(crate) fn wait(&mut self, card: &mut Card, pair: usize, count: usize) {
        self.take(card, pair);
        let wanted = self.received + count;
        eventually("frames arrive", || {
            self.take(card, pair);
            self.received >= wanted
        });
    }
}

/// Fill byte of buffers that the device must not write.
const CANARY: u8 = 0xa5;

/// Fills every rx buffer of a queue pair with canaries.
pub(crate) fn plant_canaries(card: &Card, pair: usize) {
    let (area, length) = (card.rx[pair].buffer_area(), card.options.buffer as usize);
    card.ram.write(area, &vec![CANARY; length * usize::from(card.options.size)]);
}

/// Resets the guest's driver: stops both rings of the first pair, checks for `milliseconds` that the device
/// writes no buffer, and starts the rings again.
#[track_caller]
pub(crate) fn check_reset(card: &mut Card, check: &mut Check, milliseconds: u64) {
    card.frontend.get_vring_base(0);
    card.frontend.get_vring_base(1);
    check.take(card, 0);
    // The stopped device may write no buffer, not even one that is still available, until the rings
    // run again.
    plant_canaries(card, 0);
    check_canaries(card, 0, milliseconds);
    card.run();
}

/// Checks after `milliseconds` that all canaries are intact.
#[track_caller]
pub(crate) fn check_canaries(card: &Card, pair: usize, milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
    let (area, length) = (card.rx[pair].buffer_area(), card.options.buffer as usize);
    let bytes = card.ram.read(area, length * usize::from(card.options.size));
    let touched = bytes.iter().position(|byte| *byte != CANARY);
    assert_eq!(touched, None, "written after it was given back");
}

/// Builds an IPv4/UDP frame with a partial checksum, and its virtio header.
pub(crate) fn datagram(payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = frame(0, 42 + payload);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..42].fill(0);
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&((28 + payload) as u16).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, 17]);
    bytes[26..34].copy_from_slice(&[192, 0, 2, 2, 192, 0, 2, 1]);
    let checksum = !sum(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    bytes[34..38].copy_from_slice(&[0, 9, 0, 9]);
    let length = ((8 + payload) as u16).to_be_bytes();
    bytes[38..40].copy_from_slice(&length);
    // The sum of the pseudo-header, as a partial checksum has it.
    let partial = sum(&pseudo_header(&bytes)).to_be_bytes();
    bytes[40..42].copy_from_slice(&partial);
    let header = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    (header, bytes)
}

/// Returns the Internet checksum before its inversion (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Builds the pseudo-header of an IPv4 frame without options.
fn pseudo_header(frame: &[u8]) -> Vec<u8> {
    let length = (frame.len() - 34) as u16;
    [&frame[26..34], &[0, frame[23]], &length.to_be_bytes()].concat()
}

/// Returns the sum of pseudo-header, transport header and payload: 0xffff if the checksum is right.
pub(crate) fn transport_sum(frame: &[u8]) -> u16 {
    sum(&[&pseudo_header(frame), &frame[34..]].concat())
}

/// Builds an Ethernet, IPv4 and TCP frame of `payload` bytes, and the virtio header that segments it into
/// `size` bytes each.
pub(crate) fn tcp_frame(payload: usize, size: u16) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = frame(0, 54 + payload);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..54].fill(0);
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, 6]);
    bytes[26..34].copy_from_slice(&[192, 0, 2, 2, 192, 0, 2, 1]);
    let checksum = !sum(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    bytes[46] = 0x50;
    let partial = sum(&pseudo_header(&bytes)).to_be_bytes();
    bytes[50..52].copy_from_slice(&partial);
    let mut header = vec![1, 1, 54, 0];
    header.extend(size.to_le_bytes());
    header.extend([34, 0, 16, 0, 0, 0]);
    (header, bytes)
}

/// Switches the destination port of the frames in the tx buffers from `area` between 80 and 53 until `stop`
/// is set: a guest that rewrites checked headers.
pub(crate) fn flip_ports(ram: &Ram, area: u64, slots: u64, stop: &AtomicBool) {
    let place = |slot: u64| area + slot * 2048 + HEADER as u64 + 37;
    for port in [80, 53].into_iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        (0..slots).for_each(|slot| ram.write(place(slot), &[port]));
    }
}
