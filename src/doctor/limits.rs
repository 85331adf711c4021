//! What the process may have: descriptors and capabilities. The daemon's are taken to be the same.

use super::finding::Finding;
use super::host::{Host, Myself, capability};
use super::options::Wishes;

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
/// What there may be besides: up to 32 regions, error descriptors, a socket or an io_uring.
const MORE_REGIONS: u64 = 31;
const MORE_PAIR: u64 = 3;

/// Checks both.
pub(super) fn check(host: &Host, myself: &Myself, wishes: &Wishes) -> Vec<Finding> {
    let ports = wishes.ports.iter().filter(|port| port.named).count().max(1) as u64;
    let named = wishes.ports.iter().filter(|port| port.named);
    let pairs = named.map(|port| u64::from(port.pairs)).sum::<u64>().max(1);
    let mut found = vec![descriptors(host.limit("Max open files"), ports, pairs)];
    found.extend(wishes.names_af_xdp().then(|| capabilities(myself)));
    found
}

fn descriptors(limit: Option<u64>, ports: u64, pairs: u64) -> Finding {
    let what = "open descriptors";
    let least = PROCESS + ports * (PORT + FRONTEND) + pairs * (PAIR + SERVED_PAIR);
    let most = least + ports * MORE_REGIONS + pairs * MORE_PAIR;
    let Some(limit) = limit else {
        return Finding::warn("descriptors", what, "the limit is not known (/proc/self/limits)");
    };
    let why = format!("{limit} may be open, and to serve takes {least} to {most}");
    if limit >= most {
        return Finding::pass("descriptors", what, why);
    }
    let make = if limit < least { Finding::fail } else { Finding::warn };
    let cure = format!("ulimit -n {}", most.next_power_of_two());
    make("descriptors", what, format!("{why} (LimitNOFILE= in the daemon's unit)")).cure(cure)
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
        let status = |limit| descriptors(limit, 1, 1).status;
        assert_eq!(status(Some(1024)), Status::Pass);
        assert_eq!(status(Some(32)), Status::Warn);
        assert_eq!(status(Some(12)), Status::Fail);
        assert_eq!(status(None), Status::Warn);
        assert!(descriptors(Some(1024), 40, 40).cure.is_some(), "for 40 ports they are few");
    }
}
