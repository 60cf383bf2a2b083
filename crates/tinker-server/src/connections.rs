//! How many connections there are at a time, and which of them give way while others wait.
//!
//! A connection is a file, and a process may have only so many. One that accepts until it has none left can
//! write no logs either. So a place is taken before a connection is accepted, and whoever finds none waits
//! in the operating system's queue; room is made for him by connections without a request, by answers that
//! end theirs, by polls that are answered soon, and by clients that do not take their answers.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::core::lock;
use crate::process;
use crate::watched::{Activity, Watched};

/// Files that are left to databases, logs, checkpoints and downloads, at least.
const MIN_RESERVE: u64 = 64;
/// Connections that are taken however few files there may be.
const MIN_CONNECTIONS: u64 = 16;
/// Of how many connections one is asked to leave at a time. How many wait is not known.
const ASKED_OF: usize = 16;
/// A connection that may not be asked to leave yet is not looked at again before this.
const NEXT_LOOK: Duration = Duration::from_millis(1);

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
    /// How long one that was asked to leave and is still may stay before it is cut off.
    pub(crate) linger: Duration,
    /// The same over HTTP/2, where a client without a request may never hear that it is asked.
    pub(crate) linger_http2: Duration,
    /// How long a client that does not take its answer is left alone while others wait.
    pub(crate) stall: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(1),
            short_hold: Duration::from_secs(1),
            linger: Duration::from_secs(10),
            linger_http2: Duration::from_secs(1),
            stall: Duration::from_secs(60),
        }
    }
}

/// All connections of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    most: usize,
    policy: Policy,
    state: Mutex<State>,
    /// Somebody left, or may be asked to.
    changed: Notify,
    waiting: watch::Sender<Waiting>,
}

/// Who found no place.
#[derive(Debug, Default)]
struct Waiting {
    n_waiting: usize,
    /// When somebody no longer had to wait.
    last_ended: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    /// Places, also of those who are yet to come.
    n_taken: usize,
    open: HashMap<u64, Open>,
    n_ever: u64,
    /// Those that may give way, by when they are to be looked at.
    order: BTreeSet<(Instant, u64)>,
    /// Those that were asked to leave a short time ago, and when.
    asked: VecDeque<(Instant, u64)>,
    /// Whether it was ever full.
    was_full: bool,
}

#[derive(Debug)]
struct Open {
    /// Requests whose answer has not been handed on.
    n_requests: usize,
    /// Those of them whose answer has not begun.
    n_working: usize,
    is_http2: bool,
    activity: Arc<Activity>,
    /// Its place in the order.
    look_at: Option<Instant>,
    is_asked: bool,
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
            waiting: watch::Sender::default(),
        })
    }

    /// Waits for a place for one more connection, and makes room if there is none.
    pub(crate) async fn place(self: &Arc<Self>) -> Place {
        let mut waits = None;
        loop {
            // Registered before looking, so that no change is missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let again_at = match self.take() {
                Ok(()) => return Place(Arc::clone(self)),
                Err(again_at) => again_at,
            };
            waits.get_or_insert_with(|| Waits::begin(&self.waiting));
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
        let again_at = state.make_room(Instant::now(), self.policy, (self.most / ASKED_OF).max(1));
        let was_full = std::mem::replace(&mut state.was_full, true);
        drop(state);
        if !was_full {
            tracing::warn!(
                most = self.most,
                "all connections are taken, others wait: more are accepted where more files may be open (ulimit -n)"
            );
        }
        Err(again_at)
    }

    /// Connections, and the most that there may be; `None` without a bound.
    pub(crate) fn count(&self) -> (usize, Option<usize>) {
        let n_open = lock(&self.state).open.len();
        (n_open, (self.most < usize::MAX).then_some(self.most))
    }

    /// Whether more than three quarters of the places are taken, also by those who are yet to come.
    fn is_crowded(&self) -> bool {
        let n_taken = lock(&self.state).n_taken;
        n_taken.saturating_mul(4) > self.most.saturating_mul(3)
    }

    /// Completes when a poll has been held for long enough, since others wait for its connection.
    pub(crate) async fn pressing(&self) {
        let short_hold = self.policy.short_hold;
        let mut waiting = self.waiting.subscribe();
        // Cannot fail: the sender is here.
        let _ = waiting
            .wait_for(|waiting| waiting.is_pressing(short_hold))
            .await;
        tokio::time::sleep(short_hold).await;
    }

    fn change<T>(&self, id: u64, change: impl FnOnce(&mut Open) -> T) -> Option<T> {
        let mut state = lock(&self.state);
        let open = state.open.get_mut(&id)?;
        let value = change(open);
        let may_give_way = state.reorder(id, self.policy.grace);
        drop(state);
        if may_give_way {
            self.changed.notify_waiters();
        }
        Some(value)
    }
}

