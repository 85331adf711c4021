//! Assembly of BPF programs: instructions, and jumps to labels that are placed later.

/// Target of jumps in a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A program under construction, to whose end instructions are added.
#[derive(Debug, Default)]
pub struct Assembly {
    code: Vec<u64>,
    /// Index of the instruction at each label; `usize::MAX` until the label is placed.
    places: Vec<usize>,
    /// Index and target of each jump instruction.
    jumps: Vec<(usize, Label)>,
}

impl Assembly {
    /// Creates a label. The caller must [`place`](Self::place) it.
    pub fn label(&mut self) -> Label {
        self.places.push(usize::MAX);
        Label(self.places.len() - 1)
    }

    /// Adds an instruction.
    pub fn push(&mut self, instruction: u64) {
        self.code.push(instruction);
    }

    /// Adds instructions. Jumps among them have their final distance.
    pub fn extend(&mut self, instructions: impl IntoIterator<Item = u64>) {
        self.code.extend(instructions);
    }

    /// Adds a jump to a label. `instruction` must have the distance 0.
    pub fn jump(&mut self, to: Label, instruction: u64) {
        self.jumps.push((self.code.len(), to));
        self.push(instruction);
    }

    /// Places a label before the next instruction.
    pub fn place(&mut self, label: Label) {
        self.places[label.0] = self.code.len();
    }

    /// Resolves all jumps, and returns the instructions.
    ///
    /// # Panics
    /// If a jump goes backwards, to an unplaced label, or over more than 32767 instructions.
    pub fn finish(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let skip =
                self.places[label.0].checked_sub(at + 1).and_then(|it| i16::try_from(it).ok());
            let skip = skip.expect("jumps go forward, by at most 32767 instructions");
            self.code[at] |= u64::from(skip as u16) << 16;
        }
        self.code
    }
}
