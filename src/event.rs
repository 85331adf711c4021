//! Waiting for several descriptors at once: a wrapper of the `epoll` crate, with typed events in place of numbers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use epoll::{ControlOptions, Event, Events};

use crate::sys;

/// Highest number of events that one wait reports.
const MAX_EVENTS: usize = 16;

/// Condition of a descriptor that ends a wait. A hang-up or an error ends every wait too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// The descriptor is readable.
    Read,
    /// The descriptor is writable.
    Write,
    /// The descriptor is readable or writable.
    ReadWrite,
    /// Edge-triggered: a write to an eventfd, which nothing has to read, or new data on another descriptor.
    Edge,
    /// No condition; a hang-up or an error is reported once.
    Nothing,
}

impl Interest {
    fn events(self) -> Events {
        match self {
            Interest::Read => Events::EPOLLIN,
            Interest::Write => Events::EPOLLOUT,
            Interest::ReadWrite => Events::EPOLLIN | Events::EPOLLOUT,
            Interest::Edge => Events::EPOLLIN | Events::EPOLLET,
            Interest::Nothing => Events::EPOLLET,
        }
    }
}

/// An epoll instance whose events are values of `T`.
#[derive(Debug)]
pub struct Poller<T> {
    epoll: OwnedFd,
    /// Watched descriptors and their events. The index here is the descriptor's epoll data.
    watched: Vec<Option<(RawFd, T)>>,
}

impl<T: Copy + PartialEq> Poller<T> {
    /// Creates an instance that watches no descriptor.
    ///
    /// # Errors
    /// The process or the host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Poller { epoll: sys::epoll()?, watched: Vec::new() })
    }

    /// Watches a descriptor, and reports it as `event`. The descriptor must stay open until it is removed or the poller
    /// is dropped.
    ///
    /// # Errors
    /// EEXIST if the same descriptor is watched already, EPERM if epoll does not support it, ENOSPC at the limit of
    /// epoll watches.
    pub fn add(&mut self, fd: impl AsFd, interest: Interest, event: T) -> io::Result<()> {
        let fd = fd.as_fd().as_raw_fd();
        let index = self.watched.iter().position(Option::is_none).unwrap_or_else(|| {
            self.watched.push(None);
            self.watched.len() - 1
        });
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, interest, index)?;
        self.watched[index] = Some((fd, event));
        Ok(())
    }

    /// Changes the interest in the descriptor of `event`.
    ///
    /// # Errors
    /// ENOENT if no descriptor is watched for `event`.
    pub fn modify(&mut self, event: T, interest: Interest) -> io::Result<()> {
        match self.find(event) {
            Some((index, fd)) => self.control(ControlOptions::EPOLL_CTL_MOD, fd, interest, index),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    /// Watches `fd` for `event` in place of the descriptor watched so far, which must still be open.
    ///
    /// # Errors
    /// Errors of [`remove`](Self::remove) and [`add`](Self::add).
    pub fn replace(&mut self, event: T, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        self.remove(event)?;
        self.add(fd, interest, event)
    }

    /// Stops watching for `event`. Does nothing if no descriptor is watched for it.
    ///
    /// # Errors
    /// The descriptor has been closed.
    pub fn remove(&mut self, event: T) -> io::Result<()> {
        let Some((index, fd)) = self.find(event) else { return Ok(()) };
        self.watched[index] = None;
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Interest::Read, index)
    }

    /// Notes that the descriptor of `event` has been closed. The kernel has stopped watching it.
    pub fn forget(&mut self, event: T) {
        if let Some((index, _)) = self.find(event) {
            self.watched[index] = None;
        }
    }

    fn find(&self, event: T) -> Option<(usize, RawFd)> {
        self.watched.iter().enumerate().find_map(|(index, watched)| match watched {
            Some((fd, this)) if *this == event => Some((index, *fd)),
            _ => None,
        })
    }

    fn control(
        &self,
        option: ControlOptions,
        fd: RawFd,
        interest: Interest,
        index: usize,
    ) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), option, fd, Event::new(interest.events(), index as u64))
    }

    /// Waits until an event occurs, a signal arrives, or `timeout` has passed, which is rounded up to milliseconds.
    /// Calls `each` for every event. Without `timeout`, the wait has no limit.
    ///
    /// # Errors
    /// Errors of epoll_wait(2), except EINTR.
    pub fn wait(&self, timeout: Option<Duration>, mut each: impl FnMut(T)) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); MAX_EVENTS];
        // Rounded up, because callers repeat a wait that ends too early at once.
        let milliseconds = timeout
            .map_or(-1, |timeout| timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
        let count = match epoll::wait(self.epoll.as_raw_fd(), milliseconds, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for reported in &events[..count] {
            let index = reported.data as usize;
            if let Some(Some((_, event))) = self.watched.get(index) {
                each(*event);
            }
        }
        Ok(())
    }

    /// Waits as [`wait`](Self::wait) does, and for one more descriptor, which epoll does not watch. Returns true if
    /// that descriptor is ready. `timeout` is not rounded.
    ///
    /// The kernel runs a callback of epoll at each event of a watched descriptor, during a wait or not. On an AF_XDP
    /// socket, that is one for each frame sent, and a tenth of the frame's cost.
    ///
    /// # Errors
    /// Errors of ppoll(2) and epoll_wait(2), except EINTR.
    pub fn wait_also(
        &self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        timeout: Option<Duration>,
        each: impl FnMut(T),
    ) -> io::Result<bool> {
        let events = match interest {
            Interest::Nothing => 0,
            Interest::Read | Interest::Edge => libc::POLLIN,
            Interest::Write => libc::POLLOUT,
            Interest::ReadWrite => libc::POLLIN | libc::POLLOUT,
        };
        let fds = [(self.epoll.as_fd(), libc::POLLIN), (fd, events)];
        let [watched, ready] = sys::poll_two(fds, timeout)?;
        if watched {
            self.wait(Some(Duration::ZERO), each)?;
        }
        Ok(ready)
    }
}

