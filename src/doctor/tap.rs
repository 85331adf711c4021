//! A TAP device: whether the daemon can open it as it needs it, and whether frames get through.

use super::finding::{Finding, quoted};
use super::host::{Host, Myself, capability};
use super::network::Network;
use super::offloads;
use super::options::Port;
use crate::port::tap::no_tap;
use crate::sys::link::{Link, Tun};

const CHECK: &str = "tap";

/// Checks the TAP `name` for a port.
pub(super) fn check(
    host: &Host,
    myself: &Myself,
    network: &Network,
    port: &Port,
    name: &str,
) -> Vec<Finding> {
    let Some(link) = network.find(name) else {
        return vec![missing(myself, port, name)];
    };
    let what = format!("tap {name}");
    let Some(tun) = link.tun.as_ref().filter(|tun| tun.is_tap) else {
        if link.is_macvtap() {
            return vec![Finding::fail(CHECK, what, no_tap(name))];
        }
        let kind = if link.kind.is_empty() { "card" } else { &link.kind };
        let why = format!("it is a {kind}, not a TAP: choose another name, or --af-xdp={name}");
        return vec![Finding::fail(CHECK, what, why)];
    };
    let bridge = network.bridge_of(link).map(|bridge| bridge.name.as_str());
    let mut found = vec![
        owner(myself, tun, &what, || remake(link, tun, port, bridge, myself)),
        advertisements(link, &what),
        queues(tun, port, &what, || remake(link, tun, port, bridge, myself)),
        header(tun, &what, || remake(link, tun, port, bridge, myself)),
        state(link, &what),
        mtu(link, port, bridge, &what),
    ];
    found.extend(users(host, tun, &link.name, &what));
    found.extend(offloads::of_tap(network, link, &what));
    found
}

fn missing(myself: &Myself, port: &Port, name: &str) -> Finding {
    let what = format!("tap {name}");
    let several = if port.pairs > 1 { " multi_queue" } else { "" };
    let name = quoted(name);
    let make = format!("ip tuntap add dev {name} mode tap vnet_hdr{several} user {}", myself.user);
    let up = format!("ip link set {name} mtu {} up", port.mtu);
    if myself.can(capability::NET_ADMIN) {
        let why = "it is not there: the daemon makes it, for as long as it runs and in no bridge; \
                   make it first to have it otherwise";
        Finding::warn(CHECK, what, why).fix(format!("{make} && {up}"))
    } else {
        let why = "it is not there, and to make it takes CAP_NET_ADMIN: make it for this user, as \
                   root";
        Finding::fail(CHECK, what, why).fix(format!("{make} && {up}"))
    }
}

/// Makes a TAP again as it is, but with what a port needs of it: how it was made can't be changed.
fn remake(link: &Link, tun: &Tun, port: &Port, bridge: Option<&str>, myself: &Myself) -> String {
    let name = quoted(&link.name);
    let mut words = format!("ip tuntap add dev {name} mode tap vnet_hdr");
    if tun.multi_queue || port.pairs > 1 {
        words += " multi_queue";
    }
    // Root opens it whosever it is, and so leaves it to whom it belongs.
    let is_owned = tun.owner.is_some() || tun.group.is_some();
    let (owner, group) = if myself.user == 0 && is_owned {
        (tun.owner, tun.group)
    } else {
        (Some(myself.user), None)
    };
    words += &owner.map_or(String::new(), |owner| format!(" user {owner}"));
    words += &group.map_or(String::new(), |group| format!(" group {group}"));
    let bridge = bridge.map_or(String::new(), |bridge| format!(" master {}", quoted(bridge)));
    let set = format!("ip link set {name} mtu {}{bridge} up", link.mtu);
    format!("ip link delete {name} && {words} && {set}")
}

