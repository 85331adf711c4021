//! Replacing a port that runs: the new port is built beside the old one, which resumes if that fails.
//!
//! Both ports share the listening socket and a TAP's queues by duplicated descriptors. The old port is suspended
//! while the new one starts, as in a take-over by another daemon. AF_XDP queues of a network device can be bound
//! only once. There the old port ends first, and is started again if the new one cannot start.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::control::{ControlCommand, FrontendHandover};
use super::preparing::offer;
use super::{Opened, Port, Ports, Prepared, Refusal};
use crate::config::{Host, PortConfig, PortOptions};
use crate::endpoint::{Endpoint, Frontend};
use crate::error::{StartError, no_descriptor};
use crate::features::{PortOffloads, names};
use crate::policy::Filter;
use crate::port::TapState;
use crate::sys::process::check_cpus;

/// Time that a new port's control thread may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that the kernel may take to free the queues of a closed AF_XDP socket.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);
/// Interval between two attempts to bind such a queue.
const RELEASE_POLL: Duration = Duration::from_millis(5);

/// Refusal to replace a port whose frontend cannot connect again.
const ONE_CONNECTION: &str = "the port has an inherited connection (fd), which cannot be opened again; restart the \
                              program that started the daemon";

/// The descriptors that a new port is built on.
struct Base {
    endpoint: Endpoint,
    queues: Vec<OwnedFd>,
    /// The state of a TAP that the old port has set up.
    tap: Option<TapState>,
}

impl Ports {
    /// Replaces the port `name` by the one that `options` describe. `files` are the new port's listening socket, if
    /// its path differs, and its TAP's queues, if the TAP differs.
    ///
    /// # Errors
    /// The reason why the new port cannot start; the old one resumes.
    pub fn replace(
        &mut self,
        name: &str,
        options: PortOptions,
        files: Vec<OwnedFd>,
    ) -> Result<&Port, Refusal> {
        let config = options.check().map_err(Refusal::CannotBeDone)?;
        let old = self.find(name)?;
        if old.status().has_ended() {
            let why = format!("port {name} has ended; remove it first");
            return Err(Refusal::CannotBeDone(why));
        }
        self.check_addition(&config, Some(name))?;
        let new_name = config.known_name().unwrap_or(name).to_owned();
        old.check_frontend(&config)?;
        let is_af_xdp = matches!(config.host, Host::AfXdp(_));
        let descriptors = &old.status().descriptors;
        descriptors
            .check_replacement(usize::from(config.queue_pairs), is_af_xdp)
            .map_err(|why| Refusal::CannotBeDone(why.to_string()))?;
        if shares_host(old.config(), &config) || is_on_same_device(old.config(), &config) {
            old.check_features(&config, old.offloads())?;
        }
        let is_same_tap = shares_host(old.config(), &config) && !old.status().is_degraded();
        let base = old.base_of(&config, files)?;
        self.check_device(&config, &base.queues, Some(name))?;
        if is_on_same_device(old.config(), &config) {
            self.replace_exclusively(name, &new_name, config, base)?;
        } else {
            self.replace_beside(name, &new_name, config, base)?;
        }
        info!("{new_name}: replaced; its VMM reconnects");
        if !is_same_tap {
            self.log_created_tap(&new_name);
        }
        self.find(&new_name)
    }

    /// Builds the new port while the old one runs, then suspends the old one and starts the new one.
    fn replace_beside(
        &mut self,
        name: &str,
        new_name: &str,
        config: PortConfig,
        base: Base,
    ) -> Result<(), Refusal> {
        let old = self.find(name)?;
        let Base { endpoint, queues, tap } = base;
        let opened =
            Opened::of_predecessor(new_name.into(), config.clone(), true, (queues, tap), endpoint)?;
        old.check_features(&config, opened.offloads())?;
        let prepared = self.prepare(opened, Vec::new())?;
        // The old port is suspended from here on.
        let suspended = old.suspend();
        let started = suspended.and_then(|()| {
            let started = self.start_suspended(prepared)?;
            started
                .map_err(|why| Refusal::CannotBeDone(format!("cannot start the new port: {why}")))
        });
        let old = self.find(name)?;
        if let Err(refusal) = started {
            old.send(ControlCommand::Resume);
            return Err(refusal);
        }
        old.end(&config);
        self.end(name)?;
        self.find(new_name)?.send(ControlCommand::Resume);
        Ok(())
    }

