//! Waiting for several descriptors at once: the `epoll` crate, wrapped once, with typed events
//! in place of numbers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use epoll::{ControlOptions, Event, Events};

use crate::sys;

/// Events that one wait can bring.
const EVENTS: usize = 16;

/// What a descriptor is waited on for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Readable; also hung up or broken.
    Read,
    /// Writable; also hung up or broken.
    Write,
    /// Either.
    ReadWrite,
    /// Each write to an eventfd, whatever its counter and without reading it; of others, each time
    /// that there is more to read.
    Edge,
    /// Nothing.
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
    /// What each watched descriptor stands for; a descriptor's place here is its epoll data.
    watched: Vec<Option<(RawFd, T)>>,
}

impl<T: Copy + PartialEq> Poller<T> {
    /// Makes an instance that watches nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Poller { epoll: sys::epoll()?, watched: Vec::new() })
    }

    /// Watches a descriptor, as `what`. It must stay open until it is removed or the poller is
    /// dropped.
    ///
    /// # Errors
    /// EEXIST if the same descriptor is watched already, EPERM if it can't be waited on.
    pub fn add(&mut self, fd: impl AsFd, interest: Interest, what: T) -> io::Result<()> {
        let fd = fd.as_fd().as_raw_fd();
        let place = self.watched.iter().position(Option::is_none).unwrap_or_else(|| {
            self.watched.push(None);
            self.watched.len() - 1
        });
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, interest, place)?;
        self.watched[place] = Some((fd, what));
        Ok(())
    }

    /// Changes what `what` is waited on for.
    pub fn modify(&mut self, what: T, interest: Interest) -> io::Result<()> {
        match self.find(what) {
            Some((place, fd)) => self.control(ControlOptions::EPOLL_CTL_MOD, fd, interest, place),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    /// Watches another descriptor for `what` instead of the last one, which must be open still.
    pub fn replace(&mut self, what: T, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        self.remove(what)?;
        self.add(fd, interest, what)
    }

    /// Watches `what` no more; does nothing if it was not watched.
    pub fn remove(&mut self, what: T) -> io::Result<()> {
        let Some((place, fd)) = self.find(what) else { return Ok(()) };
        self.watched[place] = None;
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Interest::Read, place)
    }

    /// Notes that the descriptor behind `what` has been closed, which ends its being watched.
    pub fn forget(&mut self, what: T) {
        if let Some((place, _)) = self.find(what) {
            self.watched[place] = None;
        }
    }

    fn find(&self, what: T) -> Option<(usize, RawFd)> {
        self.watched.iter().enumerate().find_map(|(place, watched)| match watched {
            Some((fd, this)) if *this == what => Some((place, *fd)),
            _ => None,
        })
    }

    fn control(
        &self,
        option: ControlOptions,
        fd: RawFd,
        interest: Interest,
        place: usize,
    ) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), option, fd, Event::new(interest.events(), place as u64))
    }

    /// Waits until something happens, `timeout` has passed (none: for ever), or a signal arrives,
    /// and calls `each` for every event.
    pub fn wait(&self, timeout: Option<Duration>, mut each: impl FnMut(T)) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); EVENTS];
        // Rounded up: a wait that ends early would be repeated at once.
        let milliseconds = timeout
            .map_or(-1, |timeout| timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
        let count = match epoll::wait(self.epoll.as_raw_fd(), milliseconds, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in &events[..count] {
            let place = event.data as usize;
            if let Some(Some((_, what))) = self.watched.get(place) {
                each(*what);
            }
        }
        Ok(())
    }

    /// The same, and for one more descriptor that is not watched between waits; says whether it
    /// is ready.
    ///
    /// A descriptor that is watched costs the kernel a call of epoll's whenever something happens to
    /// it, asleep or not: on an AF_XDP socket for each frame sent, which is a tenth of its cost.
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

/// Time from now until `deadline`, none if there is no deadline.
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
        poller.wait(Some(Duration::ZERO), |what| found.push(what)).unwrap();
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
            let ready = poller.wait_also(b.as_fd(), Interest::Read, time, |what| found.push(what));
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
        assert_eq!(events(&poller), ['b'], "what came meanwhile is told");
    }
}
