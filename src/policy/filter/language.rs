//! A filter as text: `allow|deny` and what a frame must be, by `;`, and `default allow|deny` last.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::{FromStr, SplitWhitespace};

use ipnet::IpNet;
use serde::Deserialize;

use super::{Action, Filter, MAX_RULES, Ports, Protocol, Rule};
use crate::frame::ethertype::{ARP, IPV4, IPV6, MIN as MIN_ETHERTYPE, is_vlan_tag};
use crate::frame::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP, WITH_PORTS, is_extension};

/// A filter as a file has it: in one string, or in a list of parts.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a filter is a string, or a list of strings")]
pub(super) enum Text {
    Whole(String),
    Parts(Vec<String>),
}

impl TryFrom<Text> for Filter {
    type Error = String;

    fn try_from(text: Text) -> Result<Self, String> {
        match text {
            Text::Whole(text) => text.parse(),
            Text::Parts(parts) => parts.join(";").parse(),
        }
    }
}

impl From<Filter> for String {
    fn from(filter: Filter) -> Self {
        filter.to_string()
    }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(';').map(str::trim).filter(|part| !part.is_empty()).peekable();
        let (mut rules, mut default) = (Vec::new(), None);
        if parts.next_if_eq(&"none").is_some() {
            default = Some(Action::Allow);
        }
        for part in parts {
            if default.is_some() {
                return Err(format!("'{part}' comes behind the end: 'default …' is the last"));
            }
            let mut words = part.split_whitespace();
            match words.next().unwrap_or_default() {
                "default" => {
                    default = Some(action(words.next().unwrap_or_default())?);
                    no_more(words)?;
                }
                first => rules.push(rule(action(first)?, words)?),
            }
            if rules.len() > MAX_RULES {
                return Err(format!("'{part}' is one rule more than {MAX_RULES}"));
            }
        }
        let default =
            default.ok_or("it ends with 'default allow' or 'default deny', or is 'none'")?;
        Ok(Filter { rules, default })
    }
}

fn action(word: &str) -> Result<Action, String> {
    match word {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        "" => Err("'default' is followed by allow or deny".into()),
        _ => Err(format!("'{word}' is none of allow, deny and default")),
    }
}

fn no_more(mut words: SplitWhitespace<'_>) -> Result<(), String> {
    words.next().map_or(Ok(()), |word| Err(format!("'{word}' comes behind the end")))
}

fn rule(action: Action, words: SplitWhitespace<'_>) -> Result<Rule, String> {
    let mut words = words.peekable();
    if words.peek().is_none() {
        return Err(format!("'{action}' is followed by nothing: what is to be matched?"));
    }
    let mut rule = Rule {
        action,
        protocol: None,
        from: None,
        to: None,
        source_port: None,
        destination_port: None,
    };
    let mut named = None;
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("'{word}' is followed by nothing"));
        let again = match word {
            "from" => rule.from.replace(prefix(value()?)?).is_some(),
            "to" => rule.to.replace(prefix(value()?)?).is_some(),
            "sport" => rule.source_port.replace(ports(value()?)?).is_some(),
            "dport" => rule.destination_port.replace(ports(value()?)?).is_some(),
            _ => {
                let protocol = match word {
                    "proto" => protocol(value()?)?,
                    "ethertype" => ethertype(value()?)?,
                    _ => by_name(word).ok_or_else(|| {
                        format!(
                            "'{word}' is none of tcp, udp, icmp, icmp6, sctp, ip, ip6, arp, other, \
                             proto, ethertype, from, to, sport and dport"
                        )
                    })?,
                };
                named = Some(word);
                rule.protocol.replace(protocol).is_some()
            }
        };
        if again {
            return Err(format!("'{word}' is one too many in a rule"));
        }
    }
    agrees(&rule, named.unwrap_or_default())?;
    Ok(rule)
}

