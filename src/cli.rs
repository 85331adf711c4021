//! The command line, assembled from the arguments that the modules below define.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueHint};

use crate::config::{CheckOptions, Config, DaemonOptions, OPERATION, PortOptions, RunOptions};
use crate::ctl;
use crate::daemon::{self, opener};
use crate::doctor::{self, Doctor};

/// Output of `--print-capabilities`, in the form of QEMU's backend program conventions.
const CAPABILITIES: &str = "{\"type\": \"net\", \"features\": []}\n";
/// Exit status after a mistake in the command line or the file.
const USAGE_ERROR: u8 = 2;

/// Serves the virtio-net devices of virtual machines over vhost-user
#[derive(Debug, Parser)]
#[command(name = "vhost-user-net", version, max_term_width = 100)]
#[command(
    override_usage = "vhost-user-net <FRONTEND OPTION> <HOST SIDE OPTION> [OPTIONS] | <COMMAND>"
)]
#[command(after_help = "All options: vhost-user-net --help. Examples: man vhost-user-net.")]
#[command(after_long_help = "Files, signals and examples: man vhost-user-net.")]
#[command(group = ArgGroup::new("frontend").required(true))]
#[command(group = ArgGroup::new("host").required(true))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    port: PortOptions,
    #[command(flatten)]
    daemon: DaemonOptions,
    /// Print this program's capabilities, as QEMU's conventions require, and exit.
    #[arg(long, help_heading = OPERATION, hide_short_help = true)]
    print_capabilities: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the ports that a file describes.
    Run(RunOptions),
    /// Check a file against this host; print each mistake on a line.
    ///
    /// Exits with 0, or with 2 after a mistake.
    CheckConfig(CheckOptions),
    /// Check this host; print faults and the commands that fix them.
    ///
    /// Changes nothing. Exits with 0, with 1 if a check fails, and with 2 if the command line is wrong.
    Doctor(doctor::Options),
    /// Ask a running daemon, or change its ports while they run.
    ///
    /// Exits with 0, with 1 if the daemon refuses, with 2 if the command line is wrong, and with 3 if no
    /// daemon can be asked.
    Ctl(ctl::Options),
    /// Open sockets and devices for the sandboxed daemon, which starts this process.
    #[command(hide = true)]
    Opener(opener::Options),
}

/// Parsed command line.
#[derive(Debug)]
pub enum Invocation {
    /// Run the daemon.
    Run(Config),
    /// Act as the client of a running daemon.
    Ctl(ctl::Options),
    /// Act as the helper process of a running daemon, over the socket at standard input.
    Opener(opener::Options),
    /// Check this host.
    Doctor(Doctor),
    /// Print this text to standard output and exit with 0.
    Print(String),
    /// Print this text to standard error and exit with 2.
    Usage(String),
}

impl Invocation {
    /// Runs the command; returns the program's exit status.
    pub fn run(self) -> ExitCode {
        match self {
            Invocation::Run(config) => match daemon::run(&config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(error, 1),
            },
            Invocation::Ctl(options) => match options.run() {
                Ok(text) => print(&text),
                Err(failure) => fail(&failure, failure.exit_status()),
            },
            Invocation::Opener(options) => match opener::run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            },
            Invocation::Doctor(doctor) => {
                let report = doctor.run();
                print(&report.show());
                if report.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
            }
            Invocation::Print(text) => print(&text),
            Invocation::Usage(text) => {
                let _ = std::io::stderr().write_all(text.as_bytes());
                ExitCode::from(USAGE_ERROR)
            }
        }
    }
}

/// Runs the program with this command line, program name first; returns the exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(arguments) {
        Ok(invocation) => invocation.run(),
        Err(error) => fail(error, USAGE_ERROR),
    }
}

/// Writes to standard output. Errors are ignored, because a reader may close the pipe early.
fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Writes a line to standard error. `eprintln!` would panic if the pipe is closed or the disk full.
fn fail(why: impl Display, status: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "vhost-user-net: {why}");
    ExitCode::from(status)
}

