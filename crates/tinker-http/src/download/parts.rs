//! How a file is cut into parts, and what a storage's answer to a part means. Pure.

use std::ops::Range;

/// A file cut into parts of equal size; the last one may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) size_bytes: u64,
    pub(super) part_bytes: u64,
}

impl Parts {
    pub(super) const fn n_parts(self) -> u64 {
        self.size_bytes.div_ceil(self.part_bytes)
    }

    /// The bytes of a part; empty past the end.
    pub(super) fn range(self, part: u64) -> Range<u64> {
        let start = part.saturating_mul(self.part_bytes).min(self.size_bytes);
        start..start.saturating_add(self.part_bytes).min(self.size_bytes)
    }
}

/// `bytes=first-last` of a range.
pub(super) fn range_header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end.saturating_sub(1))
}

/// What `Content-Range` says: the bytes that came and how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ContentRange {
    /// Nothing where the range could not be satisfied.
    pub(super) range: Option<Range<u64>>,
    pub(super) size_bytes: u64,
}

/// Reads `bytes 0-9/100` and `bytes */100` (RFC 9110, section 14.4).
pub(super) fn parse_content_range(text: &str) -> Option<ContentRange> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let size_bytes = size.trim().parse().ok()?;
    let range = match range.trim() {
        "*" => None,
        range => {
            let (first, last) = range.split_once('-')?;
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            let is_sound = first <= last && last < size_bytes;
            Some(first..is_sound.then_some(last)? + 1)
        }
    };
    Some(ContentRange { range, size_bytes })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn content_ranges_are_read_and_nonsense_is_not() {
        for (text, expected) in [
            ("bytes 0-9/100", Some((Some(0..10), 100))),
            ("bytes 99-99/100", Some((Some(99..100), 100))),
            ("bytes */0", Some((None, 0))),
            ("bytes 0-100/100", None),
            ("bytes 9-0/100", None),
            ("bytes 0-9/*", None),
            ("0-9/100", None),
            ("bytes 0-18446744073709551615/18446744073709551615", None),
        ] {
            let read = parse_content_range(text).map(|r| (r.range, r.size_bytes));
            assert_eq!(read, expected, "{text}");
        }
    }

    #[test]
    fn a_range_is_asked_for_with_its_last_byte() {
        assert_eq!(range_header(&(10..20)), "bytes=10-19");
    }

    proptest! {
        #[test]
        fn parts_cover_a_file_once(size_bytes in 0_u64..10_000, part_bytes in 1_u64..500) {
            let parts = Parts { size_bytes, part_bytes };
            let mut end = 0;
            for part in 0..parts.n_parts() {
                let range = parts.range(part);
                prop_assert_eq!(range.start, end);
                prop_assert!(range.end > range.start);
                end = range.end;
            }
            prop_assert_eq!(end, size_bytes);
            prop_assert!(parts.range(parts.n_parts()).is_empty());
        }
    }
}
