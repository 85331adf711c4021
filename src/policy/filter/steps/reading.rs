//! What the frame shows, put into variables: the headers' part of a filter, the same for all filters.

use super::{ABSENT, At, Label, Step, Steps, UNKNOWN, Variable, Width};
use crate::frame::protocol::{AUTHENTICATION, FRAGMENT, OPTIONS, WITH_PORTS, is_extension};
use crate::frame::{ethertype, protocol};
use crate::policy::filter::facts::{MAX_EXTENSIONS, MAX_OFFSET, MAX_TAGS};

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
    /// Sets the index to A, unless it is too far.
    fn set_index(&mut self, too_far: Label) {
        let near = self.label();
        self.add(Step::IfAtLeast(MAX_OFFSET as u32, too_far, near));
        self.place(near);
        self.add(Step::ToIndex);
    }

    /// Reads the frame into the variables, as `Facts` does. What most frames are is read at places
    /// that are known beforehand.
    pub(super) fn read(&mut self) {
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
            self.if_one_of(ethertype::VLAN_TAGS.map(u32::from), tagged);
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
        self.add(Step::IfAtLeast(ethertype::MIN.into(), ethertype, carries));
        self.place(ethertype);
        self.if_one_of(ethertype::CARRIERS.map(u32::from), carries);
        self.add(Step::Jump(absent));
        self.place(no_ports);
        self.get(Variable::Protocol);
        self.if_one_of(protocol::CARRIERS.map(u32::from), carries);
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
        self.if_one_of([u32::from(ethertype::IPV4)], ipv4);
        self.if_one_of([u32::from(ethertype::IPV6)], ipv6);
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
}
