//! Checks of a network device for AF_XDP: it is up, its MTU fits, and it runs the daemon's program in the
//! mode that the port asks for.

use super::finding::{Finding, quoted};
use super::host::Host;
use super::network::Network;
use super::offloads;
use super::options::Port;
use super::placement;
use super::queues;
use crate::port::af_xdp::{AfXdp, Attach, MAX_MTU, Mode, program};
use crate::sys::bpf::Program;
use crate::sys::ethtool::{self, xdp};
use crate::sys::link::Link;

/// Checks a device for a port.
pub(super) fn check(host: &Host, network: &Network, port: &Port, af_xdp: &AfXdp) -> Vec<Finding> {
    let name = &af_xdp.name;
    let Some(link) = network.find(name) else {
        let why = "no such network device; a veth pair works on any host";
        // A name has at most 15 bytes, and the peer's name ends in "-host".
        let stem: String = name.chars().take(8).collect();
        let (word, peer) = (quoted(name), quoted(&format!("{stem}-host")));
        let mtu = port.mtu;
        let command = format!(
            "ip link add {word} mtu {mtu} type veth peer name {peer} mtu {mtu} && ip link set {word} up \
             && ip link set {peer} up && ethtool -K {peer} tx off txvlan off \
             tx-vlan-stag-hw-insert off"
        );
        return vec![Finding::fail("device", name, why).fix(command)];
    };
    let mut found = vec![state(link, name), mtu(network, link, port, name)];
    let features = ethtool::xdp_features(link.index);
    let native = features.as_ref().is_ok_and(|features| is_native(*features));
    let generic = af_xdp.attach == Attach::Generic || !native;
    found.extend(driver(features, af_xdp, name));
    found.extend(known_bug(host, link, af_xdp, name));
    found.push(attached_program(host, link, name, |id| Ok(Program::by_id(id)?.info()?.name)));
    found.extend(queues::check(network, link, port, af_xdp, name));
    found.extend(offloads::of_device(network, link, generic, name));
    found.extend(placement::of_device(host, link, port, name));
    found
}

fn state(link: &Link, what: &str) -> Finding {
    if link.is_up {
        return Finding::pass("device", what, "up");
    }
    let why = "down: no frame passes";
    Finding::fail("device", what, why).fix(format!("ip link set {} up", quoted(&link.name)))
}

fn mtu(network: &Network, link: &Link, port: &Port, what: &str) -> Finding {
    let wanted = u32::from(port.mtu);
    let lower = MAX_MTU.min(wanted);
    let command = format!("ip link set {} mtu {lower}", quoted(&link.name));
    if wanted > MAX_MTU {
        let why =
            format!("the port's MTU {wanted} exceeds AF_XDP's maximum {MAX_MTU}; lower --mtu");
        return Finding::fail("mtu", what, why);
    }
    if link.mtu > MAX_MTU {
        let why = format!("MTU {} exceeds AF_XDP's maximum {MAX_MTU}", link.mtu);
        return Finding::fail("mtu", what, why).fix(command);
    }
    // A veth drops a frame above its peer's MTU (`is_skb_forwardable`).
    let peer = link.veth_peer.and_then(|peer| network.at(peer));
    let of_peer = peer.map_or(String::new(), |peer| format!(" of veth peer {}", peer.name));
    for (end, whose, direction) in [(Some(link), "", "to"), (peer, &of_peer[..], "from")] {
        let Some(end) = end.filter(|end| end.mtu < wanted) else { continue };
        let (name, less) = (&end.name, end.mtu);
        let why = format!(
            "MTU {less}{whose} is below the port's {wanted}; larger frames {direction} the guest are lost"
        );
        if link.parent.is_some() {
            // The doctor cannot tell what MTU the network behind a NIC carries.
            let why = format!("{why}. Start the daemon with --mtu={less}");
            return Finding::fail("mtu", what, why);
        }
        let command = format!("ip link set {} mtu {wanted}", quoted(name));
        return Finding::fail("mtu", what, why).fix(command);
    }
    Finding::pass("mtu", what, format!("MTU {} is at least the port's {wanted}", link.mtu))
}