    /// Ends the old port, and starts the new one, or the old one again if that fails.
    fn replace_exclusively(
        &mut self,
        name: &str,
        new_name: &str,
        config: PortConfig,
        base: Base,
    ) -> Result<(), Refusal> {
        let old = self.find(name)?;
        check_cpus(&config.cpu_affinity).map_err(Refusal::CannotBeDone)?;
        let (old_config, from_file) = (old.config().clone(), old.is_from_file());
        let again = old.listener().map_err(no_descriptor)?;
        let again = match again {
            Some(listener) => Endpoint::taken(listener).map_err(no_descriptor)?,
            None => Endpoint::open(&old_config.frontend, None)?,
        };
        if let Err(refusal) = old.suspend() {
            old.send(ControlCommand::Resume);
            return Err(refusal);
        }
        old.send(ControlCommand::CommitHandover);
        self.end(name)?;
        let failed = match self.start_again(new_name, &config, true, base.endpoint) {
            Ok(()) => {
                if config.frontend != old_config.frontend {
                    remove_socket(again, &old_config.frontend);
                }
                return Ok(());
            }
            Err(error) => error,
        };
        warn!("{name}: not changed: {failed}; starting it again with its old options");
        match self.start_again(name, &old_config, from_file, again) {
            Ok(()) => Err(Refusal::CannotBeDone(format!(
                "{failed}; the port was started again with its old options"
            ))),
            Err(why) => {
                error!("{name}: cannot start it again: {why}");
                let why =
                    format!("{failed}; cannot start the port again with its old options: {why}");
                Err(Refusal::CannotBeDone(why))
            }
        }
    }

    /// Starts a port on a device whose queues the kernel is about to free.
    fn start_again(
        &mut self,
        name: &str,
        config: &PortConfig,
        from_file: bool,
        endpoint: Endpoint,
    ) -> Result<(), StartError> {
        let end = Instant::now() + RELEASE_TIMEOUT;
        let listener = endpoint.fd().map(|fd| fd.try_clone_to_owned()).transpose();
        let listener = listener.map_err(no_descriptor)?;
        let prepared = loop {
            let endpoint = match &listener {
                Some(fd) => {
                    let fd = fd.try_clone().map_err(no_descriptor)?;
                    Endpoint::taken(fd).map_err(no_descriptor)?
                }
                None => Endpoint::open(&config.frontend, None)?,
            };
            let host = (Vec::new(), None);
            let opened =
                Opened::of_predecessor(name.into(), config.clone(), from_file, host, endpoint);
            match opened.and_then(|opened| self.prepare(opened, Vec::new())) {
                Err(_) if Instant::now() < end => thread::sleep(RELEASE_POLL),
                prepared => break prepared,
            }
        };
        self.start_suspended(prepared?)?.map_err(StartError::new)?;
        if let Ok(port) = self.find(name) {
            port.send(ControlCommand::Resume);
        }
        Ok(())
    }

    /// Starts a port's control thread, which waits for a command to resume. If the thread fails, the port is removed
    /// again, and the inner error is the thread's.
    ///
    /// # Errors
    /// The thread cannot be started.
    fn start_suspended(
        &mut self,
        mut prepared: Prepared,
    ) -> Result<Result<(), String>, StartError> {
        let (done, ready) = channel();
        // An empty replay: the port takes over no frontend.
        let (replay, _) = UnixStream::pair().map_err(no_descriptor)?;
        prepared.take_over(FrontendHandover { replay, messages: Some(0), connection: None, done });
        self.start(prepared)?;
        let ready = ready.recv_timeout(READY_TIMEOUT);
        let ready =
            ready.unwrap_or_else(|_| Err("its control thread did not answer within 1 s".into()));
        if ready.is_err() {
            self.end_last();
        }
        Ok(ready)
    }
}

impl Port {
    /// Checks that a connected VMM keeps all that it uses under `config`, except features that follow from the
    /// device.
    fn check_frontend(&self, config: &PortConfig) -> Result<(), Refusal> {
        let old = self.config();
        let inherited = matches!(config.frontend, Frontend::Inherited(_));
        if inherited && !matches!(self.listener(), Ok(Some(_))) {
            return Err(Refusal::CannotBeDone(ONE_CONNECTION.into()));
        }
        if self.status().connection().since.is_none() {
            return Ok(());
        }
        if config.frontend != old.frontend {
            return Err(cannot_change("the socket", "its VMM would reconnect to the old path"));
        }
        if config.queue_pairs < old.queue_pairs {
            return Err(cannot_change(
                "queue-pairs",
                &format!("it was offered {}", old.queue_pairs),
            ));
        }
        let mapped = self.status().memory.mapped();
        if config.memory_limit() < mapped {
            return Err(cannot_change("max-memory", &format!("it has {mapped} bytes mapped")));
        }
        if config.require_sealed_memory && !old.require_sealed_memory && mapped > 0 {
            return Err(cannot_change("require-sealed-memory", "its memory may not be sealed"));
        }
        Ok(())
    }

