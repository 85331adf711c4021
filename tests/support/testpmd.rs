//! DPDK's testpmd with its virtio-user driver, an independent guest driver.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::eventually;

/// A running testpmd.
#[derive(Debug)]
pub(crate) struct Testpmd {
    child: Child,
    input: ChildStdin,
    log: String,
}

impl Testpmd {
    /// Starts testpmd on the daemon's socket. `device` has further arguments of the virtio device.
    pub(crate) fn start(socket: &Path, queues: u16, size: u16, device: &str) -> Self {
        Self::start_on("0-1", socket, queues, size, device)
    }

    /// Starts testpmd on the CPUs `cpus`.
    pub(crate) fn start_on(
        cpus: &str,
        socket: &Path,
        queues: u16,
        size: u16,
        device: &str,
    ) -> Self {
        Self::start_with(cpus, socket, queues, size, device, &[])
    }

    /// Starts testpmd on the CPUs `cpus`, with further options.
    pub(crate) fn start_with(
        cpus: &str,
        socket: &Path,
        queues: u16,
        size: u16,
        device: &str,
        options: &[&str],
    ) -> Self {
        let device = format!(
            "net_virtio_user0,path={},queues={queues},queue_size={size},mac=52:54:00:77:00:02,{device}",
            socket.display()
        );
        let size = size.to_string();
        let queues = queues.to_string();
        let sizes = ["--rxd", &size, "--txd", &size, "--rxq", &queues, "--txq", &queues];
        Self::run(cpus, &[&device], &[&sizes, options].concat())
    }

    /// Starts testpmd as a vhost-user backend that listens on `socket` and forwards to `device`.
    #[allow(dead_code)]
    pub(crate) fn backend(cpus: &str, socket: &Path, device: &str) -> Self {
        let vhost = format!("net_vhost0,iface={},queues=1", socket.display());
        Self::run(cpus, &[&vhost, device], &["--forward-mode=io", "--auto-start"])
    }

    fn run(cpus: &str, devices: &[&str], options: &[&str]) -> Self {
        // testpmd prints through stdio, which buffers whole blocks for a pipe.
        let mut child = Command::new("stdbuf")
            .args(["-oL", "dpdk-testpmd"])
            .arg(format!("--lcores=0@{cpus},1@{cpus}"))
            .args(["--main-lcore=0", "--no-pci", "-m", "256", "--no-huge"])
            .args(["--no-shconf", "--no-telemetry"])
            .args(devices.iter().map(|device| format!("--vdev={device}")))
            .args(["--", "-i", "--no-numa", "--total-num-mbufs=16384"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = child.stdout.as_ref().unwrap().as_fd();
        fcntl(output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let input = child.stdin.take().unwrap();
        let mut testpmd = Testpmd { child, input, log: String::new() };
        testpmd.wait_for("testpmd> ");
        testpmd
    }

    /// Runs a command in testpmd. Returns its output.
    #[track_caller]
    pub(crate) fn command(&mut self, line: &str) -> String {
        // The prompt does not mark the end of a command; the error for an unknown command does.
        const MARK: &str = "no-such-command";
        self.log.clear();
        writeln!(self.input, "{line}\n{MARK}").unwrap();
        self.wait_for("Command not found");
        std::mem::take(&mut self.log)
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let output = self.child.stdout.as_mut().unwrap();
        let log = &mut self.log;
        eventually(&format!("testpmd says {text:?}"), || {
            let mut part = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut part) {
                log.push_str(&String::from_utf8_lossy(&part[..length]));
            }
            log.contains(text)
        });
    }

    /// Returns the process id.
    #[allow(dead_code)]
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Returns the CPU time of all threads, in nanoseconds.
    #[allow(dead_code)]
    pub(crate) fn cpu_nanoseconds(&self) -> u64 {
        super::cpu_nanoseconds(self.child.id())
    }

    /// Stops the process with SIGSTOP.
    #[allow(dead_code)]
    pub(crate) fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Resumes the process with SIGCONT.
    pub(crate) fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Returns a counter of `show port stats 0`.
    pub(crate) fn counter(&mut self, name: &str) -> u64 {
        let text = self.command("show port stats 0");
        let (_, rest) = text.split_once(&format!("{name}:")).unwrap_or_else(|| panic!("{text}"));
        rest.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.resume();
        let _ = writeln!(self.input, "quit");
        let mut ended = false;
        for _ in 0..300 {
            ended = self.child.try_wait().is_ok_and(|status| status.is_some());
            if ended {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        if !ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("testpmd said:\n{}", self.log);
        }
    }
}
