//! From a configuration to a running port: opening, serving, and the order of shutting down.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use log::{debug, info, warn};

use crate::config::{Config, Frontend, Host};
use crate::device::{Device, Refusal};
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller, until};
use crate::features::{Offer, OfferOptions};
use crate::net_config::NetConfig;
use crate::port::HostQueue;
use crate::port::af_xdp::Interface;
use crate::port::tap::TapQueue;
use crate::protocol::{Connection, Event, Message, Reply};
use crate::sys::process::{TerminationSignals, inherit};
use crate::sys::tap::{Queue, device_exists};
use crate::worker::{Worker, WorkerOptions};

/// Messages handled before other descriptors are looked at again.
const MESSAGES_PER_TURN: usize = 64;

/// Why the daemon can't start: one line that names the thing and the way out.
#[derive(Debug)]
pub struct StartError(String);

impl StartError {
    /// With the line to show.
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

/// What the control thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signal,
    Endpoint,
    Connection,
}

/// Runs one port until a signal ends it, or its one inherited connection does.
///
/// # Errors
/// What kept it from starting; once it runs, nothing ends it but a signal.
pub fn run(config: &Config) -> Result<(), StartError> {
    // Before anything is opened, which could get the number of a descriptor that we were
    // promised and did not get.
    let inherited = Inherited::take(config)?;
    // Before any thread is started: they inherit the mask.
    let signals = TerminationSignals::block()
        .map_err(|error| StartError::new(format!("block signals: {error}")))?;
    let (name, queues) = open_host(config, inherited.tap_queues)?;
    let offloads = queues[0].offloads();
    let options = OfferOptions {
        guest_segmentation: config.guest_tso,
        mac: config.mac.is_some(),
        ring_reset: config.ring_reset,
    };
    let offer = Offer::new(offloads, options);
    let net_config = NetConfig {
        mac: config.mac.unwrap_or_default(),
        queue_pairs: config.queue_pairs,
        mtu: config.mtu,
    };
    let workers = start_workers(config, &name, queues)?;
    // Last: whoever sees the socket may connect.
    let endpoint = Endpoint::open(&config.frontend, inherited.frontend)?;
    let device = Device::new(name, offer, net_config, workers);
    info!(
        "{}: ready, {} queue pairs, features {:#x}",
        device.name(),
        config.queue_pairs,
        offer.bits()
    );
    let mut control = Control::new(device, endpoint, &signals)
        .map_err(|error| StartError::new(format!("wait for descriptors: {error}")))?;
    control.serve();
    control.finish();
    Ok(())
}

/// Descriptors that the process that started us left open for us.
struct Inherited {
    frontend: Option<OwnedFd>,
    tap_queues: Vec<OwnedFd>,
}

impl Inherited {
    fn take(config: &Config) -> Result<Self, StartError> {
        let take = |number: RawFd, option: &str| {
            inherit(number).map_err(|error| {
                StartError::new(format!("use descriptor {number} ({option}): {error}"))
            })
        };
        let frontend = match config.frontend {
            Frontend::Inherited(number) => Some(take(number, "--fd")?),
            Frontend::Listen(_) | Frontend::Connect(_) => None,
        };
        let tap_queues = match &config.host {
            Host::TapDescriptors(numbers) => {
                numbers.iter().map(|&number| take(number, "--tap-fd")).collect::<Result<_, _>>()?
            }
            Host::Tap(_) | Host::AfXdp(_) | Host::Loopback => Vec::new(),
        };
        Ok(Inherited { frontend, tap_queues })
    }
}

