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
}

/// The requests that samples may begin of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    /// Their places among all requests, the first one first.
    pub(super) places: Vec<usize>,
    /// How many groups they belong to.
    pub(super) n_groups: usize,
}

/// Orders the requests of which samples wait. At most about `most` of them are looked for: more cannot
/// begin in one step.
pub(super) fn order(requests: impl Iterator<Item = Share> + Clone, most: usize) -> Order {
    let mut n_before = HashMap::<u64, usize>::new();
    for request in requests.clone().filter(|request| request.n_running > 0) {
        *n_before.entry(request.group).or_default() += request.n_running;
    }
    let (mut keyed, mut n_first) = (Vec::new(), 0);
    for (place, request) in requests.enumerate() {
        if request.n_waiting == 0 {
            continue;
        }
        let before = n_before.entry(request.group).or_default();
        if *before < most {
            keyed.push((*before, place, request.group));
        }
        n_first += usize::from(*before == 0);
        *before = before.saturating_add(request.n_waiting);
        if n_first == most {
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
}
