//! Sockets' places, and QEMU's user.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use vmm_sys_util::tempdir::TempDir;

use super::{Line, examine, examine_by, is_mended, is_right, line, shell};
use crate::support::daemon::Daemon;
use crate::support::{eventually, needs_root};

/// A directory that everybody may search.
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

/// Looks again in the shell that carries out the fix: a mask is a process's own.
#[track_caller]
fn is_mended_in_the_same_shell(wrong: &Line, arguments: &[&str]) {
    let script = format!("{} && exec \"$0\" \"$@\"", wrong.fix.as_deref().unwrap());
    let (_, after) = examine_by(&["sh", "-c", &script], arguments);
    is_right(wrong, &after);
}

#[test]
fn a_missing_directory_is_made_by_the_command_that_is_printed() {
    needs_root!("a_missing_directory_is_made_by_the_command_that_is_printed");
    let directory = directory();
    let arguments = [&socket(&directory, "new/one/socket")[..], "--qemu-user=nobody"];
    is_mended("socket", "FAIL", &arguments);
    let made = directory.as_path().join("new/one").metadata().unwrap();
    assert_eq!(
        (made.mode() & 0o7777, made.gid()),
        (0o2770, 65534),
        "its group's, and nobody else's"
    );
    let lines = examine(&arguments);
    let wrong = line(&lines, "qemu-user", "WARN");
    assert_eq!(wrong.fix.as_deref(), Some("umask 007"));
    is_mended_in_the_same_shell(wrong, &arguments);

    let alone = directory.as_path().join("alone");
    let argument = socket(&directory, "alone/socket");
    let before = examine(&[&argument]);
    shell(line(&before, "socket", "FAIL").fix.as_deref().unwrap());
    assert_eq!(alone.metadata().unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn a_directory_that_qemu_may_not_search_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_directory_that_qemu_may_not_search_is_mended_by_the_command_that_is_printed");
    let directory = directory();
    std::fs::create_dir_all(directory.as_path().join("outer/inner")).unwrap();
    let arguments = [&socket(&directory, "outer/inner/socket")[..], "--qemu-user=nobody"];
    set_mode(&directory, "outer", 0o700);
    set_mode(&directory, "outer/inner", 0o700);
    let lines = examine(&arguments);
    let outer = line(&lines, "qemu-user", "FAIL");
    assert!(outer.why.contains("outer, and"), "{outer:?}");
    shell(outer.fix.as_deref().unwrap());
    let lines = examine(&arguments);
    let inner = line(&lines, "qemu-user", "FAIL");
    super::show(outer, inner);
    assert!(inner.why.contains("outer/inner, and"), "{inner:?}");
    shell(inner.fix.as_deref().unwrap());
    let lines = examine(&arguments);
    super::show(inner, line(&lines, "qemu-user", "WARN"));
    is_mended_in_the_same_shell(line(&lines, "qemu-user", "WARN"), &arguments);
}

#[test]
fn a_socket_that_qemu_may_not_write_to_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_socket_that_qemu_may_not_write_to_is_mended_by_the_command_that_is_printed");
    let daemon = Daemon::start(&["--loopback"]);
    shell(&format!("chmod 755 {}", daemon.directory().display()));
    // Who waited until it listens has connected once.
    let connections = || daemon.log().matches("frontend disconnected").count();
    eventually("the first has gone", || connections() == 1);
    let argument = format!("--socket-path={}", daemon.socket().display());
    let arguments = [&argument[..], "--qemu-user=nobody"];
    is_mended("qemu-user", "FAIL", &arguments);
    let lines = examine(&arguments);
    let listening = lines.iter().find(|line| line.check == "socket").unwrap();
    assert!(listening.why.contains("a process listens there"), "{listening:?}");
    assert_eq!(connections(), 1, "doctor does not connect");
    // That user does, with a program that connects (and may be read where only root may look).
    let mut theirs = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"])
        .arg(crate::support::daemon::program().get_program())
        .args(["--loopback", "--log-level=off"])
        .arg(format!("--connect={}", daemon.socket().display()))
        .spawn()
        .unwrap();
    eventually("it is connected", || daemon.log().matches("frontend connected").count() == 2);
    theirs.kill().unwrap();
    theirs.wait().unwrap();
}

#[test]
fn a_file_in_the_sockets_place_is_moved_away_by_the_command_that_is_printed() {
    needs_root!("a_file_in_the_sockets_place_is_moved_away_by_the_command_that_is_printed");
    let directory = directory();
    std::fs::write(directory.as_path().join("it is mine"), "precious").unwrap();
    is_mended("socket", "FAIL", &[&socket(&directory, "it is mine")]);
    let kept = std::fs::read_to_string(directory.as_path().join("it is mine.old")).unwrap();
    assert_eq!(kept, "precious");
}

#[test]
fn a_directory_that_everybody_may_write_to_is_mended_by_the_command_that_is_printed() {
    needs_root!("a_directory_that_everybody_may_write_to_is_mended_by_the_command_that_is_printed");
    let directory = directory();
    set_mode(&directory, "", 0o777);
    is_mended("socket", "WARN", &[&socket(&directory, "socket")]);
    set_mode(&directory, "", 0o1777);
    let lines = examine(&[&socket(&directory, "socket")]);
    assert_eq!(line(&lines, "socket", "WARN").fix, None, "another directory is the cure");
}

#[test]
fn a_place_for_no_socket_is_said() {
    needs_root!("a_place_for_no_socket_is_said");
    let directory = directory();
    let lines = examine(&[&socket(&directory, &"x".repeat(100))]);
    assert!(line(&lines, "socket", "FAIL").why.contains("107"));
    std::fs::write(directory.as_path().join("file"), "").unwrap();
    let lines = examine(&[&socket(&directory, "file/socket")]);
    line(&lines, "socket", "FAIL");
    let lines = examine(&[&socket(&directory, "socket"), "--qemu-user=no-such-user"]);
    assert!(line(&lines, "qemu-user", "FAIL").why.contains("no-such-user"));
}
