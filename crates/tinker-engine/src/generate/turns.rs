//! Which waiting samples begin next: those of the owner with the fewest running ones first, of an owner's groups
//! likewise, each group's own in the order they came. So a thousand samples of one user, or of one of his sessions,
//! do not hold up one of another.

use std::collections::{HashMap, HashSet};

/// A request with samples that run or wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share<'a> {
    /// Whose it is.
    pub(super) owner: Option<&'a str>,
    /// What it belongs to of what is theirs.
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

/// What is known of an owner while requests are looked through.
#[derive(Debug, Default)]
struct Of {
    groups: HashMap<u64, Before>,
    n_running: usize,
    /// Groups of which nothing runs and whose first request was met.
    n_first: usize,
    /// How many samples of its group come before a request, the request's place and group, and its samples.
    candidates: Vec<(usize, usize, u64, usize)>,
}

/// Orders the requests of which samples wait. Of each group only those that fewer than `most` waiting
/// samples come before, about `most` groups of each owner, and about `most` owners: more cannot begin in one
/// step. The first `most` short ones have a place in any case, as what runs or waits before them may not take
/// the rows that are kept for them.
pub(super) fn order<'a>(requests: impl Iterator<Item = Share<'a>> + Clone, most: usize) -> Order {
    let mut owners = HashMap::<Option<&str>, Of>::new();
    let mut last = None;
    for request in requests.clone() {
        // Requests of an owner often come one after another.
        if request.n_running == 0 && last == Some(request.owner) {
            continue;
        }
        last = Some(request.owner);
        let of = owners.entry(request.owner).or_default();
        if request.n_running > 0 {
            of.n_running += request.n_running;
            of.groups.entry(request.group).or_default().n_running += request.n_running;
        }
    }
    // Owners that are known to have enough, and whose first request was met.
    let (n_owners, mut n_full, mut n_first, mut n_short) = (owners.len(), 0, 0, 0);
    for (place, request) in requests.enumerate() {
        if request.n_waiting == 0 {
            continue;
        }
        let of = owners.entry(request.owner).or_default();
        let is_first = of.n_running == 0 && of.candidates.is_empty();
        let before = of.groups.entry(request.group).or_default();
        let n = before.n_running.saturating_add(before.n_waiting);
        let may_begin = before.n_waiting < most && of.n_first < most && n_first < most;
        if may_begin || request.is_short && n_short < most {
            let candidate = (n, place, request.group, request.n_waiting);
            of.candidates.push(candidate);
        }
        of.n_first += usize::from(n == 0);
        n_full += usize::from(n == 0 && of.n_first == most);
        n_first += usize::from(is_first);
        n_short += usize::from(request.is_short);
        before.n_waiting = before.n_waiting.saturating_add(request.n_waiting);
        if (n_full == n_owners || n_first >= most) && n_short >= most {
            break;
        }
    }
    in_turn(owners.into_values())
}

/// Puts the candidates of each owner in the order of its groups, and those of all in the order of owners.
fn in_turn(owners: impl Iterator<Item = Of>) -> Order {
    let (mut keyed, mut groups) = (Vec::new(), HashSet::new());
    for (owner, mut of) in owners.enumerate() {
        of.candidates.sort_unstable();
        let mut n_before = of.n_running;
        for (n, place, group, n_waiting) in of.candidates {
            keyed.push((n_before, n, place));
            groups.insert((owner, group));
            n_before = n_before.saturating_add(n_waiting);
        }
    }
    keyed.sort_unstable();
    Order {
        places: keyed.into_iter().map(|(_, _, place)| place).collect(),
        n_groups: groups.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in a server where each group has an owner of its own.
    fn places(requests: &[(u64, usize, usize)]) -> Vec<usize> {
        let names: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        let shares = requests.iter().map(|&(group, n_running, n_waiting)| Share {
            owner: Some(&names[group as usize]),
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

    fn places_of(requests: &[(&str, u64, usize, usize)]) -> Vec<usize> {
        let shares = requests
            .iter()
            .map(|&(owner, group, n_running, n_waiting)| Share {
                owner: Some(owner),
                group,
                n_running,
                n_waiting,
                is_short: false,
            });
        order(shares, 64).places
    }

    #[test]
    fn owners_take_turns_however_many_groups_they_have() {
        let requests = [
            ("ann", 1, 0, 1),
            ("ann", 1, 0, 1),
            ("ann", 2, 0, 1),
            ("ann", 3, 0, 1),
            ("ben", 4, 0, 1),
            ("ben", 4, 0, 1),
        ];

        assert_eq!(places_of(&requests), [0, 4, 2, 5, 3, 1]);
    }

    #[test]
    fn who_has_less_running_in_all_groups_goes_first() {
        let requests = [
            ("ann", 1, 3, 0),
            ("ann", 2, 0, 1),
            ("ben", 3, 2, 1),
            ("eve", 4, 0, 1),
        ];

        assert_eq!(places_of(&requests), [3, 2, 1]);
    }

    #[test]
    fn one_request_is_found_behind_thousands_of_groups_of_another() {
        let mut requests: Vec<_> = (0..5000).map(|group| ("ann", group, 0, 1)).collect();
        requests.push(("ben", 1, 0, 1));

        let places = places_of(&requests);

        assert_eq!(places[..2], [0, 5000]);
        assert_eq!(places.len(), 65);
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
            owner: None,
            group: 1,
            n_running,
            n_waiting,
            is_short,
        };
        let requests = [share(64, 100, false), share(0, 1, false), share(0, 1, true)];

        assert_eq!(order(requests.into_iter(), 64).places, [0, 2]);
    }
}
