//! A filter as a classic BPF program, which the kernel runs for a socket or a TAP
//! (`Documentation/networking/filter.rst`).
//!
//! The program is emitted from its end to its start, so that the length of each jump is known. A conditional jump
//! over more than 255 instructions goes through an unconditional one.

use libc::sock_filter;

use super::steps::{At, Label, Step, Steps, VARIABLES, Variable, Width};
use super::{Action, Filter};

/// Maximum number of instructions of a program (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

// Codes of linux/bpf_common.h.
const LOAD_LENGTH: u16 = 0x80;
const LOAD_VALUE: u16 = 0x00;
const LOAD_MEMORY: u16 = 0x60;
const STORE_MEMORY: u16 = 0x02;
const ADD: u16 = 0x04;
const ADD_INDEX: u16 = 0x0c;
const SUBTRACT_INDEX: u16 = 0x1c;
const AND: u16 = 0x54;
const SHIFT_LEFT: u16 = 0x64;
const SHIFT_RIGHT: u16 = 0x74;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const TO_INDEX: u16 = 0x07;

/// `BPF_MEMWORDS`.
const _: () = assert!(VARIABLES <= 16);

/// Returns the program of a filter. It returns 0 for a frame that must be dropped.
pub fn classic(filter: &Filter) -> Vec<sock_filter> {
    let Steps { list, labels } = filter.steps();
    let mut emitter = Emitter { reversed: Vec::new(), places: vec![0; labels] };
    list.iter().rev().for_each(|step| emitter.emit(*step));
    emitter.reversed.reverse();
    emitter.reversed
}

struct Emitter {
    /// Instructions, last one first.
    reversed: Vec<sock_filter>,
    /// Number of instructions from each label to the end.
    places: Vec<usize>,
}

impl Emitter {
    fn push(&mut self, code: u16, k: u32) {
        self.reversed.push(sock_filter { code, jt: 0, jf: 0, k });
    }

    /// Returns the number of instructions that a jump from the next instruction to the label skips.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - self.places[label.0]
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) {
        // An unconditional jump in between makes the other jump longer.
        let near = |distance: usize| u8::try_from(distance).ok();
        let far = |distance: usize| distance + 1 > usize::from(u8::MAX);
        let (far_yes, far_no) = (far(self.distance(yes)), far(self.distance(no)));
        let mut trampoline = |label, is_far: bool| {
            is_far.then(|| {
                self.push(JUMP, self.distance(label) as u32);
                self.reversed.len()
            })
        };
        let (via_no, via_yes) = (trampoline(no, far_no), trampoline(yes, far_yes));
        let length = |via: Option<usize>, label| match via {
            Some(place) => self.reversed.len() - place,
            None => self.distance(label),
        };
        let jt = near(length(via_yes, yes)).expect("a near jump is short");
        let jf = near(length(via_no, no)).expect("a near jump is short");
        self.reversed.push(sock_filter { code, jt, jf, k });
    }

    fn load(&mut self, width: Width, at: At) {
        let (mode, offset) = match at {
            At::Start(offset) => (0x20, offset),
            At::Index(offset) => (0x40, offset),
        };
        let size = match width {
            Width::Word => 0x00,
            Width::Half => 0x08,
            Width::Byte => 0x10,
        };
        self.push(mode | size, offset);
    }

    /// Jumps to `beyond` if `bytes` at a place end behind the number that the instruction `code` with `k` loads.
    fn check(&mut self, bytes: u32, at: At, beyond: Label, code: u16, k: u32) {
        self.places.push(self.reversed.len());
        let inside = Label(self.places.len() - 1);
        let (At::Start(offset) | At::Index(offset)) = at;
        self.branch(IF_AT_LEAST, offset + bytes, inside, beyond);
        if let At::Index(_) = at {
            self.places.push(self.reversed.len());
            let positive = Label(self.places.len() - 1);
            self.branch(IF_ANY_BIT, 1 << 31, beyond, positive);
            self.push(SUBTRACT_INDEX, 0);
        }
        self.push(code, k);
    }

    fn emit(&mut self, step: Step) {
        let memory = |variable: Variable, word| (variable as usize + word) as u32;
        match step {
            // A load beyond the frame's end would terminate the program.
            Step::Load(width, at, beyond) => {
                self.load(width, at);
                self.check(width as u32, at, beyond, LOAD_LENGTH, 0);
            }
            Step::LoadInside(width, at, _) => self.load(width, at),
            Step::InPacket(bytes, at, beyond) => {
                self.check(bytes, at, beyond, LOAD_MEMORY, memory(Variable::End, 0));
            }
            Step::InFrame(bytes, at, beyond) => self.check(bytes, at, beyond, LOAD_LENGTH, 0),
            Step::Set(value) => self.push(LOAD_VALUE, value),
            Step::Get(variable, word) => self.push(LOAD_MEMORY, memory(variable, word)),
            Step::Put(variable, word) => self.push(STORE_MEMORY, memory(variable, word)),
            Step::And(mask) => self.push(AND, mask),
            Step::ShiftLeft(bits) => self.push(SHIFT_LEFT, bits),
            Step::ShiftRight(bits) => self.push(SHIFT_RIGHT, bits),
            Step::Add(value) => self.push(ADD, value),
            Step::AddIndex => self.push(ADD_INDEX, 0),
            Step::ToIndex => self.push(TO_INDEX, 0),
            Step::IfEqual(value, yes, no) => self.branch(IF_EQUAL, value, yes, no),
            Step::IfAtLeast(value, yes, no) => self.branch(IF_AT_LEAST, value, yes, no),
            Step::Jump(to) => self.push(JUMP, self.distance(to) as u32),
            Step::Place(label) => self.places[label.0] = self.reversed.len(),
            Step::End(action) => {
                let length = if action == Action::Allow { u32::MAX } else { 0 };
                self.push(RETURN, length);
            }
        }
    }
}
