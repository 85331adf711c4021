//! The operator's policy for a guest: anti-spoofing, packet filters and rate limits.
//!
//! Invariant: anti-spoofing and filters check a copy of the frame's headers that the guest cannot change, and the
//! frame that is sent begins with that copy.

pub mod allowed_sources;
pub mod anti_spoofing;
pub mod filter;
pub mod limit;
pub mod limiter;
pub mod live;

pub use allowed_sources::AllowedSources;
pub use anti_spoofing::AntiSpoofing;
pub use filter::Filter;
pub use limit::Limit;
pub use limiter::{Limiter, Limits};
pub use live::{FilterView, LiveFilter};
