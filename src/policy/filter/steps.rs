//! A filter as steps of a simple machine, which the kernel's two kinds of programs both are: an
//! accumulator, an index into the frame, variables, and jumps forward.
//!
//! Every load says where to go if the frame ends before that.

use ipnet::IpNet;

use super::facts::{
    AUTHENTICATION, FRAGMENT, ICMP, ICMPV6, IPV4, IPV6, MAX_EXTENSIONS, MAX_OFFSET, MAX_TAGS,
    OPTIONS, VLAN, WITH_PORTS, is_extension,
};
use super::{Action, Filter, Ports, Protocol, Rule};

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
}

/// How many numbers there are.
pub(super) const VARIABLES: usize = Variable::Destination as usize + 4;

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
    Set(u32),
    /// A = a variable, and back. Addresses have four words.
    Get(Variable, usize),
    Put(Variable, usize),
    And(u32),
    ShiftLeft(u32),
    ShiftRight(u32),
    Add(u32),
    AddIndex,
    /// The index = A, which was seen to be less than [`MAX_OFFSET`].
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
        for rule in &self.rules {
            steps.rule(rule);
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

    /// Sets the index to A, unless it is too far.
    fn set_index(&mut self, too_far: Label) {
        let near = self.label();
        self.add(Step::IfAtLeast(MAX_OFFSET as u32, too_far, near));
        self.place(near);
        self.add(Step::ToIndex);
    }

    /// Reads the frame into the variables, as `Facts` does. What most frames are is read at places
    /// that are known beforehand.
    fn read(&mut self) {
        self.add(Step::Set(UNKNOWN));
        for variable in [
            Variable::Ethertype,
            Variable::Version,
            Variable::Protocol,
            Variable::SourcePort,
            Variable::DestinationPort,
        ] {
            self.put(variable);
        }
        self.add(Step::Set(0));
        for word in 0..4 {
            self.add(Step::Put(Variable::Source, word));
            self.add(Step::Put(Variable::Destination, word));
        }
        let [behind_ipv4, behind_ipv6, done] = [(); 3].map(|()| self.label());
        for tag in 0..=MAX_TAGS as u32 {
            let tagged = self.label();
            self.add(Step::Load(Width::Half, At::Start(12 + 4 * tag), done));
            self.if_one_of(VLAN.map(u32::from), tagged);
            self.packet(14 + 4 * tag, behind_ipv4, behind_ipv6, done);
            self.place(tagged);
        }
        self.add(Step::Jump(done));
        self.place(behind_ipv6);
        self.extensions(behind_ipv4, done);
        self.place(behind_ipv4);
        self.ports(At::Index(0), At::Index(2), done);
        self.place(done);
    }

    /// Reads the packet at `at`, whose ethertype is A.
    fn packet(&mut self, at: u32, behind_ipv4: Label, behind_ipv6: Label, done: Label) {
        let [ipv4, ipv6] = [(); 2].map(|()| self.label());
        self.put(Variable::Ethertype);
        self.if_one_of([u32::from(IPV4)], ipv4);
        self.if_one_of([u32::from(IPV6)], ipv6);
        self.add(Step::Set(ABSENT));
        self.put(Variable::Version);
        self.put(Variable::Protocol);
        self.absent_ports(done);
        self.place(ipv4);
        self.ipv4(at, behind_ipv4, done);
        self.place(ipv6);
        self.ipv6(at, behind_ipv6, done);
    }

    fn ipv4(&mut self, at: u32, transport: Label, done: Label) {
        let [long_enough, too_short, with_ports, first, plain, options] =
            [(); 6].map(|()| self.label());
        self.version_is(4, at, done);
        self.add(Step::Load(Width::Byte, At::Start(at), done));
        self.add(Step::And(0xf));
        self.add(Step::IfAtLeast(5, long_enough, too_short));
        self.place(too_short);
        self.add(Step::Jump(done));
        self.place(long_enough);
        // The last word first: all of the header is there.
        for (offset, variable) in [(16, Variable::Destination), (12, Variable::Source)] {
            self.add(Step::Load(Width::Word, At::Start(at + offset), done));
            self.put(variable);
        }
        self.add(Step::Set(4));
        self.put(Variable::Version);
        self.add(Step::Load(Width::Byte, At::Start(at + 9), done));
        self.put(Variable::Protocol);
        self.if_one_of(WITH_PORTS.map(u32::from), with_ports);
        self.absent_ports(done);
        self.place(with_ports);
        self.add(Step::Load(Width::Half, At::Start(at + 6), done));
        self.add(Step::And(0x1fff));
        self.add(Step::IfEqual(0, first, done));
        self.place(first);
        self.add(Step::Load(Width::Byte, At::Start(at), done));
        self.add(Step::And(0xf));
        self.add(Step::IfEqual(5, plain, options));
        self.place(options);
        self.add(Step::ShiftLeft(2));
        self.add(Step::Add(at));
        self.add(Step::ToIndex);
        self.add(Step::Jump(transport));
        self.place(plain);
        self.ports(At::Start(at + 20), At::Start(at + 22), done);
    }

    fn ipv6(&mut self, at: u32, behind: Label, done: Label) {
        let plain = self.label();
        self.version_is(6, at, done);
        // The last word first: all of the header is there.
        for word in (0..4).rev() {
            for (offset, variable) in [(24, Variable::Destination), (8, Variable::Source)] {
                let place = At::Start(at + offset + 4 * word);
                self.add(Step::Load(Width::Word, place, done));
                self.add(Step::Put(variable, word as usize));
            }
        }
        self.add(Step::Set(6));
        self.put(Variable::Version);
        self.add(Step::Set(at + 40));
        self.add(Step::ToIndex);
        self.add(Step::Load(Width::Byte, At::Start(at + 6), done));
        self.put(Variable::Protocol);
        self.if_one_of(WITH_PORTS.map(u32::from), plain);
        self.add(Step::Jump(behind));
        self.place(plain);
        self.ports(At::Start(at + 40), At::Start(at + 42), done);
    }

    /// Goes over the headers of an IPv6 packet that begin at the index, of which the first one's
    /// number stands for the protocol.
    fn extensions(&mut self, transport: Label, done: Label) {
        let [last, fragment, unknown] = [(); 3].map(|()| self.label());
        for _ in 0..MAX_EXTENSIONS {
            self.extension(fragment, last, unknown);
        }
        // One more is one too many.
        self.place(last);
        self.get(Variable::Protocol);
        self.if_one_of((0..=u8::MAX).filter(|it| is_extension(*it)).map(u32::from), unknown);
        self.if_one_of(WITH_PORTS.map(u32::from), transport);
        self.absent_ports(done);

        // A later fragment: if it is of a protocol with ports, these stay unknown.
        self.place(fragment);
        self.add(Step::Load(Width::Byte, At::Index(0), unknown));
        self.put(Variable::Protocol);
        self.if_one_of((0..=u8::MAX).filter(|it| is_extension(*it)).map(u32::from), unknown);
        self.if_one_of(WITH_PORTS.map(u32::from), done);
        self.absent_ports(done);

        self.place(unknown);
        self.add(Step::Set(UNKNOWN));
        self.put(Variable::Protocol);
        self.add(Step::Jump(done));
    }

    fn absent_ports(&mut self, done: Label) {
        self.add(Step::Set(ABSENT));
        self.put(Variable::SourcePort);
        self.put(Variable::DestinationPort);
        self.add(Step::Jump(done));
    }

    /// Reads both ports, or neither.
    fn ports(&mut self, source: At, destination: At, done: Label) {
        self.add(Step::Load(Width::Half, destination, done));
        self.put(Variable::DestinationPort);
        self.add(Step::Load(Width::Half, source, done));
        self.put(Variable::SourcePort);
        self.add(Step::Jump(done));
    }

    /// Goes on if the packet at `at` is of this version of IP.
    fn version_is(&mut self, version: u32, at: u32, otherwise: Label) {
        let yes = self.label();
        self.add(Step::Load(Width::Byte, At::Start(at), otherwise));
        self.add(Step::ShiftRight(4));
        self.add(Step::IfEqual(version, yes, otherwise));
        self.place(yes);
    }

    /// Goes over one extension header, if there is one, and to `last` if not.
    fn extension(&mut self, fragment: Label, last: Label, unknown: Label) {
        let [options, authentication, is_fragment, first, skip] = [(); 5].map(|()| self.label());
        self.get(Variable::Protocol);
        self.if_one_of(OPTIONS.map(u32::from), options);
        self.if_one_of([u32::from(AUTHENTICATION)], authentication);
        self.add(Step::IfEqual(u32::from(FRAGMENT), is_fragment, last));
        self.place(is_fragment);
        // All of it is there.
        self.add(Step::Load(Width::Word, At::Index(4), unknown));
        self.add(Step::Load(Width::Half, At::Index(2), unknown));
        self.add(Step::ShiftRight(3));
        self.add(Step::IfEqual(0, first, fragment));
        self.place(first);
        self.add(Step::Load(Width::Byte, At::Index(0), unknown));
        self.put(Variable::Protocol);
        self.add(Step::Set(8));
        self.add(Step::Jump(skip));
        for (label, more, shift) in [(options, 1, 3), (authentication, 2, 2)] {
            self.place(label);
            self.add(Step::Load(Width::Byte, At::Index(0), unknown));
            self.put(Variable::Protocol);
            self.add(Step::Load(Width::Byte, At::Index(1), unknown));
            self.add(Step::Add(more));
            self.add(Step::ShiftLeft(shift));
            self.add(Step::Jump(skip));
        }
        self.place(skip);
        self.add(Step::AddIndex);
        self.set_index(unknown);
    }

    /// Ends if the rule decides, else goes on.
    fn rule(&mut self, rule: &Rule) {
        let next = self.label();
        let unknown = rule.action == Action::Deny;
        let ethertype = u32::from;
        match rule.protocol {
            None => {}
            Some(Protocol::Ethertype(wanted)) => {
                self.require(Variable::Ethertype, ethertype(wanted), unknown, next);
            }
            Some(Protocol::Icmp) => {
                self.require(Variable::Version, 4, unknown, next);
                self.require(Variable::Protocol, ICMP.into(), unknown, next);
            }
            Some(Protocol::Icmp6) => {
                self.require(Variable::Version, 6, unknown, next);
                self.require(Variable::Protocol, ICMPV6.into(), unknown, next);
            }
            Some(Protocol::Ip(wanted)) => {
                self.require(Variable::Protocol, wanted.into(), unknown, next);
            }
        }
        for (net, variable) in [(rule.from, Variable::Source), (rule.to, Variable::Destination)] {
            if let Some(net) = net {
                self.require_within(net, variable, unknown, next);
            }
        }
        for (ports, variable) in [
            (rule.source_port, Variable::SourcePort),
            (rule.destination_port, Variable::DestinationPort),
        ] {
            if let Some(ports) = ports {
                self.require_port(ports, variable, unknown, next);
            }
        }
        self.add(Step::End(rule.action));
        self.place(next);
    }

    /// Goes on if the variable has the value, or is unknown and that counts; else to `no`.
    fn require(&mut self, variable: Variable, value: u32, unknown: bool, no: Label) {
        let yes = self.label();
        self.get(variable);
        if unknown {
            self.if_one_of([UNKNOWN], yes);
        }
        self.add(Step::IfEqual(value, yes, no));
        self.place(yes);
    }

    fn require_port(&mut self, ports: Ports, variable: Variable, unknown: bool, no: Label) {
        let [yes, from_first] = [(); 2].map(|()| self.label());
        let (first, last) = (u32::from(*ports.range().start()), u32::from(*ports.range().end()));
        self.get(variable);
        if unknown {
            self.if_one_of([UNKNOWN], yes);
        }
        if first == last {
            self.add(Step::IfEqual(first, yes, no));
        } else {
            self.add(Step::IfAtLeast(first, from_first, no));
            self.place(from_first);
            self.add(Step::IfAtLeast(last + 1, no, yes));
        }
        self.place(yes);
    }

    fn require_within(&mut self, net: IpNet, variable: Variable, unknown: bool, no: Label) {
        let [yes, version] = [(); 2].map(|()| self.label());
        let (wanted, words, mask) = match net {
            IpNet::V4(net) => {
                let words = [net.network().to_bits(), 0, 0, 0];
                (4, words, [net.netmask().to_bits(), 0, 0, 0])
            }
            IpNet::V6(net) => (6, words(net.network().to_bits()), words(net.netmask().to_bits())),
        };
        self.get(Variable::Version);
        if unknown {
            self.if_one_of([UNKNOWN], yes);
        }
        self.add(Step::IfEqual(wanted, version, no));
        self.place(version);
        for (word, mask) in mask.into_iter().enumerate().filter(|(_, mask)| *mask != 0) {
            let same = self.label();
            self.add(Step::Get(variable, word));
            if mask != u32::MAX {
                self.add(Step::And(mask));
            }
            self.add(Step::IfEqual(words[word], same, no));
            self.place(same);
        }
        self.place(yes);
    }
}

fn words(bits: u128) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
}
