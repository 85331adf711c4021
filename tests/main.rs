//! The integration tests: one program, a module per use.

mod af_xdp;
mod af_xdp_survival;
mod capture;
mod cli;
mod control;
mod doctor;
mod echo;
mod fuzzing;
mod hostile;
mod lifecycle;
mod live_migration;
mod metrics;
mod migration;
mod oracle;
mod packaging;
mod policy;
mod ports;
mod protocol;
mod qemu;
mod reload;
mod sandbox;
mod support;
mod survival;
mod tap;
mod testpmd;
mod zero_copy;
