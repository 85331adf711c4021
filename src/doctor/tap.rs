//! Checks of a TAP device: the daemon can open it as the port requires, and frames pass through it.

use super::finding::{Finding, quoted};
use super::host::{Credentials, Host, capability};
use super::network::Network;
use super::offloads;
use super::options::Port;
use crate::port::tap::no_tap;
use crate::sys::link::{Link, Tun};

const CHECK: &str = "tap";

/// Checks the TAP `name` for a port.
pub(super) fn check(
    host: &Host,
    credentials: &Credentials,
    network: &Network,
    port: &Port,
    name: &str,
) -> Vec<Finding> {
    let Some(link) = network.find(name) else {
        return vec![missing(credentials, port, name)];
    };
    let Some(tun) = link.tun.as_ref().filter(|tun| tun.is_tap) else {
        if link.is_macvtap() {
            return vec![Finding::fail(CHECK, name, no_tap(name))];
        }
        let kind = if link.kind.is_empty() { "network device" } else { &link.kind };
        let why = format!("is a {kind}, not a TAP; choose another name, or use --af-xdp={name}");
        return vec![Finding::fail(CHECK, name, why)];
    };
    let bridge = network.bridge_of(link).map(|bridge| bridge.name.as_str());
    let mut found = vec![
        owner(credentials, tun, name, || recreate(link, tun, port, bridge, credentials)),
        router_advertisements(link, name),
        queues(tun, port, name, || recreate(link, tun, port, bridge, credentials)),
        header(tun, name, || recreate(link, tun, port, bridge, credentials)),
        state(link, name),
        mtu(link, port, bridge, name),
    ];
    found.extend(users(host, tun, &link.name, name));
    found.extend(offloads::of_tap(network, link, name));
    found
}

fn missing(credentials: &Credentials, port: &Port, name: &str) -> Finding {
    let several = if port.pairs > 1 { " multi_queue" } else { "" };
    let word = quoted(name);
    let user = credentials.user;
    let create = format!("ip tuntap add dev {word} mode tap vnet_hdr{several} user {user}");
    let up = format!("ip link set {word} mtu {} up", port.mtu);
    if credentials.has(capability::NET_ADMIN) {
        let why = "does not exist; the daemon would create it, in no bridge, and remove it on exit. \
                   Create it first to keep it or to add it to a bridge";
        Finding::warn(CHECK, name, why).fix(format!("{create} && {up}"))
    } else {
        let why =
            "does not exist; creating it requires CAP_NET_ADMIN. Create it for this user, as root";
        Finding::fail(CHECK, name, why).fix(format!("{create} && {up}"))
    }
}

/// Returns the command that deletes a TAP and creates it again with the port's requirements. Queues, header
/// and owner of an existing TAP cannot be changed.
fn recreate(
    link: &Link,
    tun: &Tun,
    port: &Port,
    bridge: Option<&str>,
    credentials: &Credentials,
) -> String {
    let name = quoted(&link.name);
    let mut words = format!("ip tuntap add dev {name} mode tap vnet_hdr");
    if tun.multi_queue || port.pairs > 1 {
        words += " multi_queue";
    }
    // Root can open a TAP of any owner, so the owner stays.
    let is_owned = tun.owner.is_some() || tun.group.is_some();
    let (owner, group) = if credentials.user == 0 && is_owned {
        (tun.owner, tun.group)
    } else {
        (Some(credentials.user), None)
    };
    words += &owner.map_or(String::new(), |owner| format!(" user {owner}"));
    words += &group.map_or(String::new(), |group| format!(" group {group}"));
    let bridge = bridge.map_or(String::new(), |bridge| format!(" master {}", quoted(bridge)));
    let set = format!("ip link set {name} mtu {}{bridge} up", link.mtu);
    format!("ip link delete {name} && {words} && {set}")
}

