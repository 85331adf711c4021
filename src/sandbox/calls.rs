//! The system calls of each role.
//!
//! The lists come from traces of the daemon's tests. They also have the calls that the standard library and the C
//! library make on their own: for allocation, locks, the end of threads, and the time where the vDSO cannot tell
//! it.

use std::collections::BTreeMap;

use libc::{Ioctl, c_int, c_long};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Role;
use crate::sys::uring::UNREGISTER_FILES;

/// System calls of every thread: memory (never executable), locks, time, open descriptors, and its end.
const COMMON: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_time,
    libc::SYS_tkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// System calls that wait for several descriptors.
const WAIT: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// System calls of control threads: messages with descriptors, checks of these, and the socket's file.
const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_lchown,
    libc::SYS_listen,
    libc::SYS_lstat,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_readlink,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_splice,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_unlink,
];

/// System calls of the main thread: operators, and the control socket's file.
const MAIN: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_geteuid,
    libc::SYS_getsockopt,
    libc::SYS_lchown,
    libc::SYS_listen,
    libc::SYS_lstat,
    // For netlink.
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_statx,
    libc::SYS_unlink,
];

/// System calls that start a port: threads with their filters, eventfds and io_uring.
const START: &[c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_listen,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
];

/// System calls of workers: frames of a TAP, and calls to a guest through a socket.
const WORKER: &[c_long] = &[libc::SYS_io_uring_enter, libc::SYS_readv, libc::SYS_sendto];

/// System calls of AF_XDP workers: sockets, devices, programs and maps.
const XDP: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_bpf,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
];

/// Returns rules that permit a call if one argument is one of these 32-bit numbers.
fn one_of(argument: u8, values: &[c_int]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &c_int| {
        let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let value = u64::from(*value as u32);
        SeccompRule::new(vec![SeccompCondition::new(argument, length, equal, value)?])
    };
    values.iter().map(rule).collect()
}

/// Returns the rule for internet sockets, through which ioctl(2) configures network devices. No thread can send
/// through one: a TAP's worker may not connect(2), and no thread may [name an address](no_address). An AF_XDP
/// worker can send frames anyway.
fn datagrams() -> Result<SeccompRule, BackendError> {
    let is = |argument, value: c_int| {
        let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        SeccompCondition::new(argument, length, equal, value as u64)
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    SeccompRule::new(vec![is(0, libc::AF_INET)?, is(1, kind)?])
}

/// Returns the rule that sendto(2) sends to the socket's peer: its fifth argument, an address, is null.
fn no_address() -> Result<Vec<SeccompRule>, BackendError> {
    let (length, equal) = (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq);
    Ok(vec![SeccompRule::new(vec![SeccompCondition::new(4, length, equal, 0)?])?])
}

/// Returns the rule that lchown(2) keeps the owner: its second argument is -1.
fn same_owner() -> Result<Vec<SeccompRule>, BackendError> {
    one_of(1, &[-1])
}

/// Returns the rule that memory is not executable: the third argument, the protection, has no PROT_EXEC.
fn not_executable() -> Result<Vec<SeccompRule>, BackendError> {
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, executable, 0)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}

/// Requests of ioctl(2) for a TAP (linux/if_tun.h).
const TAP_REQUESTS: &[Ioctl] = &[
    libc::TUNGETIFF,
    libc::TUNGETSNDBUF,
    libc::TUNSETOFFLOAD,
    libc::TUNSETVNETHDRSZ,
    libc::TUNSETQUEUE,
    libc::TUNATTACHFILTER,
    libc::TUNDETACHFILTER,
    libc::TUNSETVNETLE,
    libc::TUNSETCARRIER,
    libc::SIOCGIFNAME,
    libc::SIOCGIFMTU,
];
/// Requests that look up a TAP's network device.
const LOOK_UP_REQUESTS: &[Ioctl] = &[libc::SIOCGIFHWADDR, libc::SIOCGIFINDEX];

/// System calls and arguments that a role permits.
#[derive(Default)]
struct Allowed {
    calls: Vec<c_long>,
    /// Commands of fcntl(2).
    commands: Vec<c_int>,
    /// Requests of ioctl(2).
    requests: Vec<Ioctl>,
    /// Options of prctl(2).
    options: Vec<c_int>,
    /// Families of socket(2).
    families: Vec<c_int>,
    /// True if internet sockets are permitted, for requests to network devices.
    datagrams: bool,
    /// True if socket pairs and timeouts are permitted, which a take-over by another daemon requires.
    take_over: bool,
}

impl Allowed {
    fn extend(&mut self, other: Allowed) {
        self.calls.extend(other.calls);
        self.commands.extend(other.commands);
        self.requests.extend(other.requests);
        self.options.extend(other.options);
        self.families.extend(other.families);
        self.datagrams |= other.datagrams;
        self.take_over |= other.take_over;
    }
}

