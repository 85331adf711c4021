//! Checks of placement: a NIC's memory node and interrupts, CPUs reserved for the daemon, and the IOMMU.

use std::collections::BTreeSet;

use super::device;
use super::finding::Finding;
use super::host::Host;
use super::network::Network;
use super::options::{Port, Requirements};
use crate::port::af_xdp::Mode;
use crate::sys::link::Link;

/// A set of CPU numbers.
type CpuSet = BTreeSet<usize>;

/// Checks the memory node and the interrupts of a port's NIC.
pub(super) fn of_device(host: &Host, link: &Link, port: &Port, what: &str) -> Vec<Finding> {
    let Some(directory) = sysfs_directory(host, link) else {
        let why = "not applicable: a virtual device has no memory node and no interrupts";
        return vec![Finding::pass("numa", what, why)];
    };
    // The device's own directory, or the nearest above it, has these files.
    let nearest = |name: &str| {
        let mut at = directory.as_str();
        while !at.is_empty() {
            let path = format!("{at}/{name}");
            if host.exists(&path) {
                return Some(path);
            }
            at = at.rsplit_once('/').map_or("", |(above, _)| above);
        }
        None
    };
    let node = nearest("numa_node").and_then(|path| host.number::<i32>(&path));
    let near = node
        .and_then(|node| host.read(&format!("/sys/devices/system/node/node{node}/cpulist")))
        .map(|list| parse_cpus(&list));
    let interrupts = nearest("msi_irqs").map(|path| host.list(&path)).unwrap_or_default();
    vec![
        numa(nodes(host), node, near.as_ref(), port, what),
        interrupt_placement(host, &interrupts, near.as_ref(), port, what),
    ]
}

/// Returns the device's directory in sysfs; none for a virtual device.
pub(super) fn sysfs_directory(host: &Host, link: &Link) -> Option<String> {
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
    near: Option<&CpuSet>,
    port: &Port,
    what: &str,
) -> Finding {
    if nodes < 2 {
        return Finding::pass("numa", what, "not applicable: the host has one memory node");
    }
    let (Some(node @ 0..), Some(near)) = (node, near) else {
        let why = "the NIC's memory node is not known (numa_node); place workers by measurement";
        return Finding::warn("numa", what, why);
    };
    let far: CpuSet = port.cpus.iter().copied().filter(|cpu| !near.contains(cpu)).collect();
    let list = format_cpus(near);
    if port.cpus.is_empty() {
        let why = format!(
            "the NIC is on memory node {node}, and the daemon has no CPU affinity; start it with \
             --cpu-affinity={list}"
        );
        Finding::warn("numa", what, why)
    } else if far.is_empty() {
        let why = format!("the NIC and the daemon's CPUs are on memory node {node}");
        Finding::pass("numa", what, why)
    } else {
        let why = format!(
            "the NIC is on memory node {node}, but the daemon's CPUs {} are not; start it with \
             --cpu-affinity={list}",
            format_cpus(&far)
        );
        Finding::warn("numa", what, why)
    }
}

fn interrupt_placement(
    host: &Host,
    interrupts: &[String],
    near: Option<&CpuSet>,
    port: &Port,
    what: &str,
) -> Finding {
    let placed: Vec<(&String, CpuSet)> = interrupts
        .iter()
        .filter_map(|number| {
            let list = host.read(&format!("/proc/irq/{number}/effective_affinity_list"))?;
            Some((number, parse_cpus(&list)))
        })
        .collect();
    if placed.is_empty() {
        let why = "not applicable: no message-signalled interrupts of it are visible";
        return Finding::pass("interrupts", what, why);
    }
    let daemons: CpuSet = port.cpus.iter().copied().collect();
    let online = online(host);
    let near = near.unwrap_or(&online);
    // With busy polling, the daemon's CPU does the NIC's work, and so should take its interrupts.
    let avoided = |cpu: &usize| !port.busy_poll && daemons.contains(cpu);
    let good: CpuSet = near.iter().copied().filter(|cpu| !avoided(cpu)).collect();
    let wrong: Vec<&str> = placed
        .iter()
        .filter(|(_, at)| !good.is_empty() && !at.is_subset(&good))
        .map(|(number, _)| number.as_str())
        .collect();
    if wrong.is_empty() {
        let all: CpuSet = placed.iter().flat_map(|(_, at)| at.iter().copied()).collect();
        let why = format!("interrupts: {}, on CPUs {}", placed.len(), format_cpus(&all));
        return Finding::pass("interrupts", what, why);
    }
    let why = format!(
        "interrupts {} go to the daemon's CPUs or to another memory node. Exclude them from irqbalance, \
         which may move them back",
        wrong.join(", ")
    );
    let command = format!(
        "for irq in {}; do echo {} > /proc/irq/$irq/smp_affinity_list; done",
        wrong.join(" "),
        format_cpus(&good)
    );
    Finding::warn("interrupts", what, why).fix(command)
}

