//! Short runs of other modules' checks with the newest QEMU that Debian has.

use crate::support::debian::newest_qemu;
use crate::support::network::output;
use crate::support::vm::needs_guest;
use crate::support::{needs_program, skip};
use crate::{live_migration, qemu};

/// Runs a check with the newest QEMU, if it can be fetched.
fn check(test: &str, check: impl FnOnce(&[(&str, &str)])) {
    needs_guest!(test);
    needs_program!(test, "mmdebstrap");
    match newest_qemu() {
        Ok(program) => {
            let program = program.to_str().unwrap();
            assert_ne!(output(program, "--version"), output("qemu-system-x86_64", "--version"));
            check(&[("QEMU", program)]);
        }
        Err(why) => skip(test, why.lines().next().unwrap_or_default()),
    }
}

#[test]
fn newest_qemu_and_its_guest_restart() {
    check("newest_qemu_and_its_guest_restart", |qemu| {
        crate::qemu::check_restarts_and_listen(1, qemu)
    });
}

#[test]
fn newest_qemu_reconnects_to_a_killed_daemon() {
    check("newest_qemu_reconnects_to_a_killed_daemon", qemu::check_kills);
}

#[test]
fn newest_qemu_migrates_its_guest() {
    check("newest_qemu_migrates_its_guest", |qemu| live_migration::check_moves(2, qemu));
}
