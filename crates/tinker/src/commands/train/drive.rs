//! Runs a training job while watching for Ctrl-C and for the embedded server's death.

use std::pin::pin;
use std::time::Duration;

use tinker_recipes::sft::{Outcome, StopSignal};
use tokio::time::{MissedTickBehavior, interval};

use crate::failure::{Failure, FailureKind, Result};
use crate::local::Keeper;
use crate::signals::Interrupts;

/// How often the embedded server is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Awaits `job`. The first Ctrl-C asks it to save and end, the second ends it at once.
///
/// # Errors
/// The job's, or that it was ended at once.
pub(super) async fn drive(
    job: impl Future<Output = tinker_recipes::Result<Outcome>>,
    stop: StopSignal,
    mut keeper: Option<Keeper>,
) -> Result<Outcome> {
    let mut job = pin!(job);
    let mut interrupts = Interrupts::watch()?;
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            outcome = &mut job => return Ok(outcome?),
            () = interrupts.next() => {
                if stop.is_requested() {
                    let what = "ended without saving";
                    return Err(Failure::new(FailureKind::Interrupted, what));
                }
                stop.request();
            }
            _ = look.tick(), if keeper.is_some() => {
                if let Some(keeper) = &mut keeper {
                    keeper.look()?;
                }
            }
        }
    }
}
