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

/// A running daemon, ended with the value.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    directory: TempDir,
}

/// The program under test; VHOST_USER_NET says where it is on another machine than this.
pub(crate) fn program() -> Command {
    let built = env!("CARGO_BIN_EXE_vhost-user-net");
    let mut command = Command::new(std::env::var("VHOST_USER_NET").unwrap_or(built.into()));
    command.stdin(Stdio::null());
    command
}

/// What a file says of a port `name`, whose socket has that name too; `rest` is its host side and
/// the like.
pub(crate) fn port(name: &str, rest: &str) -> String {
    format!("[[port]]\nname = \"{name}\"\nsocket-path = \"{{}}/{name}\"\n{rest}\n")
}

impl Daemon {
    /// Starts it on a socket in a directory of its own, and waits until it listens.
    pub(crate) fn start(options: &[&str]) -> Self {
        let daemon = Self::spawn(options);
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts it with a file that describes its ports, and waits until the port `last` listens.
    /// `{}` in the file stands for its directory.
    pub(crate) fn with_config(contents: &str, last: &str) -> Self {
        Self::failing(contents, last, "")
    }

    /// Starts it on a socket with a fault point of `src/fault_point.rs`, and waits until it listens.
    pub(crate) fn failing_without_file(options: &[&str], fault: &str) -> Self {
        let mut daemon = Self::nobody();
        let mut command = program();
        command.arg(format!("--socket-path={}", daemon.socket().display())).args(options);
        command.env("VHOST_USER_NET_FAULT", fault);
        daemon.child = command.stderr(daemon.open_log()).spawn().unwrap();
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts it with a file, and with a fault point if `fault` names one.
    pub(crate) fn failing(contents: &str, last: &str, fault: &str) -> Self {
        let mut daemon = Self::nobody();
        daemon.write_config(contents);
        daemon.run_config_failing(fault);
        eventually("the daemon listens", || UnixStream::connect(daemon.path(last)).is_ok());
        daemon
    }

    /// The same by another program, which limits it.
    pub(crate) fn with_config_under(wrapper: &[&str], contents: &str, last: &str) -> Self {
        let mut daemon = Self::nobody();
        daemon.write_config(contents);
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(program().get_program()).stdin(Stdio::null());
        command.arg("run").arg("--config").arg(daemon.path("config"));
        daemon.child = command.stderr(daemon.open_log()).spawn().unwrap();
        eventually("the daemon listens", || UnixStream::connect(daemon.path(last)).is_ok());
        daemon
    }

    /// Starts it with somewhere else for what it logs, and waits until it listens.
    pub(crate) fn start_with_stderr(stderr: Stdio, options: &[&str]) -> Self {
        let mut daemon = Self::nobody();
        let mut command = program();
        command.arg(format!("--socket-path={}", daemon.socket().display())).args(options);
        daemon.child = command.stderr(stderr).spawn().unwrap();
        daemon.wait_until_it_listens();
        daemon
    }

    /// Starts it with the file that is there, after it has ended.
    pub(crate) fn run_config(&mut self) {
        self.run_config_failing("");
    }

    fn run_config_failing(&mut self, fault: &str) {
        let mut command = program();
        command.arg("run").arg("--config").arg(self.path("config"));
        command.env("VHOST_USER_NET_FAULT", fault);
        self.child = command.stderr(self.open_log()).spawn().unwrap();
    }

    /// Starts another one with its file, to take over from it, and waits for its end.
    pub(crate) fn upgrade(&mut self) {
        let next = self.start_successor();
        let mut last = std::mem::replace(&mut self.child, next);
        let ended = std::time::Instant::now() + super::SOON;
        while last.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < ended, "the last one does not end: {}", self.log());
        }
        assert!(last.wait().unwrap().success());
    }

    /// Starts another one with its file, to take over from it.
    pub(crate) fn start_successor(&self) -> Child {
        self.successor().stderr(self.open_log()).spawn().unwrap()
    }

    /// The command that takes over from it, with its file.
    pub(crate) fn successor(&self) -> Command {
        let mut command = program();
        command.arg("run").arg("--config").arg(self.path("config")).arg("--take-over");
        command
    }

    /// Waits for its end, and goes on as another process, which has taken over from it.
    pub(crate) fn become_successor(&mut self, successor: Child) {
        assert!(self.wait().success());
        self.child = successor;
    }

