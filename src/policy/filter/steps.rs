//! A filter as steps of a simple machine, which the kernel's two kinds of programs both are: an
//! accumulator, an index into the frame, variables, and jumps forward.
//!
//! Every load says where to go if the frame ends before that.

use ipnet::IpNet;

use super::facts::{
    ARP, AUTHENTICATION, CARRIERS, FRAGMENT, ICMP, ICMPV6, IP_CARRIERS, IPV4, IPV6, MAX_EXTENSIONS,
    MAX_OFFSET, MAX_TAGS, MIN_ETHERTYPE, OPTIONS, RARP, UNDERSTOOD, VLAN, WITH_PORTS, is_extension,
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
        let denies = self.rules.iter().position(|rule| rule.action == Action::Deny);
        for (place, rule) in self.rules.iter().enumerate() {
            // The first rule that denies drops every carrier, so only that rule tests for one.
            steps.rule(rule, denies == Some(place));
        }
        steps.add(Step::End(self.default));
        steps
    }
}

/// Places that several parts of [`Steps::read`] go to.
#[derive(Debug, Clone, Copy)]
struct Labels {
    /// The index is that of a header that begins with ports.
    behind_ipv4: Label,
    /// The index is that of a header behind IPv6's own.
    behind_ipv6: Label,
    /// The ethertype is neither IPv4's nor IPv6's.
    not_ip: Label,
    /// The protocol has no ports.
    no_ports: Label,
    done: Label,
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
        self.put(Variable::End);
        self.put(Variable::Carries);
        let [behind_ipv4, behind_ipv6, not_ip, no_ports, done] = [(); 5].map(|()| self.label());
        let labels = Labels { behind_ipv4, behind_ipv6, not_ip, no_ports, done };
        for tag in 0..=MAX_TAGS as u32 {
            let tagged = self.label();
            self.add(Step::Load(Width::Half, At::Start(12 + 4 * tag), done));
            self.if_one_of(VLAN.map(u32::from), tagged);
            self.packet(14 + 4 * tag, labels);
            self.place(tagged);
        }
        self.add(Step::Jump(done));
        self.place(behind_ipv6);
        self.extensions(labels);
        self.place(behind_ipv4);
        self.ports(At::Index(0), At::Index(2), done);
        self.without_ports(labels);
        self.place(done);
    }

    /// Handles frames without ports: first those that are not IP, then IP packets.
    fn without_ports(&mut self, Labels { not_ip, no_ports, done, .. }: Labels) {
        let [ethertype, carries, absent] = [(); 3].map(|()| self.label());
        self.place(not_ip);
        self.add(Step::Set(ABSENT));
        self.put(Variable::Version);
        self.put(Variable::Protocol);
        self.get(Variable::Ethertype);
        self.add(Step::IfAtLeast(MIN_ETHERTYPE.into(), ethertype, carries));
        self.place(ethertype);
        self.if_one_of(CARRIERS.map(u32::from), carries);
        self.add(Step::Jump(absent));
        self.place(no_ports);
        self.get(Variable::Protocol);
        self.if_one_of(IP_CARRIERS.map(u32::from), carries);
        self.add(Step::Jump(absent));
        self.place(carries);
        self.add(Step::Set(1));
        self.put(Variable::Carries);
        self.place(absent);
        self.add(Step::Set(ABSENT));
        self.put(Variable::SourcePort);
        self.put(Variable::DestinationPort);
        self.add(Step::Jump(done));
    }

    /// Reads the packet at `at`, whose ethertype is A.
    fn packet(&mut self, at: u32, labels: Labels) {
        let [ipv4, ipv6] = [(); 2].map(|()| self.label());
        self.put(Variable::Ethertype);
        self.if_one_of([u32::from(IPV4)], ipv4);
        self.if_one_of([u32::from(IPV6)], ipv6);
        self.add(Step::Jump(labels.not_ip));
        self.place(ipv4);
        self.ipv4(at, labels);
        self.place(ipv6);
        self.ipv6(at, labels);
    }

    fn ipv4(&mut self, at: u32, Labels { behind_ipv4, no_ports, done, .. }: Labels) {
        let [long_enough, too_short, with_ports, first, plain, options] =
            [(); 6].map(|()| self.label());
        self.version_is(4, at, done);
        self.add(Step::LoadInside(Width::Byte, At::Start(at), done));
        self.add(Step::And(0xf));
        self.add(Step::IfAtLeast(5, long_enough, too_short));
        self.place(too_short);
        self.add(Step::Jump(done));
        self.place(long_enough);
        self.add(Step::ShiftLeft(2));
        self.add(Step::Add(at));
        self.add(Step::ToIndex);
        self.add(Step::InFrame(20, At::Start(at), done));
        self.add(Step::LoadInside(Width::Half, At::Start(at + 2), done));
        self.add(Step::Add(at));
        self.put(Variable::End);
        self.add(Step::InPacket(0, At::Index(0), done));
        for (offset, variable) in [(16, Variable::Destination), (12, Variable::Source)] {
            self.add(Step::LoadInside(Width::Word, At::Start(at + offset), done));
            self.put(variable);
        }
        self.add(Step::Set(4));
        self.put(Variable::Version);
        self.add(Step::LoadInside(Width::Byte, At::Start(at + 9), done));
        self.put(Variable::Protocol);
        self.if_one_of(WITH_PORTS.map(u32::from), with_ports);
        self.add(Step::Jump(no_ports));
        self.place(with_ports);
        self.add(Step::LoadInside(Width::Half, At::Start(at + 6), done));
        self.add(Step::And(0x1fff));
        self.add(Step::IfEqual(0, first, done));
        self.place(first);
        self.add(Step::LoadInside(Width::Byte, At::Start(at), done));
        self.add(Step::And(0xf));
        self.add(Step::IfEqual(5, plain, options));
        self.place(options);
        self.add(Step::Jump(behind_ipv4));
        self.place(plain);
        self.ports(At::Start(at + 20), At::Start(at + 22), done);
    }

    fn ipv6(&mut self, at: u32, Labels { behind_ipv6, done, .. }: Labels) {
        let plain = self.label();
        self.version_is(6, at, done);
        self.add(Step::InFrame(40, At::Start(at), done));
        for word in (0..4).rev() {
            for (offset, variable) in [(24, Variable::Destination), (8, Variable::Source)] {
                let place = At::Start(at + offset + 4 * word);
                self.add(Step::LoadInside(Width::Word, place, done));
                self.add(Step::Put(variable, word as usize));
            }
        }
        self.add(Step::Set(6));
        self.put(Variable::Version);
        self.add(Step::LoadInside(Width::Half, At::Start(at + 4), done));
        self.add(Step::Add(at + 40));
        self.put(Variable::End);
        self.add(Step::Set(at + 40));
        self.add(Step::ToIndex);
        self.add(Step::LoadInside(Width::Byte, At::Start(at + 6), done));
        self.put(Variable::Protocol);
        self.if_one_of(WITH_PORTS.map(u32::from), plain);
        self.add(Step::Jump(behind_ipv6));
        self.place(plain);
        self.ports(At::Start(at + 40), At::Start(at + 42), done);
    }

    /// Goes over the headers of an IPv6 packet that begin at the index, of which the first one's
    /// number stands for the protocol.
    fn extensions(&mut self, Labels { behind_ipv4, no_ports, done, .. }: Labels) {
        let [last, fragment, unknown] = [(); 3].map(|()| self.label());
        for _ in 0..MAX_EXTENSIONS {
            self.extension(fragment, last, unknown);
        }
        // One more is one too many.
        self.place(last);
        self.get(Variable::Protocol);
        self.if_one_of((0..=u8::MAX).filter(|it| is_extension(*it)).map(u32::from), unknown);
        self.if_one_of(WITH_PORTS.map(u32::from), behind_ipv4);
        self.add(Step::Jump(no_ports));

        // A later fragment: if it is of a protocol with ports, these stay unknown.
        self.place(fragment);
        self.add(Step::LoadInside(Width::Byte, At::Index(0), unknown));
        self.put(Variable::Protocol);
        self.if_one_of((0..=u8::MAX).filter(|it| is_extension(*it)).map(u32::from), unknown);
        self.if_one_of(WITH_PORTS.map(u32::from), done);
        self.add(Step::Jump(no_ports));

        self.place(unknown);
        self.add(Step::Set(UNKNOWN));
        self.put(Variable::Protocol);
        self.add(Step::Jump(done));
    }

    /// Reads both ports, or neither.
    fn ports(&mut self, source: At, destination: At, done: Label) {
        self.within(2, destination, done);
        self.add(Step::LoadInside(Width::Half, destination, done));
        self.put(Variable::DestinationPort);
        self.add(Step::LoadInside(Width::Half, source, done));
        self.put(Variable::SourcePort);
        self.add(Step::Jump(done));
    }

    /// Goes on if both the packet and the frame have as many bytes at a place.
    fn within(&mut self, bytes: u32, at: At, otherwise: Label) {
        self.add(Step::InPacket(bytes, at, otherwise));
        self.add(Step::InFrame(bytes, at, otherwise));
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
        self.within(8, At::Index(0), unknown);
        self.add(Step::LoadInside(Width::Word, At::Index(4), unknown));
        self.add(Step::LoadInside(Width::Half, At::Index(2), unknown));
        self.add(Step::ShiftRight(3));
        self.add(Step::IfEqual(0, first, fragment));
        self.place(first);
        self.add(Step::LoadInside(Width::Byte, At::Index(0), unknown));
        self.put(Variable::Protocol);
        self.add(Step::Set(8));
        self.add(Step::Jump(skip));
        for (label, more, shift) in [(options, 1, 3), (authentication, 2, 2)] {
            self.place(label);
            self.within(2, At::Index(0), unknown);
            self.add(Step::LoadInside(Width::Byte, At::Index(0), unknown));
            self.put(Variable::Protocol);
            self.add(Step::LoadInside(Width::Byte, At::Index(1), unknown));
            self.add(Step::Add(more));
            self.add(Step::ShiftLeft(shift));
            self.add(Step::Jump(skip));
        }
        self.place(skip);
        self.add(Step::AddIndex);
        self.set_index(unknown);
    }

    /// Ends if the rule decides, else goes on. With `carriers` the rule also decides on every carrier.
    fn rule(&mut self, rule: &Rule, carriers: bool) {
        let [next, matched] = [(); 2].map(|()| self.label());
        let unknown = rule.action == Action::Deny;
        let ethertype = u32::from;
        if carriers {
            self.get(Variable::Carries);
            self.if_one_of([1], matched);
        }
        match rule.protocol {
            None => {}
            Some(Protocol::Ethertype(ARP)) if unknown => {
                let yes = self.label();
                self.get(Variable::Ethertype);
                self.if_one_of([UNKNOWN, ARP.into()], yes);
                self.add(Step::IfEqual(RARP.into(), yes, next));
                self.place(yes);
            }
            Some(Protocol::Other) => {
                self.get(Variable::Ethertype);
                self.if_one_of(UNDERSTOOD.map(u32::from), next);
                if !unknown {
                    self.if_one_of([UNKNOWN], next);
                }
            }
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
        self.place(matched);
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
