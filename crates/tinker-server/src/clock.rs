//! Wall-clock time in the two forms the server uses.

use tinker_types::Timestamp;

/// Milliseconds since 1970, UTC.
pub(crate) type Millis = i64;

/// The current time.
pub(crate) fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

/// Reads [`timestamp`]'s text back.
pub(crate) fn millis(text: &Timestamp) -> Option<Millis> {
    let moment: jiff::Timestamp = text.0.parse().ok()?;
    Some(moment.as_millisecond())
}

/// RFC 9110 text, as HTTP headers carry it.
pub(crate) fn http_date(at: Millis) -> String {
    let moment = jiff::Timestamp::from_millisecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    printer
        .timestamp_to_rfc9110_string(&moment)
        .unwrap_or_default()
}

/// RFC 3339 text, as answers carry it.
pub(crate) fn timestamp(at: Millis) -> Timestamp {
    let moment = jiff::Timestamp::from_millisecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    Timestamp(moment.to_string())
}
