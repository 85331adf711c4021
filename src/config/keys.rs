//! The keys of the file, derived from the definitions that read it, for manual pages and the reference.

use clap::{Arg, Args};

use super::{DaemonOptions, PortOptions, file};

/// A key of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The key, which is the option's name.
    pub name: String,
    /// TOML types that its value may have.
    pub kind: String,
    /// The option's help.
    pub help: String,
    /// Value that holds if the key is omitted, as text for people.
    pub default: Option<String>,
    /// Line of a file with this key.
    pub example: String,
    /// Tables that take the key.
    pub place: Place,
}

/// Tables that take a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The file itself, before its first table.
    Daemon,
    /// Each `[[port]]`.
    Port,
    /// Each `[[port]]`, and `[defaults]`.
    PortAndDefaults,
}

/// TOML types, with a value of each.
const KINDS: [(&str, &str); 4] =
    [("true or false", "true"), ("number", "1"), ("text", "\"x\""), ("list", "[]")];

/// Example value for each key.
const EXAMPLES: [(&str, &str); 34] = [
    ("af-xdp", "\"eth1,queue=2,mode=zero-copy\""),
    ("anti-spoofing", "true"),
    ("busy-poll", "50"),
    ("connect", "\"/run/qemu/vm1.sock\""),
    ("control", "\"/run/vhost-user-net/control.sock\""),
    ("cpu-affinity", "\"2,4-7\""),
    ("fd", "3"),
    ("group", "\"kvm\""),
    ("guest-tso", "false"),
    ("link", "false"),
    ("log-level", "\"warn\""),
    ("loopback", "true"),
    ("mac", "\"52:54:00:12:34:56\""),
    ("max-memory", "\"8g\""),
    ("metrics", "\"127.0.0.1:9560\""),
    ("mtu", "9000"),
    ("name", "\"vm1\""),
    ("queue-pairs", "4"),
    ("require-sealed-memory", "true"),
    ("ring-reset", "true"),
    ("rx-filter", "[\"allow tcp dport 22\", \"default deny\"]"),
    ("rx-limit", "\"1gbit\""),
    ("seccomp", "\"log\""),
    ("socket-group", "\"kvm\""),
    ("socket-path", "\"/run/vhost-user-net/vm1.sock\""),
    ("source-ip", "[\"192.0.2.5\", \"2001:db8::/64\"]"),
    ("source-mac", "[\"52:54:00:12:34:57\"]"),
    ("tap", "\"vnet1\""),
    ("tap-fd", "[5, 6]"),
    ("tx-filter", "\"deny tcp dport 25; default allow\""),
    ("tx-limit", "\"1gbit,100kpps\""),
    ("tx-method", "\"writev\""),
    ("user", "\"vhost-user-net\""),
    ("vlan", "[10, 20]"),
];

/// Returns all keys, in the order of the help.
pub fn keys() -> Vec<Key> {
    let options = DaemonOptions::augment_args(PortOptions::augment_args(clap::Command::new("")));
    options.get_arguments().filter_map(key).collect()
}

fn key(arg: &Arg) -> Option<Key> {
    let name = arg.get_long()?.to_owned();
    let of_port = kinds(|value| port(&format!("{name} = {value}\n")).map(drop));
    let of_daemon = || kinds(|value| daemon(&format!("{name} = {value}\n")));
    let (kind, is_port) = match of_port {
        Some(kind) => (kind, true),
        None => (of_daemon()?, false),
    };
    let value = EXAMPLES.iter().find(|(key, _)| *key == name).map_or("", |(_, it)| *it);
    let example = format!("{name} = {value}");
    let place = match port(&example) {
        _ if !is_port => Place::Daemon,
        Ok(options) if PortOptions::default().or(&options) == options => Place::PortAndDefaults,
        _ => Place::Port,
    };
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    // The first paragraph only: the others describe parts of the value, with defaults of their own.
    let summary = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let stated = summary.split_once("[default: ").and_then(|(_, rest)| rest.split_once(']'));
    let values: Vec<_> = arg.get_default_values().iter().map(|it| it.to_string_lossy()).collect();
    let default = match stated {
        Some((default, _)) => Some(default.to_owned()),
        None => {
            arg.get_action().takes_values().then(|| values.join(",")).filter(|it| !it.is_empty())
        }
    };
    Some(Key { name, kind, help, default, example, place })
}

fn port(text: &str) -> Result<PortOptions, String> {
    toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
}

fn daemon(text: &str) -> Result<(), String> {
    file::first_mistake(text).map_or(Ok(()), Err)
}

/// Returns the TOML types that a key takes, by the errors of `read`; `None` for an unknown key.
fn kinds(read: impl Fn(&str) -> Result<(), String>) -> Option<String> {
    let taken = |value: &str| match read(value) {
        Err(why) if why.contains("unknown field") => None,
        Err(why) => Some(!why.contains("invalid type") && !why.contains("wanted string")),
        Ok(()) => Some(true),
    };
    let mut names = Vec::new();
    for (name, value) in KINDS {
        if taken(value)? {
            names.push(name);
        }
    }
    Some(names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_key_has_a_valid_example() {
        let keys = keys();
        let named: BTreeSet<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        let examples: BTreeSet<&str> = EXAMPLES.iter().map(|(key, _)| *key).collect();
        assert_eq!(named, examples);
        for key in &keys {
            match key.place {
                Place::Daemon => {
                    let port = "[[port]]\nloopback = true\nfd = 3\n";
                    assert_eq!(daemon(&format!("{}\n{port}", key.example)), Ok(()));
                }
                _ => drop(port(&key.example).unwrap()),
            }
        }
        let place = |name: &str| keys.iter().find(|key| key.name == name).unwrap().place;
        assert_eq!(
            ["log-level", "tap", "mtu"].map(place),
            [Place::Daemon, Place::Port, Place::PortAndDefaults]
        );
    }

    #[test]
    fn default_of_a_sub_option_is_not_the_keys() {
        let keys = keys();
        let default =
            |name: &str| keys.iter().find(|key| key.name == name).unwrap().default.clone();
        // `queue=N` of af-xdp, and `burst=` of a limit, have defaults of their own.
        assert_eq!(default("af-xdp"), None);
        assert_eq!(default("tx-limit").as_deref(), Some("none"));
        assert_eq!(default("mtu").as_deref(), Some("1500"));
        assert_eq!(default("log-level").as_deref(), Some("info"));
        assert!(default("max-memory").is_some_and(|it| it.starts_with("twice the host's RAM")));
    }
}
