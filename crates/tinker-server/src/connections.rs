//! How many connections there are at a time, and which of them give way while others wait.
//!
//! A connection is a file, and a process may have only so many. One that accepts until it has none left can
//! write no logs either. So a place is taken before a connection is accepted, and whoever finds none waits
//! in the operating system's queue; room is made for him by connections without a request, by answers that
//! end theirs, and by polls that are answered soon.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::core::lock;
use crate::process;

/// Files that are left to databases, logs, checkpoints and downloads, at least.
const MIN_RESERVE: u64 = 64;
/// Connections that are taken however few files there may be.
const MIN_CONNECTIONS: u64 = 16;

/// Most connections that this process's limit of open files leaves room for; `None` without a limit.
pub(crate) fn max_connections() -> Option<usize> {
    process::max_open_files().map(bound)
}

/// Connections of so many files: a quarter is for everything else.
fn bound(max_open_files: u64) -> usize {
    let reserve = (max_open_files / 4).max(MIN_RESERVE);
    let most = max_open_files.saturating_sub(reserve).max(MIN_CONNECTIONS);
    usize::try_from(most).unwrap_or(usize::MAX)
}

/// When connections give way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// How long a connection without a request is left alone while others wait: its client may be about to
    /// send one.
    pub(crate) grace: Duration,
    /// Longest a poll is held while others wait.
    pub(crate) short_hold: Duration,
    /// How long one that was asked to leave may take before it is cut off.
    pub(crate) linger: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(1),
            short_hold: Duration::from_secs(1),
            linger: Duration::from_secs(10),
        }
    }
}

/// All connections of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    most: usize,
    policy: Policy,
    state: Mutex<State>,
    /// Somebody left, or has no request any more.
    changed: Notify,
    /// Whether somebody may be waiting: from when there was no place until connections are no longer
    /// crowded.
    full: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Places, also of those who are yet to come.
    n_taken: usize,
    open: HashMap<u64, Open>,
    n_ever: u64,
    /// Whether it was ever full.
    was_full: bool,
}

#[derive(Debug)]
struct Open {
    /// Requests under way.
    n_requests: usize,
    /// When the last of them ended, or the connection began.
    quiet_since: Instant,
    asked_to_leave: Option<Instant>,
    leave: Arc<Notify>,
}

impl Connections {
    /// At most so many; any number if `None`. Each listener holds one of them for whoever comes next.
    pub(crate) fn new(most: Option<usize>) -> Arc<Self> {
        Self::with_policy(most, Policy::default())
    }

    pub(crate) fn with_policy(most: Option<usize>, policy: Policy) -> Arc<Self> {
        Arc::new(Self {
            // There may be a listener for TLS and one without.
            most: most.map_or(usize::MAX, |most| most.max(2)),
            policy,
            state: Mutex::default(),
            changed: Notify::new(),
            full: watch::Sender::new(false),
        })
    }

    /// Waits for a place for one more connection, and makes room if there is none.
    pub(crate) async fn place(self: &Arc<Self>) -> Place {
        loop {
            // Registered before looking, so that no change is missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let again_at = match self.take() {
                Ok(()) => return Place(Arc::clone(self)),
                Err(again_at) => again_at,
            };
            let again = async {
                match again_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = changed => {}
                () = again => {}
            }
        }
    }

    /// Takes a place; else says when to look again at the latest.
    fn take(&self) -> Result<(), Option<Instant>> {
        let mut state = lock(&self.state);
        if state.n_taken < self.most {
            state.n_taken += 1;
            return Ok(());
        }
        self.full.send_replace(true);
        if !std::mem::replace(&mut state.was_full, true) {
            tracing::warn!(
                most = self.most,
                "all connections are taken, others wait: more are accepted where more files may be open (ulimit -n)"
            );
        }
        Err(state.make_room(Instant::now(), self.policy.grace))
    }

    /// Connections, and the most that there may be; `None` without a bound.
    pub(crate) fn count(&self) -> (usize, Option<usize>) {
        let n_open = lock(&self.state).open.len();
        (n_open, (self.most < usize::MAX).then_some(self.most))
    }

    /// Whether more than three quarters of the places are taken.
    fn is_crowded(&self) -> bool {
        self.is_crowd(lock(&self.state).open.len())
    }

    const fn is_crowd(&self, n_open: usize) -> bool {
        n_open.saturating_mul(4) > self.most.saturating_mul(3)
    }

    /// Completes when a poll has been held for long enough, since others wait for its connection.
    pub(crate) async fn pressing(&self) {
        // Cannot fail: the sender is here.
        let _ = self.full.subscribe().wait_for(|full| *full).await;
        tokio::time::sleep(self.policy.short_hold).await;
    }

    fn change<T>(&self, id: u64, change: impl FnOnce(&mut Open) -> T) -> Option<T> {
        lock(&self.state).open.get_mut(&id).map(change)
    }
}

impl State {
    /// Asks the connection to leave that has been without a request for longest, if that is long enough and
    /// no other is about to leave. Says when there may be more to do.
    fn make_room(&mut self, now: Instant, grace: Duration) -> Option<Instant> {
        let quiet = || self.open.values().filter(|open| open.n_requests == 0);
        let leaving = quiet().filter_map(|open| Some(open.asked_to_leave? + grace));
        if let Some(at) = leaving.filter(|at| *at > now).max() {
            return Some(at);
        }
        let staying = self
            .open
            .iter_mut()
            .filter(|(_, open)| open.n_requests == 0 && open.asked_to_leave.is_none());
        let (_, longest) = staying.min_by_key(|(id, open)| (open.quiet_since, **id))?;
        let due = longest.quiet_since + grace;
        if due > now {
            return Some(due);
        }
        longest.asked_to_leave = Some(now);
        longest.leave.notify_one();
        Some(now + grace)
    }
}

