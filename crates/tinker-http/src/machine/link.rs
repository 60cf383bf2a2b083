//! Whether the server can be reached, so that its loss and its return are each told once.

use std::time::Duration;

/// The state of the link to one server, shared by all calls of a client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    lost_at: Option<Duration>,
}

impl Link {
    /// Notes a lost connection; true if the server was there before.
    pub const fn lost(&mut self, now: Duration) -> bool {
        let news = self.lost_at.is_none();
        if news {
            self.lost_at = Some(now);
        }
        news
    }

    /// Notes an answer; how long the server was away, if it was.
    pub fn reached(&mut self, now: Duration) -> Option<Duration> {
        self.lost_at.take().map(|since| now.saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_return_are_news_once() {
        let mut link = Link::default();
        let at = Duration::from_secs;

        assert_eq!(link.reached(at(0)), None);
        assert!(link.lost(at(1)));
        assert!(!link.lost(at(2)));
        assert_eq!(link.reached(at(5)), Some(at(4)));
        assert_eq!(link.reached(at(6)), None);
        assert!(link.lost(at(7)));
    }
}