/// Opens the host side, one queue per pair, and names the port after it.
fn open_host(
    config: &Config,
    inherited: Vec<OwnedFd>,
) -> Result<(String, Vec<HostQueue>), StartError> {
    let pairs = config.queue_pairs;
    let queues = match &config.host {
        Host::Loopback => {
            return Ok(("loopback".into(), (0..pairs).map(|_| HostQueue::Loopback).collect()));
        }
        Host::AfXdp(options) => {
            let queues = Interface::start(options, pairs, config.mtu, config.mac, config.busy_poll)
                .map_err(|error| StartError::new(error.to_string()))?;
            let queues = queues.into_iter().map(|queue| HostQueue::AfXdp(Box::new(queue)));
            return Ok((options.name.clone(), queues.collect()));
        }
        Host::Tap(name) => open_tap(name, pairs, config.mtu)?,
        Host::TapDescriptors(_) => inherited
            .into_iter()
            .map(|fd| {
                let number = fd.as_raw_fd();
                Queue::inherit(fd)
                    .map_err(|error| StartError::new(format!("--tap-fd={number}: {error}")))
            })
            .collect::<Result<_, _>>()?,
    };
    let name = queues[0].identity().name.clone();
    if let Some(other) = queues.iter().find(|queue| queue.identity().name != name) {
        let other = &other.identity().name;
        return Err(StartError::new(format!(
            "--tap-fd names queues of {name} and of {other}: all must be of one device"
        )));
    }
    let queues = queues
        .into_iter()
        .map(|queue| {
            TapQueue::new(queue, config.tx_method).map(|queue| HostQueue::Tap(Box::new(queue)))
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(|error| StartError::new(format!("set up tap {name}: {error}")))?;
    if let HostQueue::Tap(queue) = &queues[0] {
        let offloads = queue.offloads();
        info!(
            "tap {name}: tx by {}, TCP segmentation {}, UDP segmentation {}",
            queue.tx_method(),
            if offloads.segmentation { "on" } else { "off" },
            if offloads.udp_segmentation { "on" } else { "off" },
        );
    }
    Ok((name, queues))
}

/// Opens `pairs` queues of the TAP `name`, which is made if it is missing.
fn open_tap(name: &str, pairs: u16, mtu: u16) -> Result<Vec<Queue>, StartError> {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    let make = format!("ip tuntap add dev {name} mode tap vnet_hdr{several}");
    let failed = |error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => "; is another process using it?".into(),
            Some(libc::EPERM) => {
                format!(
                    "; run with CAP_NET_ADMIN, or make it for this user with '{make} user NAME'"
                )
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "; is the kernel module tun loaded, and /dev/net/tun there?".into()
            }
            Some(libc::E2BIG) => "; other processes have queues of it open".into(),
            _ => String::new(),
        };
        StartError::new(format!("open tap {name}: {error}{hint}"))
    };
    let is_new = !device_exists(name).map_err(failed)?;
    let first = match (Queue::open(name, pairs > 1), pairs) {
        // The kernel says EINVAL when IFF_MULTI_QUEUE is not what the device has.
        (Err(error), _) if !is_new && error.raw_os_error() == Some(libc::EINVAL) => {
            match (Queue::open(name, pairs == 1), pairs) {
                (Ok(queue), 1) => queue,
                (Ok(_), _) => {
                    return Err(StartError::new(format!(
                        "tap {name} has one queue, and --queue-pairs={pairs}: make it again with \
                         'ip link delete {name} && {make}'"
                    )));
                }
                (Err(error), _) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(StartError::new(format!(
                        "{name} is a network device, but no TAP; choose another name"
                    )));
                }
                (Err(error), _) => return Err(failed(error)),
            }
        }
        (opened, _) => opened.map_err(failed)?,
    };
    let multi_queue = first.identity().multi_queue;
    let mut queues = vec![first];
    for _ in 1..pairs {
        queues.push(Queue::open(name, multi_queue).map_err(failed)?);
    }
    if is_new {
        info!("tap {name}: made, for as long as this process runs");
        queues[0].set_mtu(mtu.into()).and_then(|()| queues[0].set_up()).map_err(failed)?;
    }
    Ok(queues)
}

fn start_workers(
    config: &Config,
    name: &str,
    queues: Vec<HostQueue>,
) -> Result<Vec<Worker>, StartError> {
    let cpus = config.cpu_affinity.as_ref().map_or(&[][..], |list| &list.0);
    queues
        .into_iter()
        .enumerate()
        .map(|(pair, queue)| {
            let options = WorkerOptions {
                name: format!("{name}/{pair}"),
                cpu: cpus.iter().cycle().nth(pair).copied(),
                busy_poll: config.busy_poll,
            };
            Worker::start(queue, options)
                .map_err(|error| StartError::new(format!("start a worker of {name}: {error}")))
        })
        .collect()
}

/// The control thread of a port: signals, connections, messages.
struct Control {
    poller: Poller<Source>,
    device: Device,
    endpoint: Endpoint,
    connection: Option<Connection>,
}

