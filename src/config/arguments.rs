//! The command line: one port by options, or several by a file.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueHint};
use log::LevelFilter;

use crate::ctl;
use crate::doctor::{self, Examination};
use crate::sandbox::{Confinement, Seccomp};

use super::options::{OPERATION, socket_path};
use super::{Config, Invocation, MetricsAddress, PortOptions, check_start, file};

/// `--print-capabilities` of QEMU's backend program conventions.
const CAPABILITIES: &str = "{\"type\": \"net\", \"features\": []}\n";

/// Serves the virtio-net devices of virtual machines over vhost-user
#[derive(Debug, Parser)]
#[command(name = "vhost-user-net", version, max_term_width = 100)]
#[command(
    override_usage = "vhost-user-net [OPTIONS] <FRONTEND OPTION> <HOST SIDE OPTION>\n       \
                            vhost-user-net <COMMAND>"
)]
#[command(
    after_help = "All options: vhost-user-net --help. Units, files and examples: man vhost-user-net."
)]
#[command(after_long_help = "Files, signals and examples: man vhost-user-net.")]
#[command(group = ArgGroup::new("frontend").required(true))]
#[command(group = ArgGroup::new("host").required(true))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    port: PortOptions,
    /// Log lines of this level and above.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level(), hide_possible_values = true, help_heading = OPERATION)]
    log_level: LevelFilter,
    /// Act on a system call outside the thread's allow-list.
    #[arg(long, value_name = "ACTION", value_enum, default_value = "kill", help_heading = OPERATION, hide_short_help = true)]
    seccomp: Seccomp,
    /// Become this user once everything is open [default: stay].
    #[arg(long, value_name = "USER", help_heading = OPERATION)]
    user: Option<String>,
    /// Become this group [default: the user's].
    #[arg(long, value_name = "GROUP", help_heading = OPERATION, hide_short_help = true)]
    group: Option<String>,
    /// Listen on this unix socket for 'vhost-user-net ctl' [default: none].
    #[arg(long, value_name = "PATH", help_heading = OPERATION)]
    control: Option<PathBuf>,
    /// Serve metrics at 127.0.0.1:PORT or on a unix socket [default: none].
    #[arg(long, value_name = "ADDRESS", value_hint = ValueHint::AnyPath, help_heading = OPERATION)]
    metrics: Option<MetricsAddress>,
    /// Print what this program can do, as QEMU's conventions ask for, and exit.
    #[arg(long, help_heading = OPERATION, hide_short_help = true)]
    print_capabilities: bool,
}

/// The levels of the log, by name.
fn level() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|text| text.parse::<LevelFilter>())
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the ports that a file describes.
    Run {
        /// The file, in TOML.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Take over the ports of the daemon that listens on the file's control socket.
        ///
        /// That daemon exits. Frontends notice a pause of some milliseconds.
        #[arg(long)]
        take_over: bool,
    },
    /// Check a file, and what of it this host has; print each mistake on a line.
    ///
    /// Exits with 0, or with 2 if something is wrong.
    CheckConfig {
        /// The file.
        #[arg(value_name = "FILE")]
        config: PathBuf,
    },
    /// Check this host; print what is wrong and the command that fixes it.
    ///
    /// Nothing is changed. Exits with 0, with 1 if something fails, and with 2 if this command line is wrong.
    Doctor(doctor::Options),
    /// Ask a running daemon, or change its ports while they run.
    ///
    /// Exits with 0, with 1 if the daemon says no, with 2 if this command line is wrong, and with 3 if it can't be asked.
    Ctl(ctl::Options),
    /// Open what a daemon is to have when it reads its file again: started by the daemon.
    #[command(hide = true)]
    Opener {
        /// The file.
        config: PathBuf,
        /// What is logged.
        #[arg(long, value_parser = level(), default_value = "info")]
        log_level: LevelFilter,
    },
}

