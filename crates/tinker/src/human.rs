//! Numbers as people read them: sizes, ages, durations and counts.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// A size in powers of 1024, as in `117.7 MB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KB", "MB", "GB", "TB", "PB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A count with thousands separated, as in `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with its noun, as in `1 row` and `1,200 rows`.
pub(crate) fn counted(n: u64, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(n))
}

/// A duration in its two largest units, as in `2m 05s`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

/// Reads a duration such as `500ms`, `30s`, `15m` or `2h`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let millis = match &text[digits.len()..] {
        "ms" => Some(1),
        "" | "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .zip(millis)
        .and_then(|(n, unit)| n.checked_mul(unit))
        .map(Duration::from_millis)
        .ok_or_else(|| "write a number and ms, s, m or h, such as 15m".to_owned())
}

/// Reads a size in powers of 1024 such as `500MB` or `20GB`; a bare number is bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => Some(0),
        "KB" => Some(10),
        "MB" => Some(20),
        "GB" => Some(30),
        "TB" => Some(40),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .zip(shift)
        .and_then(|(n, shift)| n.checked_mul(1 << shift))
        .ok_or_else(|| "write a number and KB, MB, GB or TB, such as 20GB".to_owned())
}

/// How long before `now` the moment `time` was, as in `5 minutes ago`; the date after 30 days,
/// and `time` itself where it is not a moment.
pub(crate) fn age(time: &str, now: Timestamp) -> String {
    let Some(then) = parse_time(time) else {
        return time.to_owned();
    };
    let seconds = now.as_second() - then.as_second();
    let ago = |n: i64, unit: &str| format!("{} ago", counted(n.unsigned_abs(), unit));
    match seconds {
        ..0 => date(then),
        0..60 => "just now".to_owned(),
        60..3600 => ago(seconds / 60, "minute"),
        3600..86_400 => ago(seconds / 3600, "hour"),
        86_400..604_800 => ago(seconds / 86_400, "day"),
        604_800..2_592_000 => ago(seconds / 604_800, "week"),
        _ => date(then),
    }
}

/// The day of `time`, for expiry dates; `time` itself where it is not a moment.
pub(crate) fn day(time: &str) -> String {
    parse_time(time).map_or_else(|| time.to_owned(), date)
}

fn date(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).date().to_string()
}

/// RFC 3339, with `T` or a space; without an offset it is UTC.
fn parse_time(time: &str) -> Option<Timestamp> {
    time.parse().ok().or_else(|| {
        Some(
            time.parse::<DateTime>()
                .ok()?
                .to_zoned(TimeZone::UTC)
                .ok()?
                .timestamp(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_in_powers_of_1024() {
        let check = |bytes, text| assert_eq!(size(bytes), text);

        check(0, "0 B");
        check(1023, "1023 B");
        check(1024, "1.0 KB");
        check(123_456_789, "117.7 MB");
    }

    #[test]
    fn sizes_are_read_in_powers_of_1024_and_others_refused() {
        for (text, bytes) in [
            ("12", 12),
            ("3kb", 3 << 10),
            ("500MB", 500 << 20),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "1.5GB", "-1", "3 GB", "5XB", "99999999TB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn counts_are_separated_and_agree_with_their_noun() {
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(counted(1, "row"), "1 row");
        assert_eq!(counted(0, "row"), "0 rows");
    }

    #[test]
    fn durations_show_two_units() {
        let check = |seconds, text| assert_eq!(duration(Duration::from_secs(seconds)), text);

        check(9, "9s");
        check(125, "2m 05s");
        check(7_260, "2h 01m");
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "m", "5 m", "1.5h", "9d", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ages_are_relative_for_a_month() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let check = |time, text| assert_eq!(age(time, now), text);

        check("2026-11-21T11:59:30Z", "just now");
        check("2026-11-21 11:00:00+00:00", "1 hour ago");
        check("2026-11-20T12:00:00Z", "1 day ago");
        check("2026-11-01T12:00:00", "2 weeks ago");
        check("2026-01-05T12:00:00Z", "2026-01-05");
        check("soon", "soon");
    }
}