/// Who may open it: `tun_not_capable` of drivers/net/tun.c.
fn owner(myself: &Myself, tun: &Tun, what: &str, remake: impl FnOnce() -> String) -> Finding {
    let is_ours = tun.owner.is_none_or(|owner| owner == myself.user)
        && tun.group.is_none_or(|group| myself.groups.contains(&group));
    let theirs = match (tun.owner, tun.group) {
        (Some(owner), Some(group)) => format!("user {owner} in group {group}"),
        (Some(owner), None) => format!("user {owner}"),
        (None, Some(group)) => format!("group {group}"),
        (None, None) => "everybody".into(),
    };
    if (tun.owner, tun.group) == (None, None) {
        let why = "it has no owner: whoever may open /dev/net/tun can have its frames, while no daemon \
                   has it or it has several queues; make it again with 'user NAME' of the daemon's user, \
                   or 'group NAME'";
        Finding::warn("tap-owner", what, why).fix(remake())
    } else if is_ours {
        Finding::pass("tap-owner", what, format!("this user ({}) may open it", myself.user))
    } else if myself.can(capability::NET_ADMIN) {
        let why = format!("it is for {theirs}, and CAP_NET_ADMIN opens it too");
        Finding::pass("tap-owner", what, why)
    } else {
        let why = format!(
            "it is for {theirs}, and this is user {} without CAP_NET_ADMIN: make it again, as root",
            myself.user
        );
        Finding::fail("tap-owner", what, why).fix(remake())
    }
}

fn queues(tun: &Tun, port: &Port, what: &str, remake: impl FnOnce() -> String) -> Finding {
    let wanted = port.pairs;
    if tun.multi_queue {
        let why = format!("queue pairs wanted: {wanted}; it can have several");
        return Finding::pass("tap-queues", what, why);
    }
    let why = format!("queue pairs wanted: {wanted}; it can have one");
    if wanted == 1 {
        return Finding::pass("tap-queues", what, why);
    }
    Finding::fail("tap-queues", what, why).fix(remake())
}

fn header(tun: &Tun, what: &str, remake: impl FnOnce() -> String) -> Finding {
    if tun.vnet_hdr {
        return Finding::pass("tap-header", what, "a virtio header stands before each frame");
    }
    let why = "it was made without IFF_VNET_HDR: the daemon turns that on as it opens it, but a \
               queue that another program opens and hands over with --tap-fd would be refused";
    Finding::warn("tap-header", what, why).fix(remake())
}

fn state(link: &Link, what: &str) -> Finding {
    if link.is_up {
        return Finding::pass("tap-state", what, "it is up");
    }
    let why = "it is down: no frame goes through it";
    Finding::fail("tap-state", what, why).fix(format!("ip link set {} up", quoted(&link.name)))
}

/// What a guest that plays the router can do to the host.
fn advertisements(link: &Link, what: &str) -> Finding {
    const CHECK: &str = "tap-advertisements";
    if link.master.is_some() {
        return Finding::pass(
            CHECK,
            what,
            "a bridge has its frames: the host takes no routes there",
        );
    }
    if !link.takes_advertisements {
        let why = "the host takes no router advertisements from its guest";
        return Finding::pass(CHECK, what, why);
    }
    let why = "it is in no bridge, and the host takes router advertisements from its guest, which so \
               gives the host addresses and a default route";
    let command =
        format!("sysctl -qw {}=0", quoted(&format!("net/ipv6/conf/{}/accept_ra", link.name)));
    Finding::warn(CHECK, what, why).fix(command)
}

fn mtu(link: &Link, port: &Port, bridge: Option<&str>, what: &str) -> Finding {
    let wanted = u32::from(port.mtu);
    if link.mtu >= wanted {
        let why = format!("its MTU of {} takes the card's {wanted}", link.mtu);
        return Finding::pass("tap-mtu", what, why);
    }
    let why = format!("its MTU is {}, and the card's {wanted}", link.mtu);
    let command = format!("ip link set {} mtu {wanted}", quoted(&link.name));
    // A bridge drops what does not fit (`is_skb_forwardable`); a router cuts it, or says so.
    match bridge {
        Some(bridge) => {
            let why = format!("{why}: {bridge} drops longer frames to the guest without a word");
            Finding::fail("tap-mtu", what, why).fix(command)
        }
        None => {
            let why = format!("{why}: longer packets to the guest are cut, or refused");
            Finding::warn("tap-mtu", what, why).fix(command)
        }
    }
}

