//! The privileged helper process (`vhost-user-net-opener`), which opens sockets and devices that the sandboxed
//! daemon may not open. The daemon starts the helper before the sandbox, and asks it to read the file again after
//! SIGHUP, to start a missing port, or to open a deleted TAP again.
//!
//! The helper keeps the privileges that the daemon was started with. It opens only objects that the file names, and
//! reads only port names and short replies from the daemon. So a compromised daemon gains nothing that the file
//! does not grant.

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

/// Starts the helper process; returns the daemon's end of the connection. The helper exits when the daemon closes
/// that end. SIGTERM, SIGINT and SIGHUP do not end the helper, because it inherits the daemon's signal mask.
pub(super) fn start(file: &Path, level: LevelFilter) -> io::Result<UnixStream> {
    let (daemon, helper) = UnixStream::pair()?;
    daemon.set_nonblocking(true)?;
    let program = std::env::current_exe()?;
    Command::new(program)
        .arg0("vhost-user-net-opener")
        .arg("opener")
        .arg(file)
        .arg(format!("--log-level={}", level.to_string().to_lowercase()))
        .stdin(Stdio::from(OwnedFd::from(helper)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok(daemon)
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

/// Runs the helper process until the daemon closes the connection.
///
/// # Errors
/// The log's thread cannot be started, or reading from the daemon fails.
pub fn run(Options { config: file, log_level }: &Options) -> io::Result<()> {
    // The daemon set close-on-exec on the descriptors of its ports; the helper uses none of the others.
    close_inherited();
    let mut log = Log::new(*log_level);
    log.start(|| Ok(()))?;
    let result = serve(file);
    if let Err(error) = &result {
        error!(
            "daemon: helper process exits: cannot read from the daemon: {error}; restart the daemon"
        );
    }
    log.flush();
    result
}

fn serve(file: &Path) -> io::Result<()> {
    let daemon = UnixStream::from(std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?);
    let mut daemon = Connection::new(daemon, "the helper's socket".into());
    let mut logged = Vec::new();
    while let Some(request) = daemon.helper_request()? {
        match request {
            HelperRequest::Reload => reload_file(&mut daemon, file, &mut logged),
            HelperRequest::Start(names) => start_ports(&mut daemon, file, &names, &mut logged),
            HelperRequest::ReopenTap(port) => match reopen_tap(&mut daemon, file, &port) {
                Ok(true) => info!("{port}: TAP opened again"),
                Ok(false) => {}
                Err(error) => {
                    warn!("{port}: cannot open its TAP again: {error}; retried every second")
                }
            },
        }
    }
    Ok(())
}

/// Starts missing ports. A failure that is already in `logged` is not logged again.
fn start_ports(daemon: &mut Connection, file: &Path, names: &[String], logged: &mut Vec<String>) {
    let failed = match start_missing(daemon, file, names) {
        Ok(outcome) => {
            outcome.done.iter().for_each(|line| info!("reload {line}"));
            outcome.failed
        }
        Err(error) => vec![error.to_string()],
    };
    failed
        .iter()
        .filter(|line| !logged.contains(line))
        .for_each(|line| warn!("reload failed {line}"));
    *logged = failed;
}

/// Reads the file again, and changes the daemon's ports to its description.
fn reload_file(daemon: &mut Connection, file: &Path, logged: &mut Vec<String>) {
    match reload(daemon, file) {
        Ok(outcome) => {
            for line in outcome.done {
                info!("reload {line}");
            }
            for line in &outcome.failed {
                warn!("reload failed {line}");
            }
            let failures = outcome.failed.len();
            info!("reload: finished file={} failures={failures}", file.display());
            *logged = outcome.failed;
        }
        Err(error) => error!("reload: refused: {error}; no port changed"),
    }
}
