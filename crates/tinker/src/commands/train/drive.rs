//! Runs a training job while watching for Ctrl-C and for the embedded server's death.

use std::pin::pin;
use std::time::Duration;

use tinker_recipes::sft::{Outcome, StopSignal};
use tokio::time::{MissedTickBehavior, interval};

use crate::connect::Connection;
use crate::failure::{Failure, FailureKind, Result};
use crate::keeper::Keeper;
use crate::signals::Interrupts;
use crate::ui::Ui;

/// How often the embedded server is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How a job ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// The job's outcome, or why it was given up.
    pub(super) outcome: Result<Outcome>,
    /// Whether going on from the last checkpoint may end otherwise.
    pub(super) can_resume: bool,
}

/// Awaits `job`, which works over `connection`. The first of `interrupts` asks it to save and end,
/// the second ends it at once.
pub(super) async fn drive(
    job: impl Future<Output = tinker_recipes::Result<Outcome>>,
    stop: StopSignal,
    connection: &Connection,
    mut keeper: Option<Keeper>,
    interrupts: &mut Interrupts,
    ui: &Ui,
) -> Ended {
    let mut job = pin!(job);
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            outcome = &mut job => return Ended::by_itself(outcome),
            () = interrupts.next() => {
                if stop.is_requested() {
                    let what = "ended without saving";
                    return Ended::given_up(Failure::new(FailureKind::Interrupted, what));
                }
                ui.note("finishing the step in flight, then saving; Ctrl-C again quits without saving");
                stop.request();
            }
            _ = look.tick(), if keeper.is_some() => {
                if let Some(Err(failure)) = keeper.as_mut().map(|k| look_after(k, connection)) {
                    return Ended::given_up(failure);
                }
            }
        }
    }
}

/// Looks after the embedded server, and goes where it went.
fn look_after(keeper: &mut Keeper, connection: &Connection) -> Result<()> {
    match keeper.look()? {
        Some(moved) => connection.follow(moved),
        None => Ok(()),
    }
}

impl Ended {
    fn by_itself(outcome: tinker_recipes::Result<Outcome>) -> Self {
        // The same steps would fail again.
        let is_final = outcome
            .as_ref()
            .is_err_and(tinker_recipes::Error::is_divergence);
        Self {
            outcome: outcome.map_err(Failure::from),
            can_resume: !is_final,
        }
    }

    fn given_up(failure: Failure) -> Self {
        Self {
            outcome: Err(failure),
            can_resume: true,
        }
    }
}
