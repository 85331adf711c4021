//! The daemon as a child process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_sys_util::tempdir::TempDir;

use super::eventually;
use super::rings::SocketRings;

/// A running daemon in its own directory. The `drop` kills the daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    directory: TempDir,
}

/// Returns the command of the program under test. `VHOST_USER_NET` overrides its path.
pub(crate) fn program() -> Command {
    let built = env!("CARGO_BIN_EXE_vhost-user-net");
    let mut command = Command::new(std::env::var("VHOST_USER_NET").unwrap_or(built.into()));
    command.stdin(Stdio::null());
    command
}

/// Returns a `[[port]]` table with name and socket `name`. `rest` holds the other keys.
pub(crate) fn port(name: &str, rest: &str) -> String {
    format!("[[port]]\nname = \"{name}\"\nsocket-path = \"{{}}/{name}\"\n{rest}\n")
}

impl Daemon {
    /// Starts a daemon on a socket in a new directory, and waits until it listens.
    pub(crate) fn start(options: &[&str]) -> Self {
        let daemon = Self::spawn(options);
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts a daemon with a configuration file, and waits until the port `last` listens.
    /// `{}` in the file stands for its directory.
    pub(crate) fn with_config(contents: &str, last: &str) -> Self {
        Self::failing(contents, last, "")
    }

    /// Starts a daemon on a socket with a fault point of `src/fault_point.rs`, and waits until it listens.
    pub(crate) fn failing_without_file(options: &[&str], fault: &str) -> Self {
        let mut daemon = Self::not_started();
        let mut command = program();
        command.arg(format!("--socket-path={}", daemon.socket().display())).args(options);
        command.env("VHOST_USER_NET_FAULT", fault);
        daemon.child = command.stderr(daemon.open_log()).spawn().unwrap();
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts a daemon with a configuration file, and with a fault point unless `fault` is empty.
    pub(crate) fn failing(contents: &str, last: &str, fault: &str) -> Self {
        let mut daemon = Self::not_started();
        daemon.write_config(contents);
        daemon.run_config_failing(fault);
        eventually("the daemon listens", || UnixStream::connect(daemon.path(last)).is_ok());
        daemon
    }

    /// Starts a daemon with a configuration file through `wrapper`, which limits it.
    pub(crate) fn with_config_under(wrapper: &[&str], contents: &str, last: &str) -> Self {
        let mut daemon = Self::not_started();
        daemon.write_config(contents);
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(program().get_program()).stdin(Stdio::null());
        command.arg("run").arg("--config").arg(daemon.path("config"));
        daemon.child = command.stderr(daemon.open_log()).spawn().unwrap();
        eventually("the daemon listens", || UnixStream::connect(daemon.path(last)).is_ok());
        daemon
    }

    /// Starts a daemon that logs to `stderr`, and waits until it listens.
    pub(crate) fn start_with_stderr(stderr: Stdio, options: &[&str]) -> Self {
        let mut daemon = Self::not_started();
        let mut command = program();
        command.arg(format!("--socket-path={}", daemon.socket().display())).args(options);
        daemon.child = command.stderr(stderr).spawn().unwrap();
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts the daemon again with its file, after it has exited.
    pub(crate) fn run_config(&mut self) {
        self.run_config_failing("");
    }

    fn run_config_failing(&mut self, fault: &str) {
        let mut command = program();
        command.arg("run").arg("--config").arg(self.path("config"));
        command.env("VHOST_USER_NET_FAULT", fault);
        self.child = command.stderr(self.open_log()).spawn().unwrap();
    }

    /// Starts a new daemon that takes over, and waits until the old one exits.
    pub(crate) fn upgrade(&mut self) {
        let next = self.start_successor();
        let mut last = std::mem::replace(&mut self.child, next);
        let ended = std::time::Instant::now() + super::SOON;
        while last.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < ended, "the last one does not end: {}", self.log());
        }
        assert!(last.wait().unwrap().success());
    }

    /// Starts a new daemon that takes over with the same file.
    pub(crate) fn start_successor(&self) -> Child {
        self.successor().stderr(self.open_log()).spawn().unwrap()
    }

    /// Returns the command of a daemon that takes over with the same file.
    pub(crate) fn successor(&self) -> Command {
        let mut command = program();
        command.arg("run").arg("--config").arg(self.path("config")).arg("--take-over");
        command
    }

    /// Waits until the daemon exits, and continues with `successor`, which has taken over.
    pub(crate) fn become_successor(&mut self, successor: Child) {
        assert!(self.wait().success());
        self.child = successor;
    }

    /// Runs `vhost-user-net ctl` on the control socket `control`.
    pub(crate) fn ctl(&self, words: &[&str]) -> Output {
        let mut command = program();
        command.arg("ctl").arg("--control").arg(self.path("control")).args(words);
        command.output().unwrap()
    }

    /// Runs `ctl`, which must succeed, and returns its output.
    #[track_caller]
    pub(crate) fn ask(&self, words: &[&str]) -> String {
        let output = self.ctl(words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the output of `ctl --json show` for a port.
    #[track_caller]
    pub(crate) fn show(&self, port: &str) -> serde_json::Value {
        serde_json::from_str(&self.ask(&["--json", "show", port])).unwrap()
    }

    /// Rewrites the configuration file. `{}` stands for its directory.
    pub(crate) fn write_config(&self, contents: &str) {
        let directory = self.directory().to_str().unwrap();
        fs::write(self.path("config"), contents.replace("{}", directory)).unwrap();
    }

    /// Returns the thread of this name.
    pub(crate) fn thread(&self, name: &str) -> Pid {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.process()));
        let mut numbers = fs::read_dir(&tasks).unwrap().map(|task| task.unwrap().file_name());
        let is_it = |number: &std::ffi::OsString| {
            fs::read_to_string(tasks.join(number).join("comm")).unwrap().trim() == name
        };
        let number = numbers.find(is_it).expect("the thread runs");
        Pid::from_raw(number.to_str().unwrap().parse().unwrap())
    }

    /// Returns the process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Returns the number of the next descriptor that the daemon opens.
    pub(crate) fn lowest_free_descriptor(&self) -> usize {
        let free = |number: &usize| {
            !PathBuf::from(format!("/proc/{}/fd/{number}", self.child.id())).is_symlink()
        };
        (0..).find(free).unwrap()
    }

    /// Returns the path of a file in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    /// Connects to the socket of this name.
    pub(crate) fn connect_to(&self, socket: &str) -> UnixStream {
        UnixStream::connect(self.path(socket)).unwrap()
    }

    /// Starts a daemon through `wrapper`, which limits it or listens for it. `{}` in the wrapper's
    /// options stands for the socket's path.
    pub(crate) fn start_under(wrapper: &[&str], options: &[&str]) -> Self {
        let mut daemon = Self::not_started();
        let socket = daemon.socket();
        let socket = socket.to_str().unwrap();
        let mut command = Command::new(wrapper[0]);
        command.args(wrapper[1..].iter().map(|option| option.replace("{}", socket)));
        command.arg(program().get_program());
        if !options.iter().any(|option| option.starts_with("--fd")) {
            command.arg(format!("--socket-path={socket}"));
        }
        command.args(options).stdin(Stdio::null()).stderr(daemon.open_log());
        daemon.child = command.spawn().unwrap();
        daemon.wait_until_it_listens();
        daemon
    }

    /// Reads the rings of the daemon's AF_XDP socket from its mappings.
    pub(crate) fn socket_rings(&self) -> SocketRings {
        SocketRings::of(self.child.id())
    }

    /// Starts a daemon without waiting. `{}` in an option stands for the socket's path.
    pub(crate) fn spawn(options: &[&str]) -> Self {
        let mut daemon = Self::not_started();
        daemon.run(options);
        daemon
    }

    /// Starts a daemon that inherits descriptors 5 and 6, without waiting.
    pub(crate) fn inheriting(options: &[&str], five: OwnedFd, six: Option<OwnedFd>) -> Self {
        let mut daemon = Self::not_started();
        let script = if six.is_some() {
            "exec \"$0\" \"$@\" 5<&0 6<&1 0<&- 1>&2"
        } else {
            "exec \"$0\" \"$@\" 5<&0 0<&-"
        };
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(program().get_program());
        if !options.iter().any(|option| option.starts_with("--fd")) {
            command.arg(format!("--socket-path={}", daemon.socket().display()));
        }
        command.args(options).stdin(Stdio::from(five)).stderr(daemon.open_log());
        if let Some(six) = six {
            command.stdout(Stdio::from(six));
        }
        daemon.child = command.spawn().unwrap();
        daemon
    }

    /// Makes a directory for a daemon that is not started yet.
    fn not_started() -> Self {
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        Daemon { child, directory }
    }

    pub(crate) fn open_log(&self) -> fs::File {
        fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap()
    }

    /// Returns the CPU time of all threads, in nanoseconds.
    pub(crate) fn cpu_nanoseconds(&self) -> u64 {
        super::cpu_nanoseconds(self.child.id())
    }

    /// Returns the private memory in kB, without guest memory.
    pub(crate) fn private_kilobytes(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        own.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits for a second in which the daemon uses at most `most` of CPU time. One such second is enough,
    /// since a thread that spins has none. On a virtual machine a thread is also charged for stolen time.
    #[track_caller]
    pub(crate) fn check_idle(&self, most: Duration) {
        eventually("nothing is used", || {
            let before = self.cpu_nanoseconds();
            std::thread::sleep(Duration::from_secs(1));
            u128::from(self.cpu_nanoseconds() - before) <= most.as_nanos()
        });
    }

    /// Starts the daemon again in the same directory, after it has exited.
    pub(crate) fn run(&mut self, options: &[&str]) {
        let socket = self.socket();
        let socket = socket.to_str().unwrap();
        let mut command = program();
        if !options.iter().any(|option| option.contains("{}") || option.starts_with("--fd")) {
            command.arg(format!("--socket-path={socket}"));
        }
        command.args(options.iter().map(|option| option.replace("{}", socket)));
        self.child = command.stderr(self.open_log()).spawn().unwrap();
    }

    /// Waits until a connection succeeds: the socket file appears before the daemon listens.
    pub(crate) fn wait_until_it_listens(&self) {
        eventually("the daemon listens", || UnixStream::connect(self.socket()).is_ok());
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.as_path().join("socket")
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.as_path()
    }

    fn log_path(&self) -> PathBuf {
        self.directory.as_path().join("log")
    }

    /// Returns the log. The daemon's log thread writes lines shortly after their events, so this waits until
    /// none comes for 10 ms, at most 200 ms.
    pub(crate) fn log(&self) -> String {
        let read = || fs::read(self.log_path()).unwrap_or_default();
        let (mut bytes, mut quiet) = (read(), 0);
        let end = Instant::now() + Duration::from_millis(200);
        while quiet < 2 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            let now = read();
            quiet = if now.len() == bytes.len() { quiet + 1 } else { 0 };
            bytes = now;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// Reports whether the daemon runs. A daemon that another test helper has waited for has exited.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Sends SIGKILL, and waits until the daemon exits.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until the daemon exits.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the daemon ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Returns open descriptors, threads, and resident memory in kB.
    pub(crate) fn resources(&self) -> (usize, usize, usize) {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let count = |what: &str| fs::read_dir(process.join(what)).unwrap().count();
        let status = fs::read_to_string(process.join("status")).unwrap();
        let kilobytes = |what: &str| -> usize {
            let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        // Without file pages: the kernel loads those for unwinding at the first panic.
        let resident = kilobytes("RssAnon:") + kilobytes("RssShmem:");
        (count("fd"), count("task"), resident)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon said:\n{}", self.log());
        }
    }
}
