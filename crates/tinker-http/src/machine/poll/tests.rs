//! Tables and properties of the poll loop over virtual time.

use proptest::prelude::*;

use super::*;
use PollEvent::{
    ConnectionLost, Done, Elapsed, Failed, MetadataOnly, Reserved, Started, TimedOut, TryAgain,
};

const SEND: PollStep = PollStep::Send {
    allow_metadata_only: true,
};
const FETCH: PollStep = PollStep::Send {
    allow_metadata_only: false,
};

const fn status(code: u16) -> PollEvent {
    PollEvent::Status {
        code,
        empty_body: false,
        retry_after: None,
    }
}

const BARE_400: PollEvent = PollEvent::Status {
    code: 400,
    empty_body: true,
    retry_after: None,
};

const fn wait(ms: u64) -> PollStep {
    PollStep::Wait(Duration::from_millis(ms))
}

const fn finish(end: PollEnd) -> PollStep {
    PollStep::Finish(end)
}

/// Feeds `(now in ms, event)` and compares the steps, without jitter.
fn check(steps: &[(u64, PollEvent, PollStep)]) {
    let mut poll = FuturePoll::new(PollPolicy::default());
    for &(now, event, expected) in steps {
        let step = poll.on(Duration::from_millis(now), event, 0.0);
        assert_eq!(step, expected, "at {now} ms after {event:?}");
    }
}

#[test]
fn a_long_poll_that_was_held_is_repeated_at_once() {
    check(&[
        (0, Started, SEND),
        (40_000, TryAgain, SEND),
        (80_000, TryAgain, SEND),
        (81_000, Done, finish(PollEnd::Done)),
    ]);
}

#[test]
fn a_poll_that_is_held_for_too_long_is_repeated_for_as_long_as_it_takes() {
    check(&[
        (0, Started, SEND),
        (45_000, TimedOut, SEND),
        (90_000, TimedOut, SEND),
        (9_000_000, TimedOut, SEND),
        (9_000_010, Done, finish(PollEnd::Done)),
    ]);
}

#[test]
fn a_server_that_answers_at_once_is_asked_ten_times_a_second() {
    check(&[
        (0, Started, SEND),
        (5, TryAgain, wait(95)),
        (100, Elapsed, SEND),
        (130, TryAgain, wait(70)),
    ]);
}

#[test]
fn bytes_are_reserved_between_the_announcement_and_the_result() {
    check(&[
        (0, Started, SEND),
        (10, MetadataOnly(512), PollStep::ReserveBytes(512)),
        (900, Reserved, FETCH),
        (950, Done, finish(PollEnd::Done)),
    ]);
}

#[test]
fn a_second_announcement_ends_the_loop() {
    check(&[
        (0, Started, SEND),
        (10, MetadataOnly(512), PollStep::ReserveBytes(512)),
        (20, Reserved, FETCH),
        (30, MetadataOnly(512), finish(PollEnd::AnnouncedTwice)),
    ]);
}

#[test]
fn server_errors_and_lost_connections_back_off_and_an_answer_resets_that() {
    check(&[
        (0, Started, SEND),
        (10, status(503), wait(1000)),
        (1010, Elapsed, SEND),
        (1020, ConnectionLost, wait(2000)),
        (3020, Elapsed, SEND),
        (3030, status(500), wait(4000)),
        (7030, Elapsed, SEND),
        (9000, TryAgain, SEND),
        (9010, ConnectionLost, wait(1000)),
    ]);
}

#[test]
fn a_server_that_stays_away_is_given_up_after_the_outage_time() {
    check(&[
        (0, Started, SEND),
        (0, ConnectionLost, wait(1000)),
        (1_780_000, ConnectionLost, wait(2000)),
        (1_798_000, ConnectionLost, finish(PollEnd::ServerLost)),
    ]);
}

#[test]
fn throttling_is_endured_without_limit_and_the_servers_wish_wins() {
    let later = PollEvent::Status {
        code: 429,
        empty_body: false,
        retry_after: Some(Duration::from_millis(10)),
    };
    check(&[
        (0, Started, SEND),
        (1, status(429), wait(1000)),
        (10_000_000, status(429), wait(2000)),
        (20_000_000, later, wait(10)),
        (30_000_000, status(503), wait(8000)),
    ]);
}

#[test]
fn billing_pauses_for_an_hour() {
    check(&[
        (0, Started, SEND),
        (1, status(402), wait(5000)),
        (3_590_000, status(402), wait(5000)),
        (3_599_000, status(402), finish(PollEnd::BillingTimedOut)),
    ]);
}

