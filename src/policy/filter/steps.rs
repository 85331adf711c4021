//! A filter as steps of a simple machine, which the kernel's two kinds of programs both are: an
//! accumulator, an index into the frame, variables, and jumps forward.
//!
//! Every load says where to go if the frame ends before that. `reading` puts into variables what the frame
//! shows, `rules` compares these.

mod reading;
mod rules;

use super::{Action, Filter};

/// A place in the list of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(pub(super) usize);

/// A number that the program keeps, of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Variable {
    Ethertype,
    /// Version of IP.
    Version,
    Protocol,
    SourcePort,
    DestinationPort,
    /// Four words of each address: IPv4 has one.
    Source,
    Destination = Variable::Source as usize + 4,
    /// End of the IP packet by its length field, in bytes from the frame's start.
    End = Variable::Destination as usize + 4,
    /// 1 if another packet or frame follows, which nobody looks at, else 0.
    Carries,
}

/// How many numbers there are.
pub(super) const VARIABLES: usize = Variable::Carries as usize + 1;

/// What stands in a variable that the frame has not, and that it may have, and does not show.
pub(super) const ABSENT: u32 = 0x1_0000;
pub(super) const UNKNOWN: u32 = 0x2_0000;

/// Bytes of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Byte = 1,
    Half = 2,
    Word = 4,
}

/// A place in the frame, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// From its start.
    Start(u32),
    /// From the index.
    Index(u32),
}

/// A step. `A` is the accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A = the number at a place, if the frame has it.
    Load(Width, At, Label),
    /// The same, where an earlier step has seen that the frame has it. The label is for programs
    /// that must show that once more.
    LoadInside(Width, At, Label),
    /// Goes on if the packet has as many bytes at a place, by [`Variable::End`], else to the label.
    /// It leaves any number in A.
    InPacket(u32, At, Label),
    /// The same of the frame. It leaves any number in A.
    InFrame(u32, At, Label),
    Set(u32),
    /// A = a variable, and back. Addresses have four words.
    Get(Variable, usize),
    Put(Variable, usize),
    And(u32),
    ShiftLeft(u32),
    ShiftRight(u32),
    Add(u32),
    AddIndex,
    /// The index = A, which was seen to be less than [`MAX_OFFSET`](super::facts::MAX_OFFSET).
    ToIndex,
    IfEqual(u32, Label, Label),
    IfAtLeast(u32, Label, Label),
    Jump(Label),
    Place(Label),
    End(Action),
}

/// Steps, and how many labels there are.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) list: Vec<Step>,
    pub(super) labels: usize,
}

impl Filter {
    /// The steps that judge a frame as this filter does.
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

    /// Goes to `yes` if A is one of these, else on.
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
