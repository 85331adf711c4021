//! What an operator allows a guest: addresses of its own, certain
//! protocols and peers, and so much traffic.
//!
//! Invariant: a rule judges a copy of the frame's headers that the guest can't reach, and what is
//! sent begins with that copy.

pub mod allowed_sources;
pub mod anti_spoofing;
pub mod filter;
pub mod limiter;
pub mod live;

pub use allowed_sources::AllowedSources;
pub use anti_spoofing::AntiSpoofing;
pub use filter::Filter;
pub use limiter::{Limit, Limiter, Limits};
pub use live::{FilterView, LiveFilter};
