//! Simulated hosts with two memory nodes.

use std::os::unix::fs::symlink;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::doctor::host::tests::fake;
use crate::doctor::{Options, Status, network::Network};

/// Creates a host of two memory nodes with two CPUs each, and a NIC on the second. The NIC's one interrupt
/// goes to CPU `interrupt`.
fn two_nodes(interrupt: &str) -> (TempDir, Host) {
    let (directory, host) = fake(&[
        ("/sys/devices/system/node/node0/cpulist", "0-1\n"),
        ("/sys/devices/system/node/node1/cpulist", "2-3\n"),
        ("/sys/devices/system/node/possible", "0-1\n"),
        ("/sys/devices/system/cpu/online", "0-3\n"),
        ("/sys/devices/system/cpu/isolated", "3\n"),
        ("/sys/devices/pci0/nic/numa_node", "1\n"),
        ("/sys/devices/pci0/nic/msi_irqs/38", "msix\n"),
        ("/sys/devices/pci0/nic/virtio2/vendor", "x\n"),
        ("/proc/irq/38/effective_affinity_list", interrupt),
    ]);
    let devices = directory.as_path().join("sys/bus/virtio/devices");
    std::fs::create_dir_all(&devices).unwrap();
    symlink("../../../devices/pci0/nic/virtio2", devices.join("virtio2")).unwrap();
    (directory, host)
}

fn findings(host: &Host, cpus: &[usize]) -> Vec<Finding> {
    let parent = Some(("virtio".to_owned(), "virtio2".to_owned()));
    let link = Link { name: "e".into(), parent, ..Link::default() };
    let network = Network { links: vec![link.clone()], ethtool: None };
    let mut requirements =
        Requirements::new(Options { queue_pairs: 1, ..Options::default() }, None, &network);
    requirements.ports[0].cpus = cpus.to_vec();
    let mut found = of_device(host, &link, &requirements.ports[0], "e");
    found.extend(check(host, &Network::default(), &requirements));
    found
}

#[test]
fn numa_check_names_the_cpus_near_the_nic() {
    let (_directory, host) = two_nodes("2\n");
    let near = findings(&host, &[3]);
    assert!(near.iter().all(|finding| finding.status == Status::Pass), "{near:?}");
    let far = findings(&host, &[0]);
    assert_eq!(far[0].status, Status::Warn);
    assert!(far[0].why.contains("--cpu-affinity=2-3"), "{far:?}");
    assert!(findings(&host, &[])[0].why.contains("no CPU affinity"));
}

#[test]
fn interrupts_belong_near_the_nic_off_the_daemons_cpus() {
    let (_directory, host) = two_nodes("0\n");
    let fix = "for irq in 38; do echo 2 > /proc/irq/$irq/smp_affinity_list; done";
    assert_eq!(findings(&host, &[3])[1].fix.as_deref(), Some(fix));
    let (_directory, host) = two_nodes("3\n");
    assert_eq!(findings(&host, &[3])[1].fix.as_deref(), Some(fix));
    assert_eq!(findings(&host, &[2])[1].status, Status::Pass);
}

#[test]
fn cpus_are_isolated_or_shared_or_missing() {
    let (_directory, host) = two_nodes("2\n");
    let isolation = |cpus: &[usize]| findings(&host, cpus).remove(2);
    assert_eq!(isolation(&[]).status, Status::Pass);
    assert_eq!(isolation(&[3]).status, Status::Pass);
    assert!(isolation(&[2, 3]).why.contains("isolcpus=2"));
    assert_eq!(isolation(&[4]).status, Status::Fail);
}

#[test]
fn host_with_one_node_and_no_iommu_passes() {
    let (_directory, host) = fake(&[("/sys/devices/system/node/node0/cpulist", "0-1\n")]);
    assert!(findings(&host, &[]).iter().all(|finding| finding.status == Status::Pass));
}

#[test]
fn cpu_lists_round_trip() {
    for list in ["", "0", "0-3,8", "1,3,5-6"] {
        assert_eq!(format_cpus(&parse_cpus(list)), list);
    }
}
