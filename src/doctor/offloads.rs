//! Checks of checksum and segmentation offload: TAPs and NICs should have it, and the peer of an AF_XDP
//! port's veth must not use it.

use super::finding::{Finding, quoted};
use super::network::Network;
use crate::port::af_xdp::joining::Joining;
use crate::port::af_xdp::program;
use crate::port::af_xdp::tags::{CHECKSUMS, Tags};
use crate::sys::ethtool::Features;
use crate::sys::link::Link;

const CHECK: &str = "offloads";
const SEGMENTATION: &str = "tx-tcp-segmentation";

fn features(network: &Network, link: &Link) -> Option<Features> {
    network.ethtool.as_ref()?.features(link.index).ok()
}

/// Checks that scatter-gather of a TAP is on. Without it, the kernel segments each GSO frame
/// (`netdev_fix_features` of net/core/dev.c). The daemon sets all other offloads, the wanted ones included,
/// by TUNSETOFFLOAD (`set_offload` of drivers/net/tun.c), and clears them when it exits. Only
/// scatter-gather is the operator's setting.
pub(super) fn of_tap(network: &Network, link: &Link, what: &str) -> Option<Finding> {
    let features = features(network, link)?;
    const SCATTER_GATHER: &str = "tx-scatter-gather";
    let is_on = features.wanted.contains(SCATTER_GATHER);
    if is_on || !features.possible.contains(SCATTER_GATHER) {
        let why = "can pass partial checksums and GSO frames to the guest";
        return Some(Finding::pass(CHECK, what, why));
    }
    let why = format!(
        "{SCATTER_GATHER} is off: the host segments each GSO frame to the guest and completes its \
         checksum, which costs CPU time"
    );
    let command = format!("ethtool -K {} sg on", quoted(&link.name));
    Some(Finding::warn(CHECK, what, why).fix(command))
}

/// Checks the offloads of a device for AF_XDP, of its veth peer and of the devices below it. An XDP program
/// sees the bytes of a frame only, and not what the kernel or the NIC keeps beside them. `generic` is true
/// if the program is to run in the kernel's generic code.
pub(super) fn of_device(network: &Network, link: &Link, generic: bool, what: &str) -> Vec<Finding> {
    let mut found = vec![vlan_tags(link, generic, what)];
    for joining in Joining::below(link, &network.links).into_iter().filter(|_| generic) {
        let why = format!(
            "the lower device {} joins received frames; the guest does not get joined frames, so TCP \
             crawls",
            joining.device
        );
        let command = format!("ethtool -K {} {}", quoted(&joining.device), joining.offloads);
        found.push(Finding::warn("joined-frames", what, why).fix(command));
    }
    if link.is_veth {
        found.push(veth_peer(network, link, what));
        return found;
    }
    let Some(features) = features(network, link) else { return found };
    let name = quoted(&link.name);
    found.push(if features.active.contains("rx-lro") {
        let why = "LRO is on: drivers refuse XDP programs, or deliver frames that are too long";
        Finding::warn(CHECK, what, why).fix(format!("ethtool -K {name} lro off"))
    } else {
        Finding::pass(CHECK, what, "LRO is off")
    });
    found
}

/// Checks that VLAN tags of frames to the guest are in the frames, or that the program can restore them.
fn vlan_tags(link: &Link, generic: bool, what: &str) -> Finding {
    const CHECK: &str = "vlan-tags";
    if !generic && program::can_restore_tags(link.index).unwrap_or(false) {
        let why = "the daemon's XDP program restores VLAN tags in frames to the guest";
        return Finding::pass(CHECK, what, why);
    }
    let tags = Tags::of(link);
    match &tags {
        Tags::Kept => Finding::pass(CHECK, what, tags.to_string()),
        Tags::Unknown(_) => Finding::warn(CHECK, what, tags.to_string()),
        Tags::Beside { offloads, .. } if offloads.is_empty() => {
            let why = format!("frames to the guest lose their VLAN tags: {tags}");
            Finding::warn(CHECK, what, why)
        }
        Tags::Beside { device, offloads } => {
            let why = format!(
                "frames to the guest lose their VLAN tags, which {device} keeps beside the frames"
            );
            let command = format!("ethtool -K {} {offloads}", quoted(device));
            // NICs do so by default, and not every guest uses VLANs.
            let make = if link.is_veth { Finding::fail } else { Finding::warn };
            make(CHECK, what, why).fix(command)
        }
    }
}

fn veth_peer(network: &Network, link: &Link, what: &str) -> Finding {
    let Some(peer) = link.veth_peer.and_then(|peer| network.at(peer)) else {
        let why = "the peer is in another network namespace, where doctor cannot check it: partial \
                   checksums and GSO frames must be off ('ethtool -K … tx off' there)";
        return Finding::warn(CHECK, what, why);
    };
    let name = &peer.name;
    let Some(features) = features(network, peer) else {
        let why =
            format!("cannot read the offloads of peer {name}, which may send partial checksums");
        return Finding::warn(CHECK, what, why);
    };
    if CHECKSUMS.iter().all(|name| !features.active.contains(*name)) {
        let why = format!("peer {name} sends no partial checksums and no GSO frames");
        return Finding::pass(CHECK, what, why);
    }
    let why =
        format!("peer {name} sends partial checksums and GSO frames: ping works, TCP and UDP fail");
    Finding::fail(CHECK, what, why).fix(format!("ethtool -K {} tx off", quoted(name)))
}

/// Checks that each NIC of the host segments frames and completes checksums for the guests of TAPs. Otherwise
/// the host's CPUs do.
pub(super) fn nics(network: &Network) -> Vec<Finding> {
    let nics = network.links.iter().filter(|link| link.parent.is_some());
    nics.filter_map(|link| Some(of_nic(link, &features(network, link)?))).collect()
}

fn of_nic(link: &Link, features: &Features) -> Finding {
    let what = &link.name;
    let has = |name: &str| features.active.contains(name);
    let could = |name: &str| features.possible.contains(name);
    if CHECKSUMS.iter().any(|name| has(name)) && has(SEGMENTATION) {
        let why = "the NIC completes checksums and segments GSO frames of guests behind a TAP";
        return Finding::pass(CHECK, what, why);
    }
    let why = "the NIC does not complete checksums and segment GSO frames, so the kernel does it for \
               guests behind a TAP";
    if CHECKSUMS.iter().any(|name| could(name)) && could(SEGMENTATION) {
        let command = format!("ethtool -K {} tx on sg on tso on", quoted(what));
        Finding::warn(CHECK, what, format!("{why}; the driver supports both")).fix(command)
    } else {
        Finding::warn(CHECK, what, format!("{why}; the driver does not support both"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn nic_with_offloads_off_warns() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let all = [CHECKSUMS[0], SEGMENTATION];
        let found = |possible: &[&str], active: &[&str]| {
            let features =
                Features { possible: set(possible), active: set(active), ..Features::default() };
            of_nic(&Link { name: "e".into(), ..Link::default() }, &features)
        };
        assert_eq!(found(&all, &all).status, Status::Pass);
        let off = found(&all, &all[..1]);
        assert_eq!(off.fix.as_deref(), Some("ethtool -K e tx on sg on tso on"));
        assert_eq!(found(&[], &[]).fix, None);
    }
}
