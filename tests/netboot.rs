//! Guests that boot from the network. The firmware's own driver drives the device and loads the kernel, whose
//! driver then takes over.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::Daemon;
use crate::support::debian::unpacked;
use crate::support::network::{enter_namespace_with_tap, enter_namespace_with_veth, ip, output};
use crate::support::vm::{HOST_ADDRESS, Vm, check_ping, needs_guest};
use crate::support::{Running, needs_program, one_at_a_time, skip, within};

/// Time limit for firmware under software emulation on a loaded machine.
const BOOT: Duration = Duration::from_secs(150);
/// Features of the firmware's driver, without offloads. On a legacy device VIRTIO_F_VERSION_1 is missing, so
/// headers have 10 bytes.
const LEGACY: &str = "features=0x40000000\n";
const MODERN: &str = "features=0x140000000\n";

/// A firmware: variables for `qemu/run-guest`, QEMU options, and the features that its driver accepts.
struct Firmware {
    card: &'static str,
    options: Vec<String>,
    accepts: &'static str,
}

/// Returns iPXE, the device's ROM, under SeaBIOS.
fn ipxe(card: &'static str, accepts: &'static str) -> Firmware {
    Firmware { card, options: vec![], accepts }
}

/// Returns UEFI firmware with its own driver, instead of the device's ROM. It loads iPXE without drivers,
/// which uses the firmware's driver.
///
/// # Errors
///
/// The packages cannot be fetched.
fn ovmf(directory: &Path, card: &'static str, accepts: &'static str) -> Result<Firmware, String> {
    let firmware = unpacked("ovmf")?.join("usr/share/OVMF");
    let variables = directory.join("variables");
    fs::copy(firmware.join("OVMF_VARS_4M.fd"), &variables).unwrap();
    fs::copy(unpacked("ipxe")?.join("usr/lib/ipxe/snponly.efi"), directory.join("loader.efi"))
        .unwrap();
    let code = firmware.join("OVMF_CODE_4M.fd");
    let drive = |file: &Path, more: &str| {
        let drive = format!("if=pflash,format=raw,file={}{more}", file.display());
        ["-drive".to_owned(), drive]
    };
    let options = [drive(&code, ",readonly=on"), drive(&variables, "")].concat();
    Ok(Firmware { card, options, accepts })
}

/// iPXE's script after it has an address.
enum Script {
    /// Load and boot the test guest.
    Boot,
    /// Do not boot. The test of the firmware alone takes a third of the time.
    Stay,
}

impl Script {
    /// Returns the script's text, and copies the files that it loads to the directory.
    fn text(&self, directory: &Path) -> String {
        let Script::Boot = self else { return "#!ipxe\nsleep 600\n".into() };
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu/guest");
        for file in ["vmlinuz", "initramfs.gz"] {
            fs::copy(guest.join(file), directory.join(file)).unwrap();
        }
        format!(
            "#!ipxe\nkernel tftp://{HOST_ADDRESS}/vmlinuz console=ttyS0 quiet panic=-1 \
             guest_ip=192.0.2.2/24 initrd=initramfs.gz\n\
             initrd tftp://{HOST_ADDRESS}/initramfs.gz\nboot\n"
        )
    }
}

/// DHCP and TFTP server on the host's end.
fn serve(directory: &Path, device: &str, script: &Script) -> Running {
    fs::write(directory.join("script"), script.text(directory)).unwrap();
    let mut dnsmasq = Command::new("dnsmasq");
    dnsmasq.args(["--no-daemon", "--conf-file=/dev/null", "--port=0", "--user=root"]);
    dnsmasq.arg(format!("--interface={device}")).arg("--bind-interfaces");
    // An address of the firmware's own, so that who answers is the kernel.
    dnsmasq.args(["--dhcp-range=192.0.2.9,192.0.2.9", "--dhcp-userclass=set:ipxe,iPXE"]);
    dnsmasq.args(["--dhcp-match=set:efi,option:client-arch,7", "--dhcp-boot=script"]);
    dnsmasq.arg("--dhcp-boot=tag:efi,tag:!ipxe,loader.efi");
    dnsmasq.arg(format!("--dhcp-leasefile={}", directory.join("leases").display()));
    dnsmasq.arg(format!("--log-facility={}", directory.join("log").display()));
    dnsmasq.arg("--enable-tftp").arg(format!("--tftp-root={}", directory.display()));
    Running::start(&mut dnsmasq)
}

