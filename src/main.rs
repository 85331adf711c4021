//! The program: it records the inherited descriptors, then runs its command line.

use std::process::ExitCode;

use vhost_user_net::cli;
use vhost_user_net::sys::process::note_inherited;

fn main() -> ExitCode {
    // SAFETY: this process has opened no descriptor yet, so all open ones are inherited.
    #[allow(unsafe_code)]
    unsafe {
        note_inherited();
    }
    cli::run(std::env::args_os())
}