/// Whether there are frames that a rule for the protocol `named` so can match.
fn agrees(rule: &Rule, named: &str) -> Result<(), String> {
    let has_ports = match rule.protocol {
        None => true,
        Some(Protocol::Ip(number)) => WITH_PORTS.contains(&number),
        Some(_) => false,
    };
    if !has_ports && (rule.source_port.is_some() || rule.destination_port.is_some()) {
        return Err(format!("'{named}' has no ports: sport and dport go with tcp, udp and sctp"));
    }
    let version = |net: &IpNet| if net.addr().is_ipv4() { "IPv4" } else { "IPv6" };
    let carrier = match rule.protocol {
        Some(Protocol::Ethertype(IPV4) | Protocol::Icmp) => Some("IPv4"),
        Some(Protocol::Ethertype(IPV6) | Protocol::Icmp6) => Some("IPv6"),
        Some(Protocol::Ethertype(_) | Protocol::Other) => Some("not IP"),
        Some(Protocol::Ip(_)) | None => rule.from.as_ref().map(version),
    };
    let mut nets = rule.from.iter().chain(&rule.to);
    match (carrier, nets.find(|net| carrier.is_some_and(|carrier| carrier != version(net)))) {
        (Some(carrier), Some(net)) => {
            Err(format!("'{net}' matches nothing in a rule for what is {carrier}"))
        }
        _ => Ok(()),
    }
}

/// Protocols that have names.
const NAMES: [(&str, Protocol); 9] = [
    ("tcp", Protocol::Ip(TCP)),
    ("udp", Protocol::Ip(UDP)),
    ("sctp", Protocol::Ip(SCTP)),
    ("icmp", Protocol::Icmp),
    ("icmp6", Protocol::Icmp6),
    ("ip", Protocol::Ethertype(IPV4)),
    ("ip6", Protocol::Ethertype(IPV6)),
    ("arp", Protocol::Ethertype(ARP)),
    ("other", Protocol::Other),
];

fn by_name(word: &str) -> Option<Protocol> {
    NAMES.iter().find(|(name, _)| *name == word).map(|(_, protocol)| *protocol)
}

fn protocol(word: &str) -> Result<Protocol, String> {
    match word.parse() {
        Ok(number) if is_extension(number) => {
            Err(format!("'{word}' is a header that others follow in IPv6, which is looked behind"))
        }
        // In the other version of IP they are not what they are called.
        Ok(ICMP | ICMPV6) => Err(format!("'{word}' is written icmp or icmp6")),
        Ok(number) => Ok(Protocol::Ip(number)),
        Err(_) => Err(format!("'{word}' is no number of an IP protocol, which is 0 to 255")),
    }
}

fn ethertype(word: &str) -> Result<Protocol, String> {
    let number = match word.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => word.parse(),
    };
    match number {
        Ok(number) if is_vlan_tag(number) => {
            Err(format!("'{word}' is a VLAN tag, which is looked behind"))
        }
        Ok(number) if number >= MIN_ETHERTYPE => Ok(Protocol::Ethertype(number)),
        _ => Err(format!("'{word}' is no ethertype: write 0x{MIN_ETHERTYPE:04x} to 0xffff")),
    }
}

fn prefix(word: &str) -> Result<IpNet, String> {
    let parsed = word.parse().ok().or_else(|| word.parse::<IpAddr>().ok().map(IpNet::from));
    parsed.map(|net: IpNet| net.trunc()).ok_or_else(|| {
        format!("'{word}' is no IP address or prefix: write 192.0.2.5 or 2001:db8::/64")
    })
}

fn ports(word: &str) -> Result<Ports, String> {
    let wrong = || format!("'{word}' is no port, and no range of ports: write 53 or 1000-2000");
    let number = |text: &str| text.parse().map_err(|_| wrong());
    let (first, last) = match word.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(word)?, number(word)?),
    };
    if first > last { Err(wrong()) } else { Ok(Ports { first, last }) }
}

