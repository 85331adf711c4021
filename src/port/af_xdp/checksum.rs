//! The Internet checksum (RFC 1071), for guest frames with a partial checksum.

/// Completes the checksum at `start + offset`, over all bytes from `start` on. The checksum field holds the
/// sum of the pseudo-header.
///
/// # Panics
/// If the field is outside the frame.
pub(super) fn complete(frame: &mut [u8], start: usize, offset: usize) {
    let sum = !fold(sum(&frame[start..]));
    // For UDP, 0 means "no checksum". 0xffff has the same value in ones' complement (RFC 768).
    let sum = if sum == 0 { 0xffff } else { sum };
    let place = start + offset;
    frame[place..place + 2].copy_from_slice(&sum.to_ne_bytes());
}

/// Replaces the number `old` by `new` in the sum in the first two bytes, which is in network order and not
/// yet inverted (RFC 1624).
///
/// # Panics
/// If `bytes` has fewer than two bytes.
pub(super) fn replace(bytes: &mut [u8], old: u16, new: u16) {
    let sum = u16::from_be_bytes([bytes[0], bytes[1]]);
    let sum = fold(u64::from(sum) + u64::from(!old) + u64::from(new));
    bytes[..2].copy_from_slice(&sum.to_be_bytes());
}

/// Sums 16-bit words in memory order: the ones' complement sum is independent of byte order.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let word = |bytes: &[u8]| u64::from(u32::from_ne_bytes(bytes.try_into().unwrap_or_default()));
    words.map(word).sum::<u64>() + word(&last)
}

/// Folds the carries of a sum into 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Returns the folded sum of all pieces. Each but the last has an even length.
#[cfg(test)]
pub(super) fn sum_of(pieces: &[&[u8]]) -> u16 {
    fold(pieces.iter().map(|piece| sum(piece)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_example_is_summed() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn completed_checksum_makes_the_sum_all_ones() {
        for length in 40..60 {
            let mut frame: Vec<u8> = (0..length).map(|at| (at * 37) as u8).collect();
            let pseudo_header = u64::from(u16::from_ne_bytes([frame[20], frame[21]]));
            complete(&mut frame, 14, 6);
            assert_eq!(fold(sum(&frame[14..]) + pseudo_header), 0xffff, "{length}");
        }
    }

    #[test]
    fn zero_checksum_is_sent_as_all_ones() {
        let mut frame = [0xff; 8];
        frame[6..8].fill(0);
        complete(&mut frame, 4, 2);
        assert_eq!(frame[6..8], [0xff, 0xff]);
    }
}
