//! Checks of memory: huge pages for guests, and the limit of locked memory.

use super::finding::Finding;
use super::host::{Credentials, Host, capability};
use super::options::Requirements;

/// Memory of the smallest useful guest, in bytes.
const SMALLEST_GUEST: u64 = 64 << 20;

/// Checks both.
pub(super) fn check(
    host: &Host,
    credentials: &Credentials,
    requirements: &Requirements,
) -> Vec<Finding> {
    let mut found = huge_pages(host);
    found.push(locked(host, credentials, requirements.names_af_xdp()));
    found
}

/// Checks the huge pages of each memory node (Documentation/admin-guide/mm/hugetlbpage.rst).
fn huge_pages(host: &Host) -> Vec<Finding> {
    const NODES: &str = "/sys/devices/system/node";
    let nodes = host.list(NODES).into_iter().filter(|name| {
        name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok())
    });
    let mut found: Vec<_> = nodes.map(|node| of_node(host, NODES, &node)).collect();
    if found.is_empty() {
        let why = "the kernel reports no memory nodes, so huge pages are not known";
        found.push(Finding::warn("hugepages", "host", why));
    }
    found
}

fn of_node(host: &Host, nodes: &str, node: &str) -> Finding {
    let directory = format!("{nodes}/{node}/hugepages");
    let sizes = host.list(&directory);
    let count = |size: &str, which: &str| -> u64 {
        host.number(&format!("{directory}/{size}/{which}")).unwrap_or(0)
    };
    let (mut all, mut free, mut shown) = (0, 0, Vec::new());
    for size in &sizes {
        let (total, unused) = (count(size, "nr_hugepages"), count(size, "free_hugepages"));
        all += total;
        free += unused;
        if total > 0 {
            let size = size.trim_start_matches("hugepages-");
            shown.push(format!("{unused} of {total} huge pages of {size} are free"));
        }
    }
    let consequence =
        "small pages for guests cost TLB misses, and AF_XDP with zero copy then copies frames";
    let Some(smallest) = sizes.first() else {
        let why = format!("the kernel lacks huge pages (CONFIG_HUGETLBFS); {consequence}");
        return Finding::warn("hugepages", node, why);
    };
    let more = |wanted: u64| format!("echo {wanted} > {directory}/{smallest}/nr_hugepages");
    if all == 0 {
        let why = format!("no huge pages are reserved; {consequence}");
        Finding::warn("hugepages", node, why).fix(more(512))
    } else if free == 0 {
        let why = format!("{}; the next guest gets none", shown.join(", "));
        Finding::warn("hugepages", node, why).fix(more(count(smallest, "nr_hugepages") + 512))
    } else {
        Finding::pass("hugepages", node, shown.join(", "))
    }
}

/// Checks RLIMIT_MEMLOCK. AF_XDP pins guest memory, which counts against the limit without CAP_IPC_LOCK.
fn locked(host: &Host, credentials: &Credentials, af_xdp: bool) -> Finding {
    const CHECK: &str = "locked-memory";
    let what = "this process";
    let fix = "ulimit -l unlimited";
    if credentials.has(capability::IPC_LOCK) {
        return Finding::pass(CHECK, what, "has CAP_IPC_LOCK: no limit applies");
    }
    if !af_xdp {
        let why = "not applicable: a TAP needs no locked memory";
        return Finding::pass(CHECK, what, why);
    }
    let remedy = "raise it as root, or by LimitMEMLOCK=infinity in the daemon's unit";
    match host.limit("Max locked memory") {
        None => {
            let why = "cannot read the limit of locked memory (/proc/self/limits)";
            Finding::warn(CHECK, what, why)
        }
        Some(u64::MAX) => Finding::pass(CHECK, what, "locked memory is unlimited"),
        Some(bytes) if bytes < SMALLEST_GUEST => {
            let why = format!(
                "lacks CAP_IPC_LOCK, and its limit of {} MiB locked memory is too small for any guest, \
                 whose memory AF_XDP pins; {remedy}",
                bytes >> 20
            );
            Finding::fail(CHECK, what, why).fix(fix)
        }
        Some(bytes) => {
            let why = format!(
                "lacks CAP_IPC_LOCK, and its limit is {} MiB locked memory: the daemon refuses larger \
                 guests, whose memory AF_XDP pins; {remedy}",
                bytes >> 20
            );
            Finding::warn(CHECK, what, why).fix(fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    const SMALL: &str = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB";

    #[test]
    fn huge_pages_are_checked_for_each_node() {
        let (_directory, host) = fake(&[
            (&format!("{SMALL}/nr_hugepages"), "4\n"),
            (&format!("{SMALL}/free_hugepages"), "4\n"),
            ("/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages", "0\n"),
            ("/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages", "0\n"),
            ("/sys/devices/system/node/has_memory", "0-1\n"),
        ]);
        let found = huge_pages(&host);
        assert_eq!(
            found.iter().map(|it| it.status).collect::<Vec<_>>(),
            [Status::Pass, Status::Warn]
        );
        let fix = found[1].fix.as_deref().unwrap();
        assert!(fix.contains("node1/hugepages/hugepages-2048kB/nr_hugepages"), "{fix}");
    }

    #[test]
    fn huge_pages_in_use_do_not_count() {
        let (_directory, host) = fake(&[
            (&format!("{SMALL}/nr_hugepages"), "4\n"),
            (&format!("{SMALL}/free_hugepages"), "0\n"),
        ]);
        assert!(huge_pages(&host)[0].fix.as_deref().unwrap().starts_with("echo 516 >"));
    }

    #[test]
    fn locked_memory_limit_applies_to_af_xdp_only() {
        let locked = |limit: &str, af_xdp| {
            let line = format!("Max locked memory         {limit}   unlimited   bytes");
            let (_directory, host) = fake(&[("/proc/self/limits", &line)]);
            locked(&host, &Credentials::default(), af_xdp).status
        };
        assert_eq!(locked("8388608", true), Status::Fail);
        assert_eq!(locked("8388608", false), Status::Pass);
        assert_eq!(locked("1073741824", true), Status::Warn);
        assert_eq!(locked("unlimited", true), Status::Pass);
    }
}