/// Who has it open.
fn users(host: &Host, tun: &Tun, name: &str, what: &str) -> Option<Finding> {
    // The kernel shows the device with each descriptor (`tun_chr_show_fdinfo`); there may be one of
    // that name in another namespace.
    let ours = host.link("/proc/self/ns/net");
    let wanted = format!("iff:\t{name}");
    let mut holders = host.holders(|info| info.lines().any(|line| line == wanted));
    holders.retain(|(process, _)| host.link(&format!("/proc/{process}/ns/net")) == ours);
    let shown: Vec<String> =
        holders.iter().map(|(process, program)| format!("{program} (process {process})")).collect();
    let shown = shown.join(", ");
    let others: Vec<&str> = holders
        .iter()
        .filter(|(_, program)| !program.starts_with("vhost-user-net"))
        .map(|(process, _)| process.as_str())
        .collect();
    if holders.is_empty() {
        let why = format!("{} queues of it are open, and it can't be seen by whom", tun.queues);
        return (tun.queues > 0).then(|| Finding::warn("tap-use", what, why));
    }
    if others.is_empty() {
        let why = format!("{shown} has it open: another daemon can't");
        return Some(Finding::pass("tap-use", what, why));
    }
    let why = format!("{shown} has it open: end that if nobody needs it, or choose another TAP");
    let make = if tun.multi_queue { Finding::warn } else { Finding::fail };
    Some(make("tap-use", what, why).fix(format!("kill {}", others.join(" "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Host as HostSide;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    fn port(pairs: u16) -> Port {
        Port {
            host: HostSide::Tap("t".into()),
            pairs,
            mtu: 1500,
            mac: None,
            cpus: Vec::new(),
            busy_poll: false,
            judged: false,
            require_sealed_memory: false,
            named: true,
        }
    }

    #[test]
    fn a_tap_that_is_made_again_stays_what_it_was() {
        let tun = Tun { is_tap: true, owner: Some(5), group: Some(6), ..Tun::default() };
        let link = Link { name: "t".into(), mtu: 1400, ..Link::default() };
        let remade = |pairs, user| {
            let myself = Myself { user, ..Myself::default() };
            remake(&link, &tun, &port(pairs), Some("br0"), &myself)
        };
        assert_eq!(
            remade(2, 0),
            "ip link delete t && ip tuntap add dev t mode tap vnet_hdr multi_queue user 5 group 6 && \
             ip link set t mtu 1400 master br0 up"
        );
        assert!(remade(1, 1000).contains("vnet_hdr user 1000 &&"), "it is this user's then");
        let nobody_s = remake(&link, &Tun::default(), &port(1), None, &Myself::default());
        assert!(nobody_s.contains("vnet_hdr user 0 &&"), "it is no longer everybody's: {nobody_s}");
    }

    #[test]
    fn a_group_is_enough_and_a_stranger_is_not() {
        let myself = Myself { user: 1000, groups: vec![7], ..Myself::default() };
        let judged = |owner, group| {
            let tun = Tun { owner, group, ..Tun::default() };
            owner_status(&myself, &tun)
        };
        fn owner_status(myself: &Myself, tun: &Tun) -> Status {
            owner(myself, tun, "tap t", || "again".into()).status
        }
        assert_eq!(judged(None, None), Status::Warn, "anybody's");
        assert_eq!(judged(None, Some(7)), Status::Pass);
        assert_eq!(judged(Some(1000), Some(7)), Status::Pass);
        assert_eq!(judged(Some(1000), Some(8)), Status::Fail);
        assert_eq!(judged(Some(1001), None), Status::Fail);
    }

    #[test]
    fn whoever_has_it_open_is_named() {
        let (_directory, host) = fake(&[
            ("/proc/12/fdinfo/3", "pos:\t0\niff:\tt\n"),
            ("/proc/12/comm", "qemu-system-x86\n"),
            ("/proc/13/fdinfo/3", "pos:\t0\niff:\tother\n"),
            ("/proc/sys/fdinfo/3", "iff:\tt\n"),
        ]);
        let single = users(&host, &Tun::default(), "t", "tap t").unwrap();
        assert_eq!((single.status, single.fix.as_deref()), (Status::Fail, Some("kill 12")));
        assert_eq!(users(&host, &Tun::default(), "nobody-s", "tap"), None);
    }
}