/// Returns the time from now until `deadline`, or zero if it has passed. Returns `None` without a deadline.
pub fn until(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn events(poller: &Poller<char>) -> Vec<char> {
        let mut found = Vec::new();
        poller.wait(Some(Duration::ZERO), |event| found.push(event)).unwrap();
        found.sort_unstable();
        found
    }

    #[test]
    fn one_more_descriptor_may_be_waited_for() {
        let (a, mut a_peer) = UnixStream::pair().unwrap();
        let (b, mut b_peer) = UnixStream::pair().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add(&a, Interest::Read, 'a').unwrap();
        let wait = |poller: &Poller<char>| {
            let mut found = Vec::new();
            let time = Some(Duration::from_millis(1));
            let ready =
                poller.wait_also(b.as_fd(), Interest::Read, time, |event| found.push(event));
            (ready.unwrap(), found)
        };
        assert_eq!(wait(&poller), (false, vec![]));
        a_peer.write_all(b"x").unwrap();
        assert_eq!(wait(&poller), (false, vec!['a']));
        b_peer.write_all(b"x").unwrap();
        assert_eq!(wait(&poller), (true, vec!['a']));
    }

    #[test]
    fn events_are_what_was_registered() {
        let (a, mut a_peer) = UnixStream::pair().unwrap();
        let (b, mut b_peer) = UnixStream::pair().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add(&a, Interest::Read, 'a').unwrap();
        poller.add(&b, Interest::Edge, 'b').unwrap();
        assert_eq!(events(&poller), []);
        a_peer.write_all(b"x").unwrap();
        b_peer.write_all(b"x").unwrap();
        assert_eq!(events(&poller), ['a', 'b']);
        assert_eq!(events(&poller), ['a'], "the edge is reported once");
        b_peer.write_all(b"x").unwrap();
        poller.remove('a').unwrap();
        assert_eq!(events(&poller), ['b'], "and again, when there is more");
        poller.modify('b', Interest::Nothing).unwrap();
        b_peer.write_all(b"x").unwrap();
        assert_eq!(events(&poller), []);
        poller.modify('b', Interest::Edge).unwrap();
        assert_eq!(events(&poller), ['b'], "data that came meanwhile is reported");
    }
}
