//! Frames between a driver of ours and the far end of its card.

use super::driver::{Card, HEADER};
use super::network::{ETHERTYPE, Wire};

/// A frame of the tests' ethertype that no two tests' numbers share.
pub(crate) fn frame(number: usize, length: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; length.max(60)];
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0, 2, 2]);
    frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 2, 1]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame[14..22].copy_from_slice(&(number as u64).to_le_bytes());
    frame
}

/// Sends frames both ways in bursts and checks that each arrives once, unchanged, in order.
#[track_caller]
pub(crate) fn check_both_ways(wire: &Wire, card: &mut Card, count: usize) {
    let length = |number: usize| 60 + number * 13 % 1400;
    // More would not fit the packet socket's queue.
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
