//! A packet filter that an operator can replace while workers use it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Filter;

/// A filter, and the number of its changes.
#[derive(Debug, Default)]
pub struct LiveFilter {
    changes: AtomicUsize,
    filter: Mutex<Arc<Filter>>,
}

impl LiveFilter {
    /// Creates the live filter, with `filter` in force.
    pub fn new(filter: Filter) -> Self {
        LiveFilter { changes: AtomicUsize::new(0), filter: Mutex::new(Arc::new(filter)) }
    }

    /// Returns the filter in force.
    pub fn get(&self) -> Arc<Filter> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the filter. Each worker uses the new one from its next burst on.
    pub fn set(&self, filter: Filter) {
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(filter);
        // Counted after the filter is replaced: a thread that sees the new count finds the new filter.
        self.changes.fetch_add(1, Ordering::Release);
    }
}

/// One thread's view of a live filter.
#[derive(Debug, Clone)]
pub struct FilterView {
    live: Arc<LiveFilter>,
    seen: usize,
    /// The filter; `None` if it allows every frame.
    current: Option<Arc<Filter>>,
}

impl FilterView {
    /// Creates a view of the filter in force.
    pub fn new(live: Arc<LiveFilter>) -> Self {
        let seen = live.changes.load(Ordering::Acquire);
        let current = Some(live.get()).filter(|filter| !filter.is_none());
        FilterView { live, seen, current }
    }

    /// Updates the view if the filter has changed. Workers call it once for each burst.
    #[inline]
    pub fn refresh(&mut self) {
        if self.live.changes.load(Ordering::Acquire) != self.seen {
            *self = FilterView::new(self.live.clone());
        }
    }

    /// Returns the filter; `None` if it allows every frame.
    #[inline]
    pub fn current(&self) -> Option<&Filter> {
        self.current.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn change_is_seen_at_the_next_refresh() {
        let live = Arc::new(LiveFilter::default());
        let mut view = FilterView::new(live.clone());
        assert_eq!(view.current(), None);
        let filter: Filter = "default deny".parse().unwrap();
        live.set(filter.clone());
        assert_eq!(view.current(), None);
        view.refresh();
        assert_eq!(view.current(), Some(&filter));
        live.set(Filter::default());
        view.refresh();
        assert_eq!(view.current(), None);
    }
}
