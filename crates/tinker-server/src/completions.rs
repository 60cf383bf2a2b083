//! Which samples of a sampler's client are done, for the one long poll that asks for all of them.
//!
//! A list is made when a client first asks, from the log of samples, and grows while it is asked for.
//! Its cursors begin at the time of its making in microseconds, above those that the client has seen:
//! after a restart everything that may not have been fetched is announced again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tinker_types::{Completion, RequestId, SamplingSessionId};
use tokio::sync::Notify;

use crate::clock::now;
use crate::core::lock;

/// Numbers of samples that each client of a sampler has to itself.
const NUMBERS_PER_CLIENT: u64 = 1_000_000_000;

/// One of the clients that share a sampler.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SamplerClient {
    pub(crate) sampler: SamplingSessionId,
    /// 0 for the one that made it.
    pub(crate) number: u64,
}

impl SamplerClient {
    /// Whose sample a future is; `None` for futures that are none.
    pub(crate) fn of(id: &RequestId) -> Option<Self> {
        let (sampler, seq) = id.as_str().rsplit_once(":op:")?;
        let seq: u64 = seq.parse().ok()?;
        Some(Self {
            sampler: sampler.parse().ok()?,
            number: seq / NUMBERS_PER_CLIENT,
        })
    }
}

/// A sample that ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ended {
    pub(crate) id: RequestId,
    pub(crate) failed: bool,
    /// Size of the result, if it is at hand.
    pub(crate) n_bytes: Option<u64>,
}

impl Ended {
    fn completion(&self) -> Completion {
        let request_id = self.id.clone();
        if self.failed {
            return Completion::Failed { request_id };
        }
        Completion::Finished {
            request_id,
            response_payload_uncompressed_size: self.n_bytes,
        }
    }
}

/// The highest cursor that a list begins after, whatever a client says it has seen: there is always a
/// next one.
const MAX_START: u64 = u64::MAX / 2;

#[derive(Debug)]
struct Channel {
    /// By cursor.
    events: BTreeMap<u64, Ended>,
    cursors: HashMap<RequestId, u64>,
    /// The newest cursor that was given out.
    last: u64,
    notify: Arc<Notify>,
    last_used: Instant,
}

impl Channel {
    fn new(start: u64) -> Self {
        Self {
            events: BTreeMap::new(),
            cursors: HashMap::new(),
            last: start,
            notify: Arc::default(),
            last_used: Instant::now(),
        }
    }

    fn push(&mut self, ended: Ended) {
        if self.cursors.contains_key(&ended.id) {
            return;
        }
        self.last += 1;
        self.cursors.insert(ended.id.clone(), self.last);
        self.events.insert(self.last, ended);
        self.notify.notify_waiters();
    }

    fn remove(&mut self, id: &RequestId) {
        if let Some(cursor) = self.cursors.remove(id) {
            self.events.remove(&cursor);
        }
    }

    /// Forgets what was seen. A cursor from after the newest is of another life of the server.
    fn acknowledge(&mut self, cursor: u64) {
        if cursor > self.last {
            return;
        }
        let later = self.events.split_off(&(cursor + 1));
        for ended in std::mem::replace(&mut self.events, later).into_values() {
            self.cursors.remove(&ended.id);
        }
    }
}

/// The lists of all clients that ask for them.
#[derive(Debug, Default)]
pub(crate) struct Completions {
    channels: Mutex<HashMap<SamplerClient, Channel>>,
}

impl Completions {
    /// Notes what a client has seen up to and which results it has. A client that is new here gets a
    /// list that begins with what `so_far` gives.
    pub(crate) fn acknowledge(
        &self,
        client: &SamplerClient,
        cursor: u64,
        retrieved: &[RequestId],
        so_far: impl FnOnce() -> Vec<Ended>,
    ) {
        let mut channels = lock(&self.channels);
        let channel = channels.entry(client.clone()).or_insert_with(|| {
            let micros = u64::try_from(now()).unwrap_or(0) * 1000;
            let mut channel = Channel::new(micros.max(cursor.min(MAX_START)));
            so_far().into_iter().for_each(|ended| channel.push(ended));
            channel
        });
        channel.last_used = Instant::now();
        channel.acknowledge(cursor);
        retrieved.iter().for_each(|id| channel.remove(id));
    }

    /// Announces the end of a sample to its client, if that one asks and does not have the result.
    pub(crate) fn note(&self, ended: Ended, was_fetched: impl FnOnce() -> bool) {
        let Some(client) = SamplerClient::of(&ended.id) else {
            return;
        };
        let mut channels = lock(&self.channels);
        // Asked with the lists locked: a list made in between may lack the sample for this reason.
        if let Some(channel) = channels.get_mut(&client)
            && !was_fetched()
        {
            channel.push(ended);
        }
    }

    /// What a client has not seen, waiting for something up to `hold` or until `stop` is notified;
    /// and the cursor of the last of it.
    pub(crate) async fn wait(
        &self,
        client: &SamplerClient,
        hold: Duration,
        stop: &Notify,
    ) -> (Vec<Completion>, u64) {
        let Some(notify) = self.notify_of(client) else {
            return (Vec::new(), 0);
        };
        // Registered before looking, so that what comes in between is not missed.
        let ended = notify.notified();
        let stopped = stop.notified();
        tokio::pin!(ended, stopped);
        ended.as_mut().enable();
        stopped.as_mut().enable();
        let first = self.unseen(client);
        if !first.0.is_empty() || hold.is_zero() {
            return first;
        }
        tokio::select! {
            () = ended => {}
            () = stopped => {}
            () = tokio::time::sleep(hold) => {}
        }
        self.unseen(client)
    }