impl Waiting {
    /// Whether others wait. They come one by one: between two of them nobody does for a moment.
    fn is_pressing(&self, short_hold: Duration) -> bool {
        let ended = self.last_ended;
        self.n_waiting > 0 || ended.is_some_and(|at| at.elapsed() < short_hold)
    }
}

/// Somebody waits for a place until this is dropped.
struct Waits<'a>(&'a watch::Sender<Waiting>);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a watch::Sender<Waiting>) -> Self {
        waiting.send_modify(|waiting| waiting.n_waiting += 1);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| {
            waiting.n_waiting -= 1;
            waiting.last_ended = Some(Instant::now());
        });
    }
}

impl State {
    /// Asks those to leave that have been still for longest, if that is long enough and not so many others
    /// are about to leave. Says when there may be more to do.
    fn make_room(&mut self, now: Instant, policy: Policy, n_at_once: usize) -> Option<Instant> {
        let Self {
            open, order, asked, ..
        } = self;
        asked.retain(|(at, id)| *at + policy.grace > now && open.contains_key(id));
        while let Some(&(look_at, id)) = order.first() {
            if look_at > now {
                return Some(look_at);
            }
            if asked.len() >= n_at_once {
                return asked.front().map(|(at, _)| *at + policy.grace);
            }
            order.pop_first();
            let Some(open) = open.get_mut(&id) else {
                continue;
            };
            let due = open.still_since(now) + open.patience(policy.grace, policy.stall);
            if due > now {
                // Bytes move without a word to the order.
                let look_at = due.min(now + policy.grace.max(NEXT_LOOK));
                open.look_at = Some(look_at);
                order.insert((look_at, id));
            } else {
                (open.look_at, open.is_asked) = (None, true);
                open.leave.notify_one();
                asked.push_back((now, id));
            }
        }
        None
    }

    /// Puts a connection that changed where it belongs; whether it is new in the order.
    fn reorder(&mut self, id: u64, grace: Duration) -> bool {
        let Some(open) = self.open.get_mut(&id) else {
            return false;
        };
        let before = open.look_at.take();
        if let Some(at) = before {
            self.order.remove(&(at, id));
        }
        if open.is_asked || open.n_working > 0 {
            return false;
        }
        let look_at = open.activity.last() + grace;
        open.look_at = Some(look_at);
        self.order.insert((look_at, id));
        before.is_none()
    }
}

impl Open {
    /// Since when nothing happens, while no request is worked on.
    fn still_since(&self, now: Instant) -> Instant {
        // That its client gets nothing is not the client's doing.
        if self.activity.is_awaited() {
            now
        } else {
            self.activity.last()
        }
    }

    /// How long it may be still: `stalled` while there is an answer to be taken.
    fn patience(&self, idle: Duration, stalled: Duration) -> Duration {
        if self.n_requests == 0 && !self.activity.is_blocked() {
            idle
        } else {
            stalled
        }
    }

    /// When one that was asked to leave is cut off, or is to be looked at again.
    fn ends_at(&self, asked: Instant, now: Instant, policy: Policy) -> Instant {
        let linger = match self.is_http2 {
            true => policy.linger_http2,
            false => policy.linger,
        };
        if self.n_working > 0 {
            return now + linger;
        }
        let still_until = self.still_since(now) + self.patience(linger, policy.stall);
        still_until.max(asked + linger)
    }
}

/// Room for a connection, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Connections>);

