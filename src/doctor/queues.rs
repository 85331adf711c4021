//! Checks of the queues of a device for AF_XDP: their number, their rings, and the frames that they receive.

use std::collections::BTreeSet;
use std::io;

use super::finding::{Finding, quoted};
use super::network::Network;
use super::options::Port;
use crate::net_config::MacAddress;
use crate::port::af_xdp::AfXdp;
use crate::sys::ethtool::{Amount, Channels};
use crate::sys::flow::{Rule, Rules};
use crate::sys::link::Link;

/// Recommended entries of a receive ring: the frames that arrive in 70 µs at 14.88 million frames
/// a second (10 Gbit/s of the smallest frames). A shorter ring loses a burst that the daemon is late for.
const RING: u32 = 1024;

/// Checks number of queues, rings and steering.
pub(super) fn check(
    network: &Network,
    link: &Link,
    port: &Port,
    af_xdp: &AfXdp,
    what: &str,
) -> Vec<Finding> {
    let Some(ethtool) = &network.ethtool else {
        let why = "the kernel does not report queues and rings (CONFIG_ETHTOOL_NETLINK)";
        return vec![Finding::warn("queues", what, why)];
    };
    let name = quoted(&link.name);
    let wanted = u32::from(af_xdp.queue)..u32::from(af_xdp.queue) + u32::from(port.pairs);
    let channels = ethtool.channels(link.index);
    let receiving = channels.as_ref().map_or(1, |it| it.combined.now + it.rx.now);
    let mut found = vec![
        queues(channels, wanted.end, &name, what),
        rings(ethtool.rings(link.index), &name, what),
    ];
    if receiving > 1 && !link.is_veth {
        found.extend(hashing(
            ethtool.hashed_queues(link.index),
            receiving,
            wanted.start,
            &name,
            what,
        ));
    }
    let filters =
        ethtool.features(link.index).is_ok_and(|it| it.active.contains("rx-ntuple-filter"));
    let rules = Rules::of(link.index).and_then(|rules| rules.list());
    found.push(steering(rules, filters, port.mac.filter(|_| af_xdp.steer), af_xdp, &name, what));
    found
}

fn queues(channels: io::Result<Channels>, wanted: u32, name: &str, what: &str) -> Finding {
    let channels = match channels {
        Ok(channels) => channels,
        Err(_) if wanted == 1 => {
            let why = "the driver does not report queues; the port uses the first only";
            return Finding::pass("queues", what, why);
        }
        Err(error) => {
            let why = format!("queues required: {wanted}; the driver reports none: {error}");
            return Finding::warn("queues", what, why);
        }
    };
    let Channels { combined, rx, tx } = channels;
    let now = combined.now + rx.now;
    let why = format!("queues required: {wanted}, configured: {now}");
    if now >= wanted {
        return Finding::pass("queues", what, why);
    }
    if combined.most >= wanted {
        let command = format!("ethtool -L {name} combined {wanted}");
        Finding::fail("queues", what, why).fix(command)
    } else if rx.most.min(tx.most) >= wanted {
        let command = format!("ethtool -L {name} rx {wanted} tx {wanted}");
        Finding::fail("queues", what, why).fix(command)
    } else {
        let most = combined.most + rx.most;
        let why = format!("{why}, maximum: {most}; choose a lower queue=N");
        Finding::fail("queues", what, why)
    }
}

fn rings(rings: io::Result<(Amount, Amount)>, name: &str, what: &str) -> Finding {
    let (rx, tx) = match rings {
        Ok(rings) => rings,
        Err(_) => {
            let why = "not applicable: the driver has no rings of adjustable length";
            return Finding::pass("rings", what, why);
        }
    };
    let best = RING.min(rx.most);
    if rx.now >= best {
        let why = format!(
            "entries of each rx ring: {} (maximum {}), of each tx ring: {} (maximum {})",
            rx.now, rx.most, tx.now, tx.most
        );
        return Finding::pass("rings", what, why);
    }
    let why = format!("rx rings have {} entries; a longer burst loses frames", rx.now);
    Finding::warn("rings", what, why).fix(format!("ethtool -G {name} rx {best}"))
}

/// Checks that receive hashing (RSS) leaves the guest's queues alone.
fn hashing(
    hashed: io::Result<BTreeSet<u32>>,
    queues: u32,
    first: u32,
    name: &str,
    what: &str,
) -> Option<Finding> {
    let hashed = hashed.ok()?;
    let ours: Vec<u32> = hashed.iter().copied().filter(|queue| *queue >= first).collect();
    if ours.is_empty() {
        let why = format!("receive hashing (RSS) does not use queue {first} and above");
        return Some(Finding::pass("steering", what, why));
    }
    let why = format!(
        "receive hashing (RSS) brings part of the host's frames to queue {first} and above, of \
         {queues}; the guest receives them"
    );
    let found = Finding::warn("steering", what, why);
    Some(if first == 0 { found } else { found.fix(format!("ethtool -X {name} equal {first}")) })
}

