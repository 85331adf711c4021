//! The command line of a new operator: help, manual pages, completions, and mistakes with `ctl`.

use std::fs;
use std::process::{Command, Output};

use clap_complete::Shell;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vhost_user_net::{cli, config};
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::{Daemon, port, program};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::{eventually, needs_program};

#[path = "../examples/generate.rs"]
mod generate;

/// Returns the words of each command, without hidden commands.
fn commands() -> Vec<Vec<String>> {
    fn below(command: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
        all.push(path.to_vec());
        for command in command.get_subcommands().filter(|it| !it.is_hide_set()) {
            let path = [path, &[command.get_name().to_owned()]].concat();
            below(command, &path, all);
        }
    }
    let mut all = Vec::new();
    below(&cli::command(), &[], &mut all);
    all
}

fn run(words: &[&str]) -> Output {
    // Else a terminal of another width could be meant.
    program().args(words).env_remove("COLUMNS").output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn help_of_every_command_fits_100_columns() {
    let commands = commands();
    assert!(commands.len() > 14, "{commands:?}");
    for path in commands {
        for help in ["-h", "--help"] {
            let words: Vec<&str> = path.iter().map(String::as_str).chain([help]).collect();
            let text = stdout(&run(&words));
            assert!(text.contains("Usage: vhost-user-net"), "{words:?}: {text}");
            for line in text.lines() {
                assert!(line.chars().count() <= 100, "{words:?}: {line}");
            }
        }
    }
}

#[test]
fn short_help_fits_24_lines_of_80_columns() {
    for path in commands() {
        let words: Vec<&str> = path.iter().map(String::as_str).chain(["-h"]).collect();
        let text = stdout(&program().args(&words).env("COLUMNS", "80").output().unwrap());
        let lines = text.lines().count();
        assert!(lines <= 24, "{words:?} has {lines} lines: {text}");
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{words:?}: {line}");
        }
        assert!(text.contains("--help"), "{words:?}: {text}");
    }
}

#[test]
fn help_has_groups_and_every_option() {
    let help = stdout(&run(&["--help"]));
    let heads: Vec<&str> = help
        .lines()
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.strip_suffix(':'))
        .collect();
    let groups = ["Commands", "Options", "Frontend", "Host side", "Policy", "Operation", "Tuning"];
    assert_eq!(heads, groups, "{help}");
    for arg in cli::command().get_arguments().filter_map(clap::Arg::get_long) {
        assert!(help.contains(&format!("--{arg}")), "{arg} is not in {help}");
    }
}

/// Writes the package's manual pages and completions to a directory.
fn generated() -> TempDir {
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    generate::generate(directory.as_path()).unwrap();
    directory
}

#[test]
fn manual_pages_have_their_sections() {
    let directory = generated();
    let page = |name: &str| {
        fs::read_to_string(directory.as_path().join("man").join(name))
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .replace("\\-", "-")
            .replace("\\*(Aq", "'")
            .replace("\\fB", "")
            .replace("\\fR", "")
    };
    let daemon = page("vhost-user-net.8");
    for head in [
        "OPTIONS",
        "SUBCOMMANDS",
        "FILES",
        "SIGNALS",
        "\"EXIT STATUS\"",
        "EXAMPLES",
        "\"SEE ALSO\"",
    ] {
        assert!(daemon.contains(&format!("\n.SH {head}\n")), "no {head}: {daemon}");
    }
    // Each option with its help, those that a summary leaves out too.
    for arg in cli::command().get_arguments() {
        let help = arg.get_help().unwrap().to_string();
        let start: String = help.split_whitespace().take(4).collect::<Vec<_>>().join(" ");
        assert!(daemon.contains(&start), "no {start:?}: {daemon}");
    }
    assert!(daemon.contains("vhost-user-net-ctl(1)"), "{daemon}");
    assert!(page("vhost-user-net-ctl.1").contains(".SH EXAMPLES"));

    let file = page("vhost-user-net.toml.5");
    for key in config::keys() {
        for part in [format!("{} ({})", key.name, key.kind), key.example.clone()] {
            assert!(file.contains(&part), "no {part}: {file}");
        }
        let default = key.default.map(|default| format!("[default: {default}]"));
        assert!(default.is_none_or(|it| file.contains(&it)), "{}", key.name);
    }
    let units = ["vhost-user-net.service", "vhost-user-net@.service", "vhost-user-net@.socket"];
    for unit in units {
        let path = format!("{}/dist/{unit}", env!("CARGO_MANIFEST_DIR"));
        let unit = fs::read_to_string(path).unwrap();
        assert!(unit.contains("Documentation=man:vhost-user-net(8)\n"), "{unit}");
    }
}

