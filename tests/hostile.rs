//! What tenants, frontends, the network and operators can throw at the daemon, and what must
//! happen then: 50 cases, numbered as in docs/threat-model.md. Each leaves the daemon alive, its
//! neighbour's traffic whole, and nothing behind (`support::hostile::Scene`).
//!
//! Outcomes: R, the request is refused or the connection closed; B, the queue pair is broken until
//! the guest resets or reconnects; D, the frame is dropped and counted, and its chain used; C,
//! only this tenant's port suffers.

mod control;
mod rings;
