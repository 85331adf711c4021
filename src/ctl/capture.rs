//! `vhost-user-net ctl capture`: writes a port's frames to a file or a pipe.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use super::connection::{Connection, Failure};
use crate::api::requests::{CaptureOptions, Command};
use crate::event::{Interest, Poller};
use crate::sys::process::Signals;

/// Captures until the capture ends or a signal arrives; returns a line with the number of frames.
///
/// # Errors
/// The daemon cannot be reached or refuses, or the file cannot be written.
pub(super) fn capture(
    daemon: &mut Connection,
    port: &str,
    wanted: &CaptureOptions,
    file: &Path,
) -> Result<String, Failure> {
    let shown = file.display();
    let failed = |error: io::Error| Failure::Refused(format!("cannot write {shown}: {error}"));
    // Before the request, so that a signal always leaves a complete capture.
    let signals = Signals::block().map_err(failed)?;
    let (mut frames, pipe) = io::pipe().map_err(failed)?;
    let request = Command::Capture { port: port.to_owned(), wanted: wanted.clone() };
    daemon.ask(&request, &[pipe.as_fd()])?;
    // The daemon then has the only write end, and ends the capture by closing it.
    drop(pipe);
    // After the reply, so that a refused capture leaves an older file unchanged.
    let mut output: Box<dyn Write> = match file.as_os_str().as_encoded_bytes() {
        b"-" => Box::new(io::stdout().lock()),
        _ => Box::new(File::create(file).map_err(failed)?),
    };
    let stop = Command::CaptureStop { port: port.to_owned() };
    let result = (|| {
        let mut poller = Poller::new()?;
        poller.add(&frames, Interest::Read, true)?;
        poller.add(&signals, Interest::Read, false)?;
        let mut bytes = vec![0; 64 << 10];
        loop {
            let (mut readable, mut stopped) = (false, false);
            poller.wait(None, |is_pipe| if is_pipe { readable = true } else { stopped = true })?;
            if stopped && signals.take().is_some() {
                return Ok(());
            }
            if readable {
                match frames.read(&mut bytes)? {
                    0 => return Ok(()),
                    length => output.write_all(&bytes[..length])?,
                }
            }
        }
    })();
    let stats = daemon.ask(&stop, &[]);
    // Frames that were in the pipe when the signal came.
    let rest = result.and_then(|()| io::copy(&mut frames, &mut output));
    match rest.and_then(|_| output.flush()) {
        // A reader that closes the pipe ends the capture without an error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
        _ => drop(frames),
    }
    // If the port was removed meanwhile, only the file has the counts.
    let stats = stats.and_then(|_| daemon.ask(&stop, &[]));
    Ok(stats.map_or(format!("{port}: capture ended\n"), |stats| {
        format!("{port}: {} frames captured, {} left out\n", stats["captured"], stats["left_out"])
    }))
}
