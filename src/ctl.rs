//! `vhost-user-net ctl`: the client of the control socket.

mod capture;
pub mod connection;
pub mod reload;
mod stats;
pub mod top;
