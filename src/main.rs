//! The program: parse, start, exit code.

use std::io::Write;
use std::process::ExitCode;

use vhost_user_net::config::{self, Invocation};
use vhost_user_net::daemon;
use vhost_user_net::sys::process::note_inherited;

fn main() -> ExitCode {
    // SAFETY: nothing was opened yet.
    #[allow(unsafe_code)]
    unsafe {
        note_inherited();
    }
    let config = match config::parse(std::env::args_os()) {
        Ok(Invocation::Run(config)) => config,
        Ok(Invocation::Print(text)) => {
            // Whoever closes the pipe early has seen enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Usage(text)) => {
            let _ = std::io::stderr().write_all(text.as_bytes());
            return ExitCode::from(2);
        }
        Ok(Invocation::Open(file, level)) => {
            return match daemon::opener::run(&file, level) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Ok(Invocation::Ask(options)) => {
            return match options.run() {
                Ok(text) => {
                    let _ = std::io::stdout().write_all(text.as_bytes());
                    ExitCode::SUCCESS
                }
                Err(failure) => {
                    complain(&failure);
                    ExitCode::from(failure.exit_status())
                }
            };
        }
        Ok(Invocation::Examine(examination)) => {
            let report = examination.run();
            let _ = std::io::stdout().write_all(report.show().as_bytes());
            return if report.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
        Err(error) => {
            complain(error);
            return ExitCode::from(2);
        }
    };
    match daemon::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

/// Writes a line to standard error. `eprintln!` would panic if nobody reads it, or its disk is full.
fn complain(why: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "vhost-user-net: {why}");
}
