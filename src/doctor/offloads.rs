//! Checksum and segmentation offload: what TAPs and cards should do for speed, and what the other
//! end of a veth must not do.

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

/// Offloads of a TAP that somebody turned off. Only one is somebody's choice: without scatter-gather the
/// kernel segments (`netdev_fix_features` of net/core/dev.c). Whoever has a queue sets all others by
/// TUNSETOFFLOAD, as wanted ones too (`set_offload` of drivers/net/tun.c), and last to none.
pub(super) fn of_tap(network: &Network, link: &Link, what: &str) -> Option<Finding> {
    let features = features(network, link)?;
    const SCATTER_GATHER: &str = "tx-scatter-gather";
    let is_on = features.wanted.contains(SCATTER_GATHER);
    if is_on || !features.possible.contains(SCATTER_GATHER) {
        let why = "checksums and TCP segmentation may be left to the guest";
        return Some(Finding::pass(CHECK, what, why));
    }
    let why = format!(
        "somebody turned off {SCATTER_GATHER}: the host cuts and sums each frame for the guest, which \
         costs its processors more"
    );
    let command = format!("ethtool -K {} sg on", quoted(&link.name));
    Some(Finding::warn(CHECK, what, why).fix(command))
}

/// What a device for AF_XDP, or its other end, must leave alone: an XDP program sees frames as they
/// are, without what the kernel or the card knows of them. `generic`: it is to run in the kernel's
/// generic code.
pub(super) fn of_device(network: &Network, link: &Link, generic: bool, what: &str) -> Vec<Finding> {
    let mut found = vec![vlan_tags(link, generic, what)];
    for joining in Joining::below(link, &network.links).into_iter().filter(|_| generic) {
        let why = format!("the guest does not get joined frames, as TCP is: {joining}");
        let command = format!("ethtool -K {} {}", quoted(&joining.device), joining.offloads);
        found.push(Finding::warn("joined-frames", what, why).fix(command));
    }
    if link.is_veth {
        found.push(other_end(network, link, what));
        return found;
    }
    let Some(features) = features(network, link) else { return found };
    let name = quoted(&link.name);
    found.push(if features.active.contains("rx-lro") {
        let why =
            "it joins received frames (LRO): drivers refuse XDP then, or frames come too long";
        Finding::warn(CHECK, what, why).fix(format!("ethtool -K {name} lro off"))
    } else {
        Finding::pass(CHECK, what, "it does not join received frames (LRO)")
    });
    found
}

/// Whether VLAN tags of frames to the guest are in the frames, or can be put back.
fn vlan_tags(link: &Link, generic: bool, what: &str) -> Finding {
    const CHECK: &str = "vlan-tags";
    if !generic && program::can_restore_tags(link.index).unwrap_or(false) {
        let why = "the daemon's program puts VLAN tags into frames to the guest";
        return Finding::pass(CHECK, what, why);
    }
    let tags = Tags::of(link);
    let why = format!("VLAN tags get lost on the way to the guest: {tags}");
    match &tags {
        Tags::Kept => Finding::pass(CHECK, what, tags.to_string()),
        Tags::Unknown(_) => Finding::warn(CHECK, what, tags.to_string()),
        Tags::Beside { offloads, .. } if offloads.is_empty() => Finding::warn(CHECK, what, why),
        Tags::Beside { device, offloads } => {
            let command = format!("ethtool -K {} {offloads}", quoted(device));
            // Cards do so by themselves, and not every guest uses VLANs.
            let wrong = if link.is_veth { Finding::fail } else { Finding::warn };
            wrong(CHECK, what, why).fix(command)
        }
    }
}

fn other_end(network: &Network, link: &Link, what: &str) -> Finding {
    let Some(peer) = link.veth_peer.and_then(|peer| network.at(peer)) else {
        let why = "its other end is in another namespace: that must send whole frames, with their \
                   checksums ('ethtool -K … tx off' there)";
        return Finding::warn(CHECK, what, why);
    };
    let Some(features) = features(network, peer) else {
        let why = format!("whether {} leaves checksums open is not known", peer.name);
        return Finding::warn(CHECK, what, why);
    };
    if CHECKSUMS.iter().all(|name| !features.active.contains(*name)) {
        let why = format!("its other end, {}, sends whole frames with their checksums", peer.name);
        return Finding::pass(CHECK, what, why);
    }
    let why = format!(
        "its other end, {}, leaves checksums and segmentation open: pings pass, TCP and UDP do not",
        peer.name
    );
    Finding::fail(CHECK, what, why).fix(format!("ethtool -K {} tx off", quoted(&peer.name)))
}

/// Cards of the host that TAPs' guests send through: what they don't do, its processors do.
pub(super) fn cards(network: &Network) -> Vec<Finding> {
    let cards = network.links.iter().filter(|link| link.parent.is_some());
    cards.filter_map(|link| Some(of_card(link, &features(network, link)?))).collect()
}

fn of_card(link: &Link, features: &Features) -> Finding {
    let what = format!("card {}", link.name);
    let has = |name: &str| features.active.contains(name);
    let could = |name: &str| features.possible.contains(name);
    if CHECKSUMS.iter().any(|name| has(name)) && has(SEGMENTATION) {
        let why = "it sums and segments what guests behind a TAP leave open";
        return Finding::pass(CHECK, what, why);
    }
    let why =
        "it does not sum and segment: the kernel does, for what guests behind a TAP leave open";
    if CHECKSUMS.iter().any(|name| could(name)) && could(SEGMENTATION) {
        let command = format!("ethtool -K {} tx on sg on tso on", quoted(&link.name));
        Finding::warn(CHECK, what, format!("{why}, and it could")).fix(command)
    } else {
        Finding::warn(CHECK, what, format!("{why}; its driver can't"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn a_card_that_could_do_more_is_told_to() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let all = [CHECKSUMS[0], SEGMENTATION];
        let judged = |possible: &[&str], active: &[&str]| {
            let features =
                Features { possible: set(possible), active: set(active), ..Features::default() };
            of_card(&Link { name: "e".into(), ..Link::default() }, &features)
        };
        assert_eq!(judged(&all, &all).status, Status::Pass);
        let off = judged(&all, &all[..1]);
        assert_eq!(off.fix.as_deref(), Some("ethtool -K e tx on sg on tso on"));
        assert_eq!(judged(&[], &[]).fix, None);
    }
}
