//! libvirt: a real libvirtd starts the example's domain, whose hook starts the daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::program;
use crate::support::debian::{first_child, succeed};
use crate::support::network::{enter_new_namespace, ip};
use crate::support::vm::{Guest, HOST_ADDRESS, accelerator, answers, check_ping, needs_guest};
use crate::support::{eventually, needs_program, one_at_a_time};

const UNIT: &str = "vhost-user-net@vm1.service";
/// Port of the example's domain, with one more queue pair than the domain has.
const PORT: &str = "control = \"/run/vhost-user-net-vm1/control.sock\"\n[[port]]\nname = \"vm1\"\n\
    socket-path = \"/run/vhost-user-net-vm1/vm.sock\"\nsocket-group = \"kvm\"\ntap = \"vnet0\"\n\
    queue-pairs = 2\n";

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A libvirtd in its own namespaces. The drop ends them, and all processes in them.
struct Libvirt {
    unshare: Child,
    /// Process id of the namespace's init in this PID namespace.
    first: i32,
    directory: TempDir,
}

impl Libvirt {
    fn start() -> Self {
        enter_new_namespace();
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        let log = fs::File::create(directory.as_path().join("log")).unwrap();
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        unshare.arg(source("tests/libvirt/surroundings")).arg(source("qemu/guest"));
        unshare.arg(program().get_program()).stdin(Stdio::null());
        let unshare = unshare.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut libvirt = Libvirt { unshare, first: 0, directory };
        eventually("libvirtd starts", || {
            libvirt.first = first_child(&libvirt.unshare).unwrap_or(0);
            libvirt.first != 0 && libvirt.virsh(&["list"]).status.success()
        });
        libvirt
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first.to_string(), "-m", "-p", "--"]).args(words);
        command.env("PATH", "/run/bin:/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
        command
    }

    /// Runs a program in the namespaces, which must succeed. Returns its output.
    #[track_caller]
    fn run(&self, words: &[&str]) -> String {
        succeed(&mut self.command(words))
    }

    fn virsh(&self, words: &[&str]) -> Output {
        let words = [&["virsh", "--connect=qemu:///system", "--quiet"], words].concat();
        self.command(&words).output().unwrap()
    }

    /// Runs a `virsh` command, which must succeed.
    #[track_caller]
    fn do_it(&self, words: &[&str]) {
        let output = self.virsh(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {words:?}: {said}{}", self.daemon_log());
    }

    /// Returns the path of a file in the mount namespace.
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{name}", self.first))
    }

    /// Writes a file in the mount namespace. Returns its name there.
    fn write<'a>(&self, name: &'a str, text: &str) -> &'a str {
        fs::write(self.path(name), text).unwrap();
        name
    }

    /// Returns the daemons' log.
    fn daemon_log(&self) -> String {
        fs::read_to_string(self.path("/run/vhost-user-net-vm1.log")).unwrap_or_default()
    }

    /// Returns the daemon's process id in the namespace.
    fn daemon(&self) -> Option<String> {
        fs::read_to_string(self.path("/run/vhost-user-net-vm1.pid")).ok()
    }

    #[track_caller]
    fn ctl(&self, words: &[&str]) -> String {
        let control = "--control=/run/vhost-user-net-vm1/control.sock";
        self.run(&[&["vhost-user-net", "ctl", control], words].concat())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.as_path().join("log"));
            let qemu = fs::read_to_string(self.path("/var/log/libvirt/qemu/vm1.log"));
            for text in [log.unwrap_or_default(), qemu.unwrap_or_default(), self.daemon_log()] {
                eprintln!("{text}");
            }
        }
        if self.first != 0 {
            let _ = kill(Pid::from_raw(self.first), Signal::SIGKILL);
        }
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Returns the example's domain, with the test guest instead of a disk.
fn domain() -> String {
    let example = fs::read_to_string(source("dist/examples/libvirt-domain.xml")).unwrap();
    let replaced = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "{from} is not in the example");
        text.replace(from, to)
    };
    let kind = if accelerator() == "kvm" { "type='kvm'" } else { "type='qemu'" };
    let text = replaced(example, "type='kvm'", kind);
    let text = replaced(text, "unit='GiB'>1<", "unit='MiB'>256<");
    let guest = "<kernel>/var/lib/guest/vmlinuz</kernel>\n\
        <initrd>/var/lib/guest/initramfs.gz</initrd>\n\
        <cmdline>console=ttyS0 quiet panic=-1 guest_ip=192.0.2.2/24</cmdline>\n  </os>";
    let text = replaced(text, "</os>", guest);
    let ports = "<devices>\n<serial type='null'><target port='0'/></serial>\n<serial type='unix'>\
        <source mode='bind' path='/var/lib/guest/commands'/><target port='1'/></serial>";
    replaced(text, "<devices>", ports)
}

