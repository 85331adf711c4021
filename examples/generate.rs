//! Generates manual pages in DIRECTORY/man and shell completions in DIRECTORY/completions, for packages:
//! `cargo run --example generate -- DIRECTORY`. The tests include this file as a module, and read its output.

use std::fs;
use std::io;
use std::path::Path;

use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use vhost_user_net::cli;
use vhost_user_net::config::{self, Place};

const SOURCE: &str = concat!("vhost-user-net ", env!("CARGO_PKG_VERSION"));
/// Title of the manual. Short, because the page's head shows it between two copies of the page's name.
const MANUAL: &str = "vhost-user";
const FILE_PAGE: &str = "vhost-user-net.toml";

/// Entry of a section: a term and its description.
type Item = (&'static str, &'static str);

const FILES: [Item; 6] = [
    (
        "/etc/vhost-user-net.toml",
        "The ports of vhost-user-net.service: see vhost-user-net.toml(5).",
    ),
    ("/etc/vhost-user-net/NAME.toml", "The port of vhost-user-net@NAME.service."),
    ("/run/vhost-user-net/control.sock", "The default control socket of vhost-user-net-ctl(1)."),
    ("/dev/net/tun", "Opened for each TAP device."),
    ("/usr/share/vhost-user-net", "Additions to the units, alert rules and a dashboard."),
    ("/usr/share/doc/vhost-user-net/docs", "The documentation, with a page for each message."),
];
const SIGNALS: [Item; 3] = [
    ("SIGTERM, SIGINT", "Stop all ports and exit within a second."),
    (
        "SIGHUP",
        "With run --config: read the file again and change what differs. Without a file: as SIGTERM.",
    ),
    ("SIGPIPE, SIGXFSZ", "Ignored: ports continue if the log cannot be written."),
];
const EXIT_STATUS: [Item; 3] = [
    ("0", "Stopped by a signal, or another daemon took over all ports."),
    ("1", "Could not start, or no port runs any more and one failed by a bug."),
    ("2", "The command line or the file is wrong."),
];
const EXAMPLES: [Item; 5] = [
    ("One port on a TAP device", "vhost-user-net --socket-path=/run/vm1.sock --tap=vnet1"),
    (
        "One port on an AF_XDP socket",
        "vhost-user-net --socket-path=/run/vm1.sock --af-xdp=eth1,queue=2 --queue-pairs=2",
    ),
    ("Several ports, described by a file", "vhost-user-net run --config=/etc/vhost-user-net.toml"),
    (
        "The guest's side, for QEMU",
        "qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \
         -m 1G -chardev socket,id=c,path=/run/vm1.sock,reconnect-ms=1000 \
         -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n",
    ),
    ("Check of this host", "vhost-user-net doctor --tap=vnet1"),
];
const CTL_EXIT_STATUS: [Item; 4] = [
    ("0", "Done."),
    ("1", "The daemon refused."),
    ("2", "The command line is wrong."),
    ("3", "The daemon cannot be reached."),
];
const CTL_EXAMPLES: [Item; 4] = [
    ("All ports", "vhost-user-net ctl list"),
    ("Rates of all ports, ten times", "vhost-user-net ctl stats --interval=5 --count=10"),
    ("Limit a port while it runs", "vhost-user-net ctl set vm1 --tx-limit=100mbit"),
    ("Show a port's frames", "vhost-user-net ctl capture vm1 -w - | tshark -r -"),
];

#[allow(dead_code)]
fn main() -> io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1) else {
        return Err(io::Error::other("specify the directory to write to"));
    };
    generate(Path::new(&directory))
}

/// Writes all pages and completions.
pub(crate) fn generate(directory: &Path) -> io::Result<()> {
    let man = directory.join("man");
    fs::create_dir_all(&man)?;
    let mut command = with_all_help(cli::command().disable_help_subcommand(true));
    command.build();
    pages(&command, &man)?;
    fs::write(man.join(format!("{FILE_PAGE}.5")), file_page())?;

    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut command = shown(&cli::command()).version(env!("CARGO_PKG_VERSION"));
        let file = generate_to(shell, &mut command, "vhost-user-net", &completions)?;
        let text = fs::read_to_string(&file)?;
        let text = match shell {
            // clap_complete 4.6 encodes the dashes of the program's name in two ways, and then finds no subcommand.
            Shell::Bash => text.replace("vhost__subcmd__user__subcmd__net", "vhost__user__net"),
            // It completes no value of the last option, because fish's argparse refuses an option without one.
            Shell::Fish => text.replacen(&format!("{FISH_PARSE}\n"), &fish_parse(), 1),
            _ => text,
        };
        fs::write(file, text)?;
    }
    Ok(())
}

const FISH_PARSE: &str =
    "    argparse -s (__fish_vhost_user_net_global_optspecs) -- $cmd 2>/dev/null";

fn fish_parse() -> String {
    format!("{FISH_PARSE}\n    or begin\n        set -e cmd[-1]\n    {FISH_PARSE}\n    end\n")
}

/// Returns a command without its hidden subcommands, which clap_complete would offer.
fn shown(command: &clap::Command) -> clap::Command {
    let about = command.get_about().cloned().unwrap_or_default();
    // clap requires a name with static lifetime.
    let name: &'static str = command.get_name().to_owned().leak();
    clap::Command::new(name)
        .about(about)
        .args(command.get_arguments())
        .groups(command.get_groups())
        .subcommands(command.get_subcommands().filter(|below| !below.is_hide_set()).map(shown))
}

