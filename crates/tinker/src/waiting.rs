//! What a person is told while the client waits: outages, queues, retries.

use std::sync::atomic::{AtomicBool, Ordering};

use tinker_api::Event;

use crate::human;
use crate::ui::Ui;

/// An observer for a client that tells `ui` what is waited for.
pub(crate) fn teller(ui: &Ui) -> impl Fn(&Event) + Send + Sync + 'static {
    let ui = ui.clone();
    let is_lost = AtomicBool::new(false);
    move |event| tell(&ui, &is_lost, event)
}

fn tell(ui: &Ui, is_lost: &AtomicBool, event: &Event) {
    match event {
        Event::ServerLost { error } => {
            is_lost.store(true, Ordering::Relaxed);
            ui.warn(format_args!(
                "the server cannot be reached ({error}); waiting for it"
            ));
        }
        Event::ServerBack { after } => {
            is_lost.store(false, Ordering::Relaxed);
            ui.note(format_args!(
                "the server is back after {}",
                human::duration(*after)
            ));
        }
        Event::ServerSilent {
            request_type,
            since,
            ..
        } => ui.warn(format_args!(
            "the server has not answered for {} (asked for {request_type}); waiting for it",
            human::duration(*since)
        )),
        Event::ServerAnswers { after, .. } => ui.note(format_args!(
            "the server answers again after {}",
            human::duration(*after)
        )),
        // Every attempt fails while the server is away, which was said.
        Event::Retrying { .. } if is_lost.load(Ordering::Relaxed) => {}
        Event::Retrying {
            route,
            reason,
            wait,
            ..
        } => ui.note(format_args!(
            "{route} failed ({reason}); again in {:.1}s",
            wait.as_secs_f64()
        )),
        Event::Queue { state, reason, .. } => {
            let reason = reason
                .as_deref()
                .map_or(String::new(), |why| format!(": {why}"));
            ui.note(format_args!(
                "waiting in the queue, which is {state}{reason}"
            ));
        }
        Event::SamplingPaused { wait, .. } => ui.note(format_args!(
            "the server asks to wait {:.0}s before the next sample",
            wait.as_secs_f64()
        )),
        Event::HeartbeatFailing { since, error } => ui.warn(format_args!(
            "the session was not kept alive for {}: {error}",
            human::duration(*since)
        )),
        _ => {}
    }
}