/// Returns the system calls and arguments of a role, in a process with or without AF_XDP.
fn allowed(role: Role, af_xdp: bool) -> Allowed {
    let calls = |lists: &[&[c_long]]| [&[COMMON], lists].concat().concat();
    // Debug builds check with F_GETFD that a descriptor is open before closing it. The C library names its
    // allocations with PR_SET_VMA.
    let (commands, options) = (vec![libc::F_GETFD], vec![libc::PR_SET_VMA]);
    let descriptors =
        vec![libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_GET_SEALS];
    let common = Allowed { calls: calls(&[]), commands, options, ..Allowed::default() };
    match role {
        Role::Log => common,
        Role::Capture => Allowed { calls: calls(&[WAIT]), ..common },
        Role::Main => Allowed {
            calls: calls(&[WAIT, MAIN]),
            commands: vec![libc::F_GETFD, libc::F_DUPFD_CLOEXEC],
            // Non-blocking mode of accepted connections.
            requests: vec![libc::FIONBIO],
            // To make the control or metrics socket again after its file was deleted.
            families: vec![libc::AF_UNIX],
            ..common
        },
        Role::Operated => {
            let options =
                vec![libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS, libc::PR_SET_TIMERSLACK];
            // For the second descriptor of a TAP, which announces a migrated device.
            let commands = vec![libc::F_DUPFD_CLOEXEC];
            let mut all =
                Allowed { calls: calls(&[START]), commands, options, ..Allowed::default() };
            all.requests = LOOK_UP_REQUESTS.to_vec();
            let threads = [Role::Main, Role::Control, Role::Worker];
            let threads = threads.into_iter().chain(af_xdp.then_some(Role::XdpWorker));
            threads.for_each(|role| all.extend(allowed(role, af_xdp)));
            all
        }
        Role::XdpControl => {
            let mut control = allowed(Role::Control, af_xdp);
            // The packet filters of AF_XDP are BPF programs.
            control.calls.push(libc::SYS_bpf);
            control
        }
        Role::Control => Allowed {
            calls: calls(&[WAIT, CONTROL]),
            commands: [
                descriptors,
                vec![libc::F_ADD_SEALS, libc::F_DUPFD_CLOEXEC, libc::F_SETPIPE_SZ],
            ]
            .concat(),
            // For a TAP: to announce a migrated device, and to change the packet filter.
            requests: [TAP_REQUESTS, &[libc::FIONBIO, libc::TUNGETVNETHDRSZ]].concat(),
            // To connect to a VMM.
            families: vec![libc::AF_UNIX],
            take_over: true,
            ..common
        },
        Role::Worker => Allowed {
            calls: calls(&[WAIT, WORKER]),
            requests: TAP_REQUESTS.to_vec(),
            datagrams: true,
            ..common
        },
        Role::XdpWorker => Allowed {
            calls: calls(&[WAIT, WORKER, XDP]),
            commands: descriptors,
            requests: vec![libc::FIONBIO, libc::SIOCETHTOOL, libc::SIOCGIFNAME],
            // AF_PACKET registers the guest's MAC address with the device.
            families: vec![libc::AF_XDP, libc::AF_NETLINK, libc::AF_PACKET],
            datagrams: true,
            ..common
        },
    }
}

/// Returns the seccomp filter of a role; other system calls meet the action `otherwise`.
pub(super) fn filter(
    role: Role,
    af_xdp: bool,
    otherwise: SeccompAction,
) -> Result<SeccompFilter, BackendError> {
    let Allowed {
        calls,
        commands,
        requests,
        options,
        families,
        datagrams: has_datagrams,
        take_over,
    } = allowed(role, af_xdp);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        calls.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    let requests: Vec<c_int> = requests.into_iter().map(|request| request as c_int).collect();
    let mut sockets = one_of(0, &families)?;
    if has_datagrams {
        sockets.push(datagrams()?);
    }
    for (call, rule) in [
        (libc::SYS_prctl, one_of(0, &options)?),
        (libc::SYS_fcntl, one_of(1, &commands)?),
        (libc::SYS_ioctl, one_of(1, &requests)?),
        (libc::SYS_socket, sockets),
    ] {
        // An empty list of rules would permit all arguments.
        if !rule.is_empty() {
            rules.insert(call, rule);
        }
    }
    // A thread that drops a TAP's queue unregisters the queue's files from io_uring.
    let unregister = one_of(1, &[UNREGISTER_FILES.into()])?;
    rules.entry(libc::SYS_io_uring_register).or_insert(unregister);
    for (call, rule) in [(libc::SYS_sendto, no_address()?), (libc::SYS_lchown, same_owner()?)] {
        rules.entry(call).and_modify(|all| *all = rule);
    }
    if take_over {
        rules.insert(libc::SYS_socketpair, one_of(0, &[libc::AF_UNIX])?);
        let timeouts = one_of(2, &[libc::SO_RCVTIMEO, libc::SO_SNDTIMEO])?;
        // A role that may set all socket options keeps that right.
        rules.entry(libc::SYS_setsockopt).or_insert(timeouts);
    }
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)
}
