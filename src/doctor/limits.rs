//! What the process may have: descriptors and capabilities. The daemon's are taken to be the same.

use super::finding::Finding;
use super::host::{Host, Myself, capability};
use super::options::{Port, Requirements};
use crate::config;
use crate::descriptors::need;

/// Descriptors of the process with a file, a control socket and metrics, of a port and of a queue pair
/// before a frontend has come: 17 with two loopback ports of one pair, counted. A TAP has one more to
/// announce cards by, and two for each queue.
const PROCESS: u64 = 9;
const PORT: u64 = 4;
const PAIR: u64 = 3;
/// What the first guest adds at the least: its connection and one region of memory, and kick and call
/// of two rings for each pair.
const FRONTEND: u64 = 2;
const SERVED_PAIR: u64 = 4;

/// Checks both.
pub(super) fn check(host: &Host, myself: &Myself, requirements: &Requirements) -> Vec<Finding> {
    let named = requirements.ports.iter().filter(|port| port.named);
    let of_port =
        |port: &Port| (usize::from(port.pairs), matches!(port.host, config::Host::AfXdp(_)));
    let mut ports: Vec<_> = named.map(of_port).collect();
    if ports.is_empty() {
        ports.push((1, false));
    }
    let mut found = vec![descriptors(host.limit("Max open files"), &ports)];
    found.extend(requirements.names_af_xdp().then(|| capabilities(myself)));
    found
}

fn descriptors(limit: Option<u64>, ports: &[(usize, bool)]) -> Finding {
    let what = "open descriptors";
    let pairs: u64 = ports.iter().map(|(pairs, _)| *pairs as u64).sum();
    let least = PROCESS + ports.len() as u64 * (PORT + FRONTEND) + pairs * (PAIR + SERVED_PAIR);
    // With what each port may keep, and the daemon's reserve.
    let most = need(ports.iter().copied()) as u64;
    let Some(limit) = limit else {
        return Finding::warn("descriptors", what, "the limit is not known (/proc/self/limits)");
    };
    let why = format!("{limit} may be open, and to serve takes {least} to {most}");
    if limit >= most {
        return Finding::pass("descriptors", what, why);
    }
    let make = if limit < least { Finding::fail } else { Finding::warn };
    let fix = format!("ulimit -n {}", most.next_power_of_two());
    make("descriptors", what, format!("{why} (LimitNOFILE= in the daemon's unit)")).fix(fix)
}

fn capabilities(myself: &Myself) -> Finding {
    let what = "capabilities";
    let needed = [
        (capability::NET_ADMIN, "CAP_NET_ADMIN"),
        (capability::NET_RAW, "CAP_NET_RAW"),
        (capability::BPF, "CAP_BPF"),
    ];
    // CAP_SYS_ADMIN stands for CAP_BPF (bpf_capable).
    let has = |bit| myself.can(bit) || bit == capability::BPF && myself.can(capability::SYS_ADMIN);
    let missing: Vec<&str> =
        needed.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        let why = format!(
            "AF_XDP takes {}, which this process has not: start the daemon as root, or with \
             AmbientCapabilities= in its unit",
            missing.join(", ")
        );
        return Finding::fail("capabilities", what, why);
    }
    if !myself.can(capability::SYS_ADMIN) {
        let why = "all that AF_XDP takes but CAP_SYS_ADMIN, without which a device can't be shared \
                   with another daemon";
        return Finding::warn("capabilities", what, why);
    }
    Finding::pass("capabilities", what, "all that AF_XDP takes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn descriptors_are_enough_or_few_or_too_few() {
        let status = |limit| descriptors(limit, &[(1, false)]).status;
        assert_eq!(status(Some(1024)), Status::Pass);
        assert_eq!(status(Some(32)), Status::Warn);
        assert_eq!(status(Some(12)), Status::Fail);
        assert_eq!(status(None), Status::Warn);
        assert!(
            descriptors(Some(1024), &[(1, false); 40]).fix.is_some(),
            "for 40 ports they are few"
        );
    }
}