    /// What `vhost-user-net ctl` says of it, by a control socket called `control`.
    pub(crate) fn ctl(&self, words: &[&str]) -> Output {
        let mut command = program();
        command.arg("ctl").arg("--control").arg(self.path("control")).args(words);
        command.output().unwrap()
    }

    /// What it prints, if it succeeds.
    #[track_caller]
    pub(crate) fn ask(&self, words: &[&str]) -> String {
        let output = self.ctl(words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says of a port.
    #[track_caller]
    pub(crate) fn show(&self, port: &str) -> serde_json::Value {
        serde_json::from_str(&self.ask(&["--json", "show", port])).unwrap()
    }

    /// Writes the file that it was started with again; `{}` stands for its directory.
    pub(crate) fn write_config(&self, contents: &str) {
        let directory = self.directory().to_str().unwrap();
        fs::write(self.path("config"), contents.replace("{}", directory)).unwrap();
    }

    /// A thread by its name.
    pub(crate) fn thread(&self, name: &str) -> Pid {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.process()));
        let mut numbers = fs::read_dir(&tasks).unwrap().map(|task| task.unwrap().file_name());
        let is_it = |number: &std::ffi::OsString| {
            fs::read_to_string(tasks.join(number).join("comm")).unwrap().trim() == name
        };
        let number = numbers.find(is_it).expect("the thread runs");
        Pid::from_raw(number.to_str().unwrap().parse().unwrap())
    }

    /// Its process.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// The number that its next descriptor will have.
    pub(crate) fn lowest_free_descriptor(&self) -> usize {
        let free = |number: &usize| {
            !PathBuf::from(format!("/proc/{}/fd/{number}", self.child.id())).is_symlink()
        };
        (0..).find(free).unwrap()
    }

    /// A file in its directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    /// Connects to another socket than the one that it is started with as a rule.
    pub(crate) fn connect_to(&self, socket: &str) -> UnixStream {
        UnixStream::connect(self.path(socket)).unwrap()
    }

    /// Starts it by another program, which limits it or listens for it. `{}` in that program's
    /// options stands for the socket's path.
    pub(crate) fn start_under(wrapper: &[&str], options: &[&str]) -> Self {
        let mut daemon = Self::nobody();
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

    /// What its AF_XDP socket's rings hold, as the kernel has mapped them.
    pub(crate) fn socket_rings(&self) -> SocketRings {
        SocketRings::of(self.child.id())
    }

    /// Starts it without waiting. `{}` in an option stands for the socket's path.
    pub(crate) fn spawn(options: &[&str]) -> Self {
        let mut daemon = Self::nobody();
        daemon.run(options);
        daemon
    }

    /// Starts it with descriptors 5 and 6 open.
    pub(crate) fn inheriting(options: &[&str], five: OwnedFd, six: Option<OwnedFd>) -> Self {
        let mut daemon = Self::nobody();
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

    /// A directory, and no daemon in it yet.
    fn nobody() -> Self {
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        Daemon { child, directory }
    }

    pub(crate) fn open_log(&self) -> fs::File {
        fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap()
    }

    /// On-CPU nanoseconds of all its threads.
    pub(crate) fn cpu_nanoseconds(&self) -> u64 {
        super::cpu_nanoseconds(self.child.id())
    }

    /// Memory of its own, that is not shared with a guest, in kB.
    pub(crate) fn private_kilobytes(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        own.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits for a second of which it uses at most `most`. A machine that is itself a guest charges a
    /// thread what its host takes meanwhile, so one such second is enough: what spins has none.
    #[track_caller]
    pub(crate) fn check_idle(&self, most: Duration) {
        eventually("nothing is used", || {
            let before = self.cpu_nanoseconds();
            std::thread::sleep(Duration::from_secs(1));
            u128::from(self.cpu_nanoseconds() - before) <= most.as_nanos()
        });
    }

    /// Starts it again in the same directory, after it has ended.
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

    /// Its socket is there a moment before it listens.
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

    /// What it has logged so far. A thread of its own writes the lines, a little after what they tell of:
    /// this waits until no more come for 10 ms.
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

    /// Whether it has not ended. If somebody else has waited for it, it has.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Sends SIGKILL and waits.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the daemon ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Open descriptors, threads, and resident memory in kB.
    pub(crate) fn resources(&self) -> (usize, usize, usize) {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let count = |what: &str| fs::read_dir(process.join(what)).unwrap().count();
        let status = fs::read_to_string(process.join("status")).unwrap();
        let kilobytes = |what: &str| -> usize {
            let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        // Without the program's own pages: those for unwinding are read at the first panic.
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
