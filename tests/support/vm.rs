//! A real guest: a stock Debian kernel under QEMU, started by the scripts in qemu/.

use std::io::{BufRead, BufReader, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

use super::eventually;

pub(crate) const HOST_ADDRESS: &str = "192.0.2.1";
pub(crate) const GUEST_ADDRESS: &str = "192.0.2.2";

/// A running guest.
#[derive(Debug)]
pub(crate) struct Vm {
    qemu: Child,
    guest: Guest,
    directory: TempDir,
}

/// The guest's second serial port, where the guest's init accepts commands.
#[derive(Debug)]
pub(crate) struct Guest(UnixStream);

fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu").join(name))
}

/// Skips a test of real guests unless its programs are installed. Builds the guest.
macro_rules! needs_guest {
    ($test:expr) => {
        $crate::support::needs_root!($test);
        $crate::support::needs_program!($test, "qemu-system-x86_64");
        $crate::support::needs_program!($test, "iperf3");
        $crate::support::needs_program!($test, "ping");
        $crate::support::vm::make_guest();
    };
}
pub(crate) use needs_guest;

/// Builds the guest's kernel and initramfs, once.
pub(crate) fn make_guest() {
    let status = script("make-guest").status().unwrap();
    assert!(status.success(), "qemu/make-guest failed");
}

/// Returns the accelerator that runs the guest here: `kvm` or another.
pub(crate) fn accelerator() -> String {
    super::debian::succeed(&mut script("accelerator")).trim().to_owned()
}

impl Vm {
    /// Starts QEMU on the vhost-user socket. `environment` is for `qemu/run-guest`.
    pub(crate) fn start(socket: &Path, environment: &[(&str, &str)]) -> Self {
        Self::start_with(socket, environment, &[])
    }

    /// Starts QEMU on the vhost-user socket, with further QEMU options.
    pub(crate) fn start_with(
        socket: &Path,
        environment: &[(&str, &str)],
        options: &[&str],
    ) -> Self {
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        let path = |name: &str| directory.as_path().join(name);
        let log = std::fs::File::create(path("qemu.log")).unwrap();
        let qemu = script("run-guest")
            .env("SOCKET", socket)
            .env("CONSOLE", format!("file:{}", path("console").display()))
            .env("COMMANDS", format!("unix:{},server=on,wait=off", path("commands").display()))
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("monitor").display())])
            .args(options)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Vm { qemu, guest: Guest::connect(&path("commands")), directory }
    }

    /// Connects to QEMU's monitor.
    pub(crate) fn monitor(&self) -> Monitor {
        let path = self.directory.as_path().join("monitor");
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.line();
        monitor.ask("qmp_capabilities", Value::Null);
        monitor
    }

    /// Stops QEMU with SIGSTOP. For the benchmark.
    #[allow(dead_code)]
    pub(crate) fn pause(&self) {
        kill(Pid::from_raw(self.qemu.id() as i32), Signal::SIGSTOP).unwrap();
    }

    /// Resumes QEMU with SIGCONT. For the benchmark.
    #[allow(dead_code)]
    pub(crate) fn resume(&self) {
        kill(Pid::from_raw(self.qemu.id() as i32), Signal::SIGCONT).unwrap();
    }

    /// Kills QEMU, and waits for its exit.
    pub(crate) fn kill(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Guest {
    /// Waits until QEMU listens on the socket of the guest's second serial port, and connects.
    #[track_caller]
    pub(crate) fn connect(path: &Path) -> Self {
        let mut connected = None;
        eventually("QEMU starts", || {
            connected = UnixStream::connect(path).ok();
            connected.is_some()
        });
        Guest(connected.unwrap())
    }

    /// Waits at most 60 s until the guest's init is ready.
    #[track_caller]
    pub(crate) fn wait_ready(&mut self) {
        self.wait_ready_within(Duration::from_secs(60));
    }

    /// Waits at most `limit` until the guest's init is ready.
    #[track_caller]
    pub(crate) fn wait_ready_within(&mut self, limit: Duration) {
        self.wait_for_within(limit, "guest: ready");
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) -> String {
        self.wait_for_within(Duration::from_secs(60), text)
    }

    #[track_caller]
    fn wait_for_within(&mut self, limit: Duration, text: &str) -> String {
        let end = Instant::now() + limit;
        let mut log = String::new();
        self.0.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        while !log.contains(text) || !log.ends_with('\n') {
            assert!(Instant::now() < end, "the guest does not say {text:?}, but {log:?}");
            let mut part = [0; 4096];
            if let Ok(length) = self.0.read(&mut part) {
                log.push_str(&String::from_utf8_lossy(&part[..length]));
            }
        }
        log
    }

    /// Runs a command in the guest, which must succeed. Returns its output.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str) -> String {
        self.type_line(command);
        let text = self.wait_for("END ");
        let (output, code) = text.rsplit_once("END ").unwrap();
        assert_eq!(code.trim(), "0", "{command}: {output}");
        output.to_owned()
    }

    /// Waits for the end of the last typed command. Returns its output.
    #[track_caller]
    pub(crate) fn wait_for_end(&mut self) -> String {
        self.wait_for("END ")
    }

    /// Waits until a migrated guest accepts commands.
    #[track_caller]
    pub(crate) fn wait_for_commands(&mut self) {
        self.run("true");
    }

    pub(crate) fn type_line(&mut self, line: &str) {
        writeln!(self.0, "{line}").unwrap();
    }
}

