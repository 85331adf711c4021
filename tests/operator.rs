//! An operator with a clean Debian 12 and the package. Each command comes from the pages, and the pages
//! explain each line that the daemon and `ctl` print.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::process::Output;

use crate::docs::{Page, fixed_parts, letters};
use crate::packaging::{fetched, package};
use crate::support::debian::{Debian, Machine};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::Wire;
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_program, needs_root, skip};

/// Pages with operators' commands and their output.
const PAGES: [&str; 9] = [
    "install",
    "quick-start",
    "operating",
    "monitoring",
    "policy",
    "doctor",
    "survival",
    "data-path",
    "troubleshooting",
];
/// Maximum length of a line of the daemon or `ctl`, in characters.
const LONGEST: usize = 240;

/// Commands, messages and outputs of the pages.
struct Book {
    /// Lines of the blocks, without trailing comments.
    lines: BTreeSet<String>,
    /// Code spans within lines.
    spans: BTreeSet<String>,
    /// Messages of the tables, as their parts between placeholders.
    messages: Vec<Vec<String>>,
    /// Pieces of the outputs in blocks.
    pieces: BTreeSet<String>,
}

impl Book {
    fn read() -> Self {
        let (mut lines, mut spans) = (BTreeSet::new(), BTreeSet::new());
        let (mut messages, mut pieces) = (Vec::new(), BTreeSet::new());
        for name in PAGES {
            let page = Page::read(&format!("docs/{name}.md"));
            for line in page.blocks().0.concat().lines() {
                let command = line.trim().trim_start_matches("$ ");
                lines.insert(command.split("  #").next().unwrap().trim_end().to_owned());
                pieces.extend(pieces_of(line));
            }
            pieces.extend(page.spans().iter().flat_map(|span| pieces_of(span)));
            spans.extend(page.spans());
            let cells = page.first_cells("message");
            messages.extend(cells.iter().map(|cell| fixed_parts(cell)));
        }
        Book { lines, spans, messages, pieces }
    }

    /// Reports whether a page has this command, as a line of a block or a code span.
    fn has_command(&self, command: &str) -> bool {
        self.lines.contains(command) || self.spans.contains(command)
    }

    /// Reports whether the pages explain a line: a table has the message, or a block shows such a line.
    fn explains(&self, line: &str) -> bool {
        let message = self.messages.iter().any(|parts| {
            let mut rest = line;
            let found = parts.iter().all(|part| match rest.split_once(part.as_str()) {
                Some((_, behind)) => {
                    rest = behind;
                    true
                }
                None => false,
            });
            // Names, and values in quotes, are not the page's.
            let own: String = line.split('"').step_by(2).collect();
            found && parts.iter().map(|part| letters(part)).sum::<usize>() * 8 >= letters(&own)
        });
        message || pieces_of(line).iter().all(|piece| self.pieces.contains(piece))
    }
}

/// Names of this test's ports and devices, for which the pages have other names.
const NAMES: [&str; 11] = [
    "one",
    "two",
    "vm1",
    "vm2",
    "vm3",
    "vnet0",
    "vnet1",
    "vnet2",
    "vnet3",
    "vnet-vm1",
    "/etc/vhost-user-net.toml",
];

/// Splits a line at commas, colons and wide gaps, without names and numbers.
fn pieces_of(line: &str) -> Vec<String> {
    let line = line.replace("  ", ",");
    let pieces = line.split([',', ';', ':', '(', ')']).map(str::trim).filter(|it| !it.is_empty());
    pieces.map(without_names_and_numbers).collect()
}

