//! A filter as eBPF instructions, for an XDP program.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::steps::{self, ABSENT, At, Step, Steps, UNKNOWN, VARIABLES, Variable, Width};
use super::{Action, Filter, Protocol, facts};
use crate::sys::bpf::assembly::{Assembly, Label};
use crate::sys::bpf::instructions::{
    add, add_register32, add32, and32, call, copy, from_network, if_at_least32, if_equal32,
    if_greater, if_not_equal, jump, load8, load16, load32, set, set32, shift_left32, shift_right32,
    store32,
};

/// Register of the accumulator A, and of the verdict.
const A: u8 = 0;
/// Register of the frame's `struct xdp_md`.
const FRAME: u8 = 9;
// Offsets on the stack, behind the variables.
const INDEX: i16 = VARIABLES_AT - 4 * VARIABLES as i16;
const LOADED: i16 = INDEX - 4;
const VARIABLES_AT: i16 = -12;

const XDP_LOAD_BYTES: i32 = 189;

/// Number of bytes on the stack with the properties of a frame, which [`seen`] reads: 16 bytes of the source
/// address, 8 of the ports, and the others.
pub const SEEN: usize = 4 * (Variable::Source as usize + 4);
/// Offset of these bytes from the frame pointer (register 10).
pub const SEEN_AT: i16 = VARIABLES_AT + 4 - SEEN as i16;

/// Returns a frame's protocol and source address, from the [`SEEN`] bytes that the instructions have left.
pub fn seen(bytes: &[u8; SEEN]) -> (Option<Protocol>, Option<IpAddr>) {
    let variable = |variable: Variable, word: usize| {
        let at = SEEN - 4 * (variable as usize + word + 1);
        bytes[at..].first_chunk().copied().map_or(UNKNOWN, u32::from_ne_bytes)
    };
    let known = |of| Some(variable(of, 0)).filter(|it| ![UNKNOWN, ABSENT].contains(it));
    let source = [0, 1, 2, 3].map(|word| variable(Variable::Source, word));
    let bits = source.iter().fold(0, |bits: u128, word| bits << 32 | u128::from(*word));
    let source = match known(Variable::Version) {
        Some(4) => Some(IpAddr::from(Ipv4Addr::from_bits(source[0]))),
        Some(6) => Some(IpAddr::from(Ipv6Addr::from_bits(bits))),
        _ => None,
    };
    let (ethertype, number) = (known(Variable::Ethertype), known(Variable::Protocol));
    let protocol = facts::protocol(
        ethertype.map(|it| it as u16),
        number.map(|it| it as u8),
        source.map(|source| source.is_ipv4()),
    );
    (protocol, source)
}

/// Returns instructions that check the frame whose `struct xdp_md` is in register 9. They leave 1 in register 0 if
/// the frame passes, else 0. They use registers 0 to 5, and the stack except for its first 8 bytes.
///
/// Fields at an offset that depends on the frame are copied by the kernel (`bpf_xdp_load_bytes`, Linux 5.18). A
/// read through a pointer would require CAP_PERFMON, which the daemon drops.
pub fn extended(filter: &Filter) -> Vec<u64> {
    let Steps { list, labels } = filter.steps();
    let mut code = Assembly::default();
    let labels: Vec<Label> = (0..labels).map(|_| code.label()).collect();
    let end = code.label();
    let mut emitter = Emitter { code, labels, end };
    for step in list {
        emitter.emit(step);
    }
    emitter.code.place(end);
    emitter.code.finish()
}

struct Emitter {
    code: Assembly,
    labels: Vec<Label>,
    end: Label,
}

impl Emitter {
    fn push(&mut self, instruction: u64) {
        self.code.push(instruction);
    }

    fn to(&mut self, label: steps::Label, instruction: u64) {
        self.code.jump(self.labels[label.0], instruction);
    }

    /// Loads the big-endian number at a pointer plus offset into A.
    fn take(&mut self, width: Width, pointer: u8, offset: i16) {
        match width {
            Width::Byte => self.push(load8(A, pointer, offset)),
            Width::Half => self.push(load16(A, pointer, offset)),
            Width::Word => self.push(load32(A, pointer, offset)),
        }
        if width != Width::Byte {
            self.push(from_network(A, 8 * width as i32));
        }
    }

    fn emit(&mut self, step: Step) {
        let place =
            |variable: Variable, word: usize| VARIABLES_AT - 4 * (variable as usize + word) as i16;
        match step {
            // The verifier requires a bounds check at each load.
            Step::InFrame(..) => {}
            Step::Load(width, At::Start(offset), beyond)
            | Step::LoadInside(width, At::Start(offset), beyond) => {
                self.code.extend([
                    load32(1, FRAME, 0),
                    load32(2, FRAME, 4),
                    copy(3, 1),
                    add(3, (offset + width as u32) as i32),
                ]);
                self.to(beyond, if_greater(3, 2, 0));
                self.take(width, 1, offset as i16);
            }
            Step::Load(width, At::Index(offset), beyond)
            | Step::LoadInside(width, At::Index(offset), beyond) => {
                self.code.extend([
                    copy(1, FRAME),
                    load32(2, 10, INDEX),
                    add32(2, offset as i32),
                    copy(3, 10),
                    add(3, LOADED.into()),
                    set(4, width as i32),
                    call(XDP_LOAD_BYTES),
                ]);
                self.to(beyond, if_not_equal(0, 0, 0));
                self.take(width, 10, LOADED);
            }
            Step::InPacket(bytes, at, beyond) => {
                match at {
                    At::Start(offset) => self.push(set32(1, (offset + bytes) as i32)),
                    At::Index(offset) => {
                        self.code.extend([load32(1, 10, INDEX), add32(1, (offset + bytes) as i32)]);
                    }
                }
                self.push(load32(2, 10, place(Variable::End, 0)));
                self.to(beyond, if_greater(1, 2, 0));
            }
            Step::Set(value) => self.push(set32(A, value as i32)),
            Step::Get(variable, word) => self.push(load32(A, 10, place(variable, word))),
            Step::Put(variable, word) => self.push(store32(10, A, place(variable, word))),
            Step::And(mask) => self.push(and32(A, mask as i32)),
            Step::ShiftLeft(bits) => self.push(shift_left32(A, bits as i32)),
            Step::ShiftRight(bits) => self.push(shift_right32(A, bits as i32)),
            Step::Add(value) => self.push(add32(A, value as i32)),
            Step::AddIndex => {
                self.code.extend([load32(1, 10, INDEX), add_register32(A, 1)]);
            }
            Step::ToIndex => self.push(store32(10, A, INDEX)),
            Step::IfEqual(value, yes, no) => {
                self.to(yes, if_equal32(A, value as i32, 0));
                self.to(no, jump(0));
            }
            Step::IfAtLeast(value, yes, no) => {
                self.to(yes, if_at_least32(A, value as i32, 0));
                self.to(no, jump(0));
            }
            Step::Jump(to) => self.to(to, jump(0)),
            Step::Place(label) => self.code.place(self.labels[label.0]),
            Step::End(action) => {
                self.push(set32(A, i32::from(action == Action::Allow)));
                self.code.jump(self.end, jump(0));
            }
        }
    }
}
