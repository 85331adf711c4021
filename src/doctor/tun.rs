//! Checks of `/dev/net/tun`: TAP devices can be opened, with the features that ports require.

use std::io;

use super::finding::Finding;
use super::options::Requirements;
use crate::sys::tap;

const CHECK: &str = "tun";
const DEVICE: &str = "/dev/net/tun";

/// Checks the device file, and the features that the kernel reports through it.
pub(super) fn check(requirements: &Requirements) -> Vec<Finding> {
    let several = requirements.ports.iter().any(|port| port.pairs > 1);
    let mut found = vec![check_features(tap::features(), several)];
    // A host with AF_XDP ports only does not need the file.
    if !requirements.names_a_tap() {
        found.iter_mut().for_each(Finding::downgrade);
    }
    found
}

fn check_features(features: io::Result<u32>, several: bool) -> Finding {
    let flags = match features {
        Ok(flags) => flags,
        Err(error) => return unusable(&error),
    };
    let has = |flag: libc::c_int| flags & flag as u32 != 0;
    if !has(libc::IFF_VNET_HDR) || !has(libc::IFF_TAP) {
        let why = "the kernel lacks IFF_TAP or IFF_VNET_HDR, which the daemon requires; use Linux 2.6.27 \
                   or later";
        return Finding::fail(CHECK, DEVICE, why);
    }
    if !has(libc::IFF_MULTI_QUEUE) {
        let why = "the kernel lacks IFF_MULTI_QUEUE, so a TAP has one queue pair; use Linux 3.8 or later \
                   for more";
        let make = if several { Finding::fail } else { Finding::warn };
        return make(CHECK, DEVICE, why);
    }
    Finding::pass(CHECK, DEVICE, "opens; the kernel has IFF_VNET_HDR and IFF_MULTI_QUEUE")
}

fn unusable(error: &io::Error) -> Finding {
    let why = format!("cannot open: {error}; the daemon opens TAPs through it");
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            let why = "does not exist; the daemon opens TAPs through it";
            // Documentation/networking/tuntap.rst: character device 10, 200.
            let command = "modprobe -q tun; [ -e /dev/net/tun ] || { mkdir -p /dev/net && mknod \
                           -m 666 /dev/net/tun c 10 200; }";
            Finding::fail(CHECK, DEVICE, why).fix(command)
        }
        Some(libc::ENODEV | libc::ENXIO) => Finding::fail(CHECK, DEVICE, why).fix("modprobe tun"),
        // Opening the file gives no right over any device (tuntap.rst).
        Some(libc::EACCES) => Finding::fail(CHECK, DEVICE, why).fix("chmod 666 /dev/net/tun"),
        _ => Finding::fail(CHECK, DEVICE, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn missing_kernel_features_and_device_file_are_reported() {
        let all = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let status = |flags: libc::c_int, several| check_features(Ok(flags as u32), several).status;
        assert_eq!(status(all, true), Status::Pass);
        assert_eq!(status(all & !libc::IFF_MULTI_QUEUE, false), Status::Warn);
        assert_eq!(status(all & !libc::IFF_MULTI_QUEUE, true), Status::Fail);
        assert_eq!(status(all & !libc::IFF_VNET_HDR, false), Status::Fail);
        let missing = check_features(Err(io::Error::from_raw_os_error(libc::ENOENT)), false);
        assert!(missing.fix.unwrap().contains("mknod"));
        let denied = check_features(Err(io::Error::from_raw_os_error(libc::EACCES)), false);
        assert!(denied.fix.unwrap().starts_with("chmod"));
    }
}