    /// Checks that the new device offers all features that a connected VMM has accepted.
    fn check_features(&self, config: &PortConfig, offloads: PortOffloads) -> Result<(), Refusal> {
        const KEYS: [&str; 7] =
            ["tap", "tap-fd", "af-xdp", "loopback", "guest-tso", "ring-reset", "mac"];
        let accepted = self.status().connection().features.unwrap_or_default();
        let missing = accepted & !offer(config, offloads).bits();
        if missing == 0 {
            return Ok(());
        }
        let keys = self.config().fixed_differences(config);
        let keys: Vec<&str> = keys.into_iter().filter(|key| KEYS.contains(key)).collect();
        let features = names(missing).join(", ");
        Err(cannot_change(&keys.join(", "), &format!("it has accepted {features}")))
    }

    /// Returns the descriptors that a port under `config` is built on: those in `files`, and those of this port.
    fn base_of(&self, config: &PortConfig, files: Vec<OwnedFd>) -> Result<Base, Refusal> {
        let old = self.config();
        let failed = |error| Refusal::from(no_descriptor(error));
        let mut files = files.into_iter();
        let has_listener = config.frontend == old.frontend;
        let endpoint = match config.frontend {
            Frontend::Connect(_) => Endpoint::open(&config.frontend, None)?,
            _ if has_listener => {
                let listener = self
                    .listener()
                    .map_err(failed)?
                    .ok_or_else(|| Refusal::CannotBeDone(ONE_CONNECTION.into()))?;
                Endpoint::taken(listener).map_err(failed)?
            }
            _ => {
                let fd = files.next().ok_or_else(|| {
                    Refusal::CannotBeDone(
                        "the request brings no listening socket; use 'vhost-user-net ctl reload'"
                            .into(),
                    )
                })?;
                Endpoint::taken(fd).map_err(failed)?
            }
        };
        let mut queues: Vec<OwnedFd> = files.collect();
        let pairs = usize::from(config.queue_pairs);
        let is_tap = matches!(config.host, Host::Tap(_) | Host::TapDescriptors(_));
        let is_same = shares_host(old, config) && !self.status().is_degraded();
        if is_same && let Some(tap) = self.tap() {
            // The kernel steers no frame to these queues before a session has buffers and a filter for them.
            queues = tap.detach(queues).map_err(failed)?;
        }
        if is_tap && is_same && queues.is_empty() {
            queues = self.queues().map_err(failed)?.into_iter().take(pairs).collect();
        }
        let needed = if is_tap { pairs } else { 0 };
        if queues.len() != needed {
            let why = format!(
                "the port needs {needed} queues of its TAP, and the request brings {}; reload again",
                queues.len()
            );
            return Err(Refusal::CannotBeDone(why));
        }
        let tap = self.tap().filter(|_| is_same).cloned();
        Ok(Base { endpoint, queues, tap })
    }

    /// Suspends the port until a command resumes or ends it.
    fn suspend(&self) -> Result<(), Refusal> {
        let suspended: Result<_, String> = self.request(ControlCommand::PrepareHandover)?;
        suspended.map(drop).map_err(Refusal::CannotBeDone)
    }

    /// Ends this suspended port, and leaves what both ports share to the new one.
    fn end(&self, new: &PortConfig) {
        let old = self.config();
        let filter = &self.status().filters.rx;
        if (!shares_host(old, new) || new.rx_filter.is_none())
            && !filter.get().is_none()
            && let Err(error) = filter.set(&Filter::default())
        {
            warn!("{}: cannot remove its rx filter: {error}", self.name());
        }
        if old.frontend == new.frontend {
            self.send(ControlCommand::CommitHandover);
        } else if shares_host(old, new) {
            if let Ok(Some(Ok(endpoint))) = self.listener().map(|fd| fd.map(Endpoint::taken)) {
                remove_socket(endpoint, &old.frontend);
            }
            self.send(ControlCommand::CommitHandover);
        } else {
            self.send(ControlCommand::Stop("the port is replaced"));
        }
    }
}

/// Returns whether two ports have the same TAP.
fn shares_host(old: &PortConfig, new: &PortConfig) -> bool {
    old.host == new.host && matches!(old.host, Host::Tap(_) | Host::TapDescriptors(_))
}

/// Returns whether two ports have AF_XDP queues of one device, which only one port can bind at a time.
fn is_on_same_device(old: &PortConfig, new: &PortConfig) -> bool {
    match (&old.host, &new.host) {
        (Host::AfXdp(old), Host::AfXdp(new)) => old.name == new.name,
        _ => false,
    }
}

/// Removes the file of a socket that no port uses any more.
fn remove_socket(mut endpoint: Endpoint, frontend: &Frontend) {
    if let Frontend::Listen(path) = frontend {
        // Dropping the owner removes the file.
        endpoint.own(path);
    }
}

/// Returns the refusal to change a key while a VMM is connected.
fn cannot_change(key: &str, why: &str) -> Refusal {
    Refusal::CannotBeDone(format!(
        "cannot change {key} while its VMM is connected: {why}; stop the VMM and reload, or remove and \
         add the port"
    ))
}