impl Ports {
    pub(super) fn range(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Allow => "allow",
            Action::Deny => "deny",
        })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (NAMES.iter().find(|(_, protocol)| protocol == self), self) {
            (Some((name, _)), _) => f.write_str(name),
            (None, Protocol::Ip(number)) => write!(f, "proto {number}"),
            (None, Protocol::Ethertype(number)) => write!(f, "ethertype 0x{number:04x}"),
            (None, Protocol::Icmp | Protocol::Icmp6 | Protocol::Other) => Ok(()),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        if let Some(protocol) = self.protocol {
            write!(f, " {protocol}")?;
        }
        for (word, ports) in [("sport", self.source_port), ("dport", self.destination_port)] {
            if let Some(ports) = ports {
                write!(f, " {word} {ports}")?;
            }
        }
        for (word, net) in [("from", self.from), ("to", self.to)] {
            match net {
                Some(net) if net.prefix_len() == net.max_prefix_len() => {
                    write!(f, " {word} {}", net.addr())?;
                }
                Some(net) => write!(f, " {word} {net}")?,
                None => {}
            }
        }
        Ok(())
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        for rule in &self.rules {
            write!(f, "{rule}; ")?;
        }
        write!(f, "default {}", self.default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_shown_as_it_is_read() {
        for text in [
            "none",
            "default deny",
            "deny tcp dport 25; allow udp dport 1000-2000 from 192.0.2.0/24; deny icmp; \
             default allow",
            "deny other; default allow",
            "allow ip6 from 2001:db8::/32 to ff00::/8; allow arp; allow proto 89 to 224.0.0.5; \
             deny ethertype 0x88cc; allow sport 53; deny sctp sport 1 dport 2; deny icmp6; \
             default deny",
        ] {
            let filter: Filter = text.parse().unwrap();
            assert_eq!(filter.to_string(), text);
            assert_eq!(filter.to_string().parse(), Ok(filter));
        }
    }

    #[test]
    fn what_means_the_same_is_shown_the_same() {
        for (text, shown) in [
            ("default allow", "none"),
            (
                " ; deny  proto 6 to 192.0.2.5/24 ;default allow;",
                "deny tcp to 192.0.2.0/24; default allow",
            ),
            ("allow ethertype 2048; default deny", "allow ip; default deny"),
            ("allow from 192.0.2.1/32; default deny", "allow from 192.0.2.1; default deny"),
        ] {
            assert_eq!(text.parse::<Filter>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_word() {
        let many = "deny arp;".repeat(MAX_RULES + 1) + "default allow";
        for (text, named) in [
            ("", "'default allow'"),
            ("deny tcp", "'default allow'"),
            ("drop tcp; default allow", "'drop'"),
            ("deny tpc; default allow", "'tpc'"),
            ("deny; default allow", "'deny'"),
            ("deny tcp udp; default allow", "'udp'"),
            ("deny tcp dport; default allow", "'dport'"),
            ("deny tcp dport 65536; default allow", "'65536'"),
            ("deny tcp dport 9-8; default allow", "'9-8'"),
            ("deny tcp dport 8 dport 9; default allow", "'dport'"),
            ("deny icmp dport 8; default allow", "'icmp'"),
            ("deny proto 89 dport 8; default allow", "'proto'"),
            ("deny proto 256; default allow", "'256'"),
            ("deny proto 44; default allow", "'44'"),
            ("deny proto 1; default allow", "'1'"),
            ("deny ethertype 0x5ff; default allow", "'0x5ff'"),
            ("deny ethertype 0x8100; default allow", "'0x8100'"),
            ("deny from 192.0.2.0/33; default allow", "'192.0.2.0/33'"),
            ("deny arp from 192.0.2.0; default allow", "'192.0.2.0/32'"),
            ("deny other to 192.0.2.0; default allow", "'192.0.2.0/32'"),
            ("deny other dport 8; default allow", "'other'"),
            ("deny icmp from ::1; default allow", "'::1/128'"),
            ("deny from 192.0.2.0 to ::1; default allow", "'::1/128'"),
            ("default", "'default'"),
            ("default maybe", "'maybe'"),
            ("default deny now", "'now'"),
            ("default deny; deny arp", "'deny arp'"),
            ("none; deny arp", "'deny arp'"),
            (&many, "more than 64"),
        ] {
            let error = text.parse::<Filter>().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
