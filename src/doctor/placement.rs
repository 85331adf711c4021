//! Where things are: a card's memory node, its interrupts, processors that are kept for the daemon,
//! and the IOMMU.

use std::collections::BTreeSet;

use super::device;
use super::finding::Finding;
use super::host::Host;
use super::network::Network;
use super::options::{Port, Requirements};
use crate::port::af_xdp::Mode;
use crate::sys::link::Link;

/// Processors by their numbers.
type Processors = BTreeSet<usize>;

/// Checks where a card is, for a port on it.
pub(super) fn of_device(host: &Host, link: &Link, port: &Port, what: &str) -> Vec<Finding> {
    let Some(place) = place(host, link) else {
        let why = "it is virtual: it has neither memory node nor interrupts of its own";
        return vec![Finding::pass("numa", what, why)];
    };
    let above = |name: &str| {
        let mut at = place.as_str();
        while !at.is_empty() {
            let path = format!("{at}/{name}");
            if host.exists(&path) {
                return Some(path);
            }
            at = at.rsplit_once('/').map_or("", |(above, _)| above);
        }
        None
    };
    let node = above("numa_node").and_then(|path| host.number::<i32>(&path));
    let near = node
        .and_then(|node| host.read(&format!("/sys/devices/system/node/node{node}/cpulist")))
        .map(|list| processors(&list));
    let interrupts = above("msi_irqs").map(|path| host.list(&path)).unwrap_or_default();
    vec![
        numa(nodes(host), node, near.as_ref(), port, what),
        interrupt_placement(host, &interrupts, near.as_ref(), port, what),
    ]
}

/// The device's directory in sysfs; a virtual one has none.
pub(super) fn place(host: &Host, link: &Link) -> Option<String> {
    let (bus, name) = link.parent.as_ref()?;
    host.resolve(&format!("/sys/bus/{bus}/devices/{name}"))
}

fn nodes(host: &Host) -> usize {
    let is_node = |name: &&String| {
        name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok())
    };
    host.list("/sys/devices/system/node").iter().filter(is_node).count()
}

fn numa(
    nodes: usize,
    node: Option<i32>,
    near: Option<&Processors>,
    port: &Port,
    what: &str,
) -> Finding {
    if nodes < 2 {
        return Finding::pass("numa", what, "the host has one memory node: not applicable");
    }
    let (Some(node @ 0..), Some(near)) = (node, near) else {
        let why = "its memory node is not known (numa_node): place workers by measuring";
        return Finding::warn("numa", what, why);
    };
    let far: Vec<usize> = port.cpus.iter().copied().filter(|cpu| !near.contains(cpu)).collect();
    let list = shown(near);
    if port.cpus.is_empty() {
        let why = format!(
            "it is at memory node {node}, and nothing keeps the daemon there: start it with \
             --cpu-affinity={list}"
        );
        Finding::warn("numa", what, why)
    } else if far.is_empty() {
        Finding::pass("numa", what, format!("it and the daemon are at memory node {node}"))
    } else {
        let why = format!(
            "it is at memory node {node}, and processors {far:?} of the daemon's are not: start it \
             with --cpu-affinity={list}"
        );
        Finding::warn("numa", what, why)
    }
}

fn interrupt_placement(
    host: &Host,
    interrupts: &[String],
    near: Option<&Processors>,
    port: &Port,
    what: &str,
) -> Finding {
    let placed: Vec<(&String, Processors)> = interrupts
        .iter()
        .filter_map(|number| {
            let list = host.read(&format!("/proc/irq/{number}/effective_affinity_list"))?;
            Some((number, processors(&list)))
        })
        .collect();
    if placed.is_empty() {
        let why = "it has no message-signalled interrupts that are seen: not applicable";
        return Finding::pass("interrupts", what, why);
    }
    let daemons: Processors = port.cpus.iter().copied().collect();
    let online = online(host);
    let near = near.unwrap_or(&online);
    // With busy polling the daemon's processor does the card's work, and should.
    let avoided = |cpu: &usize| !port.busy_poll && daemons.contains(cpu);
    let good: Processors = near.iter().copied().filter(|cpu| !avoided(cpu)).collect();
    let wrong: Vec<&str> = placed
        .iter()
        .filter(|(_, at)| !good.is_empty() && !at.is_subset(&good))
        .map(|(number, _)| number.as_str())
        .collect();
    if wrong.is_empty() {
        let all: Processors = placed.iter().flat_map(|(_, at)| at.iter().copied()).collect();
        let why = format!("its {} interrupts go to processors {}", placed.len(), shown(&all));
        return Finding::pass("interrupts", what, why);
    }
    let why = format!(
        "interrupts {} go to processors of the daemon's, or of another memory node (irqbalance may \
         move them back: ban them there)",
        wrong.join(", ")
    );
    let command = format!(
        "for irq in {}; do echo {} > /proc/irq/$irq/smp_affinity_list; done",
        wrong.join(" "),
        shown(&good)
    );
    Finding::warn("interrupts", what, why).fix(command)
}