/// Returns true if the device's driver supports zero copy, or the kernel does not report it.
pub(super) fn has_zero_copy(link: &Link) -> bool {
    ethtool::xdp_features(link.index).map_or(true, |features| features & xdp::ZERO_COPY != 0)
}

/// Returns true if the driver runs XDP programs and redirects frames to sockets.
fn is_native(features: u64) -> bool {
    features & (xdp::BASIC | xdp::REDIRECT) == xdp::BASIC | xdp::REDIRECT
}

/// Checks the features that the driver reports (`NETDEV_CMD_DEV_GET`). A driver's version does not imply them.
fn driver(features: std::io::Result<u64>, af_xdp: &AfXdp, what: &str) -> Vec<Finding> {
    let features = match features {
        Ok(features) => features,
        Err(error) => {
            let why =
                format!("cannot read the driver's XDP features (Linux 6.3 or later): {error}");
            return vec![Finding::warn("xdp", what, why)];
        }
    };
    let native = is_native(features);
    let zero_copy = native && features & xdp::ZERO_COPY != 0;
    let mode = match (native, af_xdp.attach) {
        (_, Attach::Generic) => {
            let why = "attach=generic: the kernel's generic code runs the program";
            Finding::pass("xdp", what, why)
        }
        (true, _) => {
            Finding::pass("xdp", what, "the driver runs XDP programs and redirects frames")
        }
        (false, Attach::Native) => {
            let why = "with the device's present settings, the driver does not support XDP, which \
                       attach=native requires; use attach=auto";
            Finding::fail("xdp", what, why)
        }
        (false, Attach::Auto) => {
            let why = "with the device's present settings, the driver does not support XDP; the kernel's \
                       generic code runs the program, which costs more CPU time for each frame";
            Finding::warn("xdp", what, why)
        }
    };
    let copied = match (zero_copy, af_xdp.mode) {
        (_, Mode::Copy) => {
            Finding::pass("zero-copy", what, "mode=copy: the kernel copies each frame")
        }
        (true, _) => Finding::pass("zero-copy", what, "the driver supports zero copy"),
        (false, Mode::ZeroCopy) => {
            let why = "the driver does not support zero copy, which mode=zero-copy requires; use mode=auto";
            Finding::fail("zero-copy", what, why)
        }
        (false, Mode::Auto) => {
            let why = "the driver does not support zero copy; mode=auto lets the kernel copy each frame once";
            Finding::pass("zero-copy", what, why)
        }
    };
    vec![mode, copied]
}

/// Checks for a driver whose zero copy delivers wrong frames: igb, of Linux 6.18 to 7.3 at least
/// (docs/af-xdp.md).
fn known_bug(host: &Host, link: &Link, af_xdp: &AfXdp, what: &str) -> Option<Finding> {
    let directory = placement::sysfs_directory(host, link)?;
    let driver = host.link(&format!("{directory}/driver"))?;
    if af_xdp.mode == Mode::Copy || !driver.ends_with("igb") {
        return None;
    }
    let why = "igb's zero copy takes old descriptors for new frames when a guest runs out of buffers \
               (Linux 6.18 to 7.3); use mode=copy";
    Some(Finding::warn("zero-copy", what, why))
}