/// Parses a command line, program name first.
///
/// # Errors
/// The command line or the file has a mistake, which the line names.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, String> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // By QEMU's conventions this option stands alone, without the options that clap requires.
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
    Ok(match arguments.command {
        None => Invocation::Run(arguments.daemon.check(arguments.port)?),
        Some(Command::Run(options)) => Invocation::Run(options.read()?),
        Some(Command::CheckConfig(options)) => Invocation::Print(options.check()?),
        Some(Command::Ctl(options)) => Invocation::Ctl(options),
        Some(Command::Doctor(options)) => Invocation::Doctor(Doctor::new(options)?),
        Some(Command::Opener(options)) => Invocation::Opener(options),
    })
}

/// Returns the description of the command line, for manual pages and completions.
pub fn command() -> clap::Command {
    complete_paths_only(Arguments::command())
}

/// Sets value hints so that shells complete file names only where a value is a path.
fn complete_paths_only(command: clap::Command) -> clap::Command {
    let no_path =
        |arg: &Arg| arg.get_action().takes_values() && arg.get_value_hint() == ValueHint::Unknown;
    command
        .mut_args(|arg| if no_path(&arg) { arg.value_hint(ValueHint::Other) } else { arg })
        .mut_subcommands(complete_paths_only)
}

/// Returns the reason why `ctl set` refuses an option that is fixed while the port or the daemon runs; `None` for
/// other errors.
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

/// Returns clap's error, which is a paragraph, as one line.
fn one_line(error: &clap::Error) -> String {
    if let Some(why) = fixed_option(error) {
        return why;
    }
    let text = error.render().to_string();
    let mut lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage") && !line.starts_with("For more"))
        // No option takes a value that begins with a dash.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"));
    let first = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    lines.fold(first, |text, line| format!("{text} {line}")) + "; try --help"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Host, PortConfig};
    use crate::endpoint::Frontend;
    use crate::port::af_xdp::{AfXdp, Attach, Mode};

    fn read(arguments: &[&str]) -> Result<PortConfig, String> {
        let all = ["vhost-user-net"].iter().chain(arguments).map(Into::into);
        match parse(all)? {
            Invocation::Run(mut config) => Ok(config.ports.remove(0)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn socket_and_tap_suffice() {
        let config = read(&["--socket-path=/run/a", "--tap=vnet0"]).unwrap();
        assert_eq!(config.frontend, Frontend::Listen("/run/a".into()));
        assert_eq!(config.host, Host::Tap("vnet0".into()));
        assert_eq!((config.queue_pairs, config.mtu, config.guest_tso), (1, 1500, true));
    }

    #[test]
    fn options_are_parsed() {
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
    fn af_xdp_option_names_device_and_non_defaults() {
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
    fn net_backend_equals_socket_and_tap() {
        let config = read(&["--net-backend=socket=/run/a,tap=vmtap0,num_queues=4"]).unwrap();
        let options = ["--socket-path=/run/a", "--tap=vmtap0", "--queue-pairs=2"];
        assert_eq!(config, read(&options).unwrap());
        let config = read(&["--net-backend=socket=/run/a,tap=t,client=on"]).unwrap();
        assert_eq!(config.frontend, Frontend::Connect("/run/a".into()));
        let error = read(&["--net-backend=socket=/run/a,tap=t", "--tap=u"]).unwrap_err();
        assert!(error.contains("--net-backend"), "{error}");
    }

    #[test]
    fn mistake_is_one_line_that_names_the_option() {
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
            (&["--socket-path=a", "--af-xdp=eth1,steer=mac"], "set mac"),
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
    fn print_capabilities_needs_no_other_option() {
        let all = ["vhost-user-net", "--print-capabilities"].map(Into::into);
        let Ok(Invocation::Print(text)) = parse(all) else { panic!("not printed") };
        assert!(text.contains("\"type\": \"net\""));
    }
}