/// QEMU's monitor (QMP).
pub(crate) struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Runs a monitor command, which must succeed. Returns its result.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let mut request = serde_json::json!({"execute": command});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.0.get_mut(), "{request}").unwrap();
        loop {
            let reply = self.line();
            assert!(reply["error"].is_null(), "{command}: {reply}");
            if let Some(returned) = reply.get("return") {
                return returned.clone();
            }
        }
    }
}

impl Deref for Vm {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl DerefMut for Vm {
    fn deref_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            for name in ["qemu.log", "console"] {
                let text = std::fs::read_to_string(self.directory.as_path().join(name));
                eprintln!("{name}:\n{}", text.unwrap_or_default());
            }
        }
    }
}

/// Pings the guest until it answers.
#[track_caller]
pub(crate) fn check_ping() {
    eventually("the guest answers", answers);
}

/// Reports whether the guest answers a ping within a second.
pub(crate) fn answers() -> bool {
    let ping = Command::new("ping").args(["-c", "1", "-W", "1", GUEST_ADDRESS]).output();
    ping.unwrap().status.success()
}

/// Runs iperf3 against the guest. Returns Mbit/s at the receiver.
#[track_caller]
pub(crate) fn iperf(options: &str) -> f64 {
    iperf_with(GUEST_ADDRESS, options)
}

/// Runs iperf3 against the guest at address `guest`. Returns Mbit/s at the receiver.
#[track_caller]
pub(crate) fn iperf_with(guest: &str, options: &str) -> f64 {
    let mut text = String::new();
    // The server refuses clients until it listens again after the previous one. The host may still
    // remember that the previous guest at this address did not answer.
    const TOO_EARLY: [&str; 4] = ["refused", "busy", "reset by peer", "No route to host"];
    eventually(&format!("iperf3 {options}"), || {
        std::thread::sleep(Duration::from_millis(200));
        // A UDP client never ends without an answer.
        let output = Command::new("timeout")
            .args(["60", "iperf3", "-c", guest, "-f", "m"])
            .args(options.split_whitespace())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        let too_early = TOO_EARLY.iter().any(|reason| error.contains(reason));
        assert!(output.status.success() || too_early, "iperf3 {options}: {error}");
        text = String::from_utf8_lossy(&output.stdout).into_owned();
        output.status.success()
    });
    let receiver = text.lines().rfind(|line| line.contains("receiver")).unwrap();
    let words: Vec<&str> = receiver.split_whitespace().collect();
    let unit = words.iter().position(|word| *word == "Mbits/sec").unwrap();
    words[unit - 1].parse().unwrap()
}
