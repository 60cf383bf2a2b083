//! The spans that a subscriber sees.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use serde_json::json;
use tinker_http::Client;
use tinker_types::{AdamParams, OptimStepRequest, OptimStepTag, RequestId};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use crate::support::*;

/// A span as it was when it ended, with the names of those around it.
#[derive(Debug, Clone, Default)]
struct Seen {
    name: String,
    parent: Option<String>,
    fields: BTreeMap<String, String>,
    /// All values of each field, in order.
    history: Vec<(String, String)>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.note(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.note(field, value.to_owned());
    }
}

impl Seen {
    fn note(&mut self, field: &Field, value: String) {
        self.history.push((field.name().to_owned(), value.clone()));
        self.fields.insert(field.name().to_owned(), value);
    }

    fn values(&self, field: &str) -> Vec<&str> {
        let history = self.history.iter().filter(|(name, _)| name == field);
        history.map(|(_, value)| value.as_str()).collect()
    }
}

/// Keeps the spans of the transport.
#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<Seen>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        let span = ctx.span(id).unwrap();
        let mut seen = Seen {
            name: span.name().to_owned(),
            parent: span.parent().map(|parent| parent.name().to_owned()),
            ..Seen::default()
        };
        attributes.record(&mut seen);
        span.extensions_mut().insert(seen);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, ctx: Context<'_, S>) {
        let span = ctx.span(id).unwrap();
        values.record(span.extensions_mut().get_mut::<Seen>().unwrap());
    }

    fn on_close(&self, id: Id, ctx: Context<'_, S>) {
        let span = ctx.span(&id).unwrap();
        if span.metadata().target().starts_with("tinker_http") {
            let seen = span.extensions_mut().remove::<Seen>().unwrap();
            assert_eq!(*span.metadata().level(), Level::DEBUG);
            self.0.lock().unwrap().push(seen);
        }
    }
}

impl Capture {
    fn named(&self, name: &str) -> Vec<Seen> {
        let seen = self.0.lock().unwrap();
        seen.iter()
            .filter(|seen| seen.name == name)
            .cloned()
            .collect()
    }
}

fn step() -> OptimStepRequest {
    OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    }
}

#[tokio::test]
async fn every_attempt_is_a_span_with_its_number_and_outcome() {
    let capture = Capture::default();
    let subscriber = tracing_subscriber::registry().with(capture.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = server().await;
    let taken = ok(json!({"request_id": "r1"})).insert_header("x-request-id", "q-7");
    script(&server, "POST", "/api/v1/optim_step", [status(503), taken]).await;

    client(&server).optim_step(&step()).await.unwrap();

    let attempts = capture.named("attempt").into_iter();
    let steps: Vec<_> = attempts
        .filter(|seen| seen.fields["route"] == "/api/v1/optim_step")
        .map(|mut seen| {
            let mut take = |name: &str| seen.fields.remove(name).unwrap_or_default();
            (
                take("method"),
                take("attempt"),
                take("status"),
                take("request.id"),
            )
        })
        .collect();
    let row = |attempt: &str, status: &str, id: &str| {
        (
            "POST".to_owned(),
            attempt.to_owned(),
            status.to_owned(),
            id.to_owned(),
        )
    };
    assert_eq!(steps, [row("0", "503", ""), row("1", "200", "q-7")]);
}

#[tokio::test]
async fn the_wait_for_a_result_is_a_span_with_its_queue() {
    let capture = Capture::default();
    let subscriber = tracing_subscriber::registry().with(capture.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = server().await;
    let waiting = |state: &str, reason: &str| {
        ok(json!({
            "type": "try_again", "request_id": "r1", "queue_state": state,
            "queue_state_reason": reason,
        }))
    };
    let answers = [
        waiting("paused_capacity", "many others"),
        waiting("active", "yours is next"),
        ok(json!({"metrics": {}})),
    ];
    script(&server, "POST", "/api/v1/retrieve_future", answers).await;
    let id: RequestId = "r1".parse().unwrap();

    client(&server)
        .retrieve_optim_step(&id, None)
        .await
        .unwrap();

    let futures = capture.named("future");
    let [future] = futures.as_slice() else {
        unreachable!("{futures:?}");
    };
    assert_eq!(future.fields["request.id"], "r1");
    assert_eq!(future.fields["operation"], "OptimStep");
    assert_eq!(future.values("attempt"), ["1", "2", "3"]);
    assert_eq!(future.values("queue.state"), ["paused_capacity", "active"]);
    assert_eq!(
        future.values("queue.reason"),
        ["many others", "yours is next"]
    );
    let attempts = capture.named("attempt").into_iter();
    let inside = attempts.filter(|seen| seen.parent.as_deref() == Some("future"));
    // Settings are fetched by the first question, within its span.
    assert_eq!(
        inside
            .filter(|seen| seen.fields["route"].ends_with("retrieve_future"))
            .count(),
        3
    );
}

#[tokio::test]
async fn a_connection_that_is_not_made_is_an_error_in_the_span_without_the_key() {
    let capture = Capture::default();
    let subscriber = tracing_subscriber::registry().with(capture.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let client: Client = builder("http://127.0.0.1:1")
        .wait_for_server(std::time::Duration::ZERO)
        .build()
        .unwrap();

    client.config().await.unwrap_err();

    let attempts = capture.named("attempt");
    assert_eq!(attempts[0].fields["error"], "cannot connect to the server");
    assert!(!format!("{attempts:?}").contains("tml-secret"));
}
