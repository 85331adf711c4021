//! A filter as steps of a simple machine: an accumulator, an index into the frame, variables, and jumps forward.
//! Classic BPF and eBPF can both express each step.
//!
//! Every load names the label to jump to if the frame ends before the loaded bytes. The steps of `reading` store
//! the frame's properties in variables, and the steps of `rules` compare the variables.

mod reading;
mod rules;

use super::{Action, Filter};

/// A place in the list of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(pub(super) usize);

/// A variable of the program, of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Variable {
    Ethertype,
    /// IP version.
    Version,
    Protocol,
    SourcePort,
    DestinationPort,
    /// Source address: four words, of which IPv4 uses one.
    Source,
    /// Destination address: four words, of which IPv4 uses one.
    Destination = Variable::Source as usize + 4,
    /// End of the IP packet by its length field, in bytes from the frame's start.
    End = Variable::Destination as usize + 4,
    /// 1 if the frame carries another packet or frame, which the filter does not parse, else 0.
    Carries,
}

/// Number of 32-bit words of all variables.
pub(super) const VARIABLES: usize = Variable::Carries as usize + 1;

/// Value of a variable whose property the frame does not have.
pub(super) const ABSENT: u32 = 0x1_0000;
/// Value of a variable whose property the frame may have, and does not show.
pub(super) const UNKNOWN: u32 = 0x2_0000;

/// Number of bytes of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Byte = 1,
    Half = 2,
    Word = 4,
}

/// A place in the frame, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// Offset from the frame's start.
    Start(u32),
    /// Offset from the index.
    Index(u32),
}

/// A step. `A` is the accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A = the number at a place. Jumps to the label if the frame ends before it.
    Load(Width, At, Label),
    /// A = the number at a place that an earlier step has found inside the frame. The label serves eBPF programs,
    /// in which each load needs its own check.
    LoadInside(Width, At, Label),
    /// Continues if the packet has that many bytes at a place, by [`Variable::End`]; else jumps to the label. A is
    /// undefined afterwards.
    InPacket(u32, At, Label),
    /// Continues if the frame has that many bytes at a place; else jumps to the label. A is undefined afterwards.
    InFrame(u32, At, Label),
    Set(u32),
    /// A = a word of a variable.
    Get(Variable, usize),
    /// A word of a variable = A.
    Put(Variable, usize),
    And(u32),
    ShiftLeft(u32),
    ShiftRight(u32),
    Add(u32),
    AddIndex,
    /// The index = A, which an earlier step has found to be less than [`MAX_OFFSET`](super::facts::MAX_OFFSET).
    ToIndex,
    IfEqual(u32, Label, Label),
    IfAtLeast(u32, Label, Label),
    Jump(Label),
    Place(Label),
    End(Action),
}

/// A list of steps, and the number of its labels.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) list: Vec<Step>,
    pub(super) labels: usize,
}

impl Filter {
    /// Returns the steps that check a frame as [`check`](Filter::check) does.
    pub(super) fn steps(&self) -> Steps {
        let mut steps = Steps::default();
        steps.read();
        let denies = self.rules.iter().position(|rule| rule.action == Action::Deny);
        for (place, rule) in self.rules.iter().enumerate() {
            // The first rule that denies drops every carrier, so only that rule tests for one.
            steps.rule(rule, denies == Some(place));
        }
        steps.add(Step::End(self.default));
        steps
    }
}

impl Steps {
    fn add(&mut self, step: Step) {
        self.list.push(step);
    }

    fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels - 1)
    }

    fn place(&mut self, label: Label) {
        self.add(Step::Place(label));
    }

    /// Jumps to `yes` if A is one of the values; else continues.
    fn if_one_of(&mut self, values: impl IntoIterator<Item = u32>, yes: Label) {
        for value in values {
            let no = self.label();
            self.add(Step::IfEqual(value, yes, no));
            self.place(no);
        }
    }

    fn put(&mut self, variable: Variable) {
        self.add(Step::Put(variable, 0));
    }

    fn get(&mut self, variable: Variable) {
        self.add(Step::Get(variable, 0));
    }
}
