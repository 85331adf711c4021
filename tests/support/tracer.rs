//! A program under ptrace. One of its system calls kills it, stops it or fails.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The effect on the chosen system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strike {
    /// Kill the process before the call.
    Kill,
    /// Stop the process before the call, until [`Traced::go_on`].
    Stop,
    /// Let the call fail with this error.
    Fail(Errno),
}

/// A predicate on the number and the first three arguments of a system call: the call counts.
pub(crate) type Counts = fn(u64, [u64; 3]) -> bool;

/// The system calls that count.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    /// Text of the message after which counting begins.
    pub(crate) from: &'static str,
    /// Text of the message after which counting ends.
    pub(crate) to: &'static str,
    /// Predicate for the calls that count.
    pub(crate) counts: Counts,
}

/// A traced process.
#[derive(Debug)]
pub(crate) struct Traced {
    pub(crate) child: Child,
    window: Window,
    strike: Strike,
    /// Number of counted calls before the chosen one.
    left: usize,
    is_counting: bool,
    /// Number of the chosen call, once it was made.
    pub(crate) struck: Option<u64>,
    /// Threads. The value is true inside a system call.
    threads: HashMap<Pid, bool>,
    /// Thread whose call will fail at its return.
    failing: Option<Pid>,
    /// Thread that is stopped before its call.
    standing: Option<Pid>,
}

impl Traced {
    /// Starts a program. `strike` affects the `nth` of its counted system calls, from 0.
    pub(crate) fn start(
        command: &Command,
        log: File,
        window: Window,
        strike: Strike,
        nth: usize,
    ) -> Self {
        let mut stopped = Command::new("sh");
        // The tracer attaches before the exec, so that it sees every call.
        stopped.args(["-c", "kill -STOP $$; exec \"$0\" \"$@\""]);
        stopped.arg(command.get_program()).args(command.get_args()).process_group(0);
        let child = stopped.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let process = Pid::from_raw(child.id() as i32);
        let waited = waitpid(process, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(waited, WaitStatus::Stopped(process, Signal::SIGSTOP));
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(process, options).unwrap();
        kill(process, Signal::SIGCONT).unwrap();
        Traced {
            child,
            window,
            strike,
            left: nth,
            is_counting: false,
            struck: None,
            threads: HashMap::from([(process, false)]),
            failing: None,
            standing: None,
        }
    }

    pub(crate) fn process(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Runs the process until it exits, stops, or `done` returns true. Reports whether it exited.
    pub(crate) fn run(&mut self, mut done: impl FnMut() -> bool) -> bool {
        let group = Pid::from_raw(-self.process().as_raw());
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            assert!(Instant::now() < end, "{self:?} does not end");
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            match waitpid(group, Some(flags)) {
                Ok(WaitStatus::StillAlive) => {
                    if done() {
                        return false;
                    }
                    std::thread::sleep(Duration::from_micros(20));
                }
                Ok(WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..)) => {
                    self.threads.remove(&thread);
                    if thread == self.process() {
                        return true;
                    }
                }
                Ok(WaitStatus::PtraceSyscall(thread)) => {
                    if self.system_call(thread) {
                        return false;
                    }
                    let _ = ptrace::syscall(thread, None);
                }
                Ok(WaitStatus::PtraceEvent(thread, ..)) => {
                    self.threads.entry(thread).or_insert(false);
                    let _ = ptrace::syscall(thread, None);
                }
                Ok(WaitStatus::Stopped(thread, signal)) => {
                    self.threads.entry(thread).or_insert(false);
                    let stops = [Signal::SIGTRAP, Signal::SIGSTOP].contains(&signal);
                    let _ = ptrace::syscall(thread, (!stops).then_some(signal));
                }
                Ok(_) => {}
                Err(Errno::ECHILD) => return true,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Handles the entry or exit of a system call. Reports whether the thread must stop.
    fn system_call(&mut self, thread: Pid) -> bool {
        let inside = self.threads.entry(thread).or_insert(false);
        *inside = !*inside;
        let begins = *inside;
        let Ok(mut registers) = ptrace::getregs(thread) else { return false };
        if !begins {
            if self.failing == Some(thread)
                && let Strike::Fail(error) = self.strike
            {
                self.failing = None;
                registers.rax = -i64::from(error as i32) as u64;
                ptrace::setregs(thread, registers).unwrap();
            }
            return false;
        }
        let (number, arguments) =
            (registers.orig_rax, [registers.rdi, registers.rsi, registers.rdx]);
        let counts = self.is_counting && (self.window.counts)(number, arguments);
        // write and sendto carry the messages that begin and end the window.
        if [1, 44].contains(&number) && arguments[2] < 256 {
            let text = self.text(thread, arguments[1], arguments[2]);
            if text.contains(self.window.from) {
                self.is_counting = true;
            } else if text.contains(self.window.to) {
                self.is_counting = false;
            }
        }
        if !counts || self.struck.is_some() {
            return false;
        }
        if self.left > 0 {
            self.left -= 1;
            return false;
        }
        self.struck = Some(number);
        match self.strike {
            Strike::Kill => kill(self.process(), Signal::SIGKILL).unwrap(),
            Strike::Stop => {
                self.standing = Some(thread);
                return true;
            }
            Strike::Fail(_) => {
                self.failing = Some(thread);
                registers.orig_rax = u64::MAX;
                ptrace::setregs(thread, registers).unwrap();
            }
        }
        false
    }

    fn text(&self, thread: Pid, at: u64, length: u64) -> String {
        let words = (0..length.div_ceil(8))
            .map(|word| ptrace::read(thread, (at + 8 * word) as *mut _).unwrap_or(0));
        let bytes: Vec<u8> = words.flat_map(i64::to_ne_bytes).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Resumes the stopped thread.
    pub(crate) fn go_on(&mut self) {
        if let Some(thread) = self.standing.take() {
            ptrace::syscall(thread, None).unwrap();
        }
    }

    /// Kills the process, and waits for its exit.
    pub(crate) fn kill(mut self) {
        let _ = kill(self.process(), Signal::SIGKILL);
        self.run(|| false);
        let _ = self.child.wait();
    }

    /// Detaches from all threads.
    pub(crate) fn release(self) -> Child {
        for thread in self.threads.into_keys() {
            if ptrace::interrupt(thread).is_ok() {
                let _ = waitpid(thread, Some(WaitPidFlag::__WALL));
                let _ = ptrace::detach(thread, None);
            }
        }
        self.child
    }
}