/// Boots the firmware on a port with two queue pairs. If it loads the kernel, the kernel drives both queue
/// pairs, and the firmware drives the device again after a reboot.
fn check(
    test: &str,
    host: &str,
    script: &Script,
    firmware: impl FnOnce(&Path) -> Result<Firmware, String>,
) {
    needs_guest!(test);
    needs_program!(test, "dnsmasq");
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let firmware = match firmware(directory.as_path()) {
        Ok(firmware) => firmware,
        Err(why) => return skip(test, why.lines().next().unwrap_or_default()),
    };
    let _alone = one_at_a_time();
    let device = if host.contains("tap0") {
        enter_namespace_with_tap(true);
        "tap0"
    } else {
        enter_namespace_with_veth(2);
        output("ethtool", "-K veth1 tx off");
        // Firmware uses the first queue pair only: the far end must send to its queue alone.
        assert_eq!(output("ethtool", "-L veth1 tx 1"), "");
        "veth1"
    };
    ip(&format!("address add {HOST_ADDRESS}/24 dev {device}"));
    let daemon = Daemon::start(&[host, "--queue-pairs=2"]);
    let _server = serve(directory.as_path(), device, script);
    let environment =
        [("BOOT", "network"), ("QUEUES", "2"), ("CPUS", "1"), ("CARD", firmware.card)];
    let options: Vec<&str> = firmware.options.iter().map(String::as_str).collect();
    let mut vm = Vm::start_with(&daemon.socket(), &environment, &options);
    let driven = || daemon.log().matches(firmware.accepts).count();
    within(BOOT, "the firmware loads the script", || {
        let log = fs::read_to_string(directory.as_path().join("log")).unwrap_or_default();
        log.lines().any(|line| line.contains("sent ") && line.contains("/script "))
    });
    assert!(driven() > 0, "{}", daemon.log());
    if let Script::Boot = script {
        vm.wait_ready_within(BOOT);
        check_ping();
        vm.run("ethtool -L eth0 combined 2");
        check_ping();
        let before = driven();
        vm.type_line("reboot -f");
        within(BOOT, "the firmware drives the card again", || driven() > before);
    }
    assert!(!daemon.log().contains("queue pair stopped"), "{}", daemon.log());
    let says = daemon.log().contains("pairs that the guest does not use go to the host");
    assert_eq!(says, host.contains("af-xdp"), "{}", daemon.log());
}

#[test]
fn ipxe_boots_over_a_tap_with_legacy_headers() {
    const TEST: &str = "ipxe_boots_over_a_tap_with_legacy_headers";
    let legacy = "disable-modern=on,disable-legacy=off";
    check(TEST, "--tap=tap0", &Script::Boot, |_| Ok(ipxe(legacy, LEGACY)));
}

#[test]
fn ipxe_runs_over_af_xdp() {
    let modern = "disable-legacy=on";
    check("ipxe_runs_over_af_xdp", "--af-xdp=veth0", &Script::Stay, |_| Ok(ipxe(modern, MODERN)));
}

#[test]
fn uefi_runs_over_a_tap() {
    check("uefi_runs_over_a_tap", "--tap=tap0", &Script::Stay, |directory| {
        ovmf(directory, "romfile=,disable-legacy=on", MODERN)
    });
}

#[test]
fn uefi_boots_over_af_xdp() {
    check("uefi_boots_over_af_xdp", "--af-xdp=veth0", &Script::Boot, |directory| {
        ovmf(directory, "romfile=", LEGACY)
    });
}
