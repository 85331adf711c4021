//! Lower devices that merge received frames (GRO, LRO), below a device whose XDP program runs in the kernel's
//! generic code. The kernel disables GRO only on the program's own device (`netif_elide_gro` in
//! net/core/gro.c). Merged frames are longer than the guest's buffers.

use std::fmt;

use crate::sys::ethtool::Ethtool;
use crate::sys::link::Link;

/// Most layers of lower devices that are searched.
const DEEPEST: usize = 8;
/// Offloads that merge frames: the kernel's name, and ethtool's.
const JOIN: [(&str, &str); 3] = [("rx-gro", "gro"), ("rx-lro", "lro"), ("rx-gro-hw", "rx-gro-hw")];

/// A device that merges received frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// Name of the device.
    pub device: String,
    /// Arguments of `ethtool -K` that stop it.
    pub offloads: String,
}

impl Joining {
    /// Finds the merging devices among those of `links` that frames pass before they reach `link`.
    pub fn below(link: &Link, links: &[Link]) -> Vec<Self> {
        let Ok(ethtool) = Ethtool::open() else { return Vec::new() };
        let joining = |link: &Link| {
            let active = ethtool.features(link.index).ok()?.active;
            let on = JOIN.iter().filter(|(name, _)| active.contains(*name));
            let off: Vec<_> = on.map(|(_, name)| format!("{name} off")).collect();
            let found = Joining { device: link.name.clone(), offloads: off.join(" ") };
            (!off.is_empty()).then_some(found)
        };
        lower(link, links).into_iter().filter_map(joining).collect()
    }
}

impl fmt::Display for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Joining { device, offloads } = self;
        write!(f, "{device} merges received frames; run 'ethtool -K {device} {offloads}'")
    }
}

/// Returns all lower devices of `link`: those of a macvlan or VLAN, the ports of a bridge or bond, and the
/// lower devices of each.
fn lower<'a>(link: &'a Link, links: &'a [Link]) -> Vec<&'a Link> {
    let (mut found, mut above) = (Vec::new(), vec![link]);
    for _ in 0..DEEPEST {
        let is_lower = |it: &&Link| {
            let belongs =
                |above: &&Link| above.lower == Some(it.index) || it.master == Some(above.index);
            above.iter().any(belongs) && it.index != link.index && !found.contains(it)
        };
        let next: Vec<&Link> = links.iter().filter(is_lower).collect();
        found.extend(next.iter().copied());
        above = next;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_devices_are_found_through_all_layers() {
        let link = |index, lower, master| Link { index, lower, master, ..Link::default() };
        // A macvlan on a bridge of a VLAN and a veth; the VLAN on a bond of two NICs.
        let macvlan = link(1, Some(2), None);
        let links = [
            macvlan.clone(),
            link(2, None, None),
            link(3, Some(5), Some(2)),
            link(4, None, Some(2)),
            link(5, None, None),
            link(6, None, Some(5)),
            link(7, None, Some(5)),
            link(8, None, None),
        ];
        let indexes = |from| lower(from, &links).iter().map(|it| it.index).collect::<Vec<_>>();
        assert_eq!(indexes(&macvlan), [2, 3, 4, 5, 6, 7]);
        assert_eq!(indexes(&links[7]), [0; 0]);
    }
}