/// Returns a shell's completions after these words.
fn offered(shell: Shell, scripts: &TempDir, words: &str) -> String {
    let scripts = scripts.as_path();
    let directory = scripts.join("files");
    let _ = fs::create_dir(&directory);
    fs::write(directory.join("a-file"), "").unwrap();
    let script = match shell {
        Shell::Bash => format!(
            "source {}/completions/vhost-user-net.bash
             COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS[@]}} ))
             COMP_WORDS+=(''); compopt() {{ :; }}
             _vhost__user__net vhost-user-net '' \"${{COMP_WORDS[COMP_CWORD-1]}}\"
             echo \"${{COMPREPLY[@]}}\"",
            scripts.display()
        ),
        _ => format!(
            "source {}/completions/vhost-user-net.fish; complete -C '{words} '",
            scripts.display()
        ),
    };
    let mut command = Command::new(shell.to_string());
    let output = command
        .args(if shell == Shell::Fish { &["--no-config", "-c"][..] } else { &["-c"] })
        .arg(script)
        .current_dir(directory)
        .env("HOME", scripts)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn completions_offer_values_and_paths_where_they_fit() {
    const TEST: &str = "completions_offer_values_and_paths_where_they_fit";
    needs_program!(TEST, "fish");
    let scripts = generated();
    for shell in [Shell::Bash, Shell::Fish] {
        for (words, wanted) in [
            ("vhost-user-net --log-level", "trace"),
            ("vhost-user-net --seccomp", "kill"),
            ("vhost-user-net --tx-method", "io-uring"),
            ("vhost-user-net --guest-tso", "off"),
            ("vhost-user-net ctl set --link", "off"),
            ("vhost-user-net ctl add --anti-spoofing", "on"),
            ("vhost-user-net --socket-path", "a-file"),
            ("vhost-user-net run --config", "a-file"),
        ] {
            let said = offered(shell, &scripts, words);
            let all: Vec<&str> = said.split_whitespace().collect();
            assert!(all.contains(&wanted), "{shell} {words}: {said}");
            assert!(wanted == "a-file" || !all.contains(&"a-file"), "{shell} {words}: {said}");
        }
        for words in
            ["vhost-user-net --mac", "vhost-user-net --mtu", "vhost-user-net ctl set --vlan"]
        {
            let said = offered(shell, &scripts, words);
            assert!(!said.contains("a-file"), "{shell} {words}: {said}");
        }
    }
    for file in fs::read_dir(scripts.as_path().join("completions")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        assert!(!text.contains("opener"), "a hidden subcommand is offered");
    }
    // zsh completes at a prompt only: what it is told.
    let zsh = fs::read_to_string(scripts.as_path().join("completions/_vhost-user-net")).unwrap();
    for (option, values) in [
        ("--log-level=", ":LEVEL:(off error warn info debug trace)"),
        ("--link=", ":on|off:(on off)"),
        ("--socket-path=", ":PATH:_files"),
        ("--mtu=", ":N:"),
    ] {
        let line = zsh.lines().find(|line| line.contains(option)).unwrap();
        assert!(line.contains(values) && !line.contains("_default"), "{option}: {line}");
    }
}

const CONTROL: &str = "control = \"{}/control\"\n";

/// Starts a daemon with a file, and a guest on its port `one`.
fn operated(rest: &str) -> (Daemon, Card) {
    let ports = port("one", &format!("loopback = true\n{rest}")) + &port("two", "loopback = true");
    let daemon = Daemon::with_config(&(CONTROL.to_owned() + &ports), "two");
    let card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    eventually("it runs", || daemon.show("one")["state"] == "running");
    (daemon, card)
}

#[track_caller]
fn refused(output: &Output, code: i32) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

#[test]
fn ctl_alone_shows_its_subcommands() {
    let text = refused(&run(&["ctl"]), 2);
    for command in cli::command().find_subcommand("ctl").unwrap().get_subcommands() {
        let shown = text.contains(&format!("\n  {} ", command.get_name()));
        assert_eq!(shown, !command.is_hide_set(), "{}: {text}", command.get_name());
    }
}