fn online(host: &Host) -> CpuSet {
    parse_cpus(&host.read("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// Checks the isolation of the daemon's CPUs, and the IOMMU.
pub(super) fn check(host: &Host, network: &Network, requirements: &Requirements) -> Vec<Finding> {
    let wanted: CpuSet = requirements.ports.iter().flat_map(|port| port.cpus.clone()).collect();
    vec![isolation(host, &wanted), iommu(host, network, requirements)]
}

fn isolation(host: &Host, wanted: &CpuSet) -> Finding {
    let what = "host";
    // CPUs isolated by the kernel's command line (isolcpus=), and by cgroup partitions.
    let files = ["/sys/devices/system/cpu/isolated", "/sys/fs/cgroup/cpuset.cpus.isolated"];
    let lists = files.iter().filter_map(|path| host.read(path));
    let isolated: CpuSet = lists.flat_map(|list| parse_cpus(&list)).collect();
    let have = match isolated.is_empty() {
        true => "isolated CPUs: none".into(),
        false => format!("isolated CPUs: {}", format_cpus(&isolated)),
    };
    let Some(last) = wanted.last() else {
        let why = format!("{have}; not applicable without --cpu-affinity");
        return Finding::pass("isolation", what, why);
    };
    let absent: CpuSet = wanted.difference(&online(host)).copied().collect();
    if !absent.is_empty() {
        let list = format_cpus(&absent);
        let why = format!("--cpu-affinity names CPUs {list}, which are missing or offline");
        let found = Finding::fail("isolation", what, why);
        let file = format!("/sys/devices/system/cpu/cpu{last}/online");
        return if host.exists(&file) { found.fix(format!("echo 1 > {file}")) } else { found };
    }
    let shared: CpuSet = wanted.difference(&isolated).copied().collect();
    if shared.is_empty() {
        let why = format!("{have}, with all of --cpu-affinity");
        return Finding::pass("isolation", what, why);
    }
    let list = format_cpus(&shared);
    let why = format!(
        "{have}; other processes run on CPUs {list} of --cpu-affinity too. Boot with isolcpus={list}, or put \
         these CPUs into an isolated cgroup partition"
    );
    Finding::warn("isolation", what, why)
}

fn iommu(host: &Host, network: &Network, requirements: &Requirements) -> Finding {
    let what = "host";
    let units = host.list("/sys/class/iommu").len();
    let groups = host.list("/sys/kernel/iommu_groups");
    let may_write = requirements.af_xdp().any(|(port, af_xdp)| {
        let zero_copy = || network.find(&af_xdp.name).is_none_or(device::has_zero_copy);
        port.named && af_xdp.mode != Mode::Copy && zero_copy()
    });
    if units == 0 && groups.is_empty() {
        return if may_write {
            let why = "no IOMMU is visible: with zero copy a NIC writes to guest memory, and only its \
                       driver keeps it from all other memory. Boot with an IOMMU, or use mode=copy";
            Finding::warn("iommu", what, why)
        } else {
            let why = "no IOMMU is visible; not applicable: TAPs and copy mode do not need one";
            Finding::pass("iommu", what, why)
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
            "IOMMU groups {} are passed through: a NIC in these groups can write to any memory. Boot with \
             iommu.passthrough=0, or use mode=copy",
            open.join(", ")
        );
        return Finding::warn("iommu", what, why);
    }
    let why = format!("IOMMUs: {units}, groups: {}, passed through: {}", groups.len(), open.len());
    Finding::pass("iommu", what, why)
}

/// Parses a list of CPUs such as `0-3,8`.
fn parse_cpus(list: &str) -> CpuSet {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Formats CPUs as a list such as `0-3,8`.
fn format_cpus(cpus: &CpuSet) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
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
