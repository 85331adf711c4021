//! A file that describes several ports, in TOML: `[defaults]`, and a `[[port]]` for each. The keys
//! are the command line's options.

use std::fs;
use std::path::{Path, PathBuf};

use log::LevelFilter;
use serde::Deserialize;
use toml::Spanned;

use super::options::socket_path;
use super::{Config, Confinement, MetricsAddress, PortConfig, PortOptions, Seccomp, check_start};

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

/// Reads a file.
///
/// # Errors
/// One line: the file, line and column, and what is wrong there.
pub fn read(path: &Path) -> Result<Config, String> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| format!("read {shown}: {error}"))?;
    let config = parse(&text).map_err(|(offset, what)| match offset {
        Some(offset) => {
            let (line, column) = position(&text, offset);
            format!("{shown}:{line}:{column}: {what}")
        }
        None => format!("{shown}: {what}"),
    })?;
    let file = std::path::absolute(path).map_err(|error| format!("find {shown}: {error}"))?;
    Ok(Config { file: Some(file), ..config })
}

/// What is wrong, and how many bytes stand before it.
type Wrong = (Option<usize>, String);

fn parse(text: &str) -> Result<Config, Wrong> {
    let contents: Contents = toml::from_str(text).map_err(|error| {
        let lines: Vec<&str> = error.message().lines().collect();
        (error.span().map(|span| span.start), lines.join(", "))
    })?;
    let Contents { log_level, control, metrics, seccomp, user, group, defaults, port } = contents;
    let control = control.map(socket_path).transpose().map_err(|what| (None, what))?;
    // Whatever has no default is gone after this.
    if PortOptions::default().or(&defaults) != defaults {
        let what = "[defaults] can't name a port, its frontend, its host side or its MAC address";
        return Err((None, what.into()));
    }
    if port.is_empty() && control.is_none() {
        let what = "it describes no port, and no control socket to add one by: write a [[port]]";
        return Err((None, what.into()));
    }
    let ports = port
        .into_iter()
        .map(|options| {
            let place = Some(options.span().start);
            options.into_inner().or(&defaults).absolute().check().map_err(|what| (place, what))
        })
        .collect::<Result<Vec<PortConfig>, Wrong>>()?;
    check_start(&ports, control.as_deref()).map_err(|what| (None, what))?;
    let confinement = Confinement { seccomp, user, group };
    Ok(Config { log_level, file: None, take_over: false, control, metrics, confinement, ports })
}

/// Line and column, counted from 1, of a byte.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Frontend, Host};
    use crate::policy::Limit;

    #[test]
    fn a_port_says_what_differs_from_the_defaults() {
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
        .unwrap();
        assert_eq!(config.log_level, LevelFilter::Debug);
        let [a, b] = config.ports.try_into().unwrap();
        assert_eq!((a.mtu, a.guest_tso, a.queue_pairs, a.name), (9000, false, 1, None));
        assert_eq!(
            (a.frontend, a.host),
            (Frontend::Listen("/run/a".into()), Host::Tap("vnet0".into()))
        );
        assert_eq!((b.mtu, b.guest_tso, b.name.as_deref()), (1400, false, Some("b")));
        assert_eq!(b.cpu_affinity, [1, 3, 4]);
        assert_eq!(a.identity, None);
        let identity = b.identity.unwrap();
        assert_eq!((identity.macs.len(), identity.addresses.len()), (2, 2));
        let filter = "deny tcp dport 25; default allow".parse().unwrap();
        assert_eq!((&a.tx_filter, &b.tx_filter), (&filter, &filter));
        assert_eq!((a.rx_filter.is_none(), b.rx_filter.is_none()), (false, true));
        assert_eq!(a.rx_limit, "10mbit".parse().unwrap());
        assert_eq!((b.tx_limit, b.rx_limit), (a.tx_limit, Limit::default()));
        assert!(matches!(b.host, Host::AfXdp(af_xdp) if af_xdp.queue == 2));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let port = "[[port]]\nsocket-path = \"/a\"\nloopback = true\n";
        let cases = [
            ("", (None, "no port")),
            ("metrics = \"0.0.0.0:9560\"\n", (Some((1, 11)), "no loopback address")),
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
            (&format!("[defaults]\ntap = \"a\"\n{port}"), (None, "[defaults]")),
            (&format!("{port}{port}"), (None, "socket /a is named twice")),
            (&format!("control = \"/a\"\n{port}"), (None, "socket /a is named twice")),
            ("[[port]\n", (Some((1, 8)), "")),
        ];
        for (text, (place, named)) in cases {
            let (offset, what) = parse(text).unwrap_err();
            assert_eq!(offset.map(|offset| position(text, offset)), place, "{text}: {what}");
            assert!(what.contains(named), "{text}: {what}");
            assert_eq!(what.lines().count().max(1), 1, "{what}");
        }
    }
}
