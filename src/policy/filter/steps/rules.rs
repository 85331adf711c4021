//! A filter's rules: each compares the variables with what it is about.

use ipnet::IpNet;

use super::{Label, Step, Steps, UNKNOWN, Variable};
use crate::frame::{ethertype, protocol};
use crate::policy::filter::facts::UNDERSTOOD;
use crate::policy::filter::{Action, Ports, Protocol, Rule};

impl Steps {
    /// Ends if the rule decides, else goes on. With `carriers` the rule also decides on every carrier.
    pub(super) fn rule(&mut self, rule: &Rule, carriers: bool) {
        let [next, matched] = [(); 2].map(|()| self.label());
        let unknown = rule.action == Action::Deny;
        if carriers {
            self.get(Variable::Carries);
            self.if_one_of([1], matched);
        }
        match rule.protocol {
            None => {}
            Some(Protocol::Ethertype(ethertype::ARP)) if unknown => {
                let yes = self.label();
                self.get(Variable::Ethertype);
                self.if_one_of([UNKNOWN, ethertype::ARP.into()], yes);
                self.add(Step::IfEqual(ethertype::RARP.into(), yes, next));
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
                self.require(Variable::Ethertype, wanted.into(), unknown, next);
            }
            Some(Protocol::Icmp) => {
                self.require(Variable::Version, 4, unknown, next);
                self.require(Variable::Protocol, protocol::ICMP.into(), unknown, next);
            }
            Some(Protocol::Icmp6) => {
                self.require(Variable::Version, 6, unknown, next);
                self.require(Variable::Protocol, protocol::ICMPV6.into(), unknown, next);
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