/// Checks that no other program's XDP program is attached to the device.
fn attached_program(
    host: &Host,
    link: &Link,
    what: &str,
    name_of: impl FnOnce(u32) -> std::io::Result<String>,
) -> Finding {
    const CHECK: &str = "xdp-program";
    let Some(id) = link.program else {
        return Finding::pass(CHECK, what, "no XDP program is attached");
    };
    let name = match name_of(id) {
        Ok(name) => name,
        Err(error) => {
            let why =
                format!("an XDP program (id {id}) is attached; cannot read its name: {error}");
            return Finding::warn(CHECK, what, why);
        }
    };
    if name == program::NAME {
        let why = "the daemon's XDP program is attached; several daemons can share it";
        return Finding::pass(CHECK, what, why);
    }
    let why = format!("another XDP program is attached: '{name}' (id {id})");
    // A program that a BPF link attached stays until the last process closes the link.
    let holders = host.holders(|info| {
        let has = |line: String| info.lines().any(|it| it == line);
        has(format!("prog_id:\t{id}")) && has("link_type:\txdp".into())
    });
    if holders.is_empty() {
        let hook = if link.program_is_generic { "xdpgeneric" } else { "xdp" };
        let command = format!("ip link set dev {} {hook} off", quoted(&link.name));
        let why = format!("{why}; detach it if nothing needs it");
        return Finding::fail(CHECK, what, why).fix(command);
    }
    let (processes, programs): (Vec<_>, Vec<_>) = holders.into_iter().unzip();
    let why =
        format!("{why}, held by {}; stop that program if nothing needs it", programs.join(", "));
    Finding::fail(CHECK, what, why).fix(format!("kill {}", processes.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    fn asked(mode: Mode, attach: Attach) -> AfXdp {
        AfXdp { name: "e".into(), queue: 0, mode, attach, steer: false }
    }

    fn statuses(features: u64, af_xdp: &AfXdp) -> Vec<Status> {
        driver(Ok(features), af_xdp, "e").iter().map(|finding| finding.status).collect()
    }

    #[test]
    fn missing_driver_feature_fails_only_if_requested() {
        use Status::{Fail, Pass, Warn};
        let all = xdp::BASIC | xdp::REDIRECT | xdp::ZERO_COPY;
        let auto = asked(Mode::Auto, Attach::Auto);
        assert_eq!(statuses(all, &auto), [Pass, Pass]);
        assert_eq!(statuses(all & !xdp::ZERO_COPY, &auto), [Pass, Pass]);
        assert_eq!(statuses(0, &auto), [Warn, Pass]);
        assert_eq!(statuses(0, &asked(Mode::ZeroCopy, Attach::Native)), [Fail, Fail]);
        assert_eq!(statuses(0, &asked(Mode::Copy, Attach::Generic)), [Pass, Pass]);
        let unknown = driver(Err(std::io::ErrorKind::NotFound.into()), &auto, "e");
        assert_eq!(unknown[0].status, Warn);
    }

    #[test]
    fn zero_copy_of_igb_warns_and_copy_mode_passes() {
        let (directory, host) = fake(&[("/sys/bus/pci/devices/x/vendor", "y")]);
        let link = Link { parent: Some(("pci".into(), "x".into())), ..Link::default() };
        let found = |mode| known_bug(&host, &link, &asked(mode, Attach::Auto), "e");
        assert_eq!(found(Mode::Auto), None, "it has no driver");
        let driver = directory.as_path().join("sys/bus/pci/devices/x/driver");
        std::os::unix::fs::symlink("../../drivers/igb", driver).unwrap();
        assert_eq!(found(Mode::Auto).unwrap().status, Status::Warn);
        assert_eq!(found(Mode::Copy), None);
    }

    #[test]
    fn attached_program_is_told_from_the_daemons() {
        let link = |program| Link { name: "e".into(), program, ..Link::default() };
        let of = |program, name: Result<&str, std::io::ErrorKind>| {
            let name = name.map(str::to_owned).map_err(Into::into);
            let (_directory, host) =
                fake(&[("/proc/9/fdinfo/4", "link_type:\txdp\nprog_id:\t8\n")]);
            attached_program(&host, &link(program), "e", |_| name)
        };
        assert_eq!(of(None, Ok("")).status, Status::Pass);
        assert_eq!(of(Some(7), Ok(program::NAME)).status, Status::Pass);
        assert_eq!(of(Some(7), Err(std::io::ErrorKind::PermissionDenied)).status, Status::Warn);
        let foreign = of(Some(7), Ok("theirs"));
        assert_eq!(foreign.fix.as_deref(), Some("ip link set dev e xdp off"));
        let held = of(Some(8), Ok("theirs"));
        assert_eq!(held.fix.as_deref(), Some("kill 9"));
    }
}
