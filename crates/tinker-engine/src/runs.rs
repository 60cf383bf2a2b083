//! Rows of several sequences that go through a model together, by the adapter they go through.

use std::ops::Range;

/// Consecutive rows of one adapter.
#[derive(Debug)]
pub(crate) struct Run<'a, A> {
    pub(crate) rows: Range<usize>,
    pub(crate) adapter: Option<&'a A>,
}

/// The runs of sequences with so many rows each, one after the other: neighbours of the same adapter are
/// joined.
pub(crate) fn runs_of<'a, A>(
    owners: impl IntoIterator<Item = (usize, Option<&'a A>)>,
) -> Vec<Run<'a, A>> {
    let mut runs: Vec<Run<'a, A>> = Vec::new();
    let mut row = 0;
    for (n, adapter) in owners {
        let same = |run: &Run<'a, A>| match (run.adapter, adapter) {
            (Some(a), Some(b)) => std::ptr::eq(a, b),
            (None, None) => true,
            _ => false,
        };
        match runs.last_mut() {
            Some(last) if same(last) => last.rows.end += n,
            _ => runs.push(Run {
                rows: row..row + n,
                adapter,
            }),
        }
        row += n;
    }
    runs
}

/// The largest rank of runs, by what tells that of an adapter.
pub(crate) fn widest<A>(runs: &[Run<'_, A>], rank: impl Fn(&A) -> usize) -> usize {
    let adapters = runs.iter().filter_map(|run| run.adapter);
    adapters.map(rank).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{runs_of, widest};

    #[test]
    fn neighbours_of_the_same_adapter_are_joined() {
        let [a, b] = [7, 9];

        let runs = runs_of([
            (2, Some(&a)),
            (1, Some(&a)),
            (3, None),
            (1, None),
            (1, Some(&b)),
            (4, Some(&a)),
        ]);

        let found: Vec<_> = runs
            .iter()
            .map(|run| (run.rows.clone(), run.adapter))
            .collect();
        let wanted = [
            (0..3, Some(&a)),
            (3..7, None),
            (7..8, Some(&b)),
            (8..12, Some(&a)),
        ];
        assert_eq!(found, wanted);
        assert_eq!(widest(&runs, |rank| *rank), 9);
        assert_eq!(widest(&runs[1..2], |rank| *rank), 0);
    }
}