/// Returns the example's interface, with two queue pairs.
fn interface() -> String {
    let example = domain();
    let (_, rest) = example.split_once("<interface").unwrap();
    let (interface, _) = rest.split_once("</interface>").unwrap();
    let queues = "<model type='virtio'/>\n<driver queues='2'/>";
    format!("<interface{}</interface>", interface.replace("<model type='virtio'/>", queues))
}

#[test]
fn libvirt_runs_the_example_domain_with_the_hook() {
    const TEST: &str = "libvirt_runs_the_example_domain_with_the_hook";
    needs_guest!(TEST);
    needs_program!(TEST, "libvirtd");
    needs_program!(TEST, "virsh");
    let _alone = one_at_a_time();
    let libvirt = Libvirt::start();
    libvirt.write("/etc/vhost-user-net/vm1.toml", PORT);
    libvirt.do_it(&["define", libvirt.write("/run/domain.xml", &domain())]);
    assert!(libvirt.daemon().is_none());
    libvirt.do_it(&["start", "vm1"]);
    ip(&format!("address add {HOST_ADDRESS}/24 dev vnet0"));
    let mut guest = Guest::connect(&libvirt.path("/var/lib/guest/commands"));
    guest.wait_ready();
    check_ping();

    // libvirt can't change the link of such a card; the daemon can.
    let refused = libvirt.virsh(&["domif-setlink", "vm1", "52:54:00:12:34:56", "down"]);
    assert!(!refused.status.success());
    libvirt.ctl(&["set", "vm1", "--link=off"]);
    eventually("nothing passes", || !answers());
    libvirt.ctl(&["set", "vm1", "--link=on"]);
    check_ping();

    // QEMU connects again to the daemon that is started again.
    libvirt.run(&["kill", "-9", libvirt.daemon().unwrap().trim()]);
    libvirt.run(&["systemctl", "start", UNIT]);
    // The new daemon may find the TAP still there, with its address.
    eventually("the TAP is there again", || {
        Command::new("ip")
            .args(["address", "replace"])
            .arg(format!("{HOST_ADDRESS}/24"))
            .args(["dev", "vnet0"])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    });
    check_ping();

    // The card goes, and another one comes, with more queues.
    let interface = interface();
    let file = libvirt.write("/run/interface.xml", &interface);
    libvirt.do_it(&["detach-device", "vm1", file, "--live"]);
    eventually("the guest has lost its device", || guest.run("ls /sys/class/net") == "lo\n");
    eventually("the port is free", || libvirt.ctl(&["list"]).contains("waiting"));
    libvirt.do_it(&["attach-device", "vm1", file, "--live"]);
    eventually("the guest has a device", || guest.run("ls /sys/class/net").contains("eth0"));
    guest.run("ip address add 192.0.2.2/24 dev eth0 && ip link set eth0 up");
    eventually("it runs", || libvirt.ctl(&["show", "vm1"]).contains("of 2 queue pairs"));
    guest.run("ethtool -L eth0 combined 2");
    check_ping();
    assert!(libvirt.ctl(&["show", "vm1"]).contains("running: 2 of 2 queue pairs"));

    libvirt.do_it(&["reset", "vm1"]);
    guest.wait_ready();
    check_ping();

    libvirt.do_it(&["destroy", "vm1"]);
    eventually("the hook has stopped the unit", || libvirt.daemon().is_none());
    eventually("it has removed its socket", || {
        !libvirt.path("/run/vhost-user-net-vm1/vm.sock").exists()
    });
}