/// Returns a command whose options are all in the short help: clap_mangen leaves out the others.
fn with_all_help(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| arg.hide_short_help(false)).mut_subcommands(with_all_help)
}

/// Writes the page of a command and of each subcommand. The pages of ctl, a program for all users, are in section
/// 1, the others in section 8.
fn pages(command: &clap::Command, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let is_ctl = name.starts_with("vhost-user-net-ctl");
    // An empty date would be left out, and the next field would take its place.
    let page = Man::new(command.clone())
        .section(if is_ctl { "1" } else { "8" })
        .manual(MANUAL)
        .date(" ")
        .source(SOURCE);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    let mut rest = Roff::new();
    let see = match name {
        "vhost-user-net" => {
            section(&mut rest, "FILES", &FILES);
            section(&mut rest, "SIGNALS", &SIGNALS);
            section(&mut rest, "EXIT STATUS", &EXIT_STATUS);
            section(&mut rest, "EXAMPLES", &EXAMPLES);
            "vhost-user-net.toml(5), vhost-user-net-ctl(1), vhost-user-net-doctor(8), \
             qemu-system-x86_64(1), ip-tuntap(8)"
        }
        "vhost-user-net-ctl" => {
            section(&mut rest, "FILES", &FILES[2..3]);
            section(&mut rest, "EXIT STATUS", &CTL_EXIT_STATUS);
            section(&mut rest, "EXAMPLES", &CTL_EXAMPLES);
            "vhost-user-net(8), vhost-user-net.toml(5)"
        }
        _ => "vhost-user-net(8), vhost-user-net-ctl(1), vhost-user-net.toml(5)",
    };
    see_also(&mut rest, see);
    rest.to_writer(&mut text)?;
    let text = options_in_one_section(command, &left(&String::from_utf8_lossy(&text)));
    // The page of ctl alone is in another section.
    let text = text.replace("\nvhost\\-user\\-net\\-ctl(8)", "\nvhost\\-user\\-net\\-ctl(1)");
    fs::write(directory.join(page.get_filename()), text)?;
    let mut shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    shown.try_for_each(|command| pages(command, directory))
}

/// Returns a page with left-aligned lines, because commands are long and must not be hyphenated.
fn left(page: &str) -> String {
    page.replacen(".SH NAME", ".ad l\n.nh\n.SH NAME", 1)
}

/// Returns a page with one section of options; clap_mangen makes one for each group.
fn options_in_one_section(command: &clap::Command, page: &str) -> String {
    let mut page = page.to_owned();
    let mut start = ".SH OPTIONS\n";
    for heading in command.get_arguments().filter_map(|arg| arg.get_help_heading()) {
        let quoted = if heading.contains(' ') { format!("\"{heading}\"") } else { heading.into() };
        let section = format!(".SH {}\n", quoted.to_uppercase());
        if page.contains(&section) {
            page = page.replacen(&section, &format!("{start}.SS {quoted}\n"), 1);
            start = "";
        }
    }
    page
}

fn section(page: &mut Roff, head: &str, items: &[Item]) {
    page.control("SH", [head]);
    for (what, text) in items {
        page.control("TP", []);
        page.text([bold(*what)]);
        page.text([roman(*text)]);
    }
}

fn see_also(page: &mut Roff, pages: &str) {
    page.control("SH", ["SEE ALSO"]);
    page.text([roman(pages)]);
}

/// Returns the page of the file: each key with its type, its default and an example.
fn file_page() -> String {
    let mut page = Roff::new();
    page.control("TH", [FILE_PAGE, "5", " ", SOURCE, MANUAL]);
    page.control("SH", ["NAME"]);
    page.text([roman(format!("{FILE_PAGE} - ports of vhost-user-net"))]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "A file in TOML, of at most 1 MiB, for vhost-user-net run. Keys of the daemon stand before \
         the first table. Each [[port]] is a port. [defaults] holds keys for ports that do not have \
         them. A key has the name of an option of vhost-user-net(8); on and off are true and false \
         here. vhost-user-net check-config names each mistake by line and column.",
    )]);
    let keys = config::keys();
    for (head, places) in [
        ("KEYS OF THE DAEMON", &[Place::Daemon][..]),
        ("KEYS OF A PORT", &[Place::Port]),
        ("KEYS OF A PORT OR OF [defaults]", &[Place::PortAndDefaults]),
    ] {
        page.control("SH", [head]);
        for key in keys.iter().filter(|key| places.contains(&key.place)) {
            page.control("TP", []);
            page.text([bold(&key.name), roman(format!(" ({})", key.kind))]);
            let help = key.help.replace('\n', " ");
            let default = match &key.default {
                Some(default) if !help.contains(&format!("[default: {default}]")) => {
                    format!(" [default: {default}]")
                }
                _ => String::new(),
            };
            page.text([roman(help + &default)]);
            page.control("br", []);
            page.text([roman("Example: "), bold(&key.example)]);
        }
    }
    page.control("SH", ["EXAMPLES"]);
    page.control("nf", []);
    for line in include_str!("../dist/vhost-user-net.toml").lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    section(&mut page, "FILES", &FILES[..2]);
    see_also(&mut page, "vhost-user-net(8), vhost-user-net-ctl(1)");
    left(&page.to_roff())
}
