//! Errors that end the start of the daemon, of a port or of a command.

use std::fmt;
use std::io;

/// The reason why the daemon or a port cannot start: one line that names the object, the cause and the fix.
#[derive(Debug)]
pub struct StartError(String);

impl StartError {
    /// Creates an error with the line to show.
    pub fn new(message: impl Into<String>) -> Self {
        StartError(message.into())
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// Converts the error of starting a thread.
pub fn no_thread(error: io::Error) -> StartError {
    StartError::new(format!("start a thread: {error}"))
}

/// Converts the error of opening or watching a descriptor.
pub fn no_descriptor(error: io::Error) -> StartError {
    StartError::new(format!("wait for descriptors: {error}"))
}
