//! The integration tests: one program, a module per use.

mod af_xdp;
mod af_xdp_survival;
mod cli;
mod control;
mod echo;
mod filter;
mod fuzzing;
mod hostile;
mod lifecycle;
mod live;
mod oracle;
mod policy;
mod ports;
mod protocol;
mod qemu;
mod sandbox;
mod support;
mod tap;
mod testpmd;
mod zero_copy;
