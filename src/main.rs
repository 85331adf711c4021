//! The program: it notes the descriptors that it was started with, and runs its command line.

use std::process::ExitCode;

use vhost_user_net::cli;
use vhost_user_net::sys::process::note_inherited;

fn main() -> ExitCode {
    // SAFETY: nothing was opened yet.
    #[allow(unsafe_code)]
    unsafe {
        note_inherited();
    }
    cli::run(std::env::args_os())
}
