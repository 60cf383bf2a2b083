//! The timeline of a session as far as the logs still have it, in the JSON trace format of Chrome,
//! which Perfetto opens.

use serde::Serialize;
use tinker_types::SessionId;

use crate::app::name_of;
use crate::completions::SamplerClient;
use crate::core::{Core, lock};
use crate::error::{Error, Result};
use crate::journal::Found;
use crate::operation::Form;

/// The outer object of a trace.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    trace_events: Vec<Event>,
    display_time_unit: &'static str,
}

/// An event; times are microseconds.
#[derive(Serialize)]
struct Event {
    name: String,
    cat: &'static str,
    /// `X` for something that takes time, `M` for the name of a row.
    ph: &'static str,
    ts: i64,
    dur: i64,
    pid: u32,
    /// The row it is shown in.
    tid: u32,
    args: serde_json::Value,
}

/// A session's operations from their acceptance to their end, a row for each run and sampler.
///
/// # Errors
/// [`Error::NotFound`] for an unknown session; or a log cannot be read.
pub(crate) fn of_session(core: &Core, session: &SessionId) -> Result<Vec<u8>> {
    core.catalog.session(session)?;
    let (runs, samplers) = core.catalog.of_session(session);
    let mut trace_events = Vec::new();
    for run in &runs {
        let found = lock(&*core.journal(run)?).found();
        add_row(&mut trace_events, run.as_str(), "training", found);
    }
    let of_all = core.samples().found();
    for sampler in &samplers {
        let is_own = |found: &&Found| {
            SamplerClient::of(&found.request_id).is_some_and(|client| client.sampler == *sampler)
        };
        let found = of_all.iter().filter(is_own).cloned().collect();
        add_row(&mut trace_events, sampler.as_str(), "sampling", found);
    }
    let trace = Trace {
        trace_events,
        display_time_unit: "ms",
    };
    serde_json::to_vec(&trace).map_err(|e| Error::Invalid(e.to_string()))
}

fn add_row(events: &mut Vec<Event>, name: &str, cat: &'static str, found: Vec<Found>) {
    let tid = 1 + events.iter().filter(|event| event.ph == "M").count() as u32;
    let event = |name: &str, ph, ts, dur, args| Event {
        name: name.to_owned(),
        cat,
        ph,
        ts,
        dur,
        pid: 1,
        tid,
        args,
    };
    let args = serde_json::json!({ "name": name });
    events.push(event("thread_name", "M", 0, 0, args));
    for operation in found {
        let state = match operation.finished {
            None => "pending",
            Some(Form::Failed) => "failed",
            Some(_) => "finished",
        };
        let args = serde_json::json!({
            "request_id": operation.request_id, "seq_id": operation.seq, "state": state,
        });
        let (start, end) = (operation.accepted_at, operation.at);
        let name = name_of(operation.kind);
        events.push(event(
            name,
            "X",
            start * 1000,
            (end - start).max(0) * 1000,
            args,
        ));
    }
}
