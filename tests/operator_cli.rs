//! What a new operator types first: help, manual pages, completions, and `ctl` with mistakes.

use std::fs;
use std::process::{Command, Output};

use clap_complete::Shell;
use vhost_user_net::config;
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::program;
use crate::support::needs_program;

#[path = "../examples/generate.rs"]
mod generate;

/// Words of each command, hidden ones left out.
fn commands() -> Vec<Vec<String>> {
    fn below(command: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
        all.push(path.to_vec());
        for command in command.get_subcommands().filter(|it| !it.is_hide_set()) {
            let path = [path, &[command.get_name().to_owned()]].concat();
            below(command, &path, all);
        }
    }
    let mut all = Vec::new();
    below(&config::command(), &[], &mut all);
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
fn summary_fits_a_screen_and_help_has_groups() {
    let summary = stdout(&run(&["-h"]));
    assert!(summary.lines().count() <= 48, "{} lines: {summary}", summary.lines().count());
    assert!(summary.contains("--help"), "{summary}");
    let help = stdout(&run(&["--help"]));
    let heads: Vec<&str> = help
        .lines()
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.strip_suffix(':'))
        .collect();
    let groups = ["Commands", "Options", "Frontend", "Host side", "Policy", "Operation", "Tuning"];
    assert_eq!(heads, groups, "{help}");
    for arg in config::command().get_arguments().filter_map(clap::Arg::get_long) {
        assert!(help.contains(&format!("--{arg}")), "{arg} is not in {help}");
    }
}

/// What a package has of pages and completions, in a directory.
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
    for arg in config::command().get_arguments() {
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

/// What a shell offers behind these words.
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
        .env("HOME", "/nonexistent")
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
