//! Checks of the host's network stack: bridge netfilter, the firewall, and buffers of sockets.

use super::finding::{Finding, quoted};
use super::host::{Credentials, Host, capability};
use super::network::Network;
use super::options::{Port, Requirements};
use crate::port::af_xdp::AfXdp;

/// Recommended maximum of a socket's buffers, in bytes: the kernel's default for TCP to send.
const BUFFER: u64 = 4 << 20;

/// Checks bridge netfilter, the firewall and the buffers.
pub(super) fn check(
    host: &Host,
    credentials: &Credentials,
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
    found.extend(socket_buffers(host, credentials, requirements));
    found
}

/// Checks that bridged frames bypass the IP firewall
/// (`net.bridge.*` of Documentation/networking/ip-sysctl.rst).
fn bridge_netfilter(host: &Host, bridges: &[&str]) -> Finding {
    const DIRECTORY: &str = "/proc/sys/net/bridge";
    let what = "host";
    let names = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"];
    let on: Vec<&str> = names
        .into_iter()
        .filter(|name| host.number::<i32>(&format!("{DIRECTORY}/{name}")).is_some_and(|on| on != 0))
        .collect();
    if !host.exists(DIRECTORY) {
        let why = "br_netfilter is not loaded: bridged frames bypass iptables";
        return Finding::pass("bridge-netfilter", what, why);
    }
    if on.is_empty() {
        let why = "all settings are 0: bridged frames bypass iptables";
        return Finding::pass("bridge-netfilter", what, why);
    }
    if bridges.is_empty() {
        let why = format!("{} is 1; not applicable: the host has no bridge", on[0]);
        return Finding::pass("bridge-netfilter", what, why);
    }
    let why = format!(
        "{} is 1: frames through {} pass iptables, which costs CPU time, and loses them if the FORWARD \
         chain drops (as Docker sets it). Keep the setting if you filter guests there",
        on[0],
        bridges.join(", ")
    );
    let settings: Vec<String> = on.iter().map(|name| format!("net.bridge.{name}=0")).collect();
    Finding::warn("bridge-netfilter", what, why).fix(format!("sysctl -w {}", settings.join(" ")))
}

/// Checks that ports on AF_XDP have anti-spoofing. An AF_XDP socket takes received frames before the host's
/// firewall sees them, and sends frames behind the firewall.
fn firewall(requirements: &Requirements) -> Vec<Finding> {
    let named: Vec<_> = requirements.af_xdp().filter(|(port, _)| port.named).collect();
    if named.is_empty() {
        let why = "the firewall sees frames of TAPs; it does not see frames of AF_XDP";
        return vec![Finding::pass("firewall", "host", why)];
    }
    let check_port = |(port, af_xdp): &(&Port, &AfXdp)| {
        let what = &af_xdp.name;
        if port.anti_spoofing {
            let why =
                "the host's firewall does not see this port's frames; the port has anti-spoofing";
            Finding::pass("firewall", what, why)
        } else {
            let why = "the host's firewall does not see this port's frames, and anti-spoofing is off; \
                       filter behind the device, or start the daemon with --anti-spoofing=on";
            Finding::warn("firewall", what, why)
        }
    };
    named.iter().map(check_port).collect()
}

/// Checks `net.ipv4.tcp_rmem` and `tcp_wmem` (Documentation/networking/ip-sysctl.rst), which apply to
/// connections that end on this host.
fn tcp_buffers(host: &Host) -> Vec<Finding> {
    let check_setting = |name: &str| {
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
                "cannot read it, so the maximum is not known",
            );
        };
        if most >= BUFFER {
            let why = format!("maximum {most} bytes, for this host's own connections");
            return Finding::pass("tcp-buffers", what, why);
        }
        let why = format!(
            "maximum {most} bytes, which slows this host's own connections to guests; connections of \
             guests use the guests' buffers"
        );
        let setting = quoted(&format!("net.ipv4.{name}={least} {first} {BUFFER}"));
        Finding::warn("tcp-buffers", what, why).fix(format!("sysctl -w {setting}"))
    };
    ["tcp_rmem", "tcp_wmem"].into_iter().map(check_setting).collect()
}

/// Checks `net.core.wmem_max`, which limits AF_XDP sockets of a process without CAP_NET_ADMIN.
fn socket_buffers(
    host: &Host,
    credentials: &Credentials,
    requirements: &Requirements,
) -> Option<Finding> {
    let (what, path) = ("net.core.wmem_max", "/proc/sys/net/core/wmem_max");
    // A new network namespace has no such file: the host's setting applies.
    let most: u64 = host.number(path)?;
    if !requirements.names_af_xdp() || credentials.has(capability::NET_ADMIN) || most >= BUFFER {
        let why = format!("{most} bytes, which limits only AF_XDP sockets without CAP_NET_ADMIN");
        return Some(Finding::pass("tcp-buffers", what, why));
    }
    let why = format!(
        "{most} bytes, less than the {BUFFER} of an AF_XDP socket: bursts wait for buffer space"
    );
    Some(Finding::warn("tcp-buffers", what, why).fix(format!("sysctl -w {what}={BUFFER}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    #[test]
    fn bridge_netfilter_warns_only_with_a_bridge() {
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
    fn small_and_unreadable_tcp_buffers_warn() {
        let (_directory, host) = fake(&[("/proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t212992\n")]);
        let found = tcp_buffers(&host);
        let fix = "sysctl -w 'net.ipv4.tcp_rmem=4096 131072 4194304'";
        assert_eq!(found[0].fix.as_deref(), Some(fix));
        assert!(found[1].why.contains("cannot read"));
    }
}
