//! `vhost-user-net doctor`: checks a host, and prints each problem with the command that fixes it.
//!
//! The doctor only reads: the kernel's files, netlink, and ioctls that query. It opens no queue of a
//! device, attaches no program, connects to no socket and changes nothing. The operator runs the
//! printed commands.
//!
//! FAIL: the daemon could not serve, or would serve wrongly. WARN: the daemon would serve, but slower or
//! less safely, or the doctor cannot tell. A device that the operator did not name cannot FAIL, because
//! it may have another purpose.

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
mod queues;
mod socket;
mod stack;
mod tap;
mod tun;
mod vmm;

use crate::config::{Config, Host as HostSide, read_file};

pub use finding::{Finding, Status};
pub use options::Options;

use host::{Credentials, Host};
use network::Network;
use options::Requirements;

/// A doctor's task: the command line, and the configuration file that it names.
#[derive(Debug)]
pub struct Doctor {
    options: Options,
    config: Option<Config>,
}

/// The findings of all checks, and the format to print them in.
#[derive(Debug)]
pub struct Report {
    findings: Vec<Finding>,
    json: bool,
}

impl Doctor {
    /// Reads the configuration file that the options name, if any.
    ///
    /// # Errors
    /// The file cannot be read, or is not valid: one line that names the first mistake.
    pub fn new(options: Options) -> Result<Self, String> {
        let config = options.config.as_deref().map(read_file).transpose()?;
        Ok(Doctor { options, config })
    }

    /// Checks this host.
    pub fn run(self) -> Report {
        let host = Host::real();
        let credentials = Credentials::of(&host);
        let json = self.options.json;
        let mut findings = Vec::new();
        let network = Network::read();
        if let Err(error) = &network {
            let why = format!("cannot list network devices: netlink: {error}; no port is checked");
            findings.push(Finding::warn("network", "host", why));
        }
        // A device that netlink could not report may exist.
        let is_known = network.is_ok();
        let network = network.unwrap_or_default();
        let requirements = Requirements::new(self.options, self.config, &network);
        findings.extend(tun::check(&requirements));
        for port in requirements.ports.iter().filter(|_| is_known) {
            let mut found = match &port.host {
                HostSide::Tap(name) => tap::check(&host, &credentials, &network, port, name),
                HostSide::AfXdp(af_xdp) => device::check(&host, &network, port, af_xdp),
                HostSide::TapDescriptors(_) | HostSide::Loopback => Vec::new(),
            };
            if !port.named {
                found.iter_mut().for_each(Finding::downgrade);
            }
            findings.extend(found);
        }
        findings.extend(offloads::nics(&network));
        findings.extend(path::check(&network, &requirements));
        for socket in &requirements.sockets {
            findings.extend(socket::check(
                &host,
                &credentials,
                socket,
                requirements.qemu_user.as_deref(),
            ));
        }
        let sealed = requirements.ports.iter().any(|port| port.require_sealed_memory);
        findings.extend(vmm::check(&host, sealed));
        findings.extend(memory::check(&host, &credentials, &requirements));
        findings.extend(limits::check(&host, &credentials, &requirements));
        findings.extend(placement::check(&host, &network, &requirements));
        findings.extend(stack::check(&host, &credentials, &network, &requirements));
        Report { findings, json }
    }
}

impl Report {
    /// Returns whether any check has the status FAIL.
    pub fn fails(&self) -> bool {
        self.count(Status::Fail) > 0
    }

    fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }

    /// Formats the report: one line for each finding and a summary line, or JSON.
    pub fn show(&self) -> String {
        if self.json {
            // Only strings, which serde_json always serializes.
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
            (0, 0) => "no problem found",
            (0, _) => "the daemon can serve, but see the warnings",
            _ => "the daemon cannot serve until each FAIL is fixed",
        };
        format!("{lines}{verdict}: {passes} pass, {warnings} warn, {failures} fail\n")
    }
}