#[test]
fn three_empty_400s_are_asked_again_and_not_yet_restores_them() {
    check(&[
        (0, Started, SEND),
        (200, BARE_400, SEND),
        (400, BARE_400, SEND),
        (600, TryAgain, SEND),
        (800, BARE_400, SEND),
        (1000, BARE_400, SEND),
        (1200, BARE_400, SEND),
        (1400, BARE_400, finish(PollEnd::Refused)),
    ]);
}

#[test]
fn other_refusals_end_the_loop() {
    for code in [302, 400, 401, 403, 404, 409, 422] {
        check(&[
            (0, Started, SEND),
            (9, status(code), finish(PollEnd::Refused)),
        ]);
    }
    check(&[
        (0, Started, SEND),
        (9, status(410), finish(PollEnd::Expired)),
    ]);
    check(&[(0, Started, SEND), (9, Failed, finish(PollEnd::Failed))]);
}

fn answer(state: &str, reason: Option<&str>) -> tinker_types::TryAgain {
    let mut json = serde_json::json!({"type": "try_again", "queue_state": state});
    if let Some(reason) = reason {
        json["queue_state_reason"] = reason.into();
    }
    serde_json::from_value(json).unwrap()
}

#[test]
fn queue_news_is_told_once_per_state_and_reason_in_any_case() {
    let mut watch = QueueWatch::default();
    let mut news = |state: &str, reason| watch.observe(&answer(state, reason)).is_some();

    assert!(news("paused_capacity", Some("busy")));
    assert!(!news("PAUSED_CAPACITY", Some("busy")));
    assert!(news("paused_capacity", Some("maintenance")));
    assert!(news("active", None));
    assert!(news("dreaming", None));
    assert!(!news("Dreaming ", None));
    assert_eq!(watch.observe(&serde_json::from_str("{}").unwrap()), None);
}

#[test]
fn silence_is_told_after_two_polls_and_once_more_when_it_ends() {
    use SilenceNews::{Answers, Silent};

    let secs = Duration::from_secs;
    let mut watch = SilenceWatch::default();
    for (sent_at, now, event, expected) in [
        (0, 45, TimedOut, None),
        (45, 50, TryAgain, None),
        (50, 95, TimedOut, None),
        (95, 140, TimedOut, Some(Silent(secs(90)))),
        (140, 185, TimedOut, None),
        (185, 186, ConnectionLost, None),
        (190, 200, TryAgain, Some(Answers(secs(150)))),
        (200, 245, TimedOut, None),
        (245, 290, TimedOut, Some(Silent(secs(90)))),
        (290, 300, Done, Some(Answers(secs(100)))),
    ] {
        let news = watch.observe(secs(sent_at), secs(now), event);
        assert_eq!(news, expected, "at {now} s after {event:?}");
    }
}

fn any_event() -> impl Strategy<Value = PollEvent> {
    prop_oneof![
        Just(TryAgain),
        Just(TimedOut),
        Just(ConnectionLost),
        Just(BARE_400),
        Just(MetadataOnly(9)),
        prop::sample::select(vec![402_u16, 429, 500, 503]).prop_map(status),
    ]
}

proptest! {
    /// Whatever the server does, asks are paced and outages end.
    #[test]
    fn asks_are_paced_and_outages_end(
        events in proptest::collection::vec((any_event(), 0.0..1.0_f64, 0..50_u64), 1..300),
    ) {
        let policy = PollPolicy { outage_timeout: Duration::from_secs(60), ..PollPolicy::default() };
        let mut poll = FuturePoll::new(policy.clone());
        let mut now = Duration::ZERO;
        let mut sent_at = None;
        let mut outage_since = None;
        let mut step = poll.on(now, Started, 0.0);
        for (event, draw, took) in events {
            loop {
                step = match step {
                    PollStep::Wait(delay) => {
                        now += delay;
                        poll.on(now, Elapsed, draw)
                    }
                    PollStep::ReserveBytes(_) => poll.on(now, Reserved, draw),
                    _ => break,
                };
            }
            let PollStep::Send { allow_metadata_only } = step else { break };
            if let (Some(earlier), true) = (sent_at, allow_metadata_only) {
                prop_assert!(now >= earlier + policy.min_interval);
            }
            sent_at = Some(now);
            // The wait after an answer, such as "too many requests", is no part of an outage.
            let outage = outage_since.map_or(Duration::ZERO, |since| now - since);
            prop_assert!(outage <= policy.outage_timeout);
            now += Duration::from_millis(took);
            outage_since = match event {
                ConnectionLost | PollEvent::Status { code: 500.., .. } => outage_since.or(Some(now)),
                _ => None,
            };
            step = poll.on(now, event, draw);
        }
    }
}
