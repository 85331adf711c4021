//! Hosts of two memory nodes, which this one may not be.

use std::os::unix::fs::symlink;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::doctor::host::tests::fake;
use crate::doctor::{Options, Status, network::Network};

/// Two nodes with two processors each; a card at the second, whose one interrupt is at processor
/// `interrupt`.
fn two_nodes(interrupt: &str) -> (TempDir, Host) {
    let (directory, host) = fake(&[
        ("/sys/devices/system/node/node0/cpulist", "0-1\n"),
        ("/sys/devices/system/node/node1/cpulist", "2-3\n"),
        ("/sys/devices/system/node/possible", "0-1\n"),
        ("/sys/devices/system/cpu/online", "0-3\n"),
        ("/sys/devices/system/cpu/isolated", "3\n"),
        ("/sys/devices/pci0/card/numa_node", "1\n"),
        ("/sys/devices/pci0/card/msi_irqs/38", "msix\n"),
        ("/sys/devices/pci0/card/virtio2/vendor", "x\n"),
        ("/proc/irq/38/effective_affinity_list", interrupt),
    ]);
    let devices = directory.as_path().join("sys/bus/virtio/devices");
    std::fs::create_dir_all(&devices).unwrap();
    symlink("../../../devices/pci0/card/virtio2", devices.join("virtio2")).unwrap();
    (directory, host)
}

fn judged(host: &Host, cpus: &[usize]) -> Vec<Finding> {
    let parent = Some(("virtio".to_owned(), "virtio2".to_owned()));
    let link = Link { name: "e".into(), parent, ..Link::default() };
    let network = Network { links: vec![link.clone()], ethtool: None };
    let mut requirements =
        Requirements::new(Options { queue_pairs: 1, ..Options::default() }, None, &network);
    requirements.ports[0].cpus = cpus.to_vec();
    let mut found = of_device(host, &link, &requirements.ports[0], "device e");
    found.extend(check(host, &Network::default(), &requirements));
    found
}

#[test]
fn a_daemon_far_from_its_card_is_told_where_to_go() {
    let (_directory, host) = two_nodes("2\n");
    let near = judged(&host, &[3]);
    assert!(near.iter().all(|finding| finding.status == Status::Pass), "{near:?}");
    let far = judged(&host, &[0]);
    assert_eq!(far[0].status, Status::Warn);
    assert!(far[0].why.contains("--cpu-affinity=2-3"), "{far:?}");
    assert!(judged(&host, &[])[0].why.contains("nothing keeps the daemon there"));
}

#[test]
fn interrupts_stay_near_their_card_and_away_from_the_daemon() {
    let (_directory, host) = two_nodes("0\n");
    let fix = "for irq in 38; do echo 2 > /proc/irq/$irq/smp_affinity_list; done";
    assert_eq!(judged(&host, &[3])[1].fix.as_deref(), Some(fix));
    let (_directory, host) = two_nodes("3\n");
    assert_eq!(judged(&host, &[3])[1].fix.as_deref(), Some(fix));
    assert_eq!(judged(&host, &[2])[1].status, Status::Pass);
}

#[test]
fn processors_are_the_daemons_alone_or_shared_or_not_there() {
    let (_directory, host) = two_nodes("2\n");
    let isolation = |cpus: &[usize]| judged(&host, cpus).remove(2);
    assert_eq!(isolation(&[]).status, Status::Pass);
    assert_eq!(isolation(&[3]).status, Status::Pass);
    assert!(isolation(&[2, 3]).why.contains("isolcpus=2"));
    assert_eq!(isolation(&[4]).status, Status::Fail);
}

#[test]
fn one_node_and_no_iommu_are_nothing_to_worry_about() {
    let (_directory, host) = fake(&[("/sys/devices/system/node/node0/cpulist", "0-1\n")]);
    assert!(judged(&host, &[]).iter().all(|finding| finding.status == Status::Pass));
}

#[test]
fn lists_of_processors_come_back_as_they_were() {
    for list in ["", "0", "0-3,8", "1,3,5-6"] {
        assert_eq!(shown(&processors(list)), list);
    }
}
