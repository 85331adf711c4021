//! A filter that operators may change while frames are judged by it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Filter;

/// A filter, and how often it was changed.
#[derive(Debug, Default)]
pub struct LiveFilter {
    changes: AtomicUsize,
    filter: Mutex<Arc<Filter>>,
}

impl LiveFilter {
    /// With this filter to begin with.
    pub fn new(filter: Filter) -> Self {
        LiveFilter { changes: AtomicUsize::new(0), filter: Mutex::new(Arc::new(filter)) }
    }

    /// The filter that is in force.
    pub fn get(&self) -> Arc<Filter> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has each burst from now on judged by this one.
    pub fn set(&self, filter: Filter) {
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(filter);
        // After the filter: whoever sees the change finds it.
        self.changes.fetch_add(1, Ordering::Release);
    }
}

/// What one thread knows of it.
#[derive(Debug, Clone)]
pub struct FilterView {
    live: Arc<LiveFilter>,
    seen: usize,
    /// Nothing, if it lets everything pass.
    current: Option<Arc<Filter>>,
}

impl FilterView {
    /// With the filter as it is now.
    pub fn new(live: Arc<LiveFilter>) -> Self {
        let seen = live.changes.load(Ordering::Acquire);
        let current = Some(live.get()).filter(|filter| !filter.is_none());
        FilterView { live, seen, current }
    }

    /// Looks whether it was changed: once a burst.
    #[inline]
    pub fn refresh(&mut self) {
        if self.live.changes.load(Ordering::Acquire) != self.seen {
            *self = FilterView::new(self.live.clone());
        }
    }

    /// The filter, unless it lets everything pass.
    #[inline]
    pub fn current(&self) -> Option<&Filter> {
        self.current.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_at_the_next_look() {
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
