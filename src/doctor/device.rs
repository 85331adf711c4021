//! A network device for AF_XDP: whether it is there, carries the guest's frames, and runs the
//! daemon's program in the way that is asked for.

use super::card;
use super::finding::{Finding, quoted};
use super::host::Host;
use super::network::Network;
use super::offloads;
use super::options::Port;
use super::placement;
use crate::port::af_xdp::{AfXdp, Attach, MAX_MTU, Mode, program};
use crate::sys::bpf::Program;
use crate::sys::ethtool::{self, xdp};
use crate::sys::link::Link;

/// Checks a device for a port.
pub(super) fn check(host: &Host, network: &Network, port: &Port, af_xdp: &AfXdp) -> Vec<Finding> {
    let name = &af_xdp.name;
    let what = format!("device {name}");
    let Some(link) = network.find(name) else {
        let why = "there is no such network device: a veth serves a tenant anywhere";
        // A name has 15 bytes, and its other end's one that tells whose it is.
        let stem: String = name.chars().take(8).collect();
        let (name, peer) = (quoted(name), quoted(&format!("{stem}-host")));
        let mtu = port.mtu;
        let command = format!(
            "ip link add {name} mtu {mtu} type veth peer name {peer} mtu {mtu} && ip link set {name} up \
             && ip link set {peer} up && ethtool -K {peer} tx off txvlan off \
             tx-vlan-stag-hw-insert off"
        );
        return vec![Finding::fail("device", what, why).fix(command)];
    };
    let mut found = vec![state(link, &what), mtu(network, link, port, &what)];
    let features = ethtool::xdp_features(link.index);
    let native = features.as_ref().is_ok_and(|features| is_native(*features));
    let generic = af_xdp.attach == Attach::Generic || !native;
    found.extend(driver(features, af_xdp, &what));
    found.extend(known_to_be_wrong(host, link, af_xdp, &what));
    found.push(foreign(host, link, &what, |id| Ok(Program::by_id(id)?.info()?.name)));
    found.extend(card::check(network, link, port, af_xdp, &what));
    found.extend(offloads::of_device(network, link, generic, &what));
    found.extend(placement::of_device(host, link, port, &what));
    found
}

fn state(link: &Link, what: &str) -> Finding {
    if link.is_up {
        return Finding::pass("device", what, "it is there, and up");
    }
    let why = "it is down: no frame goes through it";
    Finding::fail("device", what, why).fix(format!("ip link set {} up", quoted(&link.name)))
}

fn mtu(network: &Network, link: &Link, port: &Port, what: &str) -> Finding {
    let wanted = u32::from(port.mtu);
    let lower = MAX_MTU.min(wanted);
    let command = format!("ip link set {} mtu {lower}", quoted(&link.name));
    if wanted > MAX_MTU {
        let why =
            format!("a card's MTU of {wanted} is wanted, and AF_XDP takes {MAX_MTU}: lower --mtu");
        return Finding::fail("mtu", what, why);
    }
    if link.mtu > MAX_MTU {
        let why = format!("its MTU is {}, and AF_XDP takes {MAX_MTU} at the most", link.mtu);
        return Finding::fail("mtu", what, why).fix(command);
    }
    // A veth drops what the end that it goes to does not take (`is_skb_forwardable`).
    let peer = link.veth_peer.and_then(|peer| network.at(peer));
    for (end, way) in [(Some(link), "to"), (peer, "from")] {
        let Some(end) = end.filter(|end| end.mtu < wanted) else { continue };
        let (name, less) = (&end.name, end.mtu);
        let why = format!(
            "{name} has an MTU of {less}, and the card {wanted}: longer frames {way} the \
                     guest are lost"
        );
        if link.parent.is_some() {
            // How much the network behind it carries is not the host's to say.
            let why = format!("{why}; start the daemon with --mtu={less}");
            return Finding::fail("mtu", what, why);
        }
        let command = format!("ip link set {} mtu {wanted}", quoted(name));
        return Finding::fail("mtu", what, why).fix(command);
    }
    Finding::pass("mtu", what, format!("its MTU of {} takes the card's {wanted}", link.mtu))
}

/// Whether a device's driver has zero copy, or does not tell.
pub(super) fn has_zero_copy(link: &Link) -> bool {
    ethtool::xdp_features(link.index).map_or(true, |features| features & xdp::ZERO_COPY != 0)
}

/// Whether the driver runs programs, and redirects frames to sockets.
fn is_native(features: u64) -> bool {
    features & (xdp::BASIC | xdp::REDIRECT) == xdp::BASIC | xdp::REDIRECT
}