/// Checks that this user may open the TAP, by the rule of `tun_not_capable` in drivers/net/tun.c.
fn owner(
    credentials: &Credentials,
    tun: &Tun,
    what: &str,
    recreate: impl FnOnce() -> String,
) -> Finding {
    let user = credentials.user;
    let may_open = tun.owner.is_none_or(|owner| owner == user)
        && tun.group.is_none_or(|group| credentials.groups.contains(&group));
    let owners = match (tun.owner, tun.group) {
        (Some(owner), Some(group)) => format!("user {owner} in group {group}"),
        (Some(owner), None) => format!("user {owner}"),
        (None, Some(group)) => format!("group {group}"),
        (None, None) => "everybody".into(),
    };
    if (tun.owner, tun.group) == (None, None) {
        let why = "has no owner: every user that may open /dev/net/tun can get its frames, while no daemon \
                   has it open or if it has several queues. Create it again with 'user NAME' of the \
                   daemon's user, or 'group NAME'";
        Finding::warn("tap-owner", what, why).fix(recreate())
    } else if may_open {
        Finding::pass("tap-owner", what, format!("this user ({user}) may open it"))
    } else if credentials.has(capability::NET_ADMIN) {
        let why = format!("belongs to {owners}; CAP_NET_ADMIN permits opening it too");
        Finding::pass("tap-owner", what, why)
    } else {
        let why = format!(
            "belongs to {owners}, but this is user {user} without CAP_NET_ADMIN. Create it again, as \
             root"
        );
        Finding::fail("tap-owner", what, why).fix(recreate())
    }
}

fn queues(tun: &Tun, port: &Port, what: &str, recreate: impl FnOnce() -> String) -> Finding {
    let wanted = port.pairs;
    if tun.multi_queue {
        let why = format!("multi-queue; queue pairs of the port: {wanted}");
        return Finding::pass("tap-queues", what, why);
    }
    let why = format!("single-queue; queue pairs of the port: {wanted}");
    if wanted == 1 {
        return Finding::pass("tap-queues", what, why);
    }
    Finding::fail("tap-queues", what, why).fix(recreate())
}

fn header(tun: &Tun, what: &str, recreate: impl FnOnce() -> String) -> Finding {
    if tun.vnet_hdr {
        return Finding::pass("tap-header", what, "has IFF_VNET_HDR: a header before each frame");
    }
    let why = "lacks IFF_VNET_HDR: the daemon sets it when it opens the TAP, but refuses a queue that \
               another program opened and passed with --tap-fd";
    Finding::warn("tap-header", what, why).fix(recreate())
}

fn state(link: &Link, what: &str) -> Finding {
    if link.is_up {
        return Finding::pass("tap-state", what, "up");
    }
    let why = "down: no frame passes";
    Finding::fail("tap-state", what, why).fix(format!("ip link set {} up", quoted(&link.name)))
}

/// Checks that the guest cannot configure the host as an IPv6 router would.
fn router_advertisements(link: &Link, what: &str) -> Finding {
    const CHECK: &str = "tap-advertisements";
    if link.master.is_some() {
        let why = "in a bridge: the host accepts no router advertisements on it";
        return Finding::pass(CHECK, what, why);
    }
    if !link.takes_advertisements {
        let why = "the host accepts no router advertisements from the guest";
        return Finding::pass(CHECK, what, why);
    }
    let why = "in no bridge, and the host accepts router advertisements: the guest can give the host \
               addresses and a default route";
    let command =
        format!("sysctl -qw {}=0", quoted(&format!("net/ipv6/conf/{}/accept_ra", link.name)));
    Finding::warn(CHECK, what, why).fix(command)
}

fn mtu(link: &Link, port: &Port, bridge: Option<&str>, what: &str) -> Finding {
    let wanted = u32::from(port.mtu);
    if link.mtu >= wanted {
        let why = format!("MTU {} is at least the port's {wanted}", link.mtu);
        return Finding::pass("tap-mtu", what, why);
    }
    let why = format!("MTU {} is below the port's {wanted}", link.mtu);
    let command = format!("ip link set {} mtu {wanted}", quoted(&link.name));
    // A bridge drops a frame above the MTU (`is_skb_forwardable`). A router fragments the packet, or
    // refuses it with an ICMP message.
    match bridge {
        Some(bridge) => {
            let why = format!("{why}; bridge {bridge} silently drops larger frames to the guest");
            Finding::fail("tap-mtu", what, why).fix(command)
        }
        None => {
            let why = format!("{why}; the host fragments or refuses larger packets to the guest");
            Finding::warn("tap-mtu", what, why).fix(command)
        }
    }
}

