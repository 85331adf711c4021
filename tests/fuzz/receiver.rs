//! A receiver's parser of frames and an interpreter of classic BPF, for the unit tests of filters and for the
//! fuzzer.

/// Interprets a classic BPF program on a frame, as the kernel does. Returns the program's result.
pub fn run(program: &[libc::sock_filter], frame: &[u8]) -> u32 {
    let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [None; 16], 0);
    let load = |at: u32, size: usize| -> Option<u32> {
        let bytes = frame.get(at as usize..)?.get(..size)?;
        Some(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    };
    loop {
        let libc::sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let indexed = |size| load(x.wrapping_add(k), size);
        let mut branch = |holds| at += usize::from(if holds { jt } else { jf });
        match code {
            0x80 => a = frame.len() as u32,
            0x00 => a = k,
            0x60 => a = memory[k as usize].expect("memory is read that was not written"),
            0x02 => memory[k as usize] = Some(a),
            0x40 | 0x48 | 0x50 => match indexed([4, 2, 1][usize::from(code - 0x40) / 8]) {
                Some(number) => a = number,
                None => panic!("a load beyond the frame's end"),
            },
            0x20 | 0x28 | 0x30 => {
                a = load(k, [4, 2, 1][usize::from(code - 0x20) / 8]).expect("a load inside")
            }
            0x04 => a = a.wrapping_add(k),
            0x0c => a = a.wrapping_add(x),
            0x1c => a = a.wrapping_sub(x),
            0x54 => a &= k,
            0x64 => a <<= k,
            0x74 => a >>= k,
            0x05 => at += k as usize,
            0x15 => branch(a == k),
            0x35 => branch(a >= k),
            0x45 => branch(a & k != 0),
            0x07 => x = a,
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

/// Payload of the next fragment: ports 9 and 3, for a first fragment that ends before its ports.
const CONTINUATION: [u8; 16] = [0, 9, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Returns the transport protocol and ports that a receiver finds, or nothing if it drops the frame or finds
/// no ports. The receiver removes every encapsulation that it knows, and trims packets to their own length,
/// as Linux does (`ip_rcv_core`, `ip6_rcv_core`). [`CONTINUATION`] completes a first fragment.
fn receiver(ethertype: u16, packet: &[u8]) -> Option<(u8, [u16; 2])> {
    let u16_of = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    match ethertype {
        0x8100 | 0x88a8 | 0x9100 | 0x9200 => receiver(u16_of(2)?, packet.get(4..)?),
        // LLC and SNAP.
        0..0x600 if packet.starts_with(&[0xaa, 0xaa, 3, 0, 0, 0]) => {
            receiver(u16_of(6)?, packet.get(8..)?)
        }
        0x8847 | 0x8848 => {
            let bottom = packet.chunks_exact(4).position(|label| label[2] & 1 != 0)?;
            let inner = packet.get(4 * (bottom + 1)..)?;
            receiver(if inner.first()? >> 4 == 4 { 0x0800 } else { 0x86dd }, inner)
        }
        // PPPoE with PPP.
        0x8864 => receiver(if u16_of(6)? == 0x21 { 0x0800 } else { 0x86dd }, packet.get(8..)?),
        // NSH without metadata.
        0x894f => receiver(if *packet.get(3)? == 1 { 0x0800 } else { 0x86dd }, packet.get(8..)?),
        0x0800 => {
            let (headers, total) = (usize::from(packet.first()? & 15) * 4, u16_of(2)?.into());
            let packet = packet.get(..total).filter(|_| packet[0] >> 4 == 4 && headers >= 20)?;
            let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]);
            let upper = packet.get(headers..).filter(|_| fragment & 0x1fff == 0)?;
            let more = if fragment & 0x2000 != 0 { &CONTINUATION[..] } else { &[] };
            let upper = &[upper, more].concat();
            match packet.get(9)? {
                51 => carried(*upper.first()?, upper.get((usize::from(*upper.get(1)?) + 2) * 4..)?),
                protocol => carried(*protocol, upper),
            }
        }
        0x86dd => {
            let (mut next, length) = (*packet.get(6)?, usize::from(u16_of(4)?));
            let upper = packet.get(40..40 + length).filter(|_| packet[0] >> 4 == 6)?;
            let completed = [upper, &CONTINUATION].concat();
            let (mut upper, mut completes) = (upper, false);
            loop {
                let header = match next {
                    0 | 43 | 60 | 135 | 139 | 140 => (usize::from(*upper.get(1)?) + 1) * 8,
                    51 => (usize::from(*upper.get(1)?) + 2) * 4,
                    44 if *upper.get(2)? == 0 && upper.get(3)? & 0xf8 == 0 => 8,
                    44 => return None,
                    protocol => return carried(protocol, upper),
                };
                if next == 44 && upper[3] & 1 != 0 && !completes {
                    completes = true;
                    upper = &completed[length - upper.len()..];
                }
                (next, upper) = (*upper.first()?, upper.get(header..)?);
            }
        }
        _ => None,
    }
}

/// Returns the transport protocol and ports of an IP packet's payload, as [`receiver`] does.
fn carried(protocol: u8, upper: &[u8]) -> Option<(u8, [u16; 2])> {
    match (protocol, upper) {
        (4, _) => receiver(0x0800, upper),
        (41, _) => receiver(0x86dd, upper),
        (47, [_, _, high, low, inner @ ..]) => receiver(u16::from_be_bytes([*high, *low]), inner),
        (6 | 17 | 33 | 132 | 136, [a, b, c, d, ..]) => {
            Some((protocol, [[*a, *b], [*c, *d]].map(u16::from_be_bytes)))
        }
        _ => None,
    }
}

/// Returns the transport protocol and ports that a receiver of a frame finds.
pub fn received(frame: &[u8]) -> Option<(u8, [u16; 2])> {
    receiver(u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]), frame.get(14..)?)
}

/// Checks that filters deny the protocol and ports that a receiver sees, and that they allow no other ones.
/// `passes` reports whether a frame passes a filter.
pub fn check_received(frame: &[u8], passes: impl Fn(&str, &[u8]) -> bool) {
    let passes = |filter: &str| passes(filter, frame);
    let seen = received(frame);
    if let Some((protocol, [source, destination])) = seen {
        let denied = format!("deny proto {protocol} sport {source} dport {destination}");
        assert!(!passes(&format!("{denied}; default allow")), "{denied}: {frame:02x?}");
        let all = "deny ip; deny ip6; default allow";
        assert!(!passes(all), "{all}: {frame:02x?}");
    }
    for (protocol, port) in [6, 17].into_iter().flat_map(|it| [0, 1, 3, 255].map(|to| (it, to))) {
        let allowed = format!("allow proto {protocol} dport {port}; default deny");
        let sees = |(is, [_, to]): (u8, [u16; 2])| is == protocol && to == port;
        assert!(!passes(&allowed) || seen.is_none_or(sees), "{allowed}: {frame:02x?}");
    }
}
