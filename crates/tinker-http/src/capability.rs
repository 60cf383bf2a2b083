//! What each endpoint is good for, in words: for errors about servers that lack it.

/// What a call to `path` would have done, to follow "cannot".
pub(crate) fn capability(method: &str, path: &str) -> &'static str {
    let below_api = path.rsplit_once("/api/v1/").map_or(path, |(_, rest)| rest);
    let segments: Vec<&str> = below_api.split('/').filter(|s| !s.is_empty()).collect();
    match (method, &segments[..]) {
        ("GET", ["get_server_capabilities"]) => "list its base models",
        (_, ["client", _]) => "give settings to clients",
        (_, ["auth", "token"]) => "exchange a key for a token",
        (_, ["auth", ..]) => "say whose key this is",
        (_, ["create_session"]) => "open sessions",
        (_, ["session_heartbeat"]) => "keep sessions alive",
        ("GET", ["sessions"]) => "list sessions",
        (_, ["sessions", "search"]) => "search sessions",
        (_, ["sessions", _, "finish"]) => "take the end of a session",
        (_, ["sessions", _, "project"]) => "move a session to a project",
        (_, ["sessions", _, "trace_export"]) => "export the trace of a session",
        (_, ["sessions", _]) => "describe sessions",
        (_, ["create_model"]) => "create training runs",
        (_, ["get_info"]) => "describe loaded models",
        (_, ["unload_model"]) => "unload models",
        (_, ["forward_backward"]) => "run forward and backward passes",
        (_, ["forward"]) => "run forward passes",
        (_, ["optim_step"]) => "take optimizer steps",
        (_, ["save_weights"]) => "save training checkpoints",
        (_, ["save_weights_for_sampler"]) => "save weights to sample from",
        (_, ["save_weights_external"]) => "export weights",
        (_, ["load_weights"]) => "load weights",
        (_, ["weights_info"]) => "describe weights",
        (_, ["copy_weights"]) => "copy weights",
        (_, ["external_weights_upload_start" | "external_weights_upload_finish"]) => {
            "take weights from outside"
        }
        (_, ["checkpoints", "search"]) => "search checkpoints",
        (_, ["create_custom_loss"]) => "compute custom losses",
        (_, ["create_sampling_session"]) => "create samplers",
        (_, ["join_sampling_session"]) => "share samplers between processes",
        (_, ["samplers", _]) => "describe samplers",
        (_, ["asample"]) => "sample",
        (_, ["retrieve_future"]) => "hand out results",
        (_, ["retrieve_futures"]) => "hand out results in batches",
        (_, ["cancel_future"]) => "cancel what was submitted",
        (_, ["telemetry"]) => "take telemetry",
        (_, ["audit"]) => "show the audit log",
        (_, ["billing", ..]) => "show billing and usage",
        ("GET", ["training_runs"]) => "list training runs",
        ("GET", ["training_runs", _]) => "describe training runs",
        ("GET", ["checkpoints"]) => "list checkpoints of all runs",
        (method, ["training_runs", _, "checkpoints", rest @ ..]) => of_checkpoint(method, rest),
        (method, ["checkpoints", rest @ ..]) => of_checkpoint(method, rest),
        _ => "do this",
    }
}

fn of_checkpoint(method: &str, rest: &[&str]) -> &'static str {
    match (method, rest.last()) {
        ("DELETE", Some(&"publish")) => "unpublish checkpoints",
        (_, Some(&"publish")) => "publish checkpoints",
        (_, Some(&"ttl")) => "change the life of checkpoints",
        (_, Some(&"external_weights_urls")) => "hand out exported weights",
        (_, Some(&("archive" | "download"))) => "hand out checkpoint archives",
        ("DELETE", _) => "delete checkpoints",
        ("PATCH" | "PUT", _) => "change checkpoints",
        _ => "list checkpoints of a run",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_told_apart_by_method_and_path() {
        for (method, path, expected) in [
            ("GET", "/api/v1/sessions", "list sessions"),
            ("GET", "/base/api/v1/sessions/S1", "describe sessions"),
            (
                "DELETE",
                "/api/v1/training_runs/S:train:0/checkpoints/weights/a/publish",
                "unpublish checkpoints",
            ),
            (
                "DELETE",
                "/api/v1/training_runs/S:train:0/checkpoints/weights/a",
                "delete checkpoints",
            ),
            (
                "GET",
                "/api/v1/training_runs/S:train:0/checkpoints",
                "list checkpoints of a run",
            ),
            ("POST", "/elsewhere", "do this"),
        ] {
            assert_eq!(capability(method, path), expected, "{method} {path}");
        }
    }
}
