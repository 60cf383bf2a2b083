//! Reproducible random order. A run is resumed by drawing its order again, so the algorithm and
//! its constants are part of what a run folder means and must not change.

/// `SplitMix64` (Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An index below `n`, by multiplication; the bias is below `n / 2^64`.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// The numbers `0..n` in an order that `seed` and `stream` alone decide.
///
/// Streams of one seed are independent: the split is one, each epoch another.
pub(crate) fn permutation(n: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mixed = SplitMix64(seed).next().wrapping_add(stream);
    let mut rng = SplitMix64(SplitMix64(mixed).next());
    let mut order: Vec<usize> = (0..n).collect();
    // Fisher and Yates, from the back.
    for last in (1..n).rev() {
        order.swap(last, rng.below(last + 1));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_pinned() {
        // Computed with an implementation of the same algorithm in Python.
        assert_eq!(permutation(8, 0, 0), [3, 5, 0, 2, 4, 7, 6, 1]);
        assert_eq!(permutation(8, 7, 3), [1, 4, 2, 3, 5, 7, 0, 6]);
        assert_eq!(permutation(0, 0, 0), [0_usize; 0]);
    }

    #[test]
    fn every_number_appears_once_and_streams_differ() {
        let first = permutation(100, 7, 1);
        let mut sorted = first.clone();
        sorted.sort_unstable();

        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(first, permutation(100, 7, 2));
        assert_ne!(first, permutation(100, 8, 1));
    }
}
