//! Command-line options that become a configuration: those of the daemon itself, of `run` and of
//! `check-config`.

use std::path::PathBuf;

use clap::ValueHint;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use log::LevelFilter;

use super::options::{OPERATION, socket_path};
use super::{Config, MetricsAddress, PortOptions, check_start, file};
use crate::sandbox::{Confinement, Seccomp};

/// Options of the daemon itself, on the command line that describes one port.
#[derive(Debug, clap::Args)]
pub struct DaemonOptions {
    /// Log lines of this level and above.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level(), help_heading = OPERATION, hide_short_help = true)]
    log_level: LevelFilter,
    /// Kill the process at a system call outside the thread's allow-list, log the call, or install no filter.
    #[arg(long, value_name = "ACTION", value_enum, default_value = "kill", help_heading = OPERATION, hide_short_help = true)]
    seccomp: Seccomp,
    /// Become this user, by name or number, once everything is open [default: stay].
    #[arg(long, value_name = "USER", help_heading = OPERATION, hide_short_help = true)]
    user: Option<String>,
    /// Become this group, by name or number [default: the user's].
    #[arg(long, value_name = "GROUP", help_heading = OPERATION, hide_short_help = true)]
    group: Option<String>,
    /// Serve ctl on this unix socket [default: none].
    #[arg(long, value_name = "PATH", help_heading = OPERATION, hide_short_help = true)]
    control: Option<PathBuf>,
    /// Serve metrics at 127.0.0.1:PORT or /PATH [default: none].
    #[arg(long, value_name = "ADDRESS", value_hint = ValueHint::AnyPath, help_heading = OPERATION, hide_short_help = true)]
    metrics: Option<MetricsAddress>,
}

impl DaemonOptions {
    /// Returns the configuration of a daemon with these options and one port.
    ///
    /// # Errors
    /// One line that names the first mistake.
    pub fn check(self, port: PortOptions) -> Result<Config, String> {
        let DaemonOptions { log_level, seccomp, user, group, control, metrics } = self;
        let ports = vec![port.check()?];
        let control = control.map(socket_path).transpose()?;
        check_start(&ports, control.as_deref())?;
        let confinement = Confinement { seccomp, user, group };
        let (file, take_over) = (None, false);
        Ok(Config { log_level, file, take_over, control, metrics, confinement, ports })
    }
}

/// Parses a level of the log by its name.
pub(crate) fn level() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|text| text.parse::<LevelFilter>())
}

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub struct RunOptions {
    /// Read the ports from this file, in TOML.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Take over the ports of the daemon that listens on the file's control socket.
    ///
    /// That daemon exits with 0.
    #[arg(long)]
    take_over: bool,
}

impl RunOptions {
    /// Reads the file.
    ///
    /// # Errors
    /// One line that names the first mistake.
    pub fn read(self) -> Result<Config, String> {
        let config = file::read(&self.config)?;
        if self.take_over && config.control.is_none() {
            let shown = self.config.display();
            return Err(format!(
                "{shown}: --take-over requires a control socket; add control = \"PATH\""
            ));
        }
        Ok(Config { take_over: self.take_over, ..config })
    }
}

/// Options of `check-config`.
#[derive(Debug, clap::Args)]
pub struct CheckOptions {
    /// The file to check.
    #[arg(value_name = "FILE")]
    config: PathBuf,
}

impl CheckOptions {
    /// Checks the file and this host; returns possible mistakes and a summary, one line each.
    ///
    /// # Errors
    /// The file has mistakes, which the text names, one line each.
    pub fn check(&self) -> Result<String, String> {
        let (config, notes) = file::check(&self.config)?;
        let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
        let (file, ports) = (self.config.display(), config.ports.len());
        Ok(format!("{notes}{file}: {ports} ports, nothing wrong\n"))
    }
}
