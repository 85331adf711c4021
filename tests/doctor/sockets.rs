//! Checks of socket paths, and of the rights of QEMU's user.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use vmm_sys_util::tempdir::TempDir;

use super::{Line, examine, examine_by, is_fixed, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::{eventually, needs_root};

/// Creates a directory that every user may search.
fn directory() -> TempDir {
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    set_mode(&directory, "", 0o755);
    directory
}

fn set_mode(directory: &TempDir, name: &str, mode: u32) {
    let path = directory.as_path().join(name);
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn socket(directory: &TempDir, name: &str) -> String {
    format!("--socket-path={}/{name}", directory.as_path().display())
}

/// Runs doctor again in the shell that ran the fix, because the umask belongs to the process.
#[track_caller]
fn is_fixed_in_the_same_shell(wrong: &Line, arguments: &[&str]) {
    let script = format!("{} && exec \"$0\" \"$@\"", wrong.fix.as_deref().unwrap());
    let (_, after) = examine_by(&["sh", "-c", &script], arguments);
    is_right(wrong, &after);
}

#[test]
fn printed_command_creates_a_missing_directory() {
    needs_root!("printed_command_creates_a_missing_directory");
    let directory = directory();
    let arguments = [&socket(&directory, "new/one/socket")[..], "--qemu-user=nobody"];
    is_fixed("socket", "FAIL", &arguments);
    let made = directory.as_path().join("new/one").metadata().unwrap();
    assert_eq!((made.mode() & 0o7777, made.gid()), (0o2770, 65534), "only the group may enter");
    let lines = examine(&arguments);
    let wrong = line(&lines, "qemu-user", "WARN");
    assert_eq!(wrong.fix.as_deref(), Some("umask 007"));
    is_fixed_in_the_same_shell(wrong, &arguments);

    let alone = directory.as_path().join("alone");
    let argument = socket(&directory, "alone/socket");
    let before = examine(&[&argument]);
    shell(line(&before, "socket", "FAIL").fix.as_deref().unwrap());
    assert_eq!(alone.metadata().unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn printed_command_lets_qemu_search_the_directories() {
    needs_root!("printed_command_lets_qemu_search_the_directories");
    let directory = directory();
    std::fs::create_dir_all(directory.as_path().join("outer/inner")).unwrap();
    let arguments = [&socket(&directory, "outer/inner/socket")[..], "--qemu-user=nobody"];
    set_mode(&directory, "outer", 0o700);
    set_mode(&directory, "outer/inner", 0o700);
    let lines = examine(&arguments);
    let outer = line(&lines, "qemu-user", "FAIL");
    assert!(outer.why.contains("outer, so"), "{outer:?}");
    shell(outer.fix.as_deref().unwrap());
    let lines = examine(&arguments);
    let inner = line(&lines, "qemu-user", "FAIL");
    super::show(outer, inner);
    assert!(inner.why.contains("outer/inner, so"), "{inner:?}");
    shell(inner.fix.as_deref().unwrap());
    let lines = examine(&arguments);
    super::show(inner, line(&lines, "qemu-user", "WARN"));
    is_fixed_in_the_same_shell(line(&lines, "qemu-user", "WARN"), &arguments);
}

#[test]
fn printed_command_lets_qemu_write_to_the_socket() {
    needs_root!("printed_command_lets_qemu_write_to_the_socket");
    let daemon = Daemon::start(&["--loopback"]);
    shell(&format!("chmod 755 {}", daemon.directory().display()));
    // `Daemon::start` has connected once, to wait until the daemon listens.
    let connections = || daemon.log().matches("frontend disconnected").count();
    eventually("the first connection has ended", || connections() == 1);
    let argument = format!("--socket-path={}", daemon.socket().display());
    let arguments = [&argument[..], "--qemu-user=nobody"];
    is_fixed("qemu-user", "FAIL", &arguments);
    let lines = examine(&arguments);
    let listening = lines.iter().find(|line| line.check == "socket").unwrap();
    assert!(listening.why.contains("a process listens on it"), "{listening:?}");
    assert_eq!(connections(), 1, "doctor does not connect");
    // QEMU's user connects. The capability lets it read a program in a directory of root's.
    let mut theirs = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"])
        .arg(crate::support::daemon::program().get_program())
        .args(["--loopback", "--log-level=off"])
        .arg(format!("--connect={}", daemon.socket().display()))
        .spawn()
        .unwrap();
    eventually("QEMU's user has connected", || {
        daemon.log().matches("frontend connected").count() == 2
    });
    theirs.kill().unwrap();
    theirs.wait().unwrap();
}

#[test]
fn printed_command_moves_a_file_from_the_sockets_path() {
    needs_root!("printed_command_moves_a_file_from_the_sockets_path");
    let directory = directory();
    std::fs::write(directory.as_path().join("it is mine"), "precious").unwrap();
    is_fixed("socket", "FAIL", &[&socket(&directory, "it is mine")]);
    let kept = std::fs::read_to_string(directory.as_path().join("it is mine.old")).unwrap();
    assert_eq!(kept, "precious");
}

#[test]
fn printed_command_closes_a_world_writable_directory() {
    needs_root!("printed_command_closes_a_world_writable_directory");
    let directory = directory();
    set_mode(&directory, "", 0o777);
    is_fixed("socket", "WARN", &[&socket(&directory, "socket")]);
    set_mode(&directory, "", 0o1777);
    let lines = examine(&[&socket(&directory, "socket")]);
    assert_eq!(line(&lines, "socket", "WARN").fix, None, "only another directory fixes it");
}

#[test]
fn impossible_socket_paths_fail() {
    needs_root!("impossible_socket_paths_fail");
    let directory = directory();
    let lines = examine(&[&socket(&directory, &"x".repeat(100))]);
    assert!(line(&lines, "socket", "FAIL").why.contains("107"));
    std::fs::write(directory.as_path().join("file"), "").unwrap();
    let lines = examine(&[&socket(&directory, "file/socket")]);
    line(&lines, "socket", "FAIL");
    let lines = examine(&[&socket(&directory, "socket"), "--qemu-user=no-such-user"]);
    assert!(line(&lines, "qemu-user", "FAIL").why.contains("no-such-user"));
}