/// Checks that a flow rule can bring the guest's frames to its queue.
fn steering(
    rules: io::Result<Vec<Rule>>,
    filters: bool,
    steer_for: Option<MacAddress>,
    af_xdp: &AfXdp,
    name: &str,
    what: &str,
) -> Finding {
    let conflict = steer_for.zip(rules.as_ref().ok()).and_then(|(mac, rules)| {
        let queue = u64::from(af_xdp.queue);
        rules.iter().find(|rule| rule.address == mac.0 && rule.queue != queue)
    });
    match (conflict, &rules, af_xdp.steer) {
        (Some(rule), _, _) => {
            let why = format!(
                "a flow rule brings the guest's frames to queue {} instead of {}; delete the rule if \
                 nothing needs it",
                rule.queue, af_xdp.queue
            );
            let command = format!("ethtool -N {name} delete {}", rule.location);
            Finding::fail("steering", what, why).fix(command)
        }
        (None, Ok(_), true) if !filters => {
            let why = "steer=mac requires flow rules, which are off";
            Finding::fail("steering", what, why).fix(format!("ethtool -K {name} ntuple on"))
        }
        (None, Ok(_), true) => Finding::pass("steering", what, "the driver supports flow rules"),
        (None, Err(error), true) => {
            let why = format!(
                "steer=mac requires flow rules, which the driver does not support: {error}. Bring the \
                 guest's frames to queue {} by other means",
                af_xdp.queue
            );
            Finding::fail("steering", what, why)
        }
        (None, Ok(rules), false) => {
            let number = rules.len();
            let why =
                format!("the port needs no flow rules; the driver supports them, and has {number}");
            Finding::pass("steering", what, why)
        }
        (None, Err(_), false) => {
            let why = "the port needs no flow rules; the driver does not support them";
            Finding::pass("steering", what, why)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::port::af_xdp::{Attach, Mode};

    const fn amount(now: u32, most: u32) -> Amount {
        Amount { now, most }
    }

    #[test]
    fn queues_are_added_up_to_the_drivers_maximum() {
        let combined =
            |now, most| Ok(Channels { combined: amount(now, most), ..Channels::default() });
        let fix = |channels, wanted| queues(channels, wanted, "e", "e").fix;
        assert_eq!(queues(combined(4, 8), 4, "e", "e").status, Status::Pass);
        assert_eq!(fix(combined(4, 8), 5).as_deref(), Some("ethtool -L e combined 5"));
        let apart = Channels { rx: amount(1, 4), tx: amount(1, 4), ..Channels::default() };
        assert_eq!(fix(Ok(apart), 2).as_deref(), Some("ethtool -L e rx 2 tx 2"));
        let few = queues(combined(4, 4), 5, "e", "e");
        assert_eq!((few.status, few.fix), (Status::Fail, None));
    }

    #[test]
    fn short_rx_ring_warns() {
        let rings = |now, most| rings(Ok((amount(now, most), amount(now, most))), "e", "e");
        assert_eq!(rings(256, 256).status, Status::Pass);
        assert_eq!(rings(512, 4096).fix.as_deref(), Some("ethtool -G e rx 1024"));
        assert_eq!(rings(2048, 4096).status, Status::Pass);
    }

    #[test]
    fn receive_hashing_to_the_guests_queues_warns() {
        let hashing = |queues: &[u32], first| {
            hashing(Ok(queues.iter().copied().collect()), 4, first, "e", "e").unwrap()
        };
        assert_eq!(hashing(&[0, 1], 2).status, Status::Pass);
        assert_eq!(hashing(&[0, 1, 2], 2).fix.as_deref(), Some("ethtool -X e equal 2"));
        assert_eq!(hashing(&[0, 1], 0).fix, None);
    }

    #[test]
    fn steering_requires_flow_rules_without_conflict() {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let af_xdp = AfXdp {
            name: "e".into(),
            queue: 2,
            mode: Mode::Auto,
            attach: Attach::Auto,
            steer: true,
        };
        let rule = |queue| vec![Rule { address: mac.0, queue, location: 9 }];
        let steering = |rules, filters| steering(rules, filters, Some(mac), &af_xdp, "e", "e");
        assert_eq!(steering(Ok(rule(2)), true).status, Status::Pass);
        assert_eq!(steering(Ok(rule(1)), true).fix.as_deref(), Some("ethtool -N e delete 9"));
        assert_eq!(steering(Ok(vec![]), false).fix.as_deref(), Some("ethtool -K e ntuple on"));
        let none = steering(Err(io::ErrorKind::Unsupported.into()), false);
        assert_eq!((none.status, none.fix), (Status::Fail, None));
    }
}
