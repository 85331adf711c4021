//! A filter as instructions of BPF, for an XDP program.

use super::steps::{Label, Step, Steps, Variable, Width};
use super::{Action, Filter};
use crate::sys::bpf::instructions::{
    add, add_register, add_register32, add32, and32, copy, copy32, from_network, if_at_least32,
    if_equal32, if_greater, jump, load8, load16, load32, set32, shift_left32, shift_right32,
    store32,
};

/// A, and the verdict.
const A: u8 = 0;
const DATA: u8 = 2;
const DATA_END: u8 = 3;
const INDEX: u8 = 4;
const PLACE: u8 = 5;
const END: u8 = 1;

/// Instructions that judge the frame between register 2 (`data`) and 3 (`data_end`), and leave 1
/// in register 0 if it passes, else 0. They use 0 to 5, and the stack but for its first 8 bytes.
pub fn extended(filter: &Filter) -> Vec<u64> {
    let Steps { list, mut labels } = filter.steps();
    let end = Label(labels);
    labels += 1;
    let mut emitter = Emitter { code: Vec::new(), places: vec![0; labels], jumps: Vec::new() };
    for step in list {
        emitter.emit(step, end);
    }
    emitter.places[end.0] = emitter.code.len();
    emitter.resolve();
    emitter.code
}

struct Emitter {
    code: Vec<u64>,
    places: Vec<usize>,
    /// Instructions that jump, and where to.
    jumps: Vec<(usize, Label)>,
}

impl Emitter {
    fn push(&mut self, instruction: u64) {
        self.code.push(instruction);
    }

    /// An instruction that skips none, and is to go to the label.
    fn to(&mut self, label: Label, instruction: u64) {
        self.jumps.push((self.code.len(), label));
        self.push(instruction);
    }

    /// Fills in how many instructions each jump skips.
    fn resolve(&mut self) {
        for (at, label) in &self.jumps {
            let skip = self.places[label.0] - at - 1;
            let skip = i16::try_from(skip).expect("a filter has less than 32768 instructions");
            self.code[*at] |= u64::from(skip as u16) << 16;
        }
    }

    fn emit(&mut self, step: Step, end: Label) {
        let slot = |variable: Variable, word: usize| -12 - 4 * (variable as usize + word) as i16;
        match step {
            Step::Load(width, offset, beyond) => {
                self.push(copy(PLACE, DATA));
                self.push(add_register(PLACE, INDEX));
                self.push(copy(END, PLACE));
                self.push(add(END, (offset + width as u32) as i32));
                self.to(beyond, if_greater(END, DATA_END, 0));
                let offset = offset as i16;
                match width {
                    Width::Byte => self.push(load8(A, PLACE, offset)),
                    Width::Half => self.push(load16(A, PLACE, offset)),
                    Width::Word => self.push(load32(A, PLACE, offset)),
                }
                if width != Width::Byte {
                    self.push(from_network(A, 8 * width as i32));
                }
            }
            Step::Set(value) => self.push(set32(A, value as i32)),
            Step::Get(variable, word) => self.push(load32(A, 10, slot(variable, word))),
            Step::Put(variable, word) => self.push(store32(10, A, slot(variable, word))),
            Step::And(mask) => self.push(and32(A, mask as i32)),
            Step::ShiftLeft(bits) => self.push(shift_left32(A, bits as i32)),
            Step::ShiftRight(bits) => self.push(shift_right32(A, bits as i32)),
            Step::Add(value) => self.push(add32(A, value as i32)),
            Step::AddIndex => self.push(add_register32(A, INDEX)),
            Step::ToIndex => self.push(copy32(INDEX, A)),
            Step::IfEqual(value, yes, no) => {
                self.to(yes, if_equal32(A, value as i32, 0));
                self.to(no, jump(0));
            }
            Step::IfAtLeast(value, yes, no) => {
                self.to(yes, if_at_least32(A, value as i32, 0));
                self.to(no, jump(0));
            }
            Step::Jump(to) => self.to(to, jump(0)),
            Step::Place(label) => self.places[label.0] = self.code.len(),
            Step::End(action) => {
                self.push(set32(A, i32::from(action == Action::Allow)));
                self.to(end, jump(0));
            }
        }
    }
}