    fn notify_of(&self, client: &SamplerClient) -> Option<Arc<Notify>> {
        lock(&self.channels)
            .get(client)
            .map(|channel| Arc::clone(&channel.notify))
    }

    fn unseen(&self, client: &SamplerClient) -> (Vec<Completion>, u64) {
        let mut channels = lock(&self.channels);
        let Some(channel) = channels.get_mut(client) else {
            return (Vec::new(), 0);
        };
        channel.last_used = Instant::now();
        let unseen = channel.events.values().map(Ended::completion).collect();
        (unseen, channel.last)
    }

    /// Drops the lists that nobody asked for within `limit`; they are made again on demand.
    pub(crate) fn drop_idle(&self, limit: Duration) {
        lock(&self.channels).retain(|_, channel| channel.last_used.elapsed() < limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> SamplerClient {
        SamplerClient::of(&id(0)).unwrap()
    }

    fn id(seq: u64) -> RequestId {
        format!("s:sample:0:op:{seq}").parse().unwrap()
    }

    fn ended(seq: u64) -> Ended {
        Ended {
            id: id(seq),
            failed: false,
            n_bytes: Some(7),
        }
    }

    fn ids(found: &[Completion]) -> Vec<RequestId> {
        let id = |c: &Completion| match c {
            Completion::Finished { request_id, .. } | Completion::Failed { request_id } => {
                request_id.clone()
            }
            other => panic!("{other:?}"),
        };
        found.iter().map(id).collect()
    }

    /// What is there at once for a client that has seen everything up to `cursor`.
    async fn ask(lists: &Completions, cursor: u64, so_far: &[u64]) -> (Vec<RequestId>, u64) {
        let so_far = so_far.iter().map(|&seq| ended(seq)).collect();
        lists.acknowledge(&client(), cursor, &[], || so_far);
        let (found, next) = lists.wait(&client(), Duration::ZERO, &Notify::new()).await;
        (ids(&found), next)
    }

    #[tokio::test]
    async fn a_cursor_without_a_next_one_is_not_believed() {
        let lists = Completions::default();

        let (found, next) = ask(&lists, u64::MAX, &[1, 2]).await;
        let (again, _) = ask(&lists, u64::MAX, &[]).await;
        let (later, _) = ask(&lists, next, &[]).await;

        assert_eq!(found, [id(1), id(2)]);
        assert_eq!(again, [id(1), id(2)]);
        assert_eq!(later, []);
    }

    #[test]
    fn samples_are_told_apart_by_their_client() {
        let of = |seq| SamplerClient::of(&id(seq)).unwrap().number;

        assert_eq!((of(0), of(999_999_999), of(3_000_000_001)), (0, 0, 3));
        assert_eq!(SamplerClient::of(&"s:train:0".parse().unwrap()), None);
    }

    #[tokio::test]
    async fn what_ended_is_announced_until_it_is_acknowledged() {
        let lists = Completions::default();
        let (found, start) = ask(&lists, 0, &[1]).await;
        assert_eq!(found, [id(1)]);
        lists.note(ended(2), || false);

        let (again, next) = ask(&lists, 0, &[]).await;
        assert_eq!(again, [id(1), id(2)], "the first answer may be lost");
        assert_eq!(ask(&lists, start, &[]).await.0, [id(2)]);
        assert_eq!(ask(&lists, next, &[]).await, (Vec::new(), next));
    }

    #[tokio::test]
    async fn what_was_fetched_is_not_announced_again() {
        let lists = Completions::default();
        ask(&lists, 0, &[1, 2]).await;

        lists.acknowledge(&client(), 0, &[id(1)], Vec::new);
        lists.note(ended(3), || true);

        assert_eq!(ask(&lists, 0, &[]).await.0, [id(2)]);
    }

    #[tokio::test]
    async fn after_a_restart_an_old_cursor_hides_nothing() {
        let before = Completions::default();
        let (_, cursor) = ask(&before, 0, &[1]).await;
        // Whatever the clock did in between.
        let cursor = cursor + (1 << 40);
        let after = Completions::default();

        let (found, next) = ask(&after, cursor, &[1, 2]).await;

        assert_eq!(found, [id(1), id(2)]);
        assert!(next > cursor);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_client_is_woken_by_the_next_end() {
        let lists = Arc::new(Completions::default());
        lists.acknowledge(&client(), 0, &[], Vec::new);
        let waiting = {
            let lists = Arc::clone(&lists);
            let hold = Duration::from_secs(3600);
            tokio::spawn(async move { lists.wait(&client(), hold, &Notify::new()).await })
        };
        tokio::task::yield_now().await;

        let failed = Ended {
            failed: true,
            ..ended(4)
        };
        lists.note(failed, || false);

        let (found, _) = waiting.await.unwrap();
        assert_eq!(found, [Completion::Failed { request_id: id(4) }]);
    }

    #[tokio::test]
    async fn a_list_that_nobody_asks_for_is_dropped_and_made_again() {
        let lists = Completions::default();
        let (_, cursor) = ask(&lists, 0, &[1]).await;

        lists.drop_idle(Duration::ZERO);
        lists.note(ended(2), || false);

        assert_eq!(ask(&lists, cursor, &[1, 2]).await.0, [id(1), id(2)]);
    }
}
