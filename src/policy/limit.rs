//! The text of a rate limit, such as `100mbit,burst=256k`: parsed, with its defaults, and displayed.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Default burst, as the time in which the bucket fills.
const DEFAULT_BURST: Duration = Duration::from_millis(10);
/// Minimum default burst in bytes: some ten frames of 1514 bytes.
const MIN_BURST_BYTES: u64 = 16 << 10;
/// Minimum default burst in packets.
const MIN_BURST_PACKETS: u64 = 16;
/// Highest rate in bits per second, at which the shortest frame takes about 300 units of time.
const MAX_BITS: u64 = 100_000_000_000;
/// Highest rate in packets per second.
const MAX_PACKETS: u64 = 1_000_000_000;

/// A rate, and the burst that may exceed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bits, or packets, per second.
    pub per_second: u64,
    /// Bytes, or packets, that may pass at once after a pause.
    pub burst: u64,
}

/// The rate limit of one direction of a port, on the wire: a GSO frame counts as its segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limit {
    /// Bits per second, with a burst in bytes; `None` for no limit.
    pub bits: Option<Rate>,
    /// Packets per second, with a burst in packets; `None` for no limit.
    pub packets: Option<Rate>,
}

impl TryFrom<String> for Limit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> Self {
        limit.to_string()
    }
}

impl FromStr for Limit {
    type Err = String;

    /// Parses `100mbit`, `10kpps`, `1gbit,100kpps,burst=2m,packet-burst=500`, `none`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |part: &str| {
            format!(
                "'{part}' is not a limit; write 100mbit, 10kpps, burst=256k, packet-burst=100, or none"
            )
        };
        let (mut bits, mut packets, mut burst, mut packet_burst) = (None, None, None, None);
        for part in text.split(',') {
            let part = part.trim();
            let (place, number) = if let Some(size) = part.strip_prefix("burst=") {
                (&mut burst, size)
            } else if let Some(size) = part.strip_prefix("packet-burst=") {
                (&mut packet_burst, size)
            } else if let Some(rate) = part.strip_suffix("bit") {
                (&mut bits, rate)
            } else if let Some(rate) = part.strip_suffix("pps") {
                (&mut packets, rate)
            } else if part == "none" && text.trim() == part {
                return Ok(Limit::default());
            } else {
                return Err(wrong(part));
            };
            let number = scaled(number).ok_or_else(|| wrong(part))?;
            if place.replace(number).is_some() {
                return Err(format!("'{part}' is given twice"));
            }
        }
        let rate = |unit,
                    no_rate: &str,
                    per_second: Option<u64>,
                    burst: Option<u64>,
                    size: u64,
                    least,
                    most| match (per_second, burst) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(no_rate.to_owned()),
            (Some(rate), _) if rate > most => {
                Err(format!("{rate} {unit}s per second exceed the maximum of {most}"))
            }
            (Some(per_second), burst) => {
                let by_time = per_second / size / (1000 / DEFAULT_BURST.as_millis() as u64);
                let burst = burst.unwrap_or(by_time.max(least));
                Ok(Some(Rate { per_second, burst }))
            }
        };
        let limit = Limit {
            bits: rate(
                "bit",
                "burst= requires a bit rate",
                bits,
                burst,
                8,
                MIN_BURST_BYTES,
                MAX_BITS,
            )?,
            packets: rate(
                "packet",
                "packet-burst= requires a packet rate",
                packets,
                packet_burst,
                1,
                MIN_BURST_PACKETS,
                MAX_PACKETS,
            )?,
        };
        if limit == Limit::default() {
            return Err(wrong(text));
        }
        Ok(limit)
    }
}

/// Parses a whole number of at least 1, with an optional suffix `k`, `m` or `g` for powers of 1000.
fn scaled(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "k" | "K" => 1000,
        "m" | "M" => 1_000_000,
        "g" | "G" => 1_000_000_000,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|number| *number > 0)
}

/// A number written with the longest suffix: `100m`.
struct Short(u64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1_000_000_000, "g"), (1_000_000, "m"), (1000, "k"), (1, "")];
        let fits = |(factor, _): &&(u64, &str)| self.0.is_multiple_of(*factor);
        let (factor, unit) = units.iter().find(fits).unwrap_or(&(1, ""));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        if let Some(Rate { per_second, burst }) = self.bits {
            write!(f, "{}bit,burst={burst}", Short(per_second))?;
            between = ",";
        }
        if let Some(Rate { per_second, burst }) = self.packets {
            write!(f, "{between}{}pps,packet-burst={burst}", Short(per_second))?;
            between = ",";
        }
        if between.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(text: &str) -> Limit {
        text.parse().unwrap()
    }

    #[test]
    fn limits_are_parsed_and_displayed() {
        let bits = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(limit("100mbit").bits, bits(100_000_000, 125_000));
        assert_eq!(limit("64kbit").bits, bits(64_000, MIN_BURST_BYTES));
        let both = limit("1gbit,10kpps,burst=2m,packet-burst=5");
        assert_eq!(both.bits, bits(1_000_000_000, 2_000_000));
        assert_eq!(both.packets, Some(Rate { per_second: 10_000, burst: 5 }));
        assert_eq!(limit(&both.to_string()), both);
        assert_eq!(both.to_string(), "1gbit,burst=2000000,10kpps,packet-burst=5");
        assert_eq!(limit("none"), Limit::default());
        assert_eq!(limit(&Limit::default().to_string()), Limit::default());
        for wrong in [
            "",
            "10",
            "10mb",
            "0bit",
            "-1bit",
            "1.5gbit",
            "10mbit,10mbit",
            "burst=1k",
            "none,1bit",
            "1bit,packet-burst=2",
            "101gbit",
            "99999999999999999999bit",
            "10 mbit",
        ] {
            assert!(wrong.parse::<Limit>().is_err(), "{wrong:?}");
        }
    }
}
