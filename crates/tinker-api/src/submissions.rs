//! Operations that were called and are not sent yet, for those who have to wait for them.

use std::sync::Arc;

use tokio::sync::watch;

/// The operations under way to the server, of all training runs of a program. Clones count alike.
#[derive(Debug, Clone)]
pub(crate) struct Submissions(Arc<watch::Sender<()>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Submission(
    #[expect(dead_code, reason = "its existence is what counts")] watch::Receiver<()>,
);

impl Default for Submissions {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }
}

impl Submissions {
    /// Counts one more.
    pub(crate) fn begin(&self) -> Submission {
        Submission(self.0.subscribe())
    }

    /// Waits until there is none.
    pub(crate) async fn finished(&self) {
        self.0.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn all_of_them_are_waited_for() {
        let submissions = Submissions::default();
        let (one, other) = (submissions.begin(), submissions.clone().begin());
        let mut finished = Box::pin(submissions.finished());

        assert!(poll!(&mut finished).is_pending());
        drop(one);
        assert!(poll!(&mut finished).is_pending());
        drop(other);
        assert!(poll!(&mut finished).is_ready());
    }

    #[tokio::test]
    async fn there_may_be_further_ones_after_a_pause() {
        let submissions = Submissions::default();
        submissions.finished().await;

        let _late = submissions.begin();

        assert!(poll!(Box::pin(submissions.finished())).is_pending());
    }
}
