//! An operator with a misconfigured host: `vhost-user-net doctor` names the problem, and the printed
//! command fixes it.
//!
//! Each test breaks one thing in a namespace of its own, runs the printed command there in a shell, and
//! runs doctor again.

mod devices;
mod host;
mod sockets;
mod taps;

use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use crate::support::daemon::program;
use crate::support::needs_root;
use crate::support::network::{enter_new_namespace, ip, output};

/// A finding of doctor, from its JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    status: String,
    check: String,
    what: String,
    why: String,
    fix: Option<String>,
}

/// Runs doctor, through a program that limits it (`wrapper`) if that is not empty; returns the exit code and
/// the findings.
#[track_caller]
fn examine_by(wrapper: &[&str], arguments: &[&str]) -> (i32, Vec<Line>) {
    let daemon = program();
    let all = wrapper.iter().copied().chain(daemon.get_program().to_str());
    let mut all = all.chain(["doctor", "--json"]).chain(arguments.iter().copied());
    let output = Command::new(all.next().unwrap()).args(all).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = String::from_utf8(output.stdout).unwrap();
    let list: Vec<Value> =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{arguments:?}: {text}{complaint}"));
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let lines: Vec<Line> = list
        .iter()
        .map(|it| Line {
            status: word(&it["status"]),
            check: word(&it["check"]),
            what: word(&it["what"]),
            why: word(&it["why"]),
            fix: it["fix"].as_str().map(str::to_owned),
        })
        .collect();
    let code = output.status.code().unwrap();
    let fails = lines.iter().any(|line| line.status == "FAIL");
    assert_eq!(code, i32::from(fails), "{lines:#?}{complaint}");
    (code, lines)
}

#[track_caller]
fn examine(arguments: &[&str]) -> Vec<Line> {
    examine_by(&[], arguments).1
}

/// Returns the first finding of a check with this status.
#[track_caller]
fn line<'a>(lines: &'a [Line], check: &str, status: &str) -> &'a Line {
    let mut all = lines.iter().filter(|line| line.check == check && line.status == status);
    all.next().unwrap_or_else(|| panic!("no {status} of {check} in {lines:#?}"))
}

/// Runs a printed command in a shell.
#[track_caller]
fn shell(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Asserts that doctor reports a problem, and that the check passes after the printed command. Returns the
/// finding of the problem.
#[track_caller]
fn is_fixed(check: &str, status: &str, arguments: &[&str]) -> Line {
    is_fixed_for(&[], check, status, arguments)
}

#[track_caller]
fn is_fixed_for(wrapper: &[&str], check: &str, status: &str, arguments: &[&str]) -> Line {
    let (_, before) = examine_by(wrapper, arguments);
    let wrong = line(&before, check, status).clone();
    let fix = wrong.fix.as_deref().unwrap_or_else(|| panic!("no fix: {wrong:?}"));
    shell(fix);
    let (_, after) = examine_by(wrapper, arguments);
    is_right(&wrong, &after);
    wrong
}

/// Asserts that the check of `wrong` passes now.
#[track_caller]
fn is_right(wrong: &Line, after: &[Line]) {
    let same: Vec<&Line> = after.iter().filter(|line| line.what == wrong.what).collect();
    let still = same.iter().find(|line| line.check == wrong.check && line.status != "PASS");
    assert_eq!(still, None, "after {:?}", wrong.fix);
    let passes = || same.iter().filter(|line| line.status == "PASS");
    let right = passes().find(|line| line.check == wrong.check).or_else(|| passes().next());
    show(wrong, right.unwrap_or_else(|| panic!("{wrong:?} and then {after:#?}")));
}

/// Prints a finding, its fix, and the finding afterwards, with --nocapture.
fn show(wrong: &Line, right: &Line) {
    let fix = wrong.fix.as_deref().unwrap_or_default();
    println!("\n    {} {} {}: {}. Fix: {fix}", wrong.status, wrong.check, wrong.what, wrong.why);
    println!("    {} {} {}: {}", right.status, right.check, right.what, right.why);
}

/// Gives this thread, and the processes that it starts, a mount namespace of their own.
fn enter_new_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    shell("mount --make-rprivate /");
}

#[test]
fn text_report_is_a_line_for_each_finding_and_a_summary() {
    needs_root!("text_report_is_a_line_for_each_finding_and_a_summary");
    enter_new_namespace();
    let text = |arguments: &[&str]| {
        let output = program().arg("doctor").args(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, report) = text(&["--af-xdp=gone0"]);
    assert_eq!(code, 1);
    let failed = report.lines().find(|line| line.starts_with("FAIL device gone0")).unwrap();
    let (finding, fix) = failed.split_once(". Fix: ").unwrap_or_else(|| panic!("{failed}"));
    assert!(finding.starts_with("FAIL device gone0: no such network device"), "{failed}");
    shell(fix);
    let (_, report) = text(&["--af-xdp=gone0"]);
    assert!(report.contains("\nPASS device gone0: up\n"), "{report}");
    let verdict = report.lines().last().unwrap();
    assert!(verdict.ends_with(" 0 fail") && verdict.contains(" warn, "), "{report}");
}

#[test]
fn wrong_command_line_gives_one_line() {
    for (arguments, named) in [
        (&["--tap=far/too/long"][..], "far/too/long"),
        (&["--mtu=67"], "67"),
        (&["--queue-pairs=0"], "0"),
        (&["--af-xdp=eth1,lane=2"], "lane"),
        (&["--config=/no/such/file"], "/no/such/file"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let output = program().arg("doctor").args(arguments).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(named) && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn doctor_changes_nothing() {
    needs_root!("doctor_changes_nothing");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap");
    ip("link add veth0 type veth peer name veth1");
    ip("link add br0 type bridge");
    let state = || {
        let sysctls = output("sysctl", "-a -r ^net[.](ipv4[.]tcp_.mem|bridge)");
        let offloads = output("ethtool", "-k tap0") + &output("ethtool", "-k veth1");
        output("ip", "-d link show") + &offloads + &sysctls
    };
    let before = state();
    let lines = examine(&["--tap=tap0", "--af-xdp=veth0", "--queue-pairs=2"]);
    assert!(lines.iter().filter(|line| line.status == "FAIL").count() > 3, "{lines:#?}");
    examine(&[]);
    assert_eq!(before, state());
}

#[test]
fn unnamed_device_warns_but_never_fails() {
    needs_root!("unnamed_device_warns_but_never_fails");
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    let lines = examine(&[]);
    assert_eq!(line(&lines, "tap-state", "WARN").what, "tap0", "a TAP may be down on purpose");
    let lines = examine(&["--tap=tap0"]);
    assert_eq!(line(&lines, "tap-state", "FAIL").what, "tap0");
}
