//! Memory: huge pages for guests, and how much may be locked.

use super::finding::Finding;
use super::host::{Host, Myself, capability};
use super::options::Requirements;

/// No guest that is of use is smaller than this many bytes.
const SMALLEST_GUEST: u64 = 64 << 20;

/// Checks both.
pub(super) fn check(host: &Host, myself: &Myself, requirements: &Requirements) -> Vec<Finding> {
    let mut found = huge_pages(host);
    found.push(locked(host, myself, requirements.names_af_xdp()));
    found
}

/// Huge pages of each memory node (Documentation/admin-guide/mm/hugetlbpage.rst).
fn huge_pages(host: &Host) -> Vec<Finding> {
    const NODES: &str = "/sys/devices/system/node";
    let nodes = host.list(NODES).into_iter().filter(|name| {
        name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok())
    });
    let mut found: Vec<_> = nodes.map(|node| of_node(host, NODES, &node)).collect();
    if found.is_empty() {
        let why = "the kernel shows no memory nodes: what there is of them is not known";
        found.push(Finding::warn("hugepages", "huge pages", why));
    }
    found
}

fn of_node(host: &Host, nodes: &str, node: &str) -> Finding {
    let what = format!("huge pages of {node}");
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
            shown.push(format!("{unused} of {total} of {size} are free"));
        }
    }
    let need = "guests' memory is then in small pages: the processor misses its page tables more \
                often, and AF_XDP with zero copy copies frames after all";
    let Some(smallest) = sizes.first() else {
        return Finding::warn(
            "hugepages",
            what,
            format!("the kernel has none (CONFIG_HUGETLBFS): {need}"),
        );
    };
    let more = |wanted: u64| format!("echo {wanted} > {directory}/{smallest}/nr_hugepages");
    if all == 0 {
        Finding::warn("hugepages", what, format!("none is set aside: {need}")).fix(more(512))
    } else if free == 0 {
        let why = format!("{}: the next guest gets none", shown.join(", "));
        Finding::warn("hugepages", what, why).fix(more(count(smallest, "nr_hugepages") + 512))
    } else {
        Finding::pass("hugepages", what, shown.join(", "))
    }
}

/// AF_XDP pins the guest's memory, which counts against RLIMIT_MEMLOCK without CAP_IPC_LOCK.
fn locked(host: &Host, myself: &Myself, af_xdp: bool) -> Finding {
    const CHECK: &str = "locked-memory";
    let what = "locked memory";
    let fix = "ulimit -l unlimited";
    if myself.can(capability::IPC_LOCK) {
        return Finding::pass(CHECK, what, "CAP_IPC_LOCK: no limit applies");
    }
    if !af_xdp {
        let why = "a TAP needs none: not applicable";
        return Finding::pass(CHECK, what, why);
    }
    let how = "as root, or LimitMEMLOCK=infinity in the unit";
    match host.limit("Max locked memory") {
        None => Finding::warn(CHECK, what, "the limit is not known (/proc/self/limits)"),
        Some(u64::MAX) => Finding::pass(CHECK, what, "no limit is set"),
        Some(bytes) if bytes < SMALLEST_GUEST => {
            let why = format!(
                "{} MiB without CAP_IPC_LOCK: no guest fits, whose memory AF_XDP pins; raise it, {how}",
                bytes >> 20
            );
            Finding::fail(CHECK, what, why).fix(fix)
        }
        Some(bytes) => {
            let why = format!(
                "{} MiB without CAP_IPC_LOCK: larger guests are refused, whose memory AF_XDP pins; \
                 raise it, {how}",
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
    fn each_node_has_its_huge_pages() {
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
    fn huge_pages_that_are_all_taken_are_too_few() {
        let (_directory, host) = fake(&[
            (&format!("{SMALL}/nr_hugepages"), "4\n"),
            (&format!("{SMALL}/free_hugepages"), "0\n"),
        ]);
        assert!(huge_pages(&host)[0].fix.as_deref().unwrap().starts_with("echo 516 >"));
    }

    #[test]
    fn the_limit_of_locked_memory_matters_to_af_xdp() {
        let locked = |limit: &str, af_xdp| {
            let line = format!("Max locked memory         {limit}   unlimited   bytes");
            let (_directory, host) = fake(&[("/proc/self/limits", &line)]);
            locked(&host, &Myself::default(), af_xdp).status
        };
        assert_eq!(locked("8388608", true), Status::Fail);
        assert_eq!(locked("8388608", false), Status::Pass);
        assert_eq!(locked("1073741824", true), Status::Warn);
        assert_eq!(locked("unlimited", true), Status::Pass);
    }
}
