//! The integration tests: one program, a module per use.

mod af_xdp;
mod af_xdp_survival;
mod capture;
mod cli;
mod control;
mod docs;
mod echo;
mod fuzzing;
mod hostile;
mod lifecycle;
mod metrics;
mod oracle;
mod policy;
mod ports;
mod protocol;
mod qemu;
mod reference;
mod reload;
mod sandbox;
mod support;
mod tap;
mod testpmd;
mod zero_copy;
