//! Every decision about time, as pure state machines: what to do next, given what happened and when.
//!
//! Nothing here waits, sends, reads a clock or draws a number. `now` is the time since the client
//! was built and `draw` a number in `[0, 1)`; both are arguments, so tests run on virtual time.

mod backoff;
mod completions;
mod limit;
mod link;
mod poll;
mod retry;
mod unheard;

pub use backoff::Backoff;
pub use completions::{CompletionEvent, CompletionPoll, CompletionStep, Missed};
pub use limit::{AimdLimit, AimdPolicy, ByteBudget, ProgressWatch, SharedPause};
pub use link::Link;
pub use poll::{
    FuturePoll, PollEnd, PollEvent, PollPolicy, PollStep, QueueWatch, SilenceNews, SilenceWatch,
};
pub use retry::{Class, Decision, Failure, RetryPolicy, RetryState, classify, parse_retry_after};
pub use unheard::Unheard;