/// Room for a connection, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Connections>);

impl Place {
    /// Somebody came.
    pub(crate) fn take_up(self) -> Connection {
        let leave = Arc::<Notify>::default();
        let open = Open {
            n_requests: 0,
            quiet_since: Instant::now(),
            asked_to_leave: None,
            leave: Arc::clone(&leave),
        };
        let mut state = lock(&self.0.state);
        state.n_ever += 1;
        let id = state.n_ever;
        state.open.insert(id, open);
        drop(state);
        let place = self;
        Connection { place, id, leave }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.n_taken -= 1;
        if !self.0.is_crowd(state.open.len()) {
            self.0
                .full
                .send_if_modified(|full| std::mem::replace(full, false));
        }
        drop(state);
        self.0.changed.notify_waiters();
    }
}

/// A connection, to be dropped after it is closed.
#[derive(Debug)]
pub(crate) struct Connection {
    place: Place,
    id: u64,
    leave: Arc<Notify>,
}

impl Connection {
    /// All connections.
    pub(crate) const fn all(&self) -> &Arc<Connections> {
        &self.place.0
    }

    /// A request has come. It is under way until this is dropped.
    pub(crate) fn begin_request(&self) -> UnderWay {
        let connections = Arc::clone(self.all());
        connections.change(self.id, |open| open.n_requests += 1);
        UnderWay {
            connections,
            id: self.id,
        }
    }

    /// Completes when the place is needed by somebody else.
    pub(crate) async fn asked_to_leave(&self) {
        self.leave.notified().await;
    }

    /// Completes when it has no request and should have been closed long ago.
    pub(crate) async fn overstayed(&self) {
        loop {
            tokio::time::sleep(self.all().policy.linger).await;
            let n_requests = self.all().change(self.id, |open| open.n_requests);
            if n_requests.is_none_or(|n| n == 0) {
                return;
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.all().state).open.remove(&self.id);
    }
}

/// A request until the end of its answer.
#[derive(Debug)]
pub(crate) struct UnderWay {
    connections: Arc<Connections>,
    id: u64,
}

impl UnderWay {
    /// Whether its connection should end with it, for there may soon be no place for others.
    pub(crate) fn is_last(&self) -> bool {
        self.connections.is_crowded()
    }

    /// Has its connection end once all requests that are under way have.
    pub(crate) fn end_connection(&self) {
        self.connections.change(self.id, |open| {
            open.asked_to_leave.get_or_insert_with(Instant::now);
            open.leave.notify_one();
        });
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let is_quiet = self.connections.change(self.id, |open| {
            open.n_requests -= 1;
            open.quiet_since = Instant::now();
            open.n_requests == 0
        });
        if is_quiet == Some(true) {
            self.connections.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    const POLICY: Policy = Policy {
        grace: Duration::from_secs(1),
        short_hold: Duration::from_secs(2),
        linger: Duration::from_secs(10),
    };

    async fn connected(all: &Arc<Connections>) -> Connection {
        all.place().await.take_up()
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
        let _request = busy.begin_request();
        let idle = connected(&all).await;
        tokio::time::advance(Duration::from_secs(5)).await;
        let (later, last) = (connected(&all).await, connected(&all).await);
        assert!(!is_asked(&idle), "nobody waits");

        let next = {
            let all = Arc::clone(&all);
            tokio::spawn(async move { connected(&all).await })
        };
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
        let (held, ends) = (first.begin_request(), second.begin_request());
        let waiting = {
            let all = Arc::clone(&all);
            tokio::spawn(async move { connected(&all).await })
        };
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
        let waiting = {
            let all = Arc::clone(&all);
            tokio::spawn(async move { connected(&all).await })
        };

        first.asked_to_leave().await;
        let asked = Instant::now();
        second.asked_to_leave().await;

        assert!(asked.elapsed() >= POLICY.grace);
        drop(second);
        waiting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn polls_are_held_for_less_from_full_until_no_longer_crowded() {
        let all = Connections::with_policy(Some(4), POLICY);
        let mut open = Vec::new();
        for n in 1..=4 {
            open.push(connected(&all).await);
            assert_eq!(all.is_crowded(), n == 4);
        }
        assert!(!*all.full.borrow(), "nobody had to wait");
        let (poll, waiting) = {
            let (poll, waits) = (Arc::clone(&all), Arc::clone(&all));
            (
                tokio::spawn(async move { poll.pressing().await }),
                tokio::spawn(async move { waits.place().await }),
            )
        };
        let began = Instant::now();

        poll.await.unwrap();

        assert!(began.elapsed() >= POLICY.short_hold);
        open.pop();
        let place = waiting.await.unwrap();
        assert!(!*all.full.borrow() && !all.is_crowded());
        drop(place);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_asked_and_stays_is_cut_off_unless_it_has_a_request() {
        let all = Connections::with_policy(Some(2), POLICY);
        let connection = connected(&all).await;
        let request = connection.begin_request();
        let mut overstayed = std::pin::pin!(connection.overstayed());

        let hour = Duration::from_secs(3600);
        assert!(
            tokio::time::timeout(hour, overstayed.as_mut())
                .await
                .is_err()
        );
        drop(request);

        overstayed.await;
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
}
