//! Shared parts of the tests: a vhost-user frontend, a virtio-net driver over its own memory, the daemon as a
//! child process, and network namespaces.

pub(crate) mod daemon;
pub(crate) mod debian;
pub(crate) mod driver;
pub(crate) mod frontend;
pub(crate) mod guest;
pub(crate) mod hostile;
pub(crate) mod network;
pub(crate) mod rings;
pub(crate) mod testpmd;
pub(crate) mod tracer;
pub(crate) mod traffic;
pub(crate) mod vm;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Time limit for any expected event, on a slow machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, condition: impl FnMut() -> bool) {
    within(SOON, what, condition);
}

/// Waits until `condition` holds, at most `limit`.
#[track_caller]
pub(crate) fn within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        let waited = started.elapsed();
        assert!(waited < limit, "{what}: not within {limit:?}");
        // Polling must leave CPU time to the awaited event.
        let pause = (waited / 64).clamp(Duration::from_micros(50), Duration::from_micros(500));
        std::thread::sleep(pause);
    }
}

/// Returns the CPU time of all threads of a process, in nanoseconds.
pub(crate) fn cpu_nanoseconds(process: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let used = |thread: std::io::Result<std::fs::DirEntry>| -> u64 {
        let text = std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    threads.map(used).sum()
}

/// Records a skipped test and the reason. `tests/run` prints these lines, and fails if `CI` is set.
pub(crate) fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
    if let Some(path) = std::env::var_os("SKIPPED_TESTS") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{test}: {why}").unwrap();
    }
}

/// Skips a test that needs TAP devices or network namespaces, unless the user is root.
macro_rules! needs_root {
    ($test:expr) => {
        if !nix::unistd::geteuid().is_root() {
            $crate::support::skip($test, "needs root for TAP devices and network namespaces");
            return;
        }
    };
}
pub(crate) use needs_root;

/// Skips a test unless its program is installed.
macro_rules! needs_program {
    ($test:expr, $program:expr) => {
        let found = std::process::Command::new("sh")
            .args(["-c", &format!("command -v {}", $program)])
            .stdout(std::process::Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            $crate::support::skip($test, concat!($program, " is not installed"));
            return;
        }
    };
}
pub(crate) use needs_program;

/// Serializes tests that keep both CPUs busy.
pub(crate) fn one_at_a_time() -> MutexGuard<'static, ()> {
    static BUSY: Mutex<()> = Mutex::new(());
    BUSY.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A child process, killed on drop.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
