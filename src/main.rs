//! The program: parse, start, exit code.

use std::io::Write;
use std::process::ExitCode;

use vhost_user_net::api::client::Failure;
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
        Ok(Invocation::Open(file)) => {
            return match daemon::opener::run(&file) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("vhost-user-net: reload: listen to the daemon: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Ok(Invocation::Ask(question)) => {
            return match question.ask() {
                Ok(text) => {
                    let _ = std::io::stdout().write_all(text.as_bytes());
                    ExitCode::SUCCESS
                }
                Err(Failure::Refused(why) | Failure::NeedsRestart(why)) => {
                    eprintln!("vhost-user-net: {why}");
                    ExitCode::FAILURE
                }
                Err(Failure::Unreachable(why) | Failure::Gone(why)) => {
                    eprintln!("vhost-user-net: {why}");
                    ExitCode::from(3)
                }
            };
        }
        Ok(Invocation::Examine(examination)) => {
            let report = examination.run();
            let _ = std::io::stdout().write_all(report.show().as_bytes());
            return if report.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
        Err(error) => {
            eprintln!("vhost-user-net: {error}");
            return ExitCode::from(2);
        }
    };
    match daemon::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-net: {error}");
            ExitCode::FAILURE
        }
    }
}