/// Checks that no other program has the TAP open.
fn users(host: &Host, tun: &Tun, name: &str, what: &str) -> Option<Finding> {
    // The kernel shows the device's name with each descriptor (`tun_chr_show_fdinfo`). Another network
    // namespace may have a device of the same name.
    let own_namespace = host.link("/proc/self/ns/net");
    let wanted = format!("iff:\t{name}");
    let mut holders = host.holders(|info| info.lines().any(|line| line == wanted));
    holders.retain(|(process, _)| host.link(&format!("/proc/{process}/ns/net")) == own_namespace);
    let shown: Vec<String> =
        holders.iter().map(|(process, program)| format!("{program} (pid {process})")).collect();
    let shown = shown.join(", ");
    let others: Vec<&str> = holders
        .iter()
        .filter(|(_, program)| !program.starts_with("vhost-user-net"))
        .map(|(process, _)| process.as_str())
        .collect();
    if holders.is_empty() {
        let why = format!("{} queues are open, in processes that doctor cannot see", tun.queues);
        return (tun.queues > 0).then(|| Finding::warn("tap-use", what, why));
    }
    if others.is_empty() {
        let why = format!("in use by {shown}; another daemon cannot open it");
        return Some(Finding::pass("tap-use", what, why));
    }
    let program = if others.len() == 1 { "that process" } else { "those processes" };
    let why = format!("in use by {shown}; stop {program} or choose another TAP");
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
            anti_spoofing: false,
            require_sealed_memory: false,
            named: true,
        }
    }

    #[test]
    fn recreated_tap_keeps_its_properties() {
        let tun = Tun { is_tap: true, owner: Some(5), group: Some(6), ..Tun::default() };
        let link = Link { name: "t".into(), mtu: 1400, ..Link::default() };
        let recreated = |pairs, user| {
            let credentials = Credentials { user, ..Credentials::default() };
            recreate(&link, &tun, &port(pairs), Some("br0"), &credentials)
        };
        assert_eq!(
            recreated(2, 0),
            "ip link delete t && ip tuntap add dev t mode tap vnet_hdr multi_queue user 5 group 6 && \
             ip link set t mtu 1400 master br0 up"
        );
        assert!(recreated(1, 1000).contains("vnet_hdr user 1000 &&"), "this user owns it then");
        let unowned = recreate(&link, &Tun::default(), &port(1), None, &Credentials::default());
        assert!(unowned.contains("vnet_hdr user 0 &&"), "root owns it then: {unowned}");
    }

    #[test]
    fn owner_or_group_may_open_a_tap() {
        let credentials = Credentials { user: 1000, groups: vec![7], ..Credentials::default() };
        let status = |owner, group| {
            let tun = Tun { owner, group, ..Tun::default() };
            owner_status(&credentials, &tun)
        };
        fn owner_status(credentials: &Credentials, tun: &Tun) -> Status {
            owner(credentials, tun, "t", || "again".into()).status
        }
        assert_eq!(status(None, None), Status::Warn, "it has no owner");
        assert_eq!(status(None, Some(7)), Status::Pass);
        assert_eq!(status(Some(1000), Some(7)), Status::Pass);
        assert_eq!(status(Some(1000), Some(8)), Status::Fail);
        assert_eq!(status(Some(1001), None), Status::Fail);
    }

    #[test]
    fn process_with_the_tap_open_is_named() {
        let (_directory, host) = fake(&[
            ("/proc/12/fdinfo/3", "pos:\t0\niff:\tt\n"),
            ("/proc/12/comm", "qemu-system-x86\n"),
            ("/proc/13/fdinfo/3", "pos:\t0\niff:\tother\n"),
            ("/proc/sys/fdinfo/3", "iff:\tt\n"),
        ]);
        let single = users(&host, &Tun::default(), "t", "t").unwrap();
        assert_eq!((single.status, single.fix.as_deref()), (Status::Fail, Some("kill 12")));
        assert_eq!(users(&host, &Tun::default(), "unused", "unused"), None);
    }
}
