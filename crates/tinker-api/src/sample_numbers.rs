//! The numbers of samples: each call has one, and each time it is submitted anew one that belongs to it.
//!
//! Servers take a number for one request only. A program that is started again gives its calls the
//! numbers that they had before; were those of resubmissions taken from the same row, every later
//! call would carry another number than the first time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// How often a sample that the server forgot is submitted anew.
pub(crate) const MAX_RESUBMISSIONS: u32 = 10;
/// Numbers that one client of a sampler has to itself; servers tell clients apart by it.
pub(crate) const NUMBERS_PER_CLIENT: u64 = 1_000_000_000;
/// Calls that one client of a sampler can make: each has a number for every submission.
const CALLS_PER_CLIENT: u64 = NUMBERS_PER_CLIENT / (MAX_RESUBMISSIONS as u64 + 1);

/// The numbers of one client of a sampler.
#[derive(Debug)]
pub(crate) struct SampleNumbers {
    first: u64,
    n_calls: AtomicU64,
}

impl SampleNumbers {
    /// Those of client `client_number`, none of which is used.
    pub(crate) const fn of_client(client_number: u64) -> Self {
        Self {
            first: client_number.saturating_mul(NUMBERS_PER_CLIENT),
            n_calls: AtomicU64::new(0),
        }
    }

    /// The number of the next call.
    pub(crate) fn next_call(&self) -> Result<u64> {
        let call = self.n_calls.fetch_add(1, Ordering::Relaxed);
        if call >= CALLS_PER_CLIENT {
            return Err(Error::InvalidRequest(format!(
                "this sampler has drawn {CALLS_PER_CLIENT} samples, all that it has numbers for: \
                 create another one"
            )));
        }
        Ok(self.first + call)
    }

    /// The number under which a sample is submitted after the server forgot the one before.
    pub(crate) const fn anew(number: u64) -> u64 {
        number + CALLS_PER_CLIENT
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// All numbers that a call may be submitted under.
    fn submissions(call: u64) -> impl Iterator<Item = u64> {
        std::iter::successors(Some(call), |number| Some(SampleNumbers::anew(*number)))
            .take(MAX_RESUBMISSIONS as usize + 1)
    }

    #[test]
    fn no_two_submissions_share_a_number_and_all_are_of_their_client() {
        let numbers = SampleNumbers::of_client(3);
        let calls = [numbers.next_call(), numbers.next_call()].map(Result::unwrap);
        let last = 3 * NUMBERS_PER_CLIENT + CALLS_PER_CLIENT - 1;

        let all: Vec<u64> = calls
            .into_iter()
            .chain([last])
            .flat_map(submissions)
            .collect();

        assert_eq!(calls, [3_000_000_000, 3_000_000_001]);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(
            all.iter().all(|number| number / NUMBERS_PER_CLIENT == 3),
            "{all:?}"
        );
    }

    #[test]
    fn a_client_without_numbers_left_says_so() {
        let numbers = SampleNumbers {
            first: 0,
            n_calls: AtomicU64::new(CALLS_PER_CLIENT - 1),
        };
        assert_eq!(numbers.next_call().unwrap(), CALLS_PER_CLIENT - 1);

        let error = numbers.next_call().unwrap_err();

        assert!(error.to_string().contains("create another one"), "{error}");
    }
}
