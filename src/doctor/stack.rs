//! What the host's network stack does with guests' frames, and what it does not.

use super::finding::{Finding, quoted};
use super::host::{Host, Myself, capability};
use super::network::Network;
use super::options::Requirements;

/// What a TCP connection's buffers may grow to as the kernel comes: 4 MiB to send.
const BUFFER: u64 = 4 << 20;

/// Checks bridge netfilter, the firewall and TCP's buffers.
pub(super) fn check(
    host: &Host,
    myself: &Myself,
    network: &Network,
    requirements: &Requirements,
) -> Vec<Finding> {
    let bridges: Vec<&str> = network
        .links
        .iter()
        .filter(|link| link.kind == "bridge")
        .map(|link| link.name.as_str())
        .collect();
    let mut found = vec![bridge_netfilter(host, &bridges)];
    found.extend(firewall(requirements));
    found.extend(tcp_buffers(host));
    found.extend(socket_buffers(host, myself, requirements));
    found
}

/// Whether bridged frames go through the IP firewall
/// (`net.bridge.*` of Documentation/networking/ip-sysctl.rst).
fn bridge_netfilter(host: &Host, bridges: &[&str]) -> Finding {
    const DIRECTORY: &str = "/proc/sys/net/bridge";
    let what = "bridge netfilter";
    let names = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"];
    let on: Vec<&str> = names
        .into_iter()
        .filter(|name| host.number::<i32>(&format!("{DIRECTORY}/{name}")).is_some_and(|on| on != 0))
        .collect();
    if !host.exists(DIRECTORY) {
        let why = "br_netfilter is not loaded: bridged frames do not go through iptables";
        return Finding::pass("bridge-netfilter", what, why);
    }
    if on.is_empty() {
        let why = "it is off: bridged frames do not go through iptables";
        return Finding::pass("bridge-netfilter", what, why);
    }
    if bridges.is_empty() {
        let why = format!("{} is on, and there is no bridge: not applicable", on[0]);
        return Finding::pass("bridge-netfilter", what, why);
    }
    let why = format!(
        "{} is on: frames that cross {} go through iptables, which is slower, and loses them where \
         FORWARD drops (as Docker sets it); leave it on if you filter guests there",
        on[0],
        bridges.join(", ")
    );
    let settings: Vec<String> = on.iter().map(|name| format!("net.bridge.{name}=0")).collect();
    Finding::warn("bridge-netfilter", what, why).fix(format!("sysctl -w {}", settings.join(" ")))
}

/// AF_XDP takes frames before the host's firewall sees them, and puts them behind it.
fn firewall(requirements: &Requirements) -> Vec<Finding> {
    let named: Vec<_> = requirements.af_xdp().filter(|(port, _)| port.named).collect();
    if named.is_empty() {
        let why = "it sees what comes from a TAP; it would see nothing of AF_XDP's";
        return vec![Finding::pass("firewall", "the host's firewall", why)];
    }
    let judge = |(port, af_xdp): &(&super::options::Port, &crate::port::af_xdp::AfXdp)| {
        let what = format!("the host's firewall and {}", af_xdp.name);
        if port.judged {
            let why =
                "it sees none of this traffic; --anti-spoofing=on judges what the guest sends";
            Finding::pass("firewall", what, why)
        } else {
            let why = "it sees none of this traffic, and nothing else judges what the guest sends: \
                       filter behind the device, or start the daemon with --anti-spoofing=on";
            Finding::warn("firewall", what, why)
        }
    };
    named.iter().map(judge).collect()
}

/// `net.ipv4.tcp_rmem` and `tcp_wmem` (Documentation/networking/ip-sysctl.rst): for connections that
/// end on this host.
fn tcp_buffers(host: &Host) -> Vec<Finding> {
    let judge = |name: &str| {
        let what = format!("net.ipv4.{name}");
        let text = host.read(&format!("/proc/sys/net/ipv4/{name}"));
        let numbers: Vec<u64> = text
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        let [least, first, most] = numbers[..] else {
            return Finding::warn(
                "tcp-buffers",
                what,
                "it can't be read: what it allows is not known",
            );
        };
        let matters = "for this host's own connections; a guest's have the guest's own";
        if most >= BUFFER {
            let why = format!("{most} bytes at the most, {matters}");
            return Finding::pass("tcp-buffers", what, why);
        }
        let why = format!("{most} bytes at the most, {matters}: one to a guest is held up by it");
        let setting = quoted(&format!("net.ipv4.{name}={least} {first} {BUFFER}"));
        Finding::warn("tcp-buffers", what, why).fix(format!("sysctl -w {setting}"))
    };
    ["tcp_rmem", "tcp_wmem"].into_iter().map(judge).collect()
}

/// `net.core.wmem_max` holds an AF_XDP socket back if nothing lets it go beyond.
fn socket_buffers(host: &Host, myself: &Myself, requirements: &Requirements) -> Option<Finding> {
    let (what, path) = ("net.core.wmem_max", "/proc/sys/net/core/wmem_max");
    // A new network namespace has no such file: the host's applies.
    let most: u64 = host.number(path)?;
    if !requirements.names_af_xdp() || myself.can(capability::NET_ADMIN) || most >= BUFFER {
        let why =
            format!("{most} bytes: TAPs have no use for it, and CAP_NET_ADMIN goes beyond it");
        return Some(Finding::pass("tcp-buffers", what, why));
    }
    let why = format!("{most} bytes, and AF_XDP's sockets want {BUFFER}: bursts wait for room");
    Some(Finding::warn("tcp-buffers", what, why).fix(format!("sysctl -w {what}={BUFFER}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    #[test]
    fn bridge_netfilter_matters_where_there_is_a_bridge() {
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        let (_directory, on) = fake(&[(path, "1\n")]);
        let fix = "sysctl -w net.bridge.bridge-nf-call-iptables=0";
        assert_eq!(bridge_netfilter(&on, &["br0"]).fix.as_deref(), Some(fix));
        assert_eq!(bridge_netfilter(&on, &[]).status, Status::Pass);
        let (_directory, off) = fake(&[(path, "0\n")]);
        assert_eq!(bridge_netfilter(&off, &["br0"]).status, Status::Pass);
        let (_directory, without) = fake(&[]);
        assert_eq!(bridge_netfilter(&without, &["br0"]).status, Status::Pass);
    }

    #[test]
    fn small_buffers_are_raised_and_unreadable_ones_said() {
        let (_directory, host) = fake(&[("/proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t212992\n")]);
        let found = tcp_buffers(&host);
        let fix = "sysctl -w 'net.ipv4.tcp_rmem=4096 131072 4194304'";
        assert_eq!(found[0].fix.as_deref(), Some(fix));
        assert!(found[1].why.contains("can't be read"));
    }
}
