//! Instructions with jumps to places that have no number yet.

/// A place in a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A program that grows at its end.
#[derive(Debug, Default)]
pub struct Assembly {
    code: Vec<u64>,
    /// Where each label is.
    places: Vec<usize>,
    /// Instructions that jump, and where to.
    jumps: Vec<(usize, Label)>,
}

impl Assembly {
    /// A label, which is to be placed.
    pub fn label(&mut self) -> Label {
        self.places.push(usize::MAX);
        Label(self.places.len() - 1)
    }

    /// Adds an instruction.
    pub fn push(&mut self, instruction: u64) {
        self.code.push(instruction);
    }

    /// Adds instructions, among which jumps skip as many as they say.
    pub fn extend(&mut self, instructions: impl IntoIterator<Item = u64>) {
        self.code.extend(instructions);
    }

    /// Adds a jump that says that it skips none, and goes to the label instead.
    pub fn jump(&mut self, to: Label, instruction: u64) {
        self.jumps.push((self.code.len(), to));
        self.push(instruction);
    }

    /// What comes next is where the label is.
    pub fn place(&mut self, label: Label) {
        self.places[label.0] = self.code.len();
    }

    /// The instructions.
    ///
    /// # Panics
    /// If a jump goes back, to no place, or over more than 32767 instructions.
    pub fn finish(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let skip =
                self.places[label.0].checked_sub(at + 1).and_then(|it| i16::try_from(it).ok());
            let skip = skip.expect("a jump goes on, and not far");
            self.code[at] |= u64::from(skip as u16) << 16;
        }
        self.code
    }
}
