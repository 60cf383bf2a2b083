//! Numbers as flags take them: what is wrong is said as what to write.

use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

/// Reads a whole number of at least 0.
///
/// # Errors
/// It is none, or too large for `T`.
pub(crate) fn whole<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: ParseIntError| {
        let what = match error.kind() {
            IntErrorKind::PosOverflow => "too large",
            _ => "write a whole number of at least 0",
        };
        what.to_owned()
    })
}

/// Reads a whole number of at least 1.
///
/// # Errors
/// It is none, or too large.
pub(crate) fn positive(text: &str) -> Result<u32, String> {
    match text.parse::<u64>() {
        Ok(0) | Err(_) => Err("write a whole number of at least 1".to_owned()),
        Ok(n) => u32::try_from(n).map_err(|_| "too large".to_owned()),
    }
}

/// Reads a whole number, below 0 too.
///
/// # Errors
/// It is none, or too large.
pub(crate) fn signed(text: &str) -> Result<i64, String> {
    text.parse()
        .map_err(|_| "write a whole number of at most 18 digits".to_owned())
}

/// Reads a number; whoever uses it knows its range.
///
/// # Errors
/// It is none.
pub(crate) fn number(text: &str) -> Result<f64, String> {
    text.parse()
        .map_err(|_| "write a number, such as 4e-3".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_at_least_0_and_fit() {
        assert_eq!(whole::<u64>("17"), Ok(17));
        for bad in ["-1", "x", "", "1.5"] {
            assert!(whole::<u64>(bad).unwrap_err().contains("at least 0"));
        }
        assert_eq!(whole::<u32>("4294967296").unwrap_err(), "too large");
    }

    #[test]
    fn counts_are_at_least_1_and_fit() {
        assert_eq!(positive("1"), Ok(1));
        for bad in ["0", "-1", "x"] {
            assert!(positive(bad).unwrap_err().contains("at least 1"), "{bad}");
        }
        assert_eq!(positive("4294967296").unwrap_err(), "too large");
    }
}
