//! Histograms whose bounds are powers of two.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Counter;

/// Counts of values by size: at most 1, at most 2, at most 4, … at most 2^(N-1), and larger.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    counts: [Counter; N],
    larger: Counter,
    sum: Counter,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| Counter::default());
        Histogram { counts, larger: Counter::default(), sum: Counter::default() }
    }
}

impl<const N: usize> Serialize for Histogram<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = self.counts.iter().chain([&self.larger, &self.sum]);
        serializer.collect_seq(all)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Histogram<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Another version may have fewer bounds, or more.
        let mut all = Vec::<Counter>::deserialize(deserializer)?.into_iter();
        let counts = std::array::from_fn(|_| all.next().unwrap_or_default());
        let (larger, sum) = (all.next().unwrap_or_default(), all.next().unwrap_or_default());
        Ok(Histogram { counts, larger, sum })
    }
}

impl<const N: usize> Histogram<N> {
    /// Counts a value. Only the histogram's one writer may call this.
    #[inline]
    pub fn observe(&self, value: u64) {
        let index = (u64::BITS - value.saturating_sub(1).leading_zeros()) as usize;
        self.counts.get(index).unwrap_or(&self.larger).add(1);
        self.sum.add(value);
    }

    /// Adds the counts of another daemon, as [`Counter::restore`] does.
    pub(super) fn restore(&self, other: &Self) {
        self.counts.iter().zip(&other.counts).for_each(|(ours, theirs)| ours.restore(theirs));
        self.larger.restore(&other.larger);
        self.sum.restore(&other.sum);
    }

    /// Returns the bounds in ascending order, each with the number of values at or below it. The last bound is
    /// infinity.
    pub fn cumulated(&self) -> Vec<(f64, u64)> {
        let mut below = 0;
        let bounds = (0..N).map(|index| (1_u64 << index) as f64).chain([f64::INFINITY]);
        let counts = self.counts.iter().chain([&self.larger]);
        let cumulate = |(bound, count): (f64, &Counter)| {
            below += count.get();
            (bound, below)
        };
        bounds.zip(counts).map(cumulate).collect()
    }

    /// Returns the sum of all values.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }

    /// Returns the lowest bound that at least `share` (0 to 1) of the values do not exceed. Returns `None` if there
    /// are no values.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let cumulated = self.cumulated();
        let all = cumulated.last().map_or(0, |(_, all)| *all);
        let enough = |(_, below): &&(f64, u64)| *below as f64 >= share * all as f64;
        cumulated.iter().find(enough).map(|(bound, _)| *bound).filter(|_| all > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_counted_below_the_next_power_of_two() {
        let histogram = Histogram::<3>::default();
        assert_eq!(histogram.quantile(0.5), None);
        [0, 1, 2, 3, 4, 5, 1000].iter().for_each(|value| histogram.observe(*value));
        let expected = [(1.0, 2), (2.0, 3), (4.0, 5), (f64::INFINITY, 7)];
        assert_eq!(histogram.cumulated(), expected);
        assert_eq!(histogram.sum(), 1015);
        assert_eq!(histogram.quantile(0.5), Some(4.0));
        assert_eq!(histogram.quantile(1.0), Some(f64::INFINITY));
    }
}
