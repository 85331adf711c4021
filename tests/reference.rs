//! `docs/reference.md` is generated from the command line's description and the metrics of a running daemon.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;

use clap::{Arg, Command};
use vhost_user_net::cli;
use vhost_user_net::config::{self, Place};

use crate::support::daemon::{Daemon, port};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference.md");
const UPDATE: &str = "UPDATE_DOCS=1 cargo test --test integration -- reference::";

#[test]
fn reference_matches_the_program() {
    let text = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(PATH, text).unwrap();
        return;
    }
    let written = fs::read_to_string(PATH).unwrap_or_default();
    let same = written.lines().zip(text.lines()).take_while(|(written, made)| written == made);
    let line = same.count();
    assert!(
        written == text,
        "docs/reference.md differs from line {} on, where it should have {:?}: generate it again \
         with '{UPDATE}'",
        line + 1,
        text.lines().nth(line).unwrap_or("nothing more")
    );
}

fn reference() -> String {
    let program = cli::command();
    let mut text = format!(
        "# Reference\n\n\
         Generated from the program: its command line's description, and the output of \
         `ctl metrics` of a daemon.\nFix mistakes in the source, then generate this page again:\n\n    {UPDATE}\n\n"
    );
    let named = |arg: &&Arg| arg.get_long().is_some() && !is_common(arg);
    let keys = config::keys();
    let key = |arg: &Arg| keys.iter().find(|key| key.name == name(arg));
    let changing: BTreeSet<&str> =
        find(&program, &["ctl", "set"]).get_arguments().filter_map(Arg::get_long).collect();

    text += "## A port's options\n\n\
             On the command line, for `ctl add`, and as keys of a `[[port]]` in a file: a `true` in \
             the file is\n`on` on the command line. `[defaults]` takes those that are not one \
             port's alone. A star: `ctl set`\nchanges it while the port runs.\n\n\
             | option | in a file | |\n|---|---|---|\n";
    for arg in program.get_arguments().filter(named) {
        let Some(key) = key(arg).filter(|key| key.place != Place::Daemon) else { continue };
        let star = if changing.contains(name(arg)) { " *" } else { "" };
        row(&mut text, &[format!("`{}`{star}", option(arg)), key.kind.clone(), help(arg)]);
    }
    text += "\n## The daemon's options\n\n\
             In a file they stand before the first table.\n\n\
             | option | in a file | |\n|---|---|---|\n";
    for arg in program.get_arguments().filter(named) {
        let kind = match key(arg) {
            Some(key) if key.place == Place::Daemon => &key.kind,
            Some(_) => continue,
            None => "not there",
        };
        row(&mut text, &[format!("`{}`", option(arg)), kind.into(), help(arg)]);
    }

    text += "\n## Commands\n\n| command | |\n|---|---|\n";
    let about = program.get_about().map(ToString::to_string).unwrap_or_default();
    row(&mut text, &["`vhost-user-net` and options".into(), about]);
    let mut details = String::new();
    for command in visible(&program) {
        commands("vhost-user-net", command, &program, &mut text, &mut details);
    }
    text + &details + &metrics()
}

/// Adds a row for a command with its options, or for its subcommands.
fn commands(
    above: &str,
    command: &Command,
    program: &Command,
    rows: &mut String,
    details: &mut String,
) {
    let path = format!("{above} {}", command.get_name());
    let mut usage = path.clone();
    for arg in command.get_arguments().filter(|arg| arg.is_positional() || arg.is_required_set()) {
        let value = if arg.is_positional() { value_name(arg) } else { long_option(arg) };
        let many =
            if arg.get_num_args().is_some_and(|range| range.max_values() > 1) { "…" } else { "" };
        let needed = arg.is_required_set();
        let _ = match needed {
            true => write!(usage, " {value}{many}"),
            false => write!(usage, " [{value}{many}]"),
        };
    }
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    row(rows, &[format!("`{usage}`"), about]);

    let same = |arg: &&Arg| {
        let twin = program.get_arguments().find(|known| known.get_id() == arg.get_id());
        twin.is_some_and(|twin| help(twin) == help(arg))
    };
    let own: Vec<&Arg> =
        command.get_arguments().filter(|arg| !is_common(arg) && !same(arg)).collect();
    if own.iter().any(|arg| !arg.is_positional()) {
        let _ = write!(details, "\n### {path}\n\n| option | |\n|---|---|\n");
        for arg in &own {
            let shown = if arg.is_positional() { value_name(arg) } else { option(arg) };
            row(details, &[format!("`{shown}`"), help(arg)]);
        }
    }
    for below in visible(command) {
        commands(&path, below, program, rows, details);
    }
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help")
}

