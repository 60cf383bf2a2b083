//! Which messages of a conversation are trained: the seven modes, and the rule of each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::message::{Message, Role};

/// Which tokens of a rendered conversation get weight 1; all others get 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOnWhat {
    /// The last message, if the assistant wrote it.
    LastAssistantMessage,
    /// Every assistant message after the last user message.
    LastAssistantTurn,
    /// Every assistant message.
    AllAssistantMessages,
    /// The body of every message, whoever wrote it.
    AllMessages,
    /// Everything, role headers too.
    AllTokens,
    /// The bodies of user and system messages.
    AllUserAndSystemMessages,
    /// The messages whose `trainable` flag is true; every message must carry the flag.
    Customized,
}

impl TrainOnWhat {
    /// Every mode.
    pub const ALL: [Self; 7] = [
        Self::LastAssistantMessage,
        Self::LastAssistantTurn,
        Self::AllAssistantMessages,
        Self::AllMessages,
        Self::AllTokens,
        Self::AllUserAndSystemMessages,
        Self::Customized,
    ];

    /// The mode's name in configuration files and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LastAssistantMessage => "last_assistant_message",
            Self::LastAssistantTurn => "last_assistant_turn",
            Self::AllAssistantMessages => "all_assistant_messages",
            Self::AllMessages => "all_messages",
            Self::AllTokens => "all_tokens",
            Self::AllUserAndSystemMessages => "all_user_and_system_messages",
            Self::Customized => "customized",
        }
    }

    /// For each message, whether its body is trained.
    ///
    /// # Errors
    /// A missing `trainable` flag under `customized`, or a flag under any other mode.
    pub fn select(self, messages: &[Message]) -> Result<Vec<bool>> {
        self.check_flags(messages)?;
        let last_user = messages
            .iter()
            .rposition(|message| message.role == Role::User);
        let selected = messages.iter().enumerate().map(|(index, message)| {
            let is_assistant = message.role == Role::Assistant;
            match self {
                Self::LastAssistantMessage => is_assistant && index + 1 == messages.len(),
                Self::LastAssistantTurn => is_assistant && last_user.is_none_or(|at| index > at),
                Self::AllAssistantMessages => is_assistant,
                Self::AllMessages | Self::AllTokens => true,
                Self::AllUserAndSystemMessages => {
                    matches!(message.role, Role::User | Role::System)
                }
                Self::Customized => message.trainable == Some(true),
            }
        });
        Ok(selected.collect())
    }

    /// Whether it trains no turn but the last.
    pub(crate) fn is_single(self) -> bool {
        matches!(self, Self::LastAssistantMessage | Self::LastAssistantTurn)
    }

    /// Whether role headers are trained too.
    pub(crate) fn trains_headers(self) -> bool {
        self == Self::AllTokens
    }

    fn check_flags(self, messages: &[Message]) -> Result<()> {
        for (index, message) in messages.iter().enumerate() {
            match (self, message.trainable) {
                (Self::Customized, None) => return Err(Error::TrainableMissing { index }),
                (Self::Customized, Some(_)) | (_, None) => {}
                (mode, Some(_)) => return Err(Error::TrainableUnused { index, mode }),
            }
        }
        Ok(())
    }
}

impl fmt::Display for TrainOnWhat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TrainOnWhat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.as_str() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::as_str).join(", ");
                Error::UnknownTrainOn {
                    name: name.to_owned(),
                    known,
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> Vec<Message> {
        vec![
            Message::system("s"),
            Message::user("u"),
            Message::assistant("a"),
            Message::user("u"),
            Message::assistant("a"),
            Message::new(Role::Tool, "t"),
            Message::assistant("a"),
        ]
    }

    fn check(mode: TrainOnWhat, expected: &str) {
        let selected = mode.select(&conversation()).unwrap();

        let marks: String = selected
            .iter()
            .map(|&s| if s { 'x' } else { '.' })
            .collect();
        assert_eq!(marks, expected, "{mode}");
    }

    #[test]
    fn each_mode_selects_its_messages() {
        check(TrainOnWhat::LastAssistantMessage, "......x");
        check(TrainOnWhat::LastAssistantTurn, "....x.x");
        check(TrainOnWhat::AllAssistantMessages, "..x.x.x");
        check(TrainOnWhat::AllMessages, "xxxxxxx");
        check(TrainOnWhat::AllTokens, "xxxxxxx");
        check(TrainOnWhat::AllUserAndSystemMessages, "xx.x...");
    }

    #[test]
    fn customized_follows_the_flags_and_needs_them_all() {
        let flagged = [
            Message::user("u").with_trainable(true),
            Message::assistant("a").with_trainable(false),
        ];

        assert_eq!(
            TrainOnWhat::Customized.select(&flagged).unwrap(),
            [true, false]
        );
        let missing = TrainOnWhat::Customized.select(&[flagged[0].clone(), Message::user("u")]);
        assert!(matches!(missing, Err(Error::TrainableMissing { index: 1 })));
        let unused = TrainOnWhat::AllMessages.select(&flagged);
        assert!(matches!(
            unused,
            Err(Error::TrainableUnused { index: 0, .. })
        ));
    }

    #[test]
    fn names_parse_back_and_an_unknown_one_lists_them() {
        for mode in TrainOnWhat::ALL {
            assert_eq!(mode.as_str().parse::<TrainOnWhat>().unwrap(), mode);
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
        }
        let error = "everything".parse::<TrainOnWhat>().unwrap_err().to_string();
        assert!(
            error.contains("`everything`") && error.contains("all_tokens"),
            "{error}"
        );
    }
}
