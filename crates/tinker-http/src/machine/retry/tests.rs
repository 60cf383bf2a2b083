//! Tables and properties of retries over virtual time.

use proptest::prelude::*;

use super::*;

const fn status(code: u16) -> Failure {
    Failure::Status {
        code,
        empty_body: false,
    }
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn sorts_failures_by_what_they_call_for() {
    let empty_400 = Failure::Status {
        code: 400,
        empty_body: true,
    };
    for (failure, should_retry, expected) in [
        (Failure::Unsent, None, Class::Unreachable),
        (Failure::Interrupted, Some(false), Class::Unreachable),
        (Failure::TimedOut, None, Class::Transient),
        (Failure::Unreadable, None, Class::Permanent),
        (Failure::Local, Some(true), Class::Permanent),
        (empty_400, None, Class::Transient),
        (empty_400, Some(false), Class::Permanent),
        (status(302), None, Class::Permanent),
        (status(400), None, Class::Permanent),
        (status(400), Some(true), Class::Transient),
        (status(401), None, Class::Permanent),
        (status(402), None, Class::Billing),
        (status(403), None, Class::Permanent),
        (status(404), None, Class::Permanent),
        (status(408), None, Class::Transient),
        (status(409), None, Class::Transient),
        (status(410), None, Class::Permanent),
        (status(422), None, Class::Permanent),
        (status(429), None, Class::Transient),
        (status(500), None, Class::Transient),
        (status(501), None, Class::Permanent),
        (status(503), None, Class::Transient),
        (status(503), Some(false), Class::Permanent),
        (status(599), None, Class::Transient),
    ] {
        assert_eq!(
            classify(failure, should_retry),
            expected,
            "{failure:?} {should_retry:?}"
        );
    }
}

#[test]
fn tells_refusals_from_requests_that_may_have_arrived() {
    for failure in [
        Failure::Interrupted,
        Failure::TimedOut,
        Failure::Unreadable,
        status(302),
        status(408),
        status(409),
        status(500),
        status(503),
    ] {
        assert!(failure.may_have_arrived(), "{failure:?}");
    }
    for code in [400, 401, 402, 403, 404, 410, 413, 422, 429, 501, 505] {
        assert!(!status(code).may_have_arrived(), "{code}");
    }
    assert!(!Failure::Unsent.may_have_arrived());
    assert!(!Failure::Local.may_have_arrived());
}

/// Feeds `(now in ms, class, retry-after in ms)` and compares the delays in ms; `None` gives up.
fn check(policy: RetryPolicy, steps: &[(u64, Class, Option<u64>, Option<u64>)]) {
    let mut state = RetryState::new(policy);
    for &(now, class, retry_after, expected) in steps {
        let decision = state.on_failure(
            Duration::from_millis(now),
            class,
            retry_after.map(Duration::from_millis),
            0.0,
        );
        let expected = expected.map_or(Decision::GiveUp, |ms| {
            Decision::RetryAfter(Duration::from_millis(ms))
        });
        assert_eq!(decision, expected, "at {now} ms after {class:?}");
    }
}

#[test]
fn transient_failures_back_off_until_the_attempts_are_used_up() {
    let policy = RetryPolicy {
        max_attempts: 3,
        ..RetryPolicy::default()
    };
    check(
        policy,
        &[
            (0, Class::Transient, None, Some(500)),
            (600, Class::Transient, None, Some(1000)),
            (1700, Class::Transient, None, None),
        ],
    );
}

#[test]
fn the_servers_wish_wins_over_the_back_off() {
    check(
        RetryPolicy::default(),
        &[
            (0, Class::Transient, Some(10), Some(10)),
            (20, Class::Transient, Some(30_000), Some(30_000)),
        ],
    );
}

#[test]
fn gives_up_when_the_next_attempt_would_be_too_late() {
    check(
        RetryPolicy::default(),
        &[
            (0, Class::Transient, None, Some(500)),
            (299_500, Class::Transient, None, None),
        ],
    );
}

#[test]
fn a_lost_server_is_waited_for_and_an_answer_restarts_that_clock() {
    let policy = RetryPolicy {
        reconnect_timeout: secs(20),
        max_attempts: 2,
        ..RetryPolicy::default()
    };
    check(
        policy,
        &[
            (0, Class::Unreachable, None, Some(500)),
            (500, Class::Unreachable, None, Some(1000)),
            (15_000, Class::Unreachable, None, Some(2000)),
            (17_000, Class::Transient, None, Some(500)),
            (18_000, Class::Unreachable, None, Some(500)),
            (38_000, Class::Unreachable, None, None),
        ],
    );
}

#[test]
fn the_time_of_an_outage_does_not_count_as_failing() {
    check(
        RetryPolicy::default(),
        &[
            (0, Class::Transient, None, Some(500)),
            (1000, Class::Unreachable, None, Some(500)),
            (290_000, Class::Unreachable, None, Some(1000)),
            (300_000, Class::Transient, None, Some(1000)),
            (590_000, Class::Transient, None, Some(2000)),
            (599_000, Class::Transient, None, None),
        ],
    );
}

#[test]
fn a_server_that_comes_and_goes_is_given_up() {
    let policy = RetryPolicy {
        max_attempts: 3,
        ..RetryPolicy::default()
    };
    check(
        policy,
        &[
            (0, Class::Transient, None, Some(500)),
            (500, Class::Unreachable, None, Some(500)),
            (1000, Class::Transient, None, Some(1000)),
            (2000, Class::Unreachable, None, Some(500)),
            (2500, Class::Transient, None, None),
        ],
    );
}

#[test]
fn billing_pauses_five_seconds_at_a_time_for_an_hour() {
    check(
        RetryPolicy::default(),
        &[
            (0, Class::Billing, None, Some(5000)),
            (3_590_000, Class::Billing, None, Some(5000)),
            (3_596_000, Class::Billing, None, None),
        ],
    );
}

#[test]
fn a_single_attempt_is_not_repeated() {
    for class in [
        Class::Permanent,
        Class::Transient,
        Class::Billing,
        Class::Unreachable,
    ] {
        check(RetryPolicy::never(), &[(0, class, None, None)]);
    }
}

#[test]
fn reads_the_three_forms_of_retry_after() {
    let wall = SystemTime::UNIX_EPOCH + secs(784_111_777);
    for (ms, text, expected) in [
        (Some("10"), None, Some(Duration::from_millis(10))),
        (Some("10"), Some("7"), Some(Duration::from_millis(10))),
        (Some("x"), Some("7"), Some(secs(7))),
        (None, Some("1.5"), Some(Duration::from_millis(1500))),
        (None, Some("Sun, 06 Nov 1994 08:49:42 GMT"), Some(secs(5))),
        (None, Some("Sun, 06 Nov 1994 08:49:00 GMT"), None),
        (None, Some("1e9"), Some(secs(60))),
        (None, Some("inf"), Some(secs(60))),
        (None, Some("-5"), None),
        (None, Some("0"), None),
        (None, Some("NaN"), None),
        (None, Some("soon"), None),
        (None, None, None),
    ] {
        assert_eq!(
            parse_retry_after(ms, text, wall),
            expected,
            "{ms:?} {text:?}"
        );
    }
}

#[test]
fn the_default_policy_is_as_documented() {
    let policy = RetryPolicy::default();

    assert_eq!(policy.total_timeout, secs(300));
    assert_eq!(policy.reconnect_timeout, secs(300));
    assert_eq!(policy.billing_pause, secs(3600));
    assert_eq!(policy.max_attempts, 40);
}

proptest! {
    /// However failures fall, attempts stay below the maximum and each wait within its budget.
    #[test]
    fn never_exceeds_its_budgets(
        failures in proptest::collection::vec((0..3_u8, 0.0..1.0_f64, 0..2000_u64), 1..400),
        max_attempts in 1..20_u32,
        total in 1..60_u64,
    ) {
        let policy = RetryPolicy {
            max_attempts,
            total_timeout: secs(total),
            reconnect_timeout: secs(total),
            billing_pause: secs(total),
            ..RetryPolicy::default()
        };
        let mut state = RetryState::new(policy.clone());
        let (mut now, mut waited, mut lost_wait, mut n_attempts) = (Duration::ZERO, Duration::ZERO, Duration::ZERO, 0);
        for (kind, draw, took) in failures {
            now += Duration::from_millis(took);
            let class = [Class::Transient, Class::Unreachable, Class::Billing][usize::from(kind)];
            if class != Class::Unreachable {
                lost_wait = Duration::ZERO;
            }
            n_attempts += u32::from(class == Class::Transient);
            let Decision::RetryAfter(delay) = state.on_failure(now, class, None, draw) else {
                break;
            };
            prop_assert!(n_attempts < max_attempts);
            now += delay;
            match class {
                Class::Transient => waited += delay,
                Class::Unreachable => lost_wait += delay,
                _ => {}
            }
            prop_assert!(waited <= policy.total_timeout);
            prop_assert!(lost_wait <= policy.reconnect_timeout);
        }
    }
}