/// Reads a command line, program name first.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<Invocation, String> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // By QEMU's conventions it stands alone, so nothing else is required beside it.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print(CAPABILITIES.into()));
    }
    let parsed = command().try_get_matches_from(arguments);
    let arguments = match parsed.and_then(|matches| Arguments::from_arg_matches(&matches)) {
        Ok(arguments) => arguments,
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return Ok(Invocation::Usage(error.render().to_string()));
        }
        Err(error) if !error.use_stderr() => {
            return Ok(Invocation::Print(error.render().to_string()));
        }
        Err(error) => return Err(one_line(&error)),
    };
    match arguments.command {
        None => {
            let ports = vec![arguments.port.check()?];
            let Arguments { log_level, control, metrics, seccomp, user, group, .. } = arguments;
            let control = control.map(socket_path).transpose()?;
            check_start(&ports, control.as_deref())?;
            let confinement = Confinement { seccomp, user, group };
            let file = None;
            let take_over = false;
            Ok(Invocation::Run(Config {
                log_level,
                file,
                take_over,
                control,
                metrics,
                confinement,
                ports,
            }))
        }
        Some(Command::Run { config: path, take_over }) => {
            let config = file::read(&path)?;
            if take_over && config.control.is_none() {
                let shown = path.display();
                return Err(format!(
                    "{shown}: take-over needs a control socket: control = \"PATH\""
                ));
            }
            Ok(Invocation::Run(Config { take_over, ..config }))
        }
        Some(Command::CheckConfig { config }) => {
            let (checked, notes) = file::check(&config)?;
            let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
            let (file, ports) = (config.display(), checked.ports.len());
            Ok(Invocation::Print(format!("{notes}{file}: {ports} ports, nothing wrong\n")))
        }
        Some(Command::Ctl(options)) => Ok(Invocation::Ask(options)),
        Some(Command::Doctor(options)) => {
            let config = options.config.as_deref().map(file::read).transpose()?;
            Ok(Invocation::Examine(Examination::new(options, config)))
        }
        Some(Command::Opener { config, log_level }) => Ok(Invocation::Open(config, log_level)),
    }
}

/// The command line's description: manual pages and completions are made from it.
pub fn command() -> clap::Command {
    complete_paths_only(Arguments::command())
}

/// Has shells complete file names only where a value is a path.
fn complete_paths_only(command: clap::Command) -> clap::Command {
    let no_path =
        |arg: &Arg| arg.get_action().takes_values() && arg.get_value_hint() == ValueHint::Unknown;
    command
        .mut_args(|arg| if no_path(&arg) { arg.value_hint(ValueHint::Other) } else { arg })
        .mut_subcommands(complete_paths_only)
}

/// Why `ctl set` does not take an option of the program: it can't change while the port, or the daemon,
/// runs.
fn fixed_option(error: &clap::Error) -> Option<String> {
    let (Some(ContextValue::String(argument)), Some(ContextValue::StyledStr(usage))) =
        (error.get(ContextKind::InvalidArg), error.get(ContextKind::Usage))
    else {
        return None;
    };
    if error.kind() != ErrorKind::UnknownArgument || !usage.to_string().contains(" ctl set ") {
        return None;
    }
    let option = argument.split('=').next().unwrap_or_default();
    let is_it = |arg: &Arg| arg.get_long().is_some_and(|long| option == format!("--{long}"));
    if <PortOptions as Args>::augment_args(clap::Command::new("")).get_arguments().any(is_it) {
        return Some(format!(
            "cannot change {option}: it can't change while the port runs; change it in the file and use \
             'vhost-user-net ctl reload', or remove and add the port"
        ));
    }
    command().get_arguments().any(is_it).then(|| {
        format!(
            "cannot change {option}: it can't change while the daemon runs; change it in the file and \
             restart the daemon"
        )
    })
}

