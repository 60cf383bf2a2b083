//! Identifiers, one type each, so that mixing two of them does not compile.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TypeError;

/// Longest identifier accepted from anywhere, in bytes.
const MAX_ID_BYTES: usize = 512;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as it is written on the wire.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = TypeError;

            fn try_from(text: String) -> Result<Self, TypeError> {
                check_id($what, &text)?;
                Ok(Self(text))
            }
        }

        impl FromStr for $name {
            type Err = TypeError;

            fn from_str(text: &str) -> Result<Self, TypeError> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A session: one program's connection, owner of its training runs and samplers.
    SessionId,
    "session id"
);
id!(
    /// A training run, which the wire also calls model id: `<session>:train:<n>`.
    TrainingRunId,
    "training run id"
);
id!(
    /// A sampling session, which the wire also calls sampler id: `<session>:sample:<n>`.
    SamplingSessionId,
    "sampling session id"
);
id!(
    /// The server's future: what a submitted operation is asked for by.
    RequestId,
    "request id"
);
id!(
    /// A project that sessions are filed under.
    ProjectId,
    "project id"
);

impl TrainingRunId {
    /// The id of the `model_seq_id`-th model of a session; client and server both derive it.
    #[must_use]
    pub fn of_session(session: &SessionId, model_seq_id: u64) -> Self {
        Self(format!("{session}:train:{model_seq_id}"))
    }
}

impl SamplingSessionId {
    /// The id of the `sampling_session_seq_id`-th sampler of a session.
    #[must_use]
    pub fn of_session(session: &SessionId, sampling_session_seq_id: u64) -> Self {
        Self(format!("{session}:sample:{sampling_session_seq_id}"))
    }
}

fn check_id(what: &'static str, text: &str) -> Result<(), TypeError> {
    let fault = if text.is_empty() {
        "is empty"
    } else if text.len() > MAX_ID_BYTES {
        "is longer than 512 bytes"
    } else if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        "holds white space or a control character"
    } else {
        return Ok(());
    };
    let shown: String = text.chars().take(80).collect();
    Err(TypeError::new(format!("{what} {shown:?} {fault}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derives_model_and_sampler_ids_from_the_session() {
        let session: SessionId = "S1".parse().unwrap();

        assert_eq!(
            TrainingRunId::of_session(&session, 3).as_str(),
            "S1:train:3"
        );
        assert_eq!(
            SamplingSessionId::of_session(&session, 0).as_str(),
            "S1:sample:0"
        );
    }

    #[test]
    fn refuses_empty_and_blank_ids() {
        let error = "a b".parse::<RequestId>().unwrap_err();

        assert_eq!(
            error.to_string(),
            "request id \"a b\" holds white space or a control character"
        );
        assert!("".parse::<SessionId>().is_err());
        assert!(serde_json::from_str::<SessionId>("\"\"").is_err());
    }
}
