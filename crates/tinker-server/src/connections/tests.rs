//! Who gets a place, who gives way, and when.

use super::*;
use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const POLICY: Policy = Policy {
    grace: Duration::from_secs(1),
    short_hold: Duration::from_secs(2),
    linger: Duration::from_secs(10),
    linger_http2: Duration::from_secs(3),
    stall: Duration::from_secs(60),
};

async fn connected(all: &Arc<Connections>) -> Connection {
    all.place().await.take_up()
}

/// Another client that waits for a place and takes it up.
fn waits(all: &Arc<Connections>) -> tokio::task::JoinHandle<Connection> {
    let all = Arc::clone(all);
    tokio::spawn(async move { connected(&all).await })
}

fn is_asked(connection: &Connection) -> bool {
    connection.asked_to_leave().now_or_never().is_some()
}

#[test]
fn a_quarter_of_the_files_is_for_everything_else() {
    let cases = [
        (20_000, 15_000),
        (1024, 768),
        (256, 192),
        (100, 36),
        (64, 16),
        (0, 16),
    ];
    for (files, connections) in cases {
        assert_eq!(bound(files), connections, "{files} files");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_bound_nobody_is_crowded() {
    let all = Connections::new(None);
    let first = connected(&all).await;
    let others = [connected(&all).await, connected(&all).await];

    tokio::time::advance(Duration::from_secs(3600)).await;

    assert_eq!(all.count(), (1 + others.len(), None));
    assert!(!all.is_crowded() && !is_asked(&first));
    assert!(all.pressing().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn the_one_without_a_request_for_longest_gives_way_and_only_that_one() {
    let all = Connections::with_policy(Some(4), POLICY);
    let busy = connected(&all).await;
    let _request = busy.begin_request(Protocol::Http1);
    let idle = connected(&all).await;
    tokio::time::advance(Duration::from_secs(5)).await;
    let (later, last) = (connected(&all).await, connected(&all).await);
    assert!(!is_asked(&idle), "nobody waits");

    let next = waits(&all);
    idle.asked_to_leave().await;

    assert_eq!(all.count(), (4, Some(4)), "the place is not free yet");
    assert!(!next.is_finished() && !is_asked(&busy) && !is_asked(&later));
    drop(idle);
    let next = next.await.unwrap();
    assert_eq!(all.count(), (4, Some(4)));
    assert!(!is_asked(&later) && !is_asked(&last) && !is_asked(&next));
}

#[tokio::test(start_paused = true)]
async fn one_that_has_just_ended_a_request_gives_way_after_the_grace() {
    let all = Connections::with_policy(Some(2), POLICY);
    let (first, second) = (connected(&all).await, connected(&all).await);
    let (held, ends) = (
        first.begin_request(Protocol::Http1),
        second.begin_request(Protocol::Http1),
    );
    let waiting = waits(&all);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!is_asked(&first) && !is_asked(&second), "both are busy");

    let ended = Instant::now();
    drop(ends);
    second.asked_to_leave().await;

    assert!(ended.elapsed() >= POLICY.grace);
    drop((second, held));
    waiting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn another_is_asked_if_the_first_does_not_leave() {
    let all = Connections::with_policy(Some(2), POLICY);
    let (first, second) = (connected(&all).await, connected(&all).await);
    let waiting = waits(&all);

    first.asked_to_leave().await;
    let asked = Instant::now();
    second.asked_to_leave().await;

    assert!(asked.elapsed() >= POLICY.grace);
    drop(second);
    waiting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn many_are_asked_at_once_where_there_are_many() {
    let all = Connections::with_policy(Some(64), POLICY);
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(connected(&all).await);
    }
    let n_asked = |open: &[Connection]| open.iter().filter(|one| is_asked(one)).count();
    let _waiting = waits(&all);
    tokio::time::sleep(POLICY.grace).await;
    tokio::task::yield_now().await;

    // Nobody leaves, so after a while others are asked.
    for _ in 0..16 {
        assert_eq!(n_asked(&open), 4);
        tokio::time::sleep(POLICY.grace).await;
        tokio::task::yield_now().await;
    }

    assert_eq!(n_asked(&open), 0, "each was asked");
}

#[tokio::test(start_paused = true)]
async fn one_whose_bytes_move_is_not_asked() {
    let all = Connections::with_policy(Some(2), POLICY);
    let (talking, silent) = (connected(&all).await, connected(&all).await);
    let (mut far, near) = tokio::io::duplex(9);
    let mut near = talking.watch(near);
    let _waiting = waits(&all);

    for _ in 0..9 {
        tokio::time::sleep(POLICY.grace / 2).await;
        far.write_all(b"head").await.unwrap();
        near.read_exact(&mut [0; 4]).await.unwrap();
    }

    assert!(is_asked(&silent) && !is_asked(&talking));
}

#[tokio::test(start_paused = true)]
async fn polls_are_held_for_less_only_while_others_wait() {
    let all = Connections::with_policy(Some(4), POLICY);
    let mut open = Vec::new();
    for _ in 1..=4 {
        open.push(connected(&all).await);
    }
    let began = Instant::now();
    let poll = {
        let all = Arc::clone(&all);
        tokio::spawn(async move { all.pressing().await })
    };
    tokio::time::sleep(POLICY.grace).await;
    assert!(!poll.is_finished(), "nobody had to wait");
    let waiting = waits(&all);

    poll.await.unwrap();

    assert_eq!(began.elapsed(), POLICY.grace + POLICY.short_hold);
    // Those who come next may wait, too.
    open.pop();
    open.push(waiting.await.unwrap());
    let began = Instant::now();
    all.pressing().await;
    assert_eq!(began.elapsed(), POLICY.short_hold);
    // All places are taken, and nobody waits.
    let hour = Duration::from_secs(3600);
    let held = tokio::time::timeout(hour, all.pressing());
    assert!(held.await.is_err());
    assert_eq!(all.count().0, 4);
}

#[tokio::test(start_paused = true)]
async fn a_place_for_whoever_comes_next_counts_in_a_crowd() {
    let all = Connections::new(Some(4));
    let _listeners = (all.place().await, all.place().await);

    let _first = connected(&all).await;
    assert!(!all.is_crowded());
    let _second = connected(&all).await;

    assert!(all.is_crowded());
    assert_eq!(all.count(), (2, Some(4)));
}

/// How long one that was asked to leave stays if nothing happens.
async fn stay(connection: &Connection) -> Duration {
    let asked = Instant::now();
    connection.overstayed().await;
    asked.elapsed()
}

#[tokio::test(start_paused = true)]
async fn one_that_is_asked_and_stays_is_cut_off_unless_it_has_a_request() {
    let all = Connections::with_policy(Some(2), POLICY);
    let connection = connected(&all).await;
    let request = connection.begin_request(Protocol::Http1);
    let mut overstayed = std::pin::pin!(connection.overstayed());

    let hour = Duration::from_secs(3600);
    assert!(
        tokio::time::timeout(hour, overstayed.as_mut())
            .await
            .is_err()
    );
    drop(request);
    let ended = Instant::now();
    overstayed.await;

    assert!(ended.elapsed() >= POLICY.linger);
    drop(connection.begin_request(Protocol::Http2));
    assert_eq!(stay(&connection).await, POLICY.linger_http2);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_asked_stays_while_its_bytes_move() {
    let all = Connections::with_policy(Some(2), POLICY);
    let connection = connected(&all).await;
    let (near, mut far) = tokio::io::duplex(99);
    let mut near = connection.watch(near);
    let began = Instant::now();
    let (stayed, ()) = tokio::join!(stay(&connection), async {
        for _ in 0..3 {
            tokio::time::sleep(POLICY.linger - POLICY.grace).await;
            near.write_all(b"answer").await.unwrap();
            far.read_exact(&mut [0; 6]).await.unwrap();
        }
        assert!(began.elapsed() > 2 * POLICY.linger);
    });

    assert_eq!(stayed, 3 * (POLICY.linger - POLICY.grace) + POLICY.linger);
}

#[tokio::test(start_paused = true)]
async fn an_answer_gives_way_that_is_not_taken_but_not_one_that_is_made() {
    let all = Connections::with_policy(Some(2), POLICY);
    let (slow, second) = (connected(&all).await, connected(&all).await);
    let (mut made, working) = (
        slow.begin_request(Protocol::Http1),
        second.begin_request(Protocol::Http1),
    );
    made.begin_answer();
    made.await_piece();
    let _waiting = waits(&all);
    tokio::time::sleep(10 * POLICY.stall).await;
    assert!(!is_asked(&slow) && !is_asked(&second));

    made.have_piece();
    let there = Instant::now();
    slow.asked_to_leave().await;

    assert!(there.elapsed() >= POLICY.stall);
    assert!(stay(&slow).await >= POLICY.linger);
    assert!(!is_asked(&second));
    drop(working);
}

#[tokio::test]
async fn a_place_that_nobody_takes_up_is_given_back() {
    let all = Connections::new(Some(2));
    let taken = (all.place().await, all.place().await);
    assert!(all.place().now_or_never().is_none());

    drop(taken);

    assert!(all.place().now_or_never().is_some());
    assert_eq!(all.count(), (0, Some(2)));
}
