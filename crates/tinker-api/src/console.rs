//! Addresses of pages of the hosted service's console. Nothing is sent.

use std::fmt::Write;

use tinker_types::{SessionId, TinkerPath, TrainingRunId};

const CONSOLE: &str = "https://tinker.thinkingmachines.ai";

/// The page of all sessions.
#[must_use]
pub fn sessions_url() -> String {
    format!("{CONSOLE}/sessions")
}

/// The page of a session.
#[must_use]
pub fn session_url(id: &SessionId) -> String {
    format!("{CONSOLE}/sessions/{id}")
}

/// The page of a training run.
#[must_use]
pub fn training_run_url(id: &TrainingRunId) -> String {
    format!("{CONSOLE}/training_runs/{id}")
}

/// The page of a checkpoint.
#[must_use]
pub fn checkpoint_url(path: &TinkerPath) -> String {
    let run = escape(path.run.as_str());
    let checkpoint = escape(&path.checkpoint.to_string());
    format!("{CONSOLE}/checkpoints/{run}/{checkpoint}")
}

/// The page where one talks to a checkpoint.
#[must_use]
pub fn playground_url(path: &TinkerPath) -> String {
    let path = escape(&path.to_string());
    format!("{CONSOLE}/playground?mode=checkpoint&checkpoint={path}")
}

/// The page of an API key.
#[must_use]
pub fn api_key_url(key_id: u64) -> String {
    format!("{CONSOLE}/keys/{key_id}")
}

/// The page where an API key is made, with its name filled in.
#[must_use]
pub fn new_api_key_url(name: &str) -> String {
    let name = escape(name);
    format!("{CONSOLE}/keys?new_key=true&key_name={name}")
}

/// Percent-encodes all but letters, digits and `-._~` (RFC 3986, section 2.3).
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(byte.into());
            }
            // Writing to a text cannot fail.
            _ => write!(escaped, "%{byte:02X}").unwrap_or_default(),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_official_client() {
        let path = "tinker://S1:train:0/weights/0001".parse().unwrap();

        assert_eq!(
            checkpoint_url(&path),
            "https://tinker.thinkingmachines.ai/checkpoints/S1%3Atrain%3A0/weights%2F0001"
        );
        assert_eq!(
            playground_url(&path),
            "https://tinker.thinkingmachines.ai/playground?mode=checkpoint\
             &checkpoint=tinker%3A%2F%2FS1%3Atrain%3A0%2Fweights%2F0001"
        );
        assert_eq!(
            session_url(&"S1".parse().unwrap()),
            "https://tinker.thinkingmachines.ai/sessions/S1"
        );
        assert_eq!(
            training_run_url(&path.run),
            "https://tinker.thinkingmachines.ai/training_runs/S1:train:0"
        );
        assert_eq!(
            new_api_key_url("tinker-cli-my host"),
            "https://tinker.thinkingmachines.ai/keys?new_key=true&key_name=tinker-cli-my%20host"
        );
        assert_eq!(api_key_url(7), "https://tinker.thinkingmachines.ai/keys/7");
        assert_eq!(
            sessions_url(),
            "https://tinker.thinkingmachines.ai/sessions"
        );
    }
}
