//! `vhost-user-net doctor`: looks at a host, says what is wrong with it, and with what command that
//! is mended.
//!
//! It reads: files of the kernel's, netlink, ioctls that ask. It opens no queue of a device, attaches
//! no program, connects to no socket and changes nothing; what is to be done is printed, not done.
//!
//! FAIL is what the daemon could not serve with, or would serve wrongly; WARN what makes it slower or
//! less safe, and what can't be known. A device that nobody named can't FAIL: it may be meant for
//! somebody else.

mod card;
mod device;
mod finding;
mod host;
mod limits;
mod memory;
mod network;
mod offloads;
mod options;
mod path;
mod placement;
mod socket;
mod stack;
mod tap;
mod tun;
mod vmm;

use crate::config::{Config, Host as HostSide, read_file};

pub use finding::{Finding, Status};
pub use options::Options;

use host::{Host, Myself};
use network::Network;
use options::Requirements;

/// What is to be looked at.
#[derive(Debug)]
pub struct Doctor {
    options: Options,
    config: Option<Config>,
}

/// What was found.
#[derive(Debug)]
pub struct Report {
    findings: Vec<Finding>,
    json: bool,
}

impl Doctor {
    /// Reads the file that the options name, if they name one.
    ///
    /// # Errors
    /// One line that names the first mistake in the file.
    pub fn new(options: Options) -> Result<Self, String> {
        let config = options.config.as_deref().map(read_file).transpose()?;
        Ok(Doctor { options, config })
    }

    /// Looks at this host.
    pub fn run(self) -> Report {
        let host = Host::real();
        let myself = Myself::of(&host);
        let json = self.options.json;
        let mut findings = Vec::new();
        let network = Network::look();
        if let Err(error) = &network {
            let why = format!("netlink: {error}; nothing is known of them, and no port is checked");
            findings.push(Finding::warn("network", "network devices", why));
        }
        // What can't be seen is not taken for missing.
        let seen = network.is_ok();
        let network = network.unwrap_or_default();
        let requirements = Requirements::new(self.options, self.config, &network);
        findings.extend(tun::check(&requirements));
        for port in requirements.ports.iter().filter(|_| seen) {
            let mut found = match &port.host {
                HostSide::Tap(name) => tap::check(&host, &myself, &network, port, name),
                HostSide::AfXdp(af_xdp) => device::check(&host, &network, port, af_xdp),
                HostSide::TapDescriptors(_) | HostSide::Loopback => Vec::new(),
            };
            if !port.named {
                found.iter_mut().for_each(Finding::soften);
            }
            findings.extend(found);
        }
        findings.extend(offloads::cards(&network));
        findings.extend(path::check(&network, &requirements));
        for socket in &requirements.sockets {
            findings.extend(socket::check(
                &host,
                &myself,
                socket,
                requirements.qemu_user.as_deref(),
            ));
        }
        let sealed = requirements.ports.iter().any(|port| port.require_sealed_memory);
        findings.extend(vmm::check(&host, sealed));
        findings.extend(memory::check(&host, &myself, &requirements));
        findings.extend(limits::check(&host, &myself, &requirements));
        findings.extend(placement::check(&host, &network, &requirements));
        findings.extend(stack::check(&host, &myself, &network, &requirements));
        Report { findings, json }
    }
}

impl Report {
    /// Whether something fails.
    pub fn fails(&self) -> bool {
        self.count(Status::Fail) > 0
    }

    fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }

    /// What is to be shown: a line for each finding and one that sums up, or JSON.
    pub fn show(&self) -> String {
        if self.json {
            // Strings and nothing else, which always can be written.
            let findings = self.findings.iter().map(|finding| {
                let mut value = serde_json::json!(finding);
                // Deprecated name of `fix`.
                value["cure"] = value["fix"].clone();
                value
            });
            return serde_json::to_string_pretty(&findings.collect::<Vec<_>>()).unwrap_or_default()
                + "\n";
        }
        let lines: String = self.findings.iter().map(|finding| format!("{finding}\n")).collect();
        let [passes, warnings, failures] =
            [Status::Pass, Status::Warn, Status::Fail].map(|status| self.count(status));
        let verdict = match (failures, warnings) {
            (0, 0) => "nothing is wrong",
            (0, _) => "the daemon can serve, but see the warnings",
            _ => "the daemon can not serve as it is",
        };
        format!("{lines}{verdict}: {passes} pass, {warnings} warn, {failures} fail\n")
    }
}