/// What the driver says that it can do (`NETDEV_CMD_DEV_GET`), not what its version lets one hope.
fn driver(features: std::io::Result<u64>, af_xdp: &AfXdp, what: &str) -> Vec<Finding> {
    let features = match features {
        Ok(features) => features,
        Err(error) => {
            let why =
                format!("what its driver can do with XDP is not known (Linux 6.3 tells): {error}");
            return vec![Finding::warn("xdp", what, why)];
        }
    };
    let native = is_native(features);
    let zero_copy = native && features & xdp::ZERO_COPY != 0;
    let mode = match (native, af_xdp.attach) {
        (_, Attach::Generic) => {
            Finding::pass("xdp", what, "the program is to run in the kernel's generic code")
        }
        (true, _) => {
            Finding::pass("xdp", what, "its driver runs XDP programs and redirects frames")
        }
        (false, Attach::Native) => {
            let why =
                "its driver has no XDP as it is set up, and attach=native is wanted: drop that";
            Finding::fail("xdp", what, why)
        }
        (false, Attach::Auto) => {
            let why = "its driver has no XDP as it is set up: the program runs in the kernel's \
                       generic code, which costs more for each frame";
            Finding::warn("xdp", what, why)
        }
    };
    let copied = match (zero_copy, af_xdp.mode) {
        (_, Mode::Copy) => {
            Finding::pass("zero-copy", what, "mode=copy: the kernel copies each frame")
        }
        (true, _) => Finding::pass("zero-copy", what, "its driver has zero copy"),
        (false, Mode::ZeroCopy) => {
            let why = "its driver has no zero copy, and mode=zero-copy is wanted: use mode=auto";
            Finding::fail("zero-copy", what, why)
        }
        (false, Mode::Auto) => {
            let why = "its driver has no zero copy: the kernel copies each frame once, which mode=auto \
                       accepts";
            Finding::pass("zero-copy", what, why)
        }
    };
    vec![mode, copied]
}

/// Drivers whose zero copy gives guests the wrong frames: igb, of Linux 6.18 to 7.3 at the least
/// (docs/af-xdp.md).
fn known_to_be_wrong(host: &Host, link: &Link, af_xdp: &AfXdp, what: &str) -> Option<Finding> {
    let driver = host.link(&format!("{}/driver", placement::place(host, link)?))?;
    if af_xdp.mode == Mode::Copy || !driver.ends_with("igb") {
        return None;
    }
    let why = "igb's zero copy takes old descriptors for new frames when a guest runs out of buffers \
               (Linux 6.18 to 7.3): use mode=copy";
    Some(Finding::warn("zero-copy", what, why))
}

/// A program of somebody else's.
fn foreign(
    host: &Host,
    link: &Link,
    what: &str,
    name_of: impl FnOnce(u32) -> std::io::Result<String>,
) -> Finding {
    const CHECK: &str = "xdp-program";
    let Some(id) = link.program else {
        return Finding::pass(CHECK, what, "it has no XDP program yet");
    };
    let name = match name_of(id) {
        Ok(name) => name,
        Err(error) => {
            let why = format!("it has an XDP program (id {id}), and whose can't be seen: {error}");
            return Finding::warn(CHECK, what, why);
        }
    };
    if name == program::NAME {
        return Finding::pass(CHECK, what, "its XDP program is the daemon's, which others share");
    }
    let why = format!("it has another XDP program, '{name}' (id {id})");
    // One that was attached by a link goes with those who hold that, and not otherwise.
    let holders = host.holders(|info| {
        let has = |line: String| info.lines().any(|it| it == line);
        has(format!("prog_id:\t{id}")) && has("link_type:\txdp".into())
    });
    if holders.is_empty() {
        let hook = if link.program_is_generic { "xdpgeneric" } else { "xdp" };
        let command = format!("ip link set dev {} {hook} off", quoted(&link.name));
        let why = format!("{why}: detach it if nobody needs it");
        return Finding::fail(CHECK, what, why).fix(command);
    }
    let (processes, programs): (Vec<_>, Vec<_>) = holders.into_iter().unzip();
    let why = format!("{why}, of {}: end that if nobody needs it", programs.join(", "));
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
        driver(Ok(features), af_xdp, "device e").iter().map(|finding| finding.status).collect()
    }

    #[test]
    fn what_the_driver_lacks_fails_only_where_it_is_asked_for() {
        use Status::{Fail, Pass, Warn};
        let all = xdp::BASIC | xdp::REDIRECT | xdp::ZERO_COPY;
        let auto = asked(Mode::Auto, Attach::Auto);
        assert_eq!(statuses(all, &auto), [Pass, Pass]);
        assert_eq!(statuses(all & !xdp::ZERO_COPY, &auto), [Pass, Pass]);
        assert_eq!(statuses(0, &auto), [Warn, Pass]);
        assert_eq!(statuses(0, &asked(Mode::ZeroCopy, Attach::Native)), [Fail, Fail]);
        assert_eq!(statuses(0, &asked(Mode::Copy, Attach::Generic)), [Pass, Pass]);
        let unknown = driver(Err(std::io::ErrorKind::NotFound.into()), &auto, "device e");
        assert_eq!(unknown[0].status, Warn);
    }

    #[test]
    fn zero_copy_of_igb_is_warned_of_and_a_copy_is_not() {
        let (directory, host) = fake(&[("/sys/bus/pci/devices/x/vendor", "y")]);
        let link = Link { parent: Some(("pci".into(), "x".into())), ..Link::default() };
        let wrong = |mode| known_to_be_wrong(&host, &link, &asked(mode, Attach::Auto), "device e");
        assert_eq!(wrong(Mode::Auto), None, "it has no driver");
        let place = directory.as_path().join("sys/bus/pci/devices/x/driver");
        std::os::unix::fs::symlink("../../drivers/igb", place).unwrap();
        assert_eq!(wrong(Mode::Auto).unwrap().status, Status::Warn);
        assert_eq!(wrong(Mode::Copy), None);
    }

    #[test]
    fn a_program_is_ours_or_foreign_or_unknown() {
        let link = |program| Link { name: "e".into(), program, ..Link::default() };
        let of = |program, name: Result<&str, std::io::ErrorKind>| {
            let name = name.map(str::to_owned).map_err(Into::into);
            let (_directory, host) =
                fake(&[("/proc/9/fdinfo/4", "link_type:\txdp\nprog_id:\t8\n")]);
            foreign(&host, &link(program), "device e", |_| name)
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
