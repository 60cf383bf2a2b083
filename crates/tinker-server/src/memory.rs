//! Refusing work that the machine has no memory for, before it begins: the kernel would end the server instead, and
//! with it everybody else's work.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::core::lock;
use crate::error::{Error, Result};
use crate::process;

/// How long what the machine has left is taken for known.
const GOOD_FOR: Duration = Duration::from_millis(500);

/// The memory that there is for more work.
#[derive(Clone)]
pub struct Memory(Arc<dyn Fn() -> Option<u64> + Send + Sync>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Memory").field(&(self.0)()).finish()
    }
}

impl Memory {
    /// What this machine has left, and the group of processes that this one is in. Nothing is refused where the
    /// system does not say.
    #[must_use]
    pub fn of_machine() -> Self {
        let known = Mutex::new(None);
        Self::told_by(move || {
            let mut known = lock(&known);
            // A thousand samples a second do not ask the kernel each.
            if let Some((at, free)) = *known
                && Instant::elapsed(&at) < GOOD_FOR
            {
                return free;
            }
            let free = process::available_memory();
            *known = Some((Instant::now(), free));
            free
        })
    }

    /// What `free` says, in bytes; `None` is as much as anybody asks for.
    pub fn told_by(free: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        Self(Arc::new(free))
    }

    /// Refuses what takes about `needed` bytes more if there are fewer.
    ///
    /// # Errors
    /// [`Error::NoMemory`] with what `what` takes, what there is, and `advice`.
    pub(crate) fn check(&self, needed: u64, what: &str, advice: &str) -> Result<()> {
        match (self.0)() {
            Some(free) if needed > free => Err(Error::NoMemory(format!(
                "{what} would take about {} of memory, and {} are available: {advice}",
                size(needed),
                size(free)
            ))),
            _ => Ok(()),
        }
    }
}

/// A number of bytes in the unit that makes it short.
fn size(n_bytes: u64) -> String {
    let mega = n_bytes as f64 / (1 << 20) as f64;
    if mega < 1024.0 {
        format!("{mega:.1} MB")
    } else {
        format!("{:.1} GB", mega / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_taken_and_what_does_not_is_refused_with_both_sizes() {
        let memory = Memory::told_by(|| Some(3 << 30));

        memory.check(3 << 30, "a model", "take another").unwrap();
        let error = memory.check((3 << 30) + (1 << 29), "a model", "take another");

        assert_eq!(
            error.unwrap_err().to_string(),
            "a model would take about 3.5 GB of memory, and 3.0 GB are available: take another"
        );
        Memory::told_by(|| None)
            .check(u64::MAX, "a model", "")
            .unwrap();
    }
}
