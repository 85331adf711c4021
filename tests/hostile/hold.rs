//! Cases 55, 56, 67 and 77: pipes, threads, processes and sockets that block only their own port.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{SYS_epoll_pwait, linger};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt::Linger};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::hostile::{Scene, note};
use crate::support::network::{enter_new_namespace, ip};
use crate::support::{eventually, needs_root};

/// A stopped thread, resumed on drop. Otherwise a failed test would wait for its process forever.
struct StoppedThread(Pid);

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // Fails if the thread has exited.
        let _ = ptrace::detach(self.0, None);
    }
}

/// Numbers of the system calls that wait for descriptors.
#[cfg(target_arch = "x86_64")]
const WAITS: [i64; 2] = [SYS_epoll_pwait, nix::libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const WAITS: [i64; 1] = [SYS_epoll_pwait];

/// Stops a port's control thread, as if its system call did not return.
fn stop_control_thread(scene: &Scene) -> StoppedThread {
    let control = scene.daemon.thread("attacked");
    let mut stopped = None;
    // Only while the thread waits: between two calls it might hold a lock.
    eventually("the control thread waits for something", || {
        ptrace::attach(control).unwrap();
        waitpid(control, Some(WaitPidFlag::__WALL)).unwrap();
        let thread = StoppedThread(control);
        let call = fs::read_to_string(format!("/proc/{control}/syscall")).unwrap();
        let number = call.split(' ').next().and_then(|number| number.parse().ok());
        stopped = number.is_some_and(|number| WAITS.contains(&number)).then_some(thread);
        stopped.is_some()
    });
    stopped.unwrap()
}

/// Checks that SIGTERM ends a daemon with a stopped thread within 1 s.
fn ends_within_a_second(scene: &mut Scene, stopped: StoppedThread) {
    let asked = Instant::now();
    scene.daemon.signal(Signal::SIGTERM);
    // The process exits only after the tracer has waited for the thread.
    waitpid(stopped.0, Some(WaitPidFlag::__WALL)).unwrap();
    assert!(scene.daemon.wait().success());
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
}

#[test]
fn hostile_55_blocking_state_pipe_blocks_no_thread() {
    let scene = Scene::operated(55);
    for load in [1_u32, 0] {
        let mut frontend = scene.frontend();
        frontend.begin();
        let (reader, writer) = std::io::pipe().unwrap();
        let pipe = if load == 1 { reader.as_raw_fd() } else { writer.as_raw_fd() };
        let payload = [load, 0].map(u32::to_ne_bytes).concat();
        frontend.send_with(FrontendReq::SET_DEVICE_STATE_FD, 0, &payload, &[pipe]);
        frontend.reply(FrontendReq::SET_DEVICE_STATE_FD);
        // The flag belongs to the open file, so the daemon's descriptor would block too.
        for end in [&reader as &dyn std::os::fd::AsFd, &writer] {
            fcntl(end.as_fd(), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        }
        let asked = Instant::now();
        let refused = frontend.get(FrontendReq::CHECK_DEVICE_STATE);
        assert_eq!(refused, u64::from(load), "a state that does not come is refused");
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    }
    assert!(scene.daemon.ask(&["list"]).contains("attacked"));
    scene.ends("R after 0.5 s; nobody waits for the pipe");
}

#[test]
fn hostile_56_stuck_port_is_abandoned() {
    needs_root!("hostile_56_stuck_port_is_abandoned");
    let mut scene = Scene::operated(56);
    let control = stop_control_thread(&scene);
    let asked = Instant::now();
    assert!(scene.daemon.ask(&["remove", "attacked"]).contains("removed"));
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    scene.daemon_says("attacked: port abandoned: it did not stop in time");
    assert!(scene.daemon.ask(&["metrics"]).contains("vhost_user_net_abandoned_ports_total 1"));
    scene.lives();
    ends_within_a_second(&mut scene, control);

    // A port that is stuck when the daemon stops.
    let mut scene = Scene::operated(56);
    let control = stop_control_thread(&scene);
    scene.lives();
    ends_within_a_second(&mut scene, control);
    note(56, "C: abandoned after 2 s; SIGTERM ends the daemon within 1 s");
}

#[test]
fn hostile_67_dead_helper_ends_no_port() {
    let mut scene = Scene::operated(67);
    let process = scene.daemon.process();
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
    for child in children.split_whitespace() {
        kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL).unwrap();
    }
    scene.daemon_says("the helper process has exited");
    scene.daemon.signal(Signal::SIGHUP);
    scene.daemon_says("reload refused: the helper process that reads the file has exited");
    // Not `ends`, since the helper's socket is closed.
    scene.check(&mut scene.card());
    scene.lives();
    note(67, "SIGHUP is refused with a log line; all ports go on");
}

/// Returns a connection whose last close waits for its peer, which does not read, and the peer.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    setsockopt(&stream, Linger, &linger { l_onoff: 1, l_linger: 20 }).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65536]).is_ok() {}
    (stream, peer)
}

#[test]
fn hostile_77_lingering_socket_delays_no_removal() {
    needs_root!("hostile_77_lingering_socket_delays_no_removal");
    for is_removed in [true, false] {
        enter_new_namespace();
        ip("link set lo up");
        let mut scene = Scene::operated(77);
        let _served = scene.frontend();
        // A second VMM waits, and has sent a descriptor.
        let waiting = scene.daemon.connect_to("attacked");
        let (stream, _peer) = lingering();
        waiting.send_with_fd(&[0_u8; 12][..], stream.as_raw_fd()).unwrap();
        drop(stream);
        let asked = Instant::now();
        if is_removed {
            assert!(scene.daemon.ask(&["remove", "attacked"]).contains("removed"));
            assert!(scene.daemon.ask(&["list"]).contains("quiet"));
        }
        scene.lives();
        scene.daemon.signal(Signal::SIGTERM);
        assert!(scene.daemon.wait().success());
        // The kernel would wait 20 s.
        assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    }
    note(77, "the port is removed, and the daemon ends, at once");
}
