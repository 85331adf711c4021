//! The configuration file in TOML: the daemon's keys, `[defaults]`, and a `[[port]]` for each port. The keys
//! have the names of the command line's options.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::LevelFilter;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue, Deserializer};

use super::host::{Finding, check_host};
use super::options::socket_path;
use super::{Config, MetricsAddress, PortConfig, PortOptions, check_start};
use crate::sandbox::{Confinement, Seccomp};

/// Longest file in bytes: about a hundred ports with all options, at 128 bytes per line.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Contents {
    #[serde(default = "info")]
    log_level: LevelFilter,
    control: Option<PathBuf>,
    metrics: Option<MetricsAddress>,
    #[serde(default)]
    seccomp: Seccomp,
    user: Option<String>,
    group: Option<String>,
    #[serde(default)]
    defaults: PortOptions,
    #[serde(default)]
    port: Vec<Spanned<PortOptions>>,
}

fn info() -> LevelFilter {
    LevelFilter::Info
}

/// Configuration of a file, and the offset of each port in bytes.
#[derive(Debug)]
struct Parsed {
    config: Config,
    places: Vec<usize>,
}

/// Reads a file.
///
/// # Errors
/// The file has a mistake. One line names file, line, column, the first mistake, and the number of others.
pub fn read(path: &Path) -> Result<Config, String> {
    let text = read_text(path)?;
    let Parsed { config, .. } = parse(&text).map_err(|wrong| {
        let first = located(path, &text, &wrong[0]);
        match wrong.len() - 1 {
            0 => first,
            more => {
                format!("{first}; {more} more mistakes: 'vhost-user-net check-config' names all")
            }
        }
    })?;
    named(config, path)
}

/// Reads a file and checks it against this host. Returns the configuration, and possible mistakes, one line
/// each.
///
/// # Errors
/// The file has mistakes. Each line names file, line, column and mistake.
pub(super) fn check(path: &Path) -> Result<(Config, Vec<String>), String> {
    let text = read_text(path)?;
    let lines = |wrong: &[Wrong]| -> Vec<String> {
        wrong.iter().map(|wrong| located(path, &text, wrong)).collect()
    };
    let Parsed { config, places } = parse(&text).map_err(|wrong| lines(&wrong).join("\n"))?;
    let (mut wrong, mut notes) = (Vec::new(), Vec::new());
    for Finding { port, certain, what } in check_host(&config) {
        let found = (port.map(|port| places[port]), what);
        if certain { wrong.push(found) } else { notes.push(found) }
    }
    if wrong.is_empty() {
        return Ok((named(config, path)?, lines(&notes)));
    }
    Err(lines(&wrong).join("\n"))
}

fn named(config: Config, path: &Path) -> Result<Config, String> {
    let file = std::path::absolute(path).map_err(|error| {
        format!("cannot find {}: {error}; write its path from / on", path.display())
    })?;
    Ok(Config { file: Some(file), ..config })
}

/// Reads a regular file of at most [`MAX_FILE`] bytes. Does not block on a FIFO or a device.
fn read_text(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let failed = |error: io::Error| format!("cannot read {shown}: {error}");
    let irregular = || Err(format!("cannot read {shown}: not a regular file; name a file in TOML"));
    // Checked before opening too, because opening a device can have effects.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return irregular();
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file: File =
        OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return irregular();
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!(
            "cannot read {shown}: longer than {MAX_FILE} bytes; is it the configuration file?"
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        format!("cannot read {shown}: byte {place} is not UTF-8; write the file in UTF-8")
    })
}

/// A mistake, and its offset in bytes.
type Wrong = (Option<usize>, String);

/// Returns a mistake with the file, line and column.
fn located(path: &Path, text: &str, (offset, what): &Wrong) -> String {
    let shown = path.display();
    match offset {
        Some(offset) => {
            let (line, column) = position(text, *offset);
            format!("{shown}:{line}:{column}: {what}")
        }
        None => format!("{shown}: {what}"),
    }
}