#[test]
fn ctl_set_names_each_option_that_cannot_change() {
    let command = cli::command();
    let set = command.find_subcommand("ctl").unwrap().find_subcommand("set").unwrap();
    let live: Vec<&str> = set.get_arguments().filter_map(clap::Arg::get_long).collect();
    let all = command.get_arguments().filter_map(clap::Arg::get_long);
    let fixed: Vec<&str> =
        all.filter(|name| !live.contains(name) && !["control", "help"].contains(name)).collect();
    assert!(fixed.contains(&"mtu") && fixed.contains(&"seccomp"), "{fixed:?}");
    for name in fixed.iter().filter(|name| !["version", "print-capabilities"].contains(name)) {
        let text = refused(&run(&["ctl", "set", "vm1", &format!("--{name}=9000")]), 2);
        assert!(text.contains(&format!("cannot change --{name}: it can't change")), "{text}");
        assert!(text.lines().count() == 1 && !text.contains("tip"), "{text}");
    }
    // No value begins with dashes.
    let text = refused(&run(&["ctl", "show", "vm1", "--colour"]), 2);
    assert!(text.contains("--colour") && !text.contains("as a value"), "{text}");
}

#[test]
fn ctl_add_names_the_conflicting_port() {
    let (daemon, mut card) = operated("");
    let socket = |name: &str| format!("--socket-path={}", daemon.path(name).display());
    for (name, socket, said) in [
        ("--name=one", socket("new"), "port one already exists; remove it first"),
        ("--name=new", socket("one"), "one belongs to port one; name another, or remove that port"),
    ] {
        let text = refused(&daemon.ctl(&["add", name, &socket, "--loopback"]), 1);
        assert!(text.contains(said), "{text}");
    }
    card.check_echo(10);
}

#[test]
fn ctl_stats_prints_as_many_tables_as_asked() {
    let (daemon, _card) = operated("");
    for (words, tables) in [(&["stats"][..], 1), (&["stats", "--count=3", "--interval=0.05"], 3)] {
        let said = daemon.ask(words);
        assert_eq!(said.matches("NAME").count(), tables, "{said}");
    }
}