fn find<'a>(command: &'a Command, path: &[&str]) -> &'a Command {
    path.iter().fold(command, |command, name| command.find_subcommand(name).unwrap())
}

/// Options that every program has: help and version.
fn is_common(arg: &Arg) -> bool {
    ["help", "version"].contains(&arg.get_id().as_str())
}

fn name(arg: &Arg) -> &str {
    arg.get_long().unwrap_or_default()
}

fn value_name(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
    if names.is_empty() { arg.get_id().as_str().to_uppercase() } else { names.join(" ") }
}

/// Returns an option's short and long form.
fn option(arg: &Arg) -> String {
    let short = arg.get_short().map_or(String::new(), |short| format!("-{short}, "));
    short + &long_option(arg)
}

/// Returns an option's long form.
fn long_option(arg: &Arg) -> String {
    let long = name(arg);
    if !arg.get_action().takes_values() {
        return format!("--{long}");
    }
    let least = arg.get_num_args().map_or(1, |range| range.min_values());
    let value = value_name(arg);
    if least == 0 { format!("--{long}[={value}]") } else { format!("--{long}={value}") }
}

/// Returns an option's help, with its values and its default.
fn help(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string);
    let mut text = help.unwrap_or_default().replace("\n\n", " ");
    let values: Vec<String> =
        arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if arg.get_action().takes_values() && !values.is_empty() && !arg.is_hide_possible_values_set() {
        let _ = write!(text, " [possible values: {}]", values.join(", "));
    }
    let defaults: Vec<_> =
        arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    let hidden = arg.is_hide_default_value_set();
    if arg.get_action().takes_values() && !defaults.is_empty() && !hidden {
        let _ = write!(text, " [default: {}]", defaults.join(", "));
    }
    text
}

fn row(text: &mut String, cells: &[String]) {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

/// Returns the metrics of a daemon with one port.
fn metrics() -> String {
    let file = "control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true");
    let daemon = Daemon::with_config(&file, "one");
    let said = daemon.ask(&["metrics"]);
    let mut text =
        "\n## Metrics\n\nAll begin with `vhost_user_net_`. rx is to the guest, tx from it.\n\n\
                    | metric | kind | labels | |\n|---|---|---|---|\n"
            .to_owned();
    let mut values = "\n| metric | label | values |\n|---|---|---|\n".to_owned();
    for (name, help) in
        said.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '))
    {
        let kind =
            said.lines().find_map(|line| line.strip_prefix(&format!("# TYPE {name} "))).unwrap();
        let labels: Vec<(&str, &str)> = said
            .lines()
            .filter(|line| line.starts_with(name))
            .filter_map(|line| line.split_once('{')?.1.rsplit_once('}'))
            .flat_map(|(labels, _)| labels.split(',').filter_map(|label| label.split_once('=')))
            .collect();
        let mut names: Vec<&str> = Vec::new();
        for (label, _) in labels.iter().filter(|(label, _)| *label != "le") {
            if !names.contains(label) {
                names.push(label);
            }
        }
        row(&mut text, &[format!("`{name}`"), kind.into(), names.join(", "), help.into()]);
        for label in names.iter().filter(|label| ["reason", "state"].contains(label)) {
            let mut all: Vec<String> = Vec::new();
            for (_, value) in labels.iter().filter(|(name, _)| name == label) {
                let value = format!("`{}`", value.trim_matches('"'));
                if !all.contains(&value) {
                    all.push(value);
                }
            }
            row(&mut values, &[format!("`{name}`"), (*label).into(), all.join(", ")]);
        }
    }
    text + &values
}