fn wrong(error: &toml::de::Error) -> Wrong {
    let lines: Vec<&str> = error.message().lines().collect();
    let mut what = lines.join(", ");
    // toml's list of all keys would add 400 letters.
    if let Some((unknown, _)) = what.split_once(", expected one of `")
        && unknown.starts_with("unknown field")
    {
        what = format!("{unknown}; 'man vhost-user-net.toml' names the keys");
    }
    (error.span().map(|span| span.start), what)
}

/// Checks each key and value of a table against `T`; removes those with mistakes.
fn check_keys<T: DeserializeOwned>(table: &mut DeTable<'_>, mistakes: &mut Vec<Wrong>) {
    for (key, value) in std::mem::take(table) {
        let one = DeTable::from_iter([(key.clone(), value.clone())]);
        let one = Deserializer::from(Spanned::new(value.span(), one));
        match T::deserialize(one) {
            Ok(_) => drop(table.insert(key, value)),
            Err(error) => {
                let (place, what) = wrong(&error);
                let is_key = what.starts_with("unknown field");
                let what = if is_key { what } else { format!("{}: {what}", key.get_ref()) };
                mistakes.push((place.or(Some(key.span().start)), what));
            }
        }
    }
}

/// Checks the keys of each `[[port]]`; removes the ports with mistakes.
fn check_ports(ports: &mut DeValue<'_>, mistakes: &mut Vec<Wrong>) {
    let DeValue::Array(ports) = ports else { return };
    for port in std::mem::replace(ports, DeArray::new()).iter() {
        let mut port = port.clone();
        let before = mistakes.len();
        if let DeValue::Table(table) = port.get_mut() {
            check_keys::<PortOptions>(table, mistakes);
        }
        if mistakes.len() == before {
            ports.push(port);
        }
    }
}

/// Returns the first mistake in a file's text.
pub(super) fn first_mistake(text: &str) -> Option<String> {
    parse(text).err().map(|wrong| wrong[0].1.clone())
}

/// Parses a file's text. Reports all mistakes, except those that another mistake hides.
fn parse(text: &str) -> Result<Parsed, Vec<Wrong>> {
    let (mut root, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(errors.iter().map(wrong).collect());
    }
    let mut mistakes = Vec::new();
    let mut defaults_place = None;
    for (key, value) in root.get_mut().iter_mut() {
        match (key.get_ref().as_ref(), value.get_mut()) {
            ("defaults", DeValue::Table(table)) => {
                defaults_place = Some(key.span().start);
                check_keys::<PortOptions>(table, &mut mistakes);
            }
            ("port", ports) => check_ports(ports, &mut mistakes),
            _ => {}
        }
    }
    let described = root.get_ref().get("port").is_some();
    check_keys::<Contents>(root.get_mut(), &mut mistakes);
    let contents = match Contents::deserialize(Deserializer::from(root)) {
        Ok(contents) => contents,
        Err(error) => {
            mistakes.push(wrong(&error));
            return Err(mistakes);
        }
    };
    let Contents { log_level, control, metrics, seccomp, user, group, defaults, port } = contents;
    let control = control.map(socket_path).transpose().unwrap_or_else(|what| {
        mistakes.push((None, format!("control: {what}")));
        None
    });
    // `or` drops the keys that can have no default.
    if PortOptions::default().or(&defaults) != defaults {
        let what = "[defaults] can't name a port, its frontend, its host side or its MAC address; move these \
                    keys to each [[port]]";
        mistakes.push((defaults_place, what.into()));
    }
    if !described && control.is_none() && mistakes.is_empty() {
        let what =
            "no port, and no control socket to add one; write a [[port]], or control = \"PATH\"";
        mistakes.push((None, what.into()));
    }
    let (mut ports, mut places): (Vec<PortConfig>, Vec<usize>) = Default::default();
    for options in port {
        let place = options.span().start;
        match options.into_inner().or(&defaults).absolute().check() {
            Ok(port) => {
                ports.push(port);
                places.push(place);
                // A port that claims another port's object is left out, so that later ports are checked.
                if let Err(what) = check_start(&ports, control.as_deref()) {
                    mistakes.push((Some(place), what));
                    ports.pop();
                    places.pop();
                }
            }
            Err(what) => mistakes.push((Some(place), what)),
        }
    }
    if !mistakes.is_empty() {
        mistakes.sort_by_key(|(place, _)| *place);
        return Err(mistakes);
    }
    let confinement = Confinement { seccomp, user, group };
    let (file, take_over) = (None, false);
    let config = Config { log_level, file, take_over, control, metrics, confinement, ports };
    Ok(Parsed { config, places })
}

