//! Which waiting samples begin next: those of the group with the fewest running ones first, each group's
//! own in the order they came. So a thousand samples of one user do not hold up one of another.

use std::collections::{HashMap, HashSet};

/// A request with samples that run or wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// Whose it is.
    pub(super) group: u64,
    pub(super) n_running: usize,
    pub(super) n_waiting: usize,
    /// Whether rows are kept for such requests.
    pub(super) is_short: bool,
}

/// The requests that samples may begin of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    /// Their places among all requests, the first one first.
    pub(super) places: Vec<usize>,
    /// How many groups they belong to.
    pub(super) n_groups: usize,
}

/// Samples of a group that come before a request of it.
#[derive(Debug, Clone, Copy, Default)]
struct Before {
    n_running: usize,
    n_waiting: usize,
}

/// Orders the requests of which samples wait. Of each group only those that fewer than `most` waiting
/// samples come before, and about `most` groups: more cannot begin in one step. The first `most` short
/// ones have a place in any case, as what runs or waits before them may not take the rows that are kept
/// for them.
pub(super) fn order(requests: impl Iterator<Item = Share> + Clone, most: usize) -> Order {
    let mut before = HashMap::<u64, Before>::new();
    for request in requests.clone().filter(|request| request.n_running > 0) {
        before.entry(request.group).or_default().n_running += request.n_running;
    }
    let (mut keyed, mut n_first, mut n_short) = (Vec::new(), 0, 0);
    for (place, request) in requests.enumerate() {
        if request.n_waiting == 0 {
            continue;
        }
        let before = before.entry(request.group).or_default();
        let n = before.n_running.saturating_add(before.n_waiting);
        let may_begin = before.n_waiting < most && n_first < most;
        if may_begin || request.is_short && n_short < most {
            keyed.push((n, place, request.group));
        }
        n_first += usize::from(n == 0);
        n_short += usize::from(request.is_short);
        before.n_waiting = before.n_waiting.saturating_add(request.n_waiting);
        if n_first >= most && n_short >= most {
            break;
        }
    }
    keyed.sort_unstable();
    let groups: HashSet<u64> = keyed.iter().map(|(_, _, group)| *group).collect();
    Order {
        places: keyed.into_iter().map(|(_, place, _)| place).collect(),
        n_groups: groups.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(requests: &[(u64, usize, usize)]) -> Vec<usize> {
        let shares = requests.iter().map(|&(group, n_running, n_waiting)| Share {
            group,
            n_running,
            n_waiting,
            is_short: false,
        });
        order(shares, 64).places
    }

    #[test]
    fn groups_take_turns_and_each_keeps_its_order() {
        let requests = [
            (1, 0, 1),
            (1, 0, 1),
            (1, 0, 1),
            (2, 0, 1),
            (3, 0, 1),
            (2, 0, 1),
        ];

        assert_eq!(places(&requests), [0, 3, 4, 1, 5, 2]);
    }

    #[test]
    fn who_has_fewer_running_goes_first() {
        assert_eq!(places(&[(1, 3, 0), (1, 0, 1), (2, 1, 1)]), [2, 1]);
    }

    #[test]
    fn a_request_for_many_samples_counts_as_many() {
        assert_eq!(
            places(&[(1, 0, 8), (1, 0, 1), (2, 0, 1), (2, 0, 1)]),
            [0, 2, 3, 1]
        );
    }

    #[test]
    fn what_does_not_wait_has_no_turn() {
        assert!(places(&[(1, 4, 0)]).is_empty());
    }

    #[test]
    fn no_more_are_looked_for_than_can_begin() {
        let requests: Vec<_> = (0..1000).map(|group| (group, 0, 1)).collect();

        assert_eq!(places(&requests), (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn a_short_request_has_a_place_behind_any_number_of_samples() {
        let share = |n_running, n_waiting, is_short| Share {
            group: 1,
            n_running,
            n_waiting,
            is_short,
        };
        let requests = [share(64, 100, false), share(0, 1, false), share(0, 1, true)];

        assert_eq!(order(requests.into_iter(), 64).places, [0, 2]);
    }
}
