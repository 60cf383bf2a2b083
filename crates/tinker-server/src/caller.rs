//! Who a request comes from, and what that may see and do.
//!
//! The guard finds the caller by the key and keeps it in the task while the request is answered; the
//! catalog asks for it at every look-up. What has no caller, the engine's thread and the server itself,
//! sees everything.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::api_error::{ApiError, ApiResult};
use crate::keys::{KeyLimits, KeyName};

/// What a key is good for. Every key may look at what belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Lists, look-ups, downloads and results.
    Read,
    /// Samples, also through the compatible endpoints.
    Sample,
    /// Training runs and checkpoints, whatever changes them.
    Train,
    /// Everything, of all keys: also counters and the audit log.
    Admin,
}

impl Scope {
    /// All scopes, least first.
    pub const ALL: [Self; 4] = [Self::Read, Self::Sample, Self::Train, Self::Admin];

    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Sample => "sample",
            Self::Train => "train",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

tokio::task_local! {
    static CALLER: Caller;
}

/// Whoever sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of the key; none for the data directory's own, which may do everything.
    pub(crate) key: Option<KeyName>,
    /// The key's digest, which no other key that ever has its name shares.
    pub(crate) digest: Option<Arc<str>>,
    scopes: BTreeSet<Scope>,
    pub(crate) limits: KeyLimits,
}

impl Caller {
    /// Whoever has the data directory's own token.
    pub(crate) fn own() -> Self {
        Self {
            key: None,
            digest: None,
            scopes: [Scope::Admin].into(),
            limits: KeyLimits::UNLIMITED,
        }
    }

    pub(crate) fn of_key(key: KeyName, scopes: BTreeSet<Scope>, limits: KeyLimits) -> Self {
        Self {
            key: Some(key),
            digest: None,
            scopes,
            limits,
        }
    }

    /// The same with the key's digest.
    pub(crate) fn with_digest(self, digest: &str) -> Self {
        Self {
            digest: Some(digest.into()),
            ..self
        }
    }

    /// Whoever had a key that was removed meanwhile.
    pub(crate) fn removed(key: KeyName) -> Self {
        Self::of_key(key, BTreeSet::new(), KeyLimits::default())
    }

    /// Whether it may do what takes this scope.
    pub(crate) fn has(&self, scope: Scope) -> bool {
        scope == Scope::Read || self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin)
    }

    /// Whether it may see what belongs to a key.
    fn sees(&self, owner: Option<&KeyName>) -> bool {
        self.has(Scope::Admin) || self.key.as_ref() == owner
    }
}

/// Answers a request for its caller.
pub(crate) async fn answer_for<T>(caller: Caller, request: impl Future<Output = T>) -> T {
    CALLER.scope(caller, request).await
}

/// Does something for a caller.
pub(crate) fn work_for<T>(caller: Caller, work: impl FnOnce() -> T) -> T {
    CALLER.sync_scope(caller, work)
}

/// Who is being answered, if this is part of a request.
pub(crate) fn current() -> Option<Caller> {
    CALLER.try_with(Clone::clone).ok()
}

/// Work of the current request that will be done on another thread.
pub(crate) fn carried<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let caller = current();
    move || match caller {
        Some(caller) => work_for(caller, work),
        None => work(),
    }
}

/// The key that is being answered.
pub(crate) fn current_key() -> Option<KeyName> {
    CALLER.try_with(|caller| caller.key.clone()).ok().flatten()
}

/// Whether whoever is being answered may see what belongs to `owner`.
pub(crate) fn may_see(owner: Option<&KeyName>) -> bool {
    CALLER.try_with(|caller| caller.sees(owner)).unwrap_or(true)
}

/// Refuses a request whose key lacks a scope.
///
/// # Errors
/// 403 with the scope that is missing.
pub(crate) fn check(scope: Scope) -> ApiResult<()> {
    let refusal = CALLER.try_with(|caller| {
        let key = caller.key.as_ref().filter(|_| !caller.has(scope))?;
        Some(format!(
            "API key {key} lacks the scope {scope}: whoever runs the server gives keys with `tinker serve keys add NAME --scope {scope}`"
        ))
    });
    match refusal {
        Ok(Some(text)) => Err(ApiError::forbidden(text)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(name: &str, scopes: &[Scope]) -> Caller {
        let scopes = scopes.iter().copied().collect();
        Caller::of_key(name.parse().unwrap(), scopes, KeyLimits::default())
    }

    #[test]
    fn a_key_sees_its_own_and_an_admin_everything() {
        let (ann, ben): (KeyName, KeyName) = ("ann".parse().unwrap(), "ben".parse().unwrap());
        let of_ann = caller("ann", &[Scope::Train]);

        assert!(of_ann.sees(Some(&ann)));
        assert!(!of_ann.sees(Some(&ben)) && !of_ann.sees(None));
        for all in [caller("ann", &[Scope::Admin]), Caller::own()] {
            assert!(all.sees(Some(&ann)) && all.sees(Some(&ben)) && all.sees(None));
        }
    }

    #[test]
    fn scopes_do_not_contain_each_other_but_for_admin_and_reading() {
        let sampler = caller("ann", &[Scope::Sample]);
        let has = |caller: &Caller| Scope::ALL.map(|scope| caller.has(scope));

        assert_eq!(has(&sampler), [true, true, false, false]);
        assert_eq!(has(&caller("ann", &[])), [true, false, false, false]);
        assert_eq!(has(&caller("ann", &[Scope::Admin])), [true; 4]);
    }

    #[tokio::test]
    async fn work_on_another_thread_is_for_the_same_caller() {
        let ann = caller("ann", &[]);
        let work = answer_for(ann.clone(), async {
            let carried = carried(current);
            tokio::task::spawn_blocking(carried).await.unwrap()
        });

        assert_eq!(work.await, Some(ann));
        assert_eq!(carried(current)(), None);
    }
}