/// clap explains itself in a paragraph; the log has lines.
fn one_line(error: &clap::Error) -> String {
    if let Some(why) = fixed_option(error) {
        return why;
    }
    let text = error.render().to_string();
    let mut lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage") && !line.starts_with("For more"))
        // No value of ours begins with dashes.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"));
    let first = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    lines.fold(first, |text, line| format!("{text} {line}")) + "; try --help"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{AfXdp, Attach, Host, Mode, PortConfig};
    use crate::endpoint::Frontend;

    fn read(arguments: &[&str]) -> Result<PortConfig, String> {
        let all = ["vhost-user-net"].iter().chain(arguments).map(Into::into);
        match parse(all)? {
            Invocation::Run(mut config) => Ok(config.ports.remove(0)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_socket_and_a_tap_are_enough() {
        let config = read(&["--socket-path=/run/a", "--tap=vnet0"]).unwrap();
        assert_eq!(config.frontend, Frontend::Listen("/run/a".into()));
        assert_eq!(config.host, Host::Tap("vnet0".into()));
        assert_eq!((config.queue_pairs, config.mtu, config.guest_tso), (1, 1500, true));
    }

    #[test]
    fn every_option_is_understood() {
        let config = read(&[
            "--connect=/run/a",
            "--tap-fd=7,8",
            "--mac=52:54:00:00:00:01",
            "--mtu=9000",
            "--guest-tso=off",
            "--busy-poll=50",
            "--tx-filter=deny tcp dport 25; default allow",
            "--cpu-affinity=1,3-4",
            "--log-level=debug",
        ])
        .unwrap();
        assert_eq!(config.host, Host::TapDescriptors(vec![7, 8]));
        assert_eq!(config.queue_pairs, 2);
        assert!(!config.guest_tso);
        assert_eq!(config.tx_filter.to_string(), "deny tcp dport 25; default allow");
        assert!(config.rx_filter.is_none());
        assert_eq!(config.busy_poll, Some(Duration::from_micros(50)));
        assert_eq!(config.cpu_affinity, [1, 3, 4]);
    }

    #[test]
    fn an_af_xdp_port_is_a_device_and_what_differs_from_the_default() {
        let config = read(&["--socket-path=a", "--af-xdp=eth1"]).unwrap();
        let plain = AfXdp {
            name: "eth1".into(),
            queue: 0,
            mode: Mode::Auto,
            attach: Attach::Auto,
            steer: false,
        };
        assert_eq!(config.host, Host::AfXdp(plain.clone()));
        let option = "--af-xdp=eth1,queue=3,mode=zero-copy,attach=native,steer=mac";
        let config = read(&["--socket-path=a", option, "--mac=52:54:00:00:00:01"]).unwrap();
        let expected =
            AfXdp { queue: 3, mode: Mode::ZeroCopy, attach: Attach::Native, steer: true, ..plain };
        assert_eq!(config.host, Host::AfXdp(expected));
    }

    #[test]
    fn cloud_hypervisors_option_is_a_socket_and_a_tap() {
        let config = read(&["--net-backend=socket=/run/a,tap=vmtap0,num_queues=4"]).unwrap();
        let options = ["--socket-path=/run/a", "--tap=vmtap0", "--queue-pairs=2"];
        assert_eq!(config, read(&options).unwrap());
        let config = read(&["--net-backend=socket=/run/a,tap=t,client=on"]).unwrap();
        assert_eq!(config.frontend, Frontend::Connect("/run/a".into()));
        let error = read(&["--net-backend=socket=/run/a,tap=t", "--tap=u"]).unwrap_err();
        assert!(error.contains("--net-backend"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_that_names_it() {
        let long = format!("--socket-path=/{}", "x".repeat(107));
        let cases: &[(&[&str], &str)] = &[
            (&["--tap=a"], "--socket-path"),
            (&["--socket-path=a"], "--tap"),
            (&["--socket-path=a", "--fd=3", "--tap=a"], "--fd"),
            (&["--socket-path=a", "--tap=a", "--loopback"], "--loopback"),
            (&["--socket-path=a", "--tap=a", "--frobnicate"], "--frobnicate"),
            (&[&long, "--tap=a"], "107"),
            (&["--socket-path=a", "--tap=a", "--queue-pairs=0"], "queue-pairs=0"),
            (&["--socket-path=a", "--tap=a", "--queue-pairs=129"], "128"),
            (&["--socket-path=a", "--tap-fd=5,6", "--queue-pairs=3"], "tap-fd names 2"),
            (&["--fd=5", "--tap-fd=6,5"], "descriptor 5"),
            (&["--socket-path=a", "--tap=a", "--mac=1:2"], "1:2"),
            (&["--socket-path=a", "--tap=a", "--mtu=67"], "67"),
            (&["--socket-path=a", "--tap=a", "--tx-filter=deny tcp port 5"], "'port'"),
            (&["--socket-path=a", "--loopback", "--rx-filter=default deny"], "loopback"),
            (&["--socket-path=a", "--tap=a", "--guest-tso=maybe"], "maybe"),
            (&["--socket-path=a", "--tap=a", "--cpu-affinity=4-2"], "4-2"),
            (&["--socket-path=a", "--tap=a", "--log-level=loud"], "loud"),
            (&["--socket-path=a", "--tap=far/too/long"], "far/too/long"),
            (&["--socket-path=a", "--tap=vnet%d"], "vnet%d"),
            (&["--socket-path=a", "--af-xdp=a/b"], "a/b"),
            (&["--socket-path=a", "--af-xdp=eth1,3"], "'3'"),
            (&["--socket-path=a", "--af-xdp=eth1,queue=x"], "'x'"),
            (&["--socket-path=a", "--af-xdp=eth1,mode=fast"], "'fast'"),
            (&["--socket-path=a", "--af-xdp=eth1,lane=1"], "'lane'"),
            (&["--socket-path=a", "--af-xdp=eth1,mode=zero-copy,attach=generic"], "generic"),
            (&["--socket-path=a", "--af-xdp=eth1,steer=ip"], "'ip'"),
            (&["--socket-path=a", "--af-xdp=eth1,steer=mac"], "address: mac"),
            (
                &[
                    "--socket-path=a",
                    "--af-xdp=eth1,steer=mac",
                    "--mac=52:54:00:00:00:01",
                    "--queue-pairs=2",
                ],
                "queue-pairs=2",
            ),
            (&["--socket-path=a", "--tap=a", "--af-xdp=b"], "--af-xdp"),
        ];
        for (arguments, named) in cases {
            let error = read(arguments).unwrap_err();
            assert!(error.contains(named), "{arguments:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn capabilities_need_no_other_option() {
        let all = ["vhost-user-net", "--print-capabilities"].map(Into::into);
        let Ok(Invocation::Print(text)) = parse(all) else { panic!("not printed") };
        assert!(text.contains("\"type\": \"net\""));
    }
}