#[test]
fn list_and_show_print_the_policy_in_force() {
    let (daemon, _card) = operated(
        "mac = \"52:54:00:00:00:01\"\nanti-spoofing = true\nsource-ip = [\"192.0.2.5\"]\n\
         source-mac = [\"52:54:00:00:00:02\"]\nvlan = [7]",
    );
    daemon.ask(&["set", "one", "--link=off", "--source-ip=192.0.2.6,2001:db8::/64"]);
    let list = daemon.ask(&["list"]);
    let row = |name: &str| -> Vec<String> {
        let line = list.lines().find(|line| line.to_lowercase().starts_with(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    };
    let heads = row("name");
    let cell =
        |port: &str, head: &str| row(port)[heads.iter().position(|it| it == head).unwrap()].clone();
    for (port, head, wanted) in [
        ("one", "LINK", "down"),
        ("one", "MAC", "52:54:00:00:00:01"),
        ("one", "ANTI-SPOOFING", "on"),
        ("two", "LINK", "up"),
        ("two", "MAC", "-"),
        ("two", "ANTI-SPOOFING", "off"),
    ] {
        assert_eq!(cell(port, head), wanted, "{port}: {list}");
    }
    let shown: Vec<String> = daemon
        .ask(&["show", "one"])
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for line in [
        "link down",
        "mac 52:54:00:00:00:01",
        "anti spoofing on",
        "source macs 52:54:00:00:00:01,52:54:00:00:00:02",
        "source ips 192.0.2.6/32,2001:db8::/64",
        "vlans 7",
    ] {
        assert!(shown.iter().any(|it| it == line), "{line}: {shown:#?}");
    }
    let report = daemon.show("one");
    assert_eq!(report["mac"], "52:54:00:00:00:01");
    assert_eq!(report["anti_spoofing"], true);
    assert_eq!(report["source_ips"], json!(["192.0.2.6/32", "2001:db8::/64"]));
    assert_eq!((&report["vlans"], &report["link"]), (&json!([7]), &"down".into()));
    let other = daemon.show("two");
    assert_eq!((&other["mac"], &other["anti_spoofing"]), (&Value::Null, &false.into()));
}

#[test]
fn reload_log_names_actor_and_changes() {
    let identity = "mac = \"52:54:00:00:00:01\"\nanti-spoofing = true\n";
    let (daemon, _card) = operated(&format!("{identity}source-ip = [\"192.0.2.5\"]"));
    let _two = Frontend::new(daemon.connect_to("two"));
    eventually("two has a frontend", || daemon.show("two")["state"] == "connected");
    // A changed policy, a port that goes, and one that can't be had.
    let one = format!("loopback = true\n{identity}source-ip = [\"192.0.2.6\"]\nlink = false");
    let never = "[[port]]\nname = \"never\"\nsocket-path = \"{}/none/x\"\nloopback = true\n";
    daemon.write_config(&(CONTROL.to_owned() + &port("one", &one) + never));
    daemon.signal(Signal::SIGHUP);
    eventually("the file is read again", || daemon.log().contains(" failures=1"));
    assert_eq!(daemon.show("one")["state"], "running");
    let log = daemon.log();
    for said in [
        "INFO ] one: anti-spoofing set by the file from=\"on, mac 52:54:00:00:00:01, ip 192.0.2.5/32, \
         vlan none\" to=\"on, mac 52:54:00:00:00:01, ip 192.0.2.6/32, vlan none\"",
        "INFO ] one: link set by the file from=\"on\" to=\"off\"",
        "INFO ] two: removed by the file",
        "INFO ] two: frontend disconnected: the port is removed",
        "INFO ] reload two: removed",
        "WARN ] reload failed never: not added: ",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert!(!log.contains("by an operator") && !log.contains("the daemon stops"), "{log}");
    daemon.ask(&["set", "one", "--anti-spoofing=off", "--source-ip=none"]);
    daemon.ask(&["remove", "one"]);
    for said in ["one: anti-spoofing set by an operator", "one: removed by an operator"] {
        assert!(daemon.log().contains(said), "{said}: {}", daemon.log());
    }
    for line in daemon.log().lines() {
        let head = line.split_once(']').map(|(head, _)| head).unwrap_or_default();
        let parts: Vec<&str> = head.split_whitespace().collect();
        let timed = parts[0].starts_with("[20") && parts[0].ends_with('Z');
        assert!(timed && parts.len() == 2, "no time and level: {line}");
    }
}

/// Makes the daemon log, with one connection after another.
fn chatter(daemon: &Daemon, connections: usize) {
    for _ in 0..connections {
        let mut frontend = Frontend::new(daemon.connect());
        frontend.begin();
        drop(frontend);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn log_on_a_full_disk_drops_and_counts_whole_lines() {
    needs_program!("log_on_a_full_disk_drops_and_counts_whole_lines", "prlimit");
    // A file that may not grow, as on a full disk: the last write is cut.
    let options = ["--loopback", "--log-level=debug"];
    let mut daemon = Daemon::start_under(&["prlimit", "--fsize=2999:", "--"], &options);
    let size = || daemon.log().len();
    for _ in 0..100 {
        if size() == 2999 {
            break;
        }
        chatter(&daemon, 1);
    }
    eventually("the log is full", || size() == 2999);
    chatter(&daemon, 5);
    let mut raise = Command::new("prlimit");
    raise.arg(format!("--pid={}", daemon.process())).arg("--fsize=unlimited");
    assert!(raise.status().unwrap().success());
    eventually("the log counts lost lines", || {
        chatter(&daemon, 1);
        daemon.log().contains(" log lines were lost")
    });
    let log = daemon.log();
    for line in log.lines() {
        assert!(line.starts_with("[20") && line.matches("[20").count() == 1, "{line}: {log}");
    }
    let said = log.lines().find(|line| line.contains(" log lines were lost")).unwrap();
    let count: u64 = said.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!(count >= 5 && said.contains("WARN ] log: "), "{said}");
    assert!(daemon.is_alive());
}

#[test]
fn spoofed_frames_are_counted_in_rate_limited_log() {
    let (daemon, mut card) = operated("mac = \"52:54:00:00:00:01\"\nanti-spoofing = true");
    let lines = |log: &str| -> Vec<String> {
        let said = log.lines().filter(|line| line.contains("anti-spoofing dropped frames"));
        said.map(str::to_owned).collect()
    };
    // Ethernet from another address, some as a bridge.
    let spoofed = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], &[8, 0], &[0; 46]].concat();
    let bridge = [&[1, 0x80, 0xc2, 0, 0, 0][..], &spoofed[6..]].concat();
    card.send(0, &spoofed);
    eventually("the log has the line", || lines(&daemon.log()).len() == 1);
    let log = daemon.log();
    let said = lines(&log).remove(0);
    assert!(said.contains("WARN ] one/0: ") && said.contains(" spoofed_mac=1;"), "{said}");
    let first = std::time::Instant::now();
    for _ in 0..40 {
        card.send(0, &spoofed);
        card.send(0, &bridge);
    }
    let dropped = || daemon.show("one")["dropped"].as_u64();
    eventually("all are dropped", || dropped() == Some(81));
    if first.elapsed() < std::time::Duration::from_secs(9) {
        assert_eq!(lines(&daemon.log()).len(), 1, "{}", daemon.log());
    }
}
