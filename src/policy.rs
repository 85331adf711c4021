//! What an operator allows a guest: addresses of its own, certain
//! protocols and peers, and so much traffic.
//!
//! Invariant: a rule judges a copy of the frame's headers that the guest can't reach, and what is
//! sent begins with that copy.

pub mod filter;
pub mod identity;
pub mod limiter;
pub mod live;
pub mod rules;

pub use filter::Filter;
pub use identity::Identity;
pub use limiter::{Limit, Limiter, Limits};
pub use live::{FilterView, LiveFilter};
pub use rules::Rules;
