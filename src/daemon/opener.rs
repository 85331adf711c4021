//! The process that opens what a daemon is to have once it has given up its rights: it is started
//! before, and waits until the daemon is told to read its file again (SIGHUP), or has lost a TAP.
//!
//! It keeps what the daemon was started with, and takes nothing from it but the word to begin, and
//! short replies: whoever has taken the daemon over gains no more than what the file names.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use log::{LevelFilter, error, info, warn};

use crate::config::level;
use crate::ctl::{Connection, HelperRequest, reload, reopen_tap, start_missing};
use crate::logging::Log;
use crate::sys::process::close_inherited;

/// Starts it; returns the daemon's end of the connection with it. It ends when that is closed, and by no
/// signal: it inherits our mask.
pub(super) fn start(file: &Path, level: LevelFilter) -> io::Result<UnixStream> {
    let (ours, its) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let program = std::env::current_exe()?;
    Command::new(program)
        .arg0("vhost-user-net-opener")
        .arg("opener")
        .arg(file)
        .arg(format!("--log-level={}", level.to_string().to_lowercase()))
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok(ours)
}

/// Command line of the helper process.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The daemon's file.
    config: PathBuf,
    /// Log lines of this level and above.
    #[arg(long, value_parser = level(), default_value = "info")]
    log_level: LevelFilter,
}

/// Runs the helper process: has the daemon's ports be what the file says, each time that it is told to.
pub fn run(Options { config: file, log_level }: &Options) -> io::Result<()> {
    // Those that a port uses were taken before we were started: of the others, none is ours.
    close_inherited();
    let mut log = Log::new(*log_level);
    log.start(|| Ok(()))?;
    let result = serve(file);
    if let Err(error) = &result {
        error!("daemon: the helper process cannot listen to the daemon: {error}");
    }
    log.flush();
    result
}

fn serve(file: &Path) -> io::Result<()> {
    let daemon = UnixStream::from(std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?);
    let mut daemon = Connection::new(daemon, "its opener's socket".into());
    let mut said = Vec::new();
    while let Some(wish) = daemon.wish()? {
        match wish {
            HelperRequest::Reload => read_again(&mut daemon, file, &mut said),
            HelperRequest::Start(names) => start_again(&mut daemon, file, &names, &mut said),
            HelperRequest::ReopenTap(port) => match reopen_tap(&mut daemon, file, &port) {
                Ok(true) => info!("{port}: its TAP is there again, and opened"),
                Ok(false) => {}
                Err(error) => warn!("{port}: open its TAP again: {error}"),
            },
        }
    }
    Ok(())
}

/// Starts ports that do not run. Why one cannot be started is said once.
fn start_again(daemon: &mut Connection, file: &Path, names: &[String], said: &mut Vec<String>) {
    let failed = match start_missing(daemon, file, names) {
        Ok(outcome) => {
            outcome.done.iter().for_each(|line| info!("reload {line}"));
            outcome.failed
        }
        Err(error) => vec![error.to_string()],
    };
    failed
        .iter()
        .filter(|line| !said.contains(line))
        .for_each(|line| warn!("reload failed {line}"));
    *said = failed;
}

fn read_again(daemon: &mut Connection, file: &Path, said: &mut Vec<String>) {
    match reload(daemon, file) {
        Ok(outcome) => {
            for line in outcome.done {
                info!("reload {line}");
            }
            for line in &outcome.failed {
                warn!("reload failed {line}");
            }
            let shown = file.display();
            let failures = outcome.failed.len();
            info!("reload: {shown} read again, {failures} failures");
            *said = outcome.failed;
        }
        Err(error) => error!("reload: {error}; nothing is changed"),
    }
}
