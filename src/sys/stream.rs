//! Pipes and sockets of the frontend. No read or write waits for the frontend.
//!
//! O_NONBLOCK belongs to the open file, which the frontend has too, and can change at any time. So no call here relies
//! on the flag: sockets are used with MSG_DONTWAIT. Pipes are used by splice(2) with SPLICE_F_NONBLOCK, through a pipe
//! of the daemon.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};
use nix::sys::socket::{MsgFlags, recv, send};

/// Most bytes that one call moves; every pipe holds this much.
const CHUNK: usize = 4096;

/// A pipe or a stream socket whose other end and flags the frontend controls.
#[derive(Debug)]
pub struct ForeignStream {
    file: File,
    /// The daemon's own pipe, if `file` is a pipe.
    own: Option<(PipeReader, PipeWriter)>,
    /// Bytes in the daemon's own pipe that `file` has not accepted yet.
    unsent: usize,
}

impl ForeignStream {
    /// Creates a stream from a descriptor. A pipe gets a capacity of `capacity` bytes, if the kernel permits it.
    ///
    /// # Errors
    /// `InvalidInput` if `file` is neither a pipe nor a socket.
    pub fn new(file: File, capacity: usize) -> io::Result<Self> {
        let kind = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let kind = kind.to_string_lossy();
        let own = if kind.starts_with("pipe:[") {
            // If the kernel refuses, the capacity stays.
            let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(capacity as libc::c_int));
            Some(io::pipe()?)
        } else if kind.starts_with("socket:[") {
            None
        } else {
            let text = format!("the descriptor is {kind}, neither a pipe nor a socket");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        Ok(ForeignStream { file, own, unsent: 0 })
    }

    /// Reads at most 4096 of the bytes that have arrived. Returns 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if no byte has arrived, or another error of the stream.
    pub fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let most = target.len().min(CHUNK);
        match &mut self.own {
            Some((reader, writer)) => {
                let moved = move_bytes(&self.file, writer, most)?;
                // The daemon's own pipe holds these bytes, so this does not wait.
                reader.read_exact(&mut target[..moved])?;
                Ok(moved)
            }
            None => Ok(recv(self.file.as_raw_fd(), &mut target[..most], MsgFlags::MSG_DONTWAIT)?),
        }
    }

    /// Writes as many bytes as the stream accepts, and returns how many it has taken. If the
    /// stream is a pipe, some can still be in the daemon's own pipe: see [`has_unsent`](Self::has_unsent).
    ///
    /// # Errors
    /// `WouldBlock` if the stream is full, `BrokenPipe` if its other end is closed.
    pub fn write(&mut self, source: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let Some((reader, writer)) = &mut self.own else {
            return Ok(send(self.file.as_raw_fd(), source, flags)?);
        };
        let mut taken = 0;
        if self.unsent == 0 {
            taken = source.len().min(CHUNK);
            // The daemon's own pipe is empty, and holds a chunk, so this does not wait.
            writer.write_all(&source[..taken])?;
            self.unsent = taken;
        }
        match move_bytes(reader, &self.file, self.unsent) {
            Ok(moved) => self.unsent -= moved,
            // The next call moves the bytes that were taken.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => {}
            Err(error) => return Err(error),
        }
        Ok(taken)
    }

    /// Returns whether the daemon's own pipe holds bytes that [`write`](Self::write) has taken. Another call of
    /// `write`, also with no bytes, moves them.
    pub fn has_unsent(&self) -> bool {
        self.unsent > 0
    }
}

impl AsFd for ForeignStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Moves at most `most` bytes from or to a pipe, and never waits.
fn move_bytes(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    Ok(splice(from, None, to, None, most, SpliceFFlags::SPLICE_F_NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn foreign(fd: impl Into<OwnedFd>) -> ForeignStream {
        ForeignStream::new(File::from(fd.into()), 1 << 16).unwrap()
    }

    /// Returns both ends of a pipe and of a socket, blocking, as a frontend can make them.
    fn ends() -> [(ForeignStream, ForeignStream); 2] {
        let (reader, writer) = io::pipe().unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        [(foreign(reader), foreign(writer)), (foreign(here), foreign(there))]
    }

    #[test]
    fn blocking_streams_never_block_reads_or_writes() {
        for (mut reader, mut writer) in ends() {
            let mut bytes = [0; 10_000];
            assert_eq!(reader.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let mut written = 0;
            let error = loop {
                match writer.write(&[7; 5000]) {
                    Ok(some) => written += some,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            let mut read = 0;
            while read < written {
                let some = reader.read(&mut bytes).unwrap_or_else(|_| {
                    assert!(writer.has_unsent());
                    assert_eq!(writer.write(&[]).unwrap(), 0);
                    0
                });
                assert!(bytes[..some].iter().all(|byte| *byte == 7));
                read += some;
            }
            drop(writer);
            assert_eq!(reader.read(&mut bytes).unwrap(), 0, "the end");
        }
    }

    #[test]
    fn files_are_refused() {
        let file = File::open("/dev/zero").unwrap();
        let error = ForeignStream::new(file, 1).unwrap_err();
        assert!(error.to_string().contains("/dev/zero"), "{error}");
    }
}