fn online(host: &Host) -> Processors {
    processors(&host.read("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// Checks isolation and the IOMMU.
pub(super) fn check(host: &Host, network: &Network, requirements: &Requirements) -> Vec<Finding> {
    let wanted: Processors = requirements.ports.iter().flat_map(|port| port.cpus.clone()).collect();
    vec![isolation(host, &wanted), iommu(host, network, requirements)]
}

fn isolation(host: &Host, wanted: &Processors) -> Finding {
    // By the kernel's command line (isolcpus=), and by cgroups' partitions.
    let files = ["/sys/devices/system/cpu/isolated", "/sys/fs/cgroup/cpuset.cpus.isolated"];
    let lists = files.iter().filter_map(|path| host.read(path));
    let isolated: Processors = lists.flat_map(|list| processors(&list)).collect();
    let what = "isolated processors";
    let have = if isolated.is_empty() { "none".into() } else { shown(&isolated) };
    let Some(last) = wanted.last() else {
        let why = format!("{have}; no --cpu-affinity asks for any: not applicable");
        return Finding::pass("isolation", what, why);
    };
    let absent: Processors = wanted.difference(&online(host)).copied().collect();
    if !absent.is_empty() {
        let why = format!("--cpu-affinity names {}, which the host has not", shown(&absent));
        let found = Finding::fail("isolation", what, why);
        let file = format!("/sys/devices/system/cpu/cpu{last}/online");
        return if host.exists(&file) { found.fix(format!("echo 1 > {file}")) } else { found };
    }
    let shared: Processors = wanted.difference(&isolated).copied().collect();
    if shared.is_empty() {
        return Finding::pass("isolation", what, format!("{have}: all that the daemon is to have"));
    }
    let list = shown(&shared);
    let why = format!(
        "{have}, and --cpu-affinity names {list} too: other processes run there as well; boot with \
         isolcpus={list}, or make them a cgroup's isolated partition"
    );
    Finding::warn("isolation", what, why)
}

fn iommu(host: &Host, network: &Network, requirements: &Requirements) -> Finding {
    let units = host.list("/sys/class/iommu").len();
    let groups = host.list("/sys/kernel/iommu_groups");
    let may_write = requirements.af_xdp().any(|(port, af_xdp)| {
        let zero_copy = || network.find(&af_xdp.name).is_none_or(device::has_zero_copy);
        port.named && af_xdp.mode != Mode::Copy && zero_copy()
    });
    if units == 0 && groups.is_empty() {
        let why = "none is seen: with zero copy a card writes to guests' memory, and nothing but its \
                   driver keeps it from the rest";
        return if may_write {
            Finding::warn("iommu", "IOMMU", format!("{why}; boot with one, or use mode=copy"))
        } else {
            let why = "none is seen, and TAPs and copy mode do without: not applicable";
            Finding::pass("iommu", "IOMMU", why)
        };
    }
    let open: Vec<&str> = groups
        .iter()
        .filter(|group| {
            let kind = host.read(&format!("/sys/kernel/iommu_groups/{group}/type"));
            kind.as_deref() == Some("identity")
        })
        .map(String::as_str)
        .collect();
    if may_write && !open.is_empty() {
        let why = format!(
            "groups {} are passed through: a card there can write anywhere; boot with \
             iommu.passthrough=0, or use mode=copy",
            open.join(", ")
        );
        return Finding::warn("iommu", "IOMMU", why);
    }
    let why = format!("{units} units, {} groups, {} passed through", groups.len(), open.len());
    Finding::pass("iommu", "IOMMU", why)
}

/// Reads a list such as `0-3,8`.
fn processors(list: &str) -> Processors {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

fn shown(processors: &Processors) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &cpu in processors {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let part = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
