//! `/dev/net/tun`: whether TAP devices can be opened, and with what.

use std::io;

use super::finding::Finding;
use super::options::Requirements;
use crate::sys::tap;

const CHECK: &str = "tun";
const DEVICE: &str = "/dev/net/tun";

/// Checks the device, and what the kernel says it can do.
pub(super) fn check(requirements: &Requirements) -> Vec<Finding> {
    let mut found = judge(tap::features(), requirements.ports.iter().any(|port| port.pairs > 1));
    // A host for AF_XDP alone does without.
    if !requirements.names_a_tap() {
        found.iter_mut().for_each(Finding::soften);
    }
    found
}

fn judge(features: io::Result<u32>, several: bool) -> Vec<Finding> {
    let flags = match features {
        Ok(flags) => flags,
        Err(error) => return vec![unusable(&error)],
    };
    let has = |flag: libc::c_int| flags & flag as u32 != 0;
    if !has(libc::IFF_VNET_HDR) || !has(libc::IFF_TAP) {
        let why = "the kernel has no IFF_VNET_HDR: checksum and segmentation need it, and the \
                   daemon too; take a kernel that has it (any since Linux 2.6.27)";
        return vec![Finding::fail(CHECK, DEVICE, why)];
    }
    if !has(libc::IFF_MULTI_QUEUE) {
        let why = "the kernel has no IFF_MULTI_QUEUE: a TAP has one queue pair; take a kernel that \
                   has it (any since Linux 3.8)";
        let make = if several { Finding::fail } else { Finding::warn };
        return vec![make(CHECK, DEVICE, why)];
    }
    vec![Finding::pass(CHECK, DEVICE, "it opens, with virtio headers and several queues")]
}

fn unusable(error: &io::Error) -> Finding {
    let why = format!("a TAP is opened through it: {error}");
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            let why = "it is not there, and a TAP is opened through it";
            // Documentation/networking/tuntap.rst: character device 10, 200.
            let command = "modprobe -q tun; [ -e /dev/net/tun ] || { mkdir -p /dev/net && mknod \
                           -m 666 /dev/net/tun c 10 200; }";
            Finding::fail(CHECK, DEVICE, why).fix(command)
        }
        Some(libc::ENODEV | libc::ENXIO) => Finding::fail(CHECK, DEVICE, why).fix("modprobe tun"),
        // Opening it gives no right over any device (tuntap.rst).
        Some(libc::EACCES) => Finding::fail(CHECK, DEVICE, why).fix("chmod 666 /dev/net/tun"),
        _ => Finding::fail(CHECK, DEVICE, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn what_the_kernel_lacks_is_said_and_what_is_missing_is_made() {
        let all = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let status = |flags: libc::c_int, several| judge(Ok(flags as u32), several)[0].status;
        assert_eq!(status(all, true), Status::Pass);
        assert_eq!(status(all & !libc::IFF_MULTI_QUEUE, false), Status::Warn);
        assert_eq!(status(all & !libc::IFF_MULTI_QUEUE, true), Status::Fail);
        assert_eq!(status(all & !libc::IFF_VNET_HDR, false), Status::Fail);
        let missing = judge(Err(io::Error::from_raw_os_error(libc::ENOENT)), false).remove(0);
        assert!(missing.fix.unwrap().contains("mknod"));
        let denied = judge(Err(io::Error::from_raw_os_error(libc::EACCES)), false).remove(0);
        assert!(denied.fix.unwrap().starts_with("chmod"));
    }
}
