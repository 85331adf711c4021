//! Checks of the process's limit of open descriptors and of its capabilities.
//!
//! The doctor assumes that the daemon has the same.

use super::finding::Finding;
use super::host::{Credentials, Host, capability};
use super::options::{Port, Requirements};
use crate::config;
use crate::descriptors::need;

/// Descriptors of the process (with a file, a control socket and metrics), of each port and of each queue
/// pair, before a frontend connects. Counted: 17 with two loopback ports of one pair. A TAP has one more for
/// announcements, and two for each queue.
const PROCESS: u64 = 9;
const PORT: u64 = 4;
const PAIR: u64 = 3;
/// Descriptors that the first guest adds at least: its connection and one memory region, and kick and call
/// of two rings for each queue pair.
const FRONTEND: u64 = 2;
const SERVED_PAIR: u64 = 4;

/// The checked object.
const WHAT: &str = "this process";

/// Checks both.
pub(super) fn check(
    host: &Host,
    credentials: &Credentials,
    requirements: &Requirements,
) -> Vec<Finding> {
    let named = requirements.ports.iter().filter(|port| port.named);
    let of_port =
        |port: &Port| (usize::from(port.pairs), matches!(port.host, config::Host::AfXdp(_)));
    let mut ports: Vec<_> = named.map(of_port).collect();
    if ports.is_empty() {
        ports.push((1, false));
    }
    let mut found = vec![descriptors(host.limit("Max open files"), &ports)];
    found.extend(requirements.names_af_xdp().then(|| capabilities(credentials)));
    found
}

fn descriptors(limit: Option<u64>, ports: &[(usize, bool)]) -> Finding {
    let pairs: u64 = ports.iter().map(|(pairs, _)| *pairs as u64).sum();
    let least = PROCESS + ports.len() as u64 * (PORT + FRONTEND) + pairs * (PAIR + SERVED_PAIR);
    // With the most that each port may keep, and the daemon's reserve.
    let most = need(ports.iter().copied()) as u64;
    let Some(limit) = limit else {
        let why = "cannot read the limit of open descriptors (/proc/self/limits)";
        return Finding::warn("descriptors", WHAT, why);
    };
    let why = format!("limit of open descriptors: {limit}; the ports need {least} to {most}");
    if limit >= most {
        return Finding::pass("descriptors", WHAT, why);
    }
    let make = if limit < least { Finding::fail } else { Finding::warn };
    let fix = format!("ulimit -n {}", most.next_power_of_two());
    make("descriptors", WHAT, format!("{why} (LimitNOFILE= in the daemon's unit)")).fix(fix)
}

fn capabilities(credentials: &Credentials) -> Finding {
    let needed = [
        (capability::NET_ADMIN, "CAP_NET_ADMIN"),
        (capability::NET_RAW, "CAP_NET_RAW"),
        (capability::BPF, "CAP_BPF"),
    ];
    // CAP_SYS_ADMIN includes CAP_BPF (bpf_capable).
    let has = |bit| {
        credentials.has(bit) || bit == capability::BPF && credentials.has(capability::SYS_ADMIN)
    };
    let missing: Vec<&str> =
        needed.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        let why = format!(
            "lacks {}, which AF_XDP requires; start the daemon as root, or with AmbientCapabilities= in \
             its unit",
            missing.join(", ")
        );
        return Finding::fail("capabilities", WHAT, why);
    }
    if !credentials.has(capability::SYS_ADMIN) {
        let why = "has the capabilities that AF_XDP requires, but lacks CAP_SYS_ADMIN: the daemon cannot \
                   share a device with another daemon";
        return Finding::warn("capabilities", WHAT, why);
    }
    Finding::pass("capabilities", WHAT, "has all capabilities that AF_XDP requires")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn descriptor_limit_is_compared_with_the_ports_need() {
        let status = |limit| descriptors(limit, &[(1, false)]).status;
        assert_eq!(status(Some(1024)), Status::Pass);
        assert_eq!(status(Some(32)), Status::Warn);
        assert_eq!(status(Some(12)), Status::Fail);
        assert_eq!(status(None), Status::Warn);
        assert!(
            descriptors(Some(1024), &[(1, false); 40]).fix.is_some(),
            "1024 are too few for 40 ports"
        );
    }
}
