//! The system calls of each role.
//!
//! Found by tracing the daemon through its tests, and read against what the standard library and
//! the C library do on their own: they allocate, take locks, end threads, and ask the kernel for
//! the time where the vDSO can't tell.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Role;

/// What every thread may do: take and give memory (none that can be executed), wait for locks and
/// time, use descriptors that are open, end.
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

/// Waiting for several descriptors.
const WAIT: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// Messages with descriptors, and what must be known of these; the socket's file.
const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_unlink,
];

/// Operators, and their socket's file.
const MAIN: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_geteuid,
    libc::SYS_getsockopt,
    libc::SYS_lstat,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_statx,
    libc::SYS_unlink,
];

/// Frames of a TAP.
const WORKER: &[c_long] = &[libc::SYS_io_uring_enter, libc::SYS_readv];

/// Sockets, and their devices, programs and maps.
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

/// A rule that a call's argument is one of a few 32-bit numbers.
fn one_of(argument: u8, values: &[c_int]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &c_int| {
        let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let value = u64::from(*value as u32);
        SeccompRule::new(vec![SeccompCondition::new(argument, length, equal, value)?])
    };
    values.iter().map(rule).collect()
}

/// A rule for internet sockets that can't connect to anything by themselves: requests to network
/// devices go through such.
fn datagrams() -> Result<SeccompRule, BackendError> {
    let is = |argument, value: c_int| {
        let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        SeccompCondition::new(argument, length, equal, value as u64)
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    SeccompRule::new(vec![is(0, libc::AF_INET)?, is(1, kind)?])
}

/// A rule that memory can't be executed: its protection is the third argument.
fn not_executable() -> Result<Vec<SeccompRule>, BackendError> {
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, executable, 0)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}

/// Requests to devices that a role makes: that of a listener for its connections, those of a TAP
/// (linux/if_tun.h) and of sockets (the driver's, by ethtool).
fn requests(role: Role) -> &'static [c_int] {
    const FIONBIO: c_int = 0x5421;
    const TUNSETOFFLOAD: c_int = 0x4004_54d0_u32 as c_int;
    const TUNSETVNETHDRSZ: c_int = 0x4004_54d8_u32 as c_int;
    const TUNSETQUEUE: c_int = 0x4004_54d9_u32 as c_int;
    const TUNATTACHFILTER: c_int = 0x4010_54d5;
    const TUNDETACHFILTER: c_int = 0x4010_54d6;
    const TUNSETVNETLE: c_int = 0x4004_54dc_u32 as c_int;
    const TUNGETIFF: c_int = 0x8004_54d2_u32 as c_int;
    const SIOCGIFMTU: c_int = 0x8921;
    const SIOCETHTOOL: c_int = 0x8946;
    match role {
        Role::Log => &[],
        Role::Main | Role::XdpControl => &[FIONBIO],
        Role::Control => &[FIONBIO, TUNATTACHFILTER, TUNDETACHFILTER, TUNSETQUEUE, TUNGETIFF],
        Role::Worker => {
            &[TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETQUEUE, TUNGETIFF, SIOCGIFMTU]
        }
        Role::XdpWorker => &[FIONBIO, SIOCETHTOOL],
    }
}

/// The filter of a role; whatever else a thread does meets `otherwise`.
pub(super) fn filter(role: Role, otherwise: SeccompAction) -> Result<SeccompFilter, BackendError> {
    let lists: &[&[c_long]] = match role {
        Role::Main => &[COMMON, WAIT, MAIN],
        Role::Log => &[COMMON],
        Role::Control => &[COMMON, WAIT, CONTROL],
        Role::XdpControl => &[COMMON, WAIT, CONTROL, &[libc::SYS_bpf]],
        Role::Worker => &[COMMON, WAIT, WORKER],
        Role::XdpWorker => &[COMMON, WAIT, WORKER, XDP],
    };
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        lists.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    // The C library names what it allocates.
    rules.insert(libc::SYS_prctl, one_of(0, &[libc::PR_SET_VMA])?);
    // Builds for debugging look whether a descriptor that they close is open.
    let commands: &[c_int] = match role {
        Role::Main | Role::Log | Role::Worker => &[libc::F_GETFD],
        Role::Control | Role::XdpControl | Role::XdpWorker => {
            &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_GET_SEALS]
        }
    };
    rules.insert(libc::SYS_fcntl, one_of(1, commands)?);
    let requests = requests(role);
    if !requests.is_empty() {
        rules.insert(libc::SYS_ioctl, one_of(1, requests)?);
    }
    // To connect to a VMM; for the requests; for AF_XDP itself, netlink, and an address to listen to.
    let sockets = match role {
        Role::Main | Role::Log => Vec::new(),
        Role::Control | Role::XdpControl => one_of(0, &[libc::AF_UNIX])?,
        Role::Worker => vec![datagrams()?],
        Role::XdpWorker => {
            let families = one_of(0, &[libc::AF_XDP, libc::AF_NETLINK, libc::AF_PACKET])?;
            families.into_iter().chain([datagrams()?]).collect()
        }
    };
    if !sockets.is_empty() {
        rules.insert(libc::SYS_socket, sockets);
    }
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)
}