/// Replaces each name and each number of a text with a sign.
fn without_names_and_numbers(text: &str) -> String {
    let replaced = text.split(' ').map(|word| {
        let (key, value) = word.split_once('=').unwrap_or(("", word));
        let value = if NAMES.contains(&value) || value.starts_with("/etc/vhost-user-net/") {
            "NAME"
        } else if value.starts_with(|c: char| c.is_ascii_digit()) {
            "N"
        } else {
            value
        };
        format!("{key} {value}")
    });
    replaced.collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// The operator's session: the commands typed, and the lines that no page explains.
struct Walk {
    book: Book,
    machine: Machine,
    unexplained: Vec<String>,
}

impl Walk {
    /// Runs a command that a page has, with some words replaced. Returns its output.
    fn try_types(&mut self, command: &str, words: &[(&str, &str)]) -> Output {
        assert!(self.book.has_command(command), "no page has the command: {command}");
        let mut typed = command.to_owned();
        for (word, other) in words {
            assert!(typed.contains(word), "{word} is not in: {command}");
            typed = typed.replace(word, other);
        }
        let output = self.machine.output(&["sh", "-c", &typed]);
        // Doctor's lines are explained by their commands, which its own tests carry out.
        if typed.starts_with("vhost-user-net") && !typed.ends_with("doctor") {
            for text in [&output.stdout, &output.stderr] {
                self.reads(&typed, &String::from_utf8_lossy(text));
            }
        }
        output
    }

    /// Runs a command that a page has, which must succeed. Returns its output.
    #[track_caller]
    fn types(&mut self, command: &str, words: &[(&str, &str)]) -> String {
        let output = self.try_types(command, words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Checks printed lines: records those that no page explains, and those that are too long.
    fn reads(&mut self, whose: &str, text: &str) {
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            if !self.book.explains(line) {
                self.unexplained.push(format!("{whose}: {line}"));
            }
            if line.len() > LONGEST {
                self.unexplained.push(format!("{whose}: {} letters: {line}", line.len()));
            }
        }
    }

    /// Checks the log of a unit's daemon.
    fn reads_log(&mut self, unit: &str) -> String {
        let log = self.machine.run(&[
            "journalctl",
            "--no-pager",
            "--output=cat",
            "_TRANSPORT=stdout",
            &format!("_SYSTEMD_UNIT={unit}"),
        ]);
        for line in log.lines() {
            // Its time and level are systemd's, or stand before it.
            let text = line.split_once("] ").map_or(line, |(_, text)| text).to_owned();
            self.reads(unit, &text);
        }
        log
    }

    /// Starts a guest whose VMM connects to a port's socket.
    fn guest(&self, socket: &str) -> Card {
        let path = self.machine.path(socket);
        let mut connected = None;
        eventually("the port listens", || {
            connected = UnixStream::connect(&path).ok();
            connected.is_some()
        });
        Card::start(Frontend::new(connected.unwrap()), Options::default())
    }
}

#[test]
fn documented_commands_work_on_clean_debian() {
    const TEST: &str = "documented_commands_work_on_clean_debian";
    needs_root!(TEST);
    needs_program!(TEST, "cargo-deb");
    needs_program!(TEST, "mmdebstrap");
    needs_program!(TEST, "systemd-nspawn");
    let debian = fetched!(TEST, Debian::new());
    debian.install(&package().file);
    let machine = Machine::boot(debian);
    machine.enter_network();
    let mut walk = Walk { book: Book::read(), machine, unexplained: vec![] };

    // A daemon for one machine.
    walk.types("cp /etc/vhost-user-net/example.toml /etc/vhost-user-net/vm1.toml", &[]);
    walk.machine.run(&["sed", "-i", "s/example/vm1/g", "/etc/vhost-user-net/vm1.toml"]);
    walk.types("vhost-user-net check-config FILE", &[("FILE", "/etc/vhost-user-net/vm1.toml")]);
    walk.types("systemctl enable --now vhost-user-net@vm1", &[]);
    let mut card = walk.guest("/run/vhost-user-net-vm1/vm.sock");
    check_both_ways(&Wire::open("vnet-vm1"), &mut card, 20);
    drop(card);
    walk.machine.run(&["systemctl", "disable", "--now", "vhost-user-net@vm1"]);
    walk.reads_log("vhost-user-net@vm1.service");

    // Three ports in one daemon, one on a TAP that was made beforehand.
    walk.types("ip tuntap add dev vnet1 mode tap vnet_hdr group kvm", &[]);
    walk.machine.run(&["ip", "link", "add", "br0", "type", "bridge"]);
    walk.types("ip link set vnet1 master br0 up", &[]);
    let mut file = walk.machine.run(&["cat", "/etc/vhost-user-net.toml"]).replace("\n# ", "\n");
    file = file[file.find("control =").unwrap()..].replace("Where Prometheus asks.\n", "");
    file += "[[port]]\nname = \"vm3\"\nsocket-path = \"/run/vhost-user-net/vm3.sock\"\n\
             tap = \"vnet3\"\n";
    walk.machine.write("/etc/vhost-user-net.toml", &file);
    walk.types("vhost-user-net check-config FILE", &[("FILE", "/etc/vhost-user-net.toml")]);
    walk.types("systemctl enable --now vhost-user-net", &[]);
    let mut card = walk.guest("/run/vhost-user-net/vm1.sock");
    check_both_ways(&Wire::open("vnet1"), &mut card, 20);
    let list = walk.types("vhost-user-net ctl list", &[]);
    assert_eq!(list.lines().count(), 4, "{list}");
    walk.types("vhost-user-net ctl show vm1", &[]);

    // Policy, until the next reload.
    walk.types("vhost-user-net ctl set vm1 --tx-limit=100mbit --rx-limit=100mbit", &[]);
    walk.types("vhost-user-net ctl set vm1 --link=off", &[]);
    let list = walk.types("vhost-user-net ctl list", &[]);
    assert!(list.contains("100mbit"), "{list}");
    walk.types("vhost-user-net ctl reload", &[]);
    let list = walk.types("vhost-user-net ctl list", &[]);
    assert!(!list.contains("100mbit"), "{list}");
    walk.machine.write("/etc/vhost-user-net.toml", &file.replace("1gbit,100kpps", "10mbit"));
    walk.types("systemctl reload", &[("reload", "reload vhost-user-net")]);
    eventually("the file is read", || {
        walk.machine.run(&["vhost-user-net", "ctl", "list"]).contains("10mbit")
    });

    // A wrong file changes nothing.
    let wrong = file.replace("vnet3", "vnet2").replace("anti-spoofing", "anti-spoof");
    walk.machine.write("/etc/vhost-user-net.toml", &wrong);
    let said =
        walk.try_types("vhost-user-net check-config FILE", &[("FILE", "/etc/vhost-user-net.toml")]);
    assert!(!said.status.success());
    assert!(!walk.try_types("vhost-user-net ctl reload", &[]).status.success());
    walk.machine.write("/etc/vhost-user-net.toml", &file);
    check_both_ways(&Wire::open("vnet1"), &mut card, 20);

    // The daemon is killed; systemd starts it again, and the VMM reconnects.
    let unit = "vhost-user-net.service";
    let kill = format!("kill -9 {}", walk.machine.property(unit, "MainPID"));
    walk.machine.run(&["sh", "-c", &kill]);
    walk.machine.wait_for(unit, "NRestarts", "1");
    drop(card);
    let mut card = walk.guest("/run/vhost-user-net/vm1.sock");
    check_both_ways(&Wire::open("vnet1"), &mut card, 20);

    // A TAP is deleted, and made again.
    walk.machine.run(&["ip", "link", "delete", "vnet1"]);
    eventually("the port is degraded", || {
        walk.machine.run(&["vhost-user-net", "ctl", "show", "vm1"]).contains("degraded")
    });
    walk.types("vhost-user-net ctl show vm1", &[]);
    walk.types("ip tuntap add dev vnet1 mode tap vnet_hdr group kvm", &[]);
    walk.types("ip link set vnet1 master br0 up", &[]);
    eventually("the daemon has opened it again", || {
        walk.machine.log(unit).contains("vm1: replaced")
    });
    drop(card);
    let mut card = walk.guest("/run/vhost-user-net/vm1.sock");
    check_both_ways(&Wire::open("vnet1"), &mut card, 20);
    let said = walk.try_types("vhost-user-net doctor", &[]);
    assert!(!String::from_utf8_lossy(&said.stdout).contains("FAIL tap"), "{said:?}");
    drop(card);
    walk.machine.run(&["systemctl", "stop", unit]);
    let asked = walk.try_types("vhost-user-net ctl list", &[]);
    assert_eq!(asked.status.code(), Some(3));
    walk.reads_log(unit);
    assert!(walk.unexplained.is_empty(), "no page explains:\n{}", walk.unexplained.join("\n"));
}
