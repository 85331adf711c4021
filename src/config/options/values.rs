//! Types of options' values, in the notation of the command line and the file.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Parses `on` or `off`.
pub(super) fn on_or_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["on", "off"]).map(|text| text == "on")
}

/// A list as one word of the command line: `a,b`, or `none`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct List<T>(pub(super) Vec<T>);

impl<T: FromStr<Err: fmt::Display>> FromStr for List<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(List(Vec::new()));
        }
        let parse = |item: &str| item.parse().map_err(|error| format!("'{item}': {error}"));
        text.split(',').map(parse).collect::<Result<_, _>>().map(List)
    }
}

/// IP addresses, as `192.0.2.5` or `2001:db8::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Prefix(pub(super) IpNet);

impl From<Prefix> for String {
    fn from(Prefix(net): Prefix) -> Self {
        net.to_string()
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        parsed.map(Prefix).ok_or_else(|| {
            format!("'{text}' is not an IP address or prefix; write 192.0.2.5 or 2001:db8::/64")
        })
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Number of bytes, as `512m`, `64g` or `1t`; k, m, g and t are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct ByteSize(pub(super) u64);

/// Letters for powers of 1024, largest first, with their shifts in bits.
const BYTE_UNITS: [(char, u32); 4] = [('t', 40), ('g', 30), ('m', 20), ('k', 10)];

impl From<ByteSize> for String {
    fn from(ByteSize(bytes): ByteSize) -> Self {
        let fits = |(_, shift): &&(char, u32)| bytes.is_multiple_of(1 << shift);
        match BYTE_UNITS.iter().find(fits) {
            Some((letter, shift)) => format!("{}{letter}", bytes >> shift),
            None => bytes.to_string(),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let unit = BYTE_UNITS.iter().find(|(letter, _)| lower.ends_with(*letter));
        let (digits, shift) =
            unit.map_or((&lower[..], 0), |(_, shift)| (&lower[..lower.len() - 1], *shift));
        let number = digits.parse::<u64>().ok().filter(|number| *number > 0);
        number
            .and_then(|number| number.checked_mul(1 << shift))
            .map(ByteSize)
            .ok_or_else(|| format!("'{text}' is not a size in bytes; write 512m, 64g or 1t"))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A list of CPUs, as `2,4-7`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct CpuList(pub(super) Vec<usize>);

impl From<CpuList> for String {
    fn from(CpuList(cpus): CpuList) -> Self {
        let numbers: Vec<String> = cpus.iter().map(usize::to_string).collect();
        numbers.join(",")
    }
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<usize>().map_err(|_| format!("'{text}' is not a CPU number; write 2,4-7"))
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first || last >= libc::CPU_SETSIZE as usize {
                return Err(format!("'{part}' is not a range of CPUs; write 2,4-7"));
            }
            cpus.extend(first..=last);
        }
        Ok(CpuList(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