/// Returns the line and column of a byte, counted from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Host;
    use crate::endpoint::Frontend;
    use crate::policy::Limit;

    #[test]
    fn port_overrides_defaults() {
        let config = parse(
            r#"
            log-level = "debug"
            [defaults]
            mtu = 9000
            guest-tso = false
            tx-limit = "10mbit"
            rx-limit = "10mbit"
            tx-filter = ["deny tcp dport 25", "default allow"]
            rx-filter = "allow udp; default deny"
            [[port]]
            socket-path = "/run/a"
            tap = "vnet0"
            [[port]]
            name = "b"
            connect = "/run/b"
            af-xdp = "eth1,queue=2"
            mtu = 1400
            cpu-affinity = "1,3-4"
            tx-method = "io-uring"
            mac = "52:54:00:00:00:01"
            anti-spoofing = true
            source-mac = ["52:54:00:00:00:02"]
            source-ip = ["192.0.2.5", "2001:db8::/64"]
            rx-limit = "none"
            rx-filter = "none"
            "#,
        )
        .unwrap()
        .config;
        assert_eq!(config.log_level, LevelFilter::Debug);
        let [a, b] = config.ports.try_into().unwrap();
        assert_eq!((a.mtu, a.guest_tso, a.queue_pairs, a.name), (9000, false, 1, None));
        assert_eq!(
            (a.frontend, a.host),
            (Frontend::Listen("/run/a".into()), Host::Tap("vnet0".into()))
        );
        assert_eq!((b.mtu, b.guest_tso, b.name.as_deref()), (1400, false, Some("b")));
        assert_eq!(b.cpu_affinity, [1, 3, 4]);
        assert_eq!(a.allowed_sources, None);
        let sources = b.allowed_sources.unwrap();
        assert_eq!((sources.macs.len(), sources.addresses.len()), (2, 2));
        let filter = "deny tcp dport 25; default allow".parse().unwrap();
        assert_eq!((&a.tx_filter, &b.tx_filter), (&filter, &filter));
        assert_eq!((a.rx_filter.is_none(), b.rx_filter.is_none()), (false, true));
        assert_eq!(a.rx_limit, "10mbit".parse().unwrap());
        assert_eq!((b.tx_limit, b.rx_limit), (a.tx_limit, Limit::default()));
        assert!(matches!(b.host, Host::AfXdp(af_xdp) if af_xdp.queue == 2));
    }

    #[test]
    fn mistake_has_line_and_column() {
        let port = "[[port]]\nsocket-path = \"/a\"\nloopback = true\n";
        let cases = [
            ("", (None, "no port")),
            ("metrics = \"0.0.0.0:9560\"\n", (Some((1, 11)), "not a loopback address")),
            ("metrics = \"9560\"\n", (Some((1, 11)), "127.0.0.1:9560")),
            ("control = \"/a\"\n[[port]]\n", (Some((2, 1)), "socket-path")),
            ("[[port]]\nsocket-path = \"/a\"\ntup = \"x\"\n", (Some((3, 1)), "tup")),
            ("log-levle = \"info\"\n[[port]]\n", (Some((1, 1)), "log-levle")),
            ("[[port]]\nmtu = \"big\"\n", (Some((2, 7)), "u16")),
            ("[[port]]\nmac = \"1:2\"\n", (Some((2, 7)), "1:2")),
            ("[[port]]\naf-xdp = \"a,lane=1\"\n", (Some((2, 10)), "lane")),
            ("[[port]]\nloopback = true\n", (Some((1, 1)), "socket-path")),
            (&format!("{port}anti-spoofing = true\n"), (Some((1, 1)), "source-mac")),
            (&format!("{port}source-ip = [\"192.0.2.1\"]\n"), (Some((1, 1)), "anti-spoofing")),
            (&format!("{port}source-ip = [\"192.0.2.1/33\"]\n"), (Some((4, 13)), "192.0.2.1/33")),
            (
                &format!("{port}mac = \"2:0\"\nanti-spoofing = true\nvlan = [4095]\n"),
                (Some((4, 7)), "2:0"),
            ),
            (
                &format!(
                    "{port}mac = \"02:00:00:00:00:01\"\nanti-spoofing = true\nvlan = [4095]\n"
                ),
                (Some((1, 1)), "4095"),
            ),
            (&format!("{port}tx-limit = \"10mb\"\n"), (Some((4, 12)), "10mb")),
            (&format!("{port}tx-filter = \"deny tpc\"\n"), (Some((4, 13)), "'tpc'")),
            (&format!("{port}tx-filter = [\"deny arp\"]\n"), (Some((4, 13)), "'default allow'")),
            (&format!("{port}tx-filter = 7\n"), (Some((4, 13)), "list of strings")),
            (&format!("{port}rx-filter = \"default deny\"\n"), (Some((1, 1)), "loopback")),
            (&format!("{port}mtu = 67\n"), (Some((1, 1)), "67")),
            (&format!("{port}name = \"a b\"\n"), (Some((1, 1)), "a b")),
            (&format!("[defaults]\ntap = \"a\"\n{port}"), (Some((1, 2)), "[defaults]")),
            (&format!("{port}{port}"), (Some((4, 1)), "socket /a is used twice")),
            (&format!("control = \"/a\"\n{port}"), (Some((2, 1)), "socket /a is used twice")),
            ("[[port]\n", (Some((1, 8)), "")),
        ];
        for (text, (place, named)) in cases {
            let (offset, what) = parse(text).unwrap_err().remove(0);
            assert_eq!(offset.map(|offset| position(text, offset)), place, "{text}: {what}");
            assert!(what.contains(named), "{text}: {what}");
            assert_eq!(what.lines().count().max(1), 1, "{what}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let text = "log-level = \"loud\"\nusr = \"x\"\n[defaults]\nmtu = 70000\n\
                    [[port]]\nsocket-path = \"/a\"\ntap = \"far/too\"\n\
                    [[port]]\nsocket-path = \"/b\"\ntup = \"\"\"\na\nb\"\"\"\nlink = \"on\"\n\
                    [[port]]\nsocket-path = \"/c\"\nloopback = true\n\
                    [[port]]\nsocket-path = \"/c\"\nloopback = true\n";
        let wrong = parse(text).unwrap_err();
        let lines: Vec<usize> =
            wrong.iter().filter_map(|(place, _)| Some(position(text, (*place)?).0)).collect();
        assert_eq!(lines, [1, 2, 4, 5, 10, 13, 17], "{wrong:?}");
        for (named, (_, what)) in
            ["log-level: ", "usr", "mtu: ", "far/too", "tup", "link: ", "used twice"]
                .iter()
                .zip(&wrong)
        {
            assert!(what.contains(named), "{what}");
        }
        // A syntax error may hide other mistakes.
        assert_eq!(parse("a = \nb = ]\n[[port\n").unwrap_err().len(), 3);
    }
}
