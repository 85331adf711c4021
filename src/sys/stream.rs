//! A pipe or socket of the frontend's, read and written without ever waiting for the frontend.
//!
//! O_NONBLOCK belongs to the open file, which the frontend has too and can change at any time. So no
//! call here relies on it: a socket is used with MSG_DONTWAIT, and a pipe by splice(2) with
//! SPLICE_F_NONBLOCK, by way of a pipe of our own.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};
use nix::sys::socket::{MsgFlags, recv, send};

/// Bytes moved by one call at most: less than any pipe holds.
const CHUNK: usize = 4096;

/// A pipe or a stream socket whose other end, and flags, are somebody else's.
#[derive(Debug)]
pub struct ForeignStream {
    file: File,
    /// The pipe of our own, if `file` is a pipe.
    own: Option<(PipeReader, PipeWriter)>,
    /// Bytes in the pipe of our own that `file` had no room for yet.
    unsent: usize,
}

impl ForeignStream {
    /// Takes over a descriptor. A pipe is made to hold `capacity` bytes, if the kernel permits it.
    ///
    /// # Errors
    /// `InvalidInput` if `file` is neither a pipe nor a socket.
    pub fn new(file: File, capacity: usize) -> io::Result<Self> {
        let kind = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let kind = kind.to_string_lossy();
        let own = if kind.starts_with("pipe:[") {
            // If the kernel refuses, the size stays.
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

    /// Reads what is there; 0 bytes are the end.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is there.
    pub fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let most = target.len().min(CHUNK);
        match &mut self.own {
            Some((reader, writer)) => {
                let moved = move_bytes(&self.file, writer, most)?;
                // They are there: this does not wait.
                reader.read_exact(&mut target[..moved])?;
                Ok(moved)
            }
            None => Ok(recv(self.file.as_raw_fd(), &mut target[..most], MsgFlags::MSG_DONTWAIT)?),
        }
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room; `BrokenPipe` if nobody reads.
    pub fn write(&mut self, source: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let Some((reader, writer)) = &mut self.own else {
            return Ok(send(self.file.as_raw_fd(), source, flags)?);
        };
        let mut taken = 0;
        if self.unsent == 0 {
            taken = source.len().min(CHUNK);
            // The pipe of our own is empty, and holds a chunk: this does not wait.
            writer.write_all(&source[..taken])?;
            self.unsent = taken;
        }
        match move_bytes(reader, &self.file, self.unsent) {
            Ok(moved) => self.unsent -= moved,
            // What was taken goes with the next call.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => {}
            Err(error) => return Err(error),
        }
        Ok(taken)
    }

    /// Whether bytes were taken that the other end has not been given.
    pub fn has_unsent(&self) -> bool {
        self.unsent > 0
    }
}

impl AsFd for ForeignStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Moves bytes from or to a pipe, without waiting for either side.
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

    /// Both ends, blocking: whoever has the other descriptor may have made them so.
    fn ends() -> [(ForeignStream, ForeignStream); 2] {
        let (reader, writer) = io::pipe().unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        [(foreign(reader), foreign(writer)), (foreign(here), foreign(there))]
    }

    #[test]
    fn blocking_streams_are_not_waited_for() {
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