impl Control {
    fn new(device: Device, endpoint: Endpoint, signals: &TerminationSignals) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(signals, Interest::Read, Source::Signal)?;
        if let Some(fd) = endpoint.fd() {
            poller.add(fd, Interest::Read, Source::Endpoint)?;
        }
        Ok(Control { poller, device, endpoint, connection: None })
    }

    /// Serves one frontend after the other until a signal comes.
    fn serve(&mut self) {
        loop {
            if self.connection.is_none() {
                if self.endpoint.is_exhausted() {
                    info!("{}: the inherited connection has ended", self.device.name());
                    return;
                }
                self.connect();
            }
            let deadline = match &self.connection {
                Some(connection) => connection.deadline(),
                None => self.endpoint.deadline(),
            };
            let mut signalled = false;
            let waited = self.poller.wait(until(deadline), |source| {
                signalled |= source == Source::Signal;
            });
            if let Err(error) = waited {
                warn!("{}: wait for descriptors: {error}", self.device.name());
                return;
            }
            if signalled {
                return;
            }
            self.talk();
        }
    }

    /// Takes a new connection, if there is one.
    fn connect(&mut self) {
        let Some(stream) = self.endpoint.connection() else { return };
        let name = self.device.name();
        let watched = Connection::new(stream).and_then(|connection| {
            self.poller.add(&connection, Interest::Read, Source::Connection)?;
            // The next frontend waits until this one has gone.
            self.poller.remove(Source::Endpoint)?;
            Ok(connection)
        });
        match watched {
            Ok(connection) => {
                info!("{name}: frontend connected");
                self.connection = Some(connection);
            }
            Err(error) => warn!("{name}: take a connection: {error}"),
        }
    }

    /// Handles what the frontend has sent.
    fn talk(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(connection) = &mut self.connection else { return };
            let ended = match connection.receive() {
                Ok(Event::Message(message)) => self.answer(message).err(),
                Ok(Event::Pending) => {
                    let wanted =
                        if connection.is_sending() { Interest::Write } else { Interest::Read };
                    let _ = self.poller.modify(Source::Connection, wanted);
                    return;
                }
                Ok(Event::Closed) => Some(None),
                Err(error) => Some(Some(error.to_string())),
            };
            if let Some(why) = ended {
                self.disconnect(why.as_deref());
            }
        }
    }

    /// Carries a message out and replies.
    ///
    /// # Errors
    /// Why the connection has to be closed; nothing if the frontend has gone.
    fn answer(&mut self, message: Message) -> Result<(), Option<String>> {
        let (code, need_reply) = (message.code, message.need_reply);
        // SET_PROTOCOL_FEATURES itself may switch acknowledgements on: they count from then on.
        let handled = self.device.handle(message);
        let acknowledge = need_reply && self.device.acknowledges();
        let reply = match handled {
            Ok(Some(reply)) => Some(reply),
            Ok(None) => acknowledge.then_some(Reply::U64(0)),
            Err(Refusal::Refused(why)) => {
                warn!("{}: {code:?} refused: {why}", self.device.name());
                acknowledge.then_some(Reply::U64(1))
            }
            Err(Refusal::Unanswerable(why)) => return Err(Some(format!("{code:?}: {why}"))),
        };
        match (reply, &mut self.connection) {
            (Some(reply), Some(connection)) => connection.send(code, &reply).map_err(|error| {
                let gone = matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                );
                (!gone).then(|| error.to_string())
            }),
            _ => Ok(()),
        }
    }

    /// Lets go of the frontend and of all that it gave us, and waits for the next.
    fn disconnect(&mut self, why: Option<&str>) {
        let name = self.device.name();
        match why {
            Some(why) => warn!("{name}: connection closed: {why}"),
            None => info!("{name}: frontend disconnected"),
        }
        let started = Instant::now();
        self.device.forget();
        debug!("{}: stopped in {:?}", self.device.name(), started.elapsed());
        let _ = self.poller.remove(Source::Connection);
        self.connection = None;
        if let Some(fd) = self.endpoint.fd()
            && let Err(error) = self.poller.add(fd, Interest::Read, Source::Endpoint)
        {
            warn!("{}: wait for the next frontend: {error}", self.device.name());
        }
        self.log_counters();
    }

    /// Stops in the order in which nothing is left half done: rings first, then the connection,
    /// then the socket's file (all when `self` is dropped).
    fn finish(mut self) {
        if self.connection.is_some() {
            self.disconnect(Some("the daemon stops"));
        }
        info!("{}: stopped", self.device.name());
    }

    fn log_counters(&self) {
        for (pair, worker) in self.device.workers().iter().enumerate() {
            let name = self.device.name();
            let counters = worker.counters();
            info!("{name}/{pair}: rx {}", counters.rx);
            info!("{name}/{pair}: tx {}", counters.tx);
            debug!(
                "{name}/{pair}: {} turns, {} sleeps, {} waits for the guest's buffers",
                counters.turns.get(),
                counters.sleeps.get(),
                counters.starved.get()
            );
        }
    }
}