impl Place {
    /// Somebody came.
    pub(crate) fn take_up(self) -> Connection {
        let (leave, activity) = (Arc::<Notify>::default(), Arc::new(Activity::new()));
        let open = Open {
            n_requests: 0,
            n_working: 0,
            is_http2: false,
            activity: Arc::clone(&activity),
            look_at: None,
            is_asked: false,
            leave: Arc::clone(&leave),
        };
        let mut state = lock(&self.0.state);
        state.n_ever += 1;
        let id = state.n_ever;
        state.open.insert(id, open);
        state.reorder(id, self.0.policy.grace);
        drop(state);
        // Another listener may wait.
        self.0.changed.notify_waiters();
        let place = self;
        Connection {
            place,
            id,
            leave,
            activity,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.state).n_taken -= 1;
        self.0.changed.notify_waiters();
    }
}

/// A connection, to be dropped after it is closed.
#[derive(Debug)]
pub(crate) struct Connection {
    place: Place,
    id: u64,
    leave: Arc<Notify>,
    activity: Arc<Activity>,
}

impl Connection {
    /// All connections.
    pub(crate) const fn all(&self) -> &Arc<Connections> {
        &self.place.0
    }

    /// What its bytes go through, so that it is known when they move.
    pub(crate) fn watch<T>(&self, io: T) -> Watched<T> {
        Watched::new(io, Arc::clone(&self.activity))
    }

    /// A request has come. It is under way until this is dropped.
    pub(crate) fn begin_request(&self, protocol: Protocol) -> UnderWay {
        let connections = Arc::clone(self.all());
        self.activity.touch();
        connections.change(self.id, |open| {
            open.n_requests += 1;
            open.n_working += 1;
            open.is_http2 = protocol == Protocol::Http2;
        });
        UnderWay {
            connections,
            id: self.id,
            activity: Arc::clone(&self.activity),
            stage: Stage::Working,
        }
    }

    /// Completes when the place is needed by somebody else.
    pub(crate) async fn asked_to_leave(&self) {
        self.leave.notified().await;
    }

    /// Completes when it is still although it should have been closed long ago.
    pub(crate) async fn overstayed(&self) {
        let (asked, policy) = (Instant::now(), self.all().policy);
        loop {
            let now = Instant::now();
            let ends_at = self
                .all()
                .change(self.id, |open| open.ends_at(asked, now, policy));
            match ends_at {
                Some(at) if at > now => tokio::time::sleep_until(at).await,
                _ => return,
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = lock(&self.all().state);
        let look_at = state.open.remove(&self.id).and_then(|open| open.look_at);
        if let Some(at) = look_at {
            state.order.remove(&(at, self.id));
        }
    }
}

/// What a request came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// A request until the end of its answer.
#[derive(Debug)]
pub(crate) struct UnderWay {
    connections: Arc<Connections>,
    id: u64,
    activity: Arc<Activity>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// There is no answer yet.
    Working,
    /// The client has all that there is of the answer, the rest is to be made.
    Awaited,
    /// There is more of the answer than was taken.
    Sending,
}

impl UnderWay {
    /// Whether there may soon be no place for others.
    pub(crate) fn is_crowded(&self) -> bool {
        self.connections.is_crowded()
    }

    /// The answer has begun: from now on the client is to take it.
    pub(crate) fn begin_answer(&mut self) {
        self.leave_stage();
    }

    /// The next piece of the answer is not there yet.
    pub(crate) fn await_piece(&mut self) {
        if self.stage == Stage::Sending {
            self.activity.begin_await();
            self.stage = Stage::Awaited;
        }
    }

    /// A piece of the answer is there.
    pub(crate) fn have_piece(&mut self) {
        if self.stage == Stage::Awaited {
            self.leave_stage();
        }
    }

    fn leave_stage(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Sending) {
            Stage::Working => {
                self.activity.touch();
                self.connections.change(self.id, |open| open.n_working -= 1);
            }
            Stage::Awaited => self.activity.end_await(),
            Stage::Sending => {}
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.leave_stage();
        self.activity.touch();
        self.connections
            .change(self.id, |open| open.n_requests -= 1);
    }
}

#[cfg(test)]
mod tests;
