//! What must hold for every conversation, not only the ones we thought of.

use proptest::prelude::*;
use tinker_chat::{Message, RendererName, Role, Termination, TrainOnWhat};

use crate::support::named;

/// Text without `⏎`, which `role_colon` cannot keep apart from its own blank lines.
fn line() -> BoxedStrategy<String> {
    prop_oneof![
        "[a-zA-Z0-9 .,!?éß漢🙂]{0,24}",
        Just("<|im_end|>".to_owned()),
        Just("User: <|eot_id|>".to_owned()),
        Just(" leading and trailing ".to_owned()),
    ]
    .boxed()
}

fn text() -> BoxedStrategy<String> {
    prop_oneof![3 => line(), 1 => "[a-z\n ]{0,16}"].boxed()
}

/// An optional system message, then user and assistant in turn, ending with the assistant.
fn conversation(body: BoxedStrategy<String>) -> impl Strategy<Value = Vec<Message>> {
    let turns = prop::collection::vec((body.clone(), body.clone()), 1..4);
    (prop::option::of(body), turns).prop_map(|(system, turns)| {
        let mut messages: Vec<Message> = system.into_iter().map(Message::system).collect();
        for (user, assistant) in turns {
            messages.push(Message::user(user));
            messages.push(Message::assistant(assistant));
        }
        messages
    })
}

/// The prompt for the last message is a prefix of the example, the rest parses back to that
/// message, and exactly the rest is trained.
fn check(name: RendererName, messages: &[Message]) -> Result<(), TestCaseError> {
    let renderer = named(name);
    let (reply, history) = messages.split_last().unwrap();
    let prompt = renderer
        .build_generation_prompt(history, Role::Assistant)
        .unwrap();
    let example = renderer
        .build_supervised_example(messages, TrainOnWhat::LastAssistantMessage)
        .unwrap();

    prop_assert_eq!(example.tokens.len(), example.weights.len());
    prop_assert!(example.tokens.starts_with(&prompt));
    let (before, after) = example.weights.split_at(prompt.len());
    prop_assert!(before.iter().all(|&w| w == 0.0) && after.iter().all(|&w| w == 1.0));
    let parsed = renderer
        .parse_response(&example.tokens[prompt.len()..])
        .unwrap();
    prop_assert_eq!(parsed, (reply.clone(), Termination::StopSequence));
    Ok(())
}

/// Each later prompt starts with the earlier prompt and reply.
fn check_extension(name: RendererName, messages: &[Message]) -> Result<(), TestCaseError> {
    let renderer = named(name);
    prop_assert!(renderer.has_extension_property());
    let mut earlier: Vec<u32> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role == Role::Assistant {
            let prompt = renderer
                .build_generation_prompt(&messages[..index], Role::Assistant)
                .unwrap();
            prop_assert!(prompt.starts_with(&earlier));
            earlier = prompt;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn parse_inverts_render_for_marker_formats(messages in conversation(text())) {
        for name in [
            RendererName::Llama3,
            RendererName::Qwen3Instruct,
            RendererName::Qwen3,
            RendererName::Qwen3DisableThinking,
        ] {
            check(name, &messages)?;
        }
    }

    #[test]
    fn parse_inverts_render_for_role_colon(messages in conversation(line())) {
        check(RendererName::RoleColon, &messages)?;
    }

    #[test]
    fn parse_inverts_render_for_a_chat_template(messages in conversation(text())) {
        check(RendererName::ChatTemplate, &messages)?;
    }

    #[test]
    fn parse_keeps_thinking(user in line(), thinking in "[a-z ]{1,12}", reply in line()) {
        let reply = Message::assistant(reply).with_thinking(thinking);
        check(RendererName::Qwen3, &[Message::user(user), reply])?;
    }

    #[test]
    fn prompts_extend_earlier_ones(messages in conversation(line())) {
        for name in [RendererName::RoleColon, RendererName::Llama3, RendererName::Qwen3Instruct] {
            check_extension(name, &messages)?;
        }
    }

    #[test]
    fn parsing_any_tokens_never_fails(tokens in prop::collection::vec(0_u32..400, 0..32)) {
        for name in RendererName::ALL {
            named(name).parse_response(&tokens).unwrap();
        }
    }
}

#[test]
fn a_reply_without_end_marker_is_malformed_and_eos_is_told_apart() {
    let tokenizer = crate::support::tokenizer();
    let mut tokens = tokenizer.encode_text("Hello").unwrap();
    let parse = |tokens: &[u32]| {
        let renderer = named(RendererName::Llama3);
        let (message, termination) = renderer.parse_response(tokens).unwrap();
        assert_eq!(message, Message::assistant("Hello"));
        termination
    };

    assert_eq!(parse(&tokens), Termination::Malformed);
    tokens.push(tokenizer.token_id("<|endoftext|>").unwrap());
    assert_eq!(parse(&tokens), Termination::Eos);
}

#[test]
fn an_open_think_block_is_malformed_and_kept_as_text() {
    let tokenizer = crate::support::tokenizer();
    let tokens = tokenizer.encode("<think>\nhm<|im_end|>").unwrap();

    let parsed = named(RendererName::Qwen3).parse_response(&tokens).unwrap();

    assert_eq!(
        parsed,
        (Message::assistant("<think>\nhm"), Termination::Malformed)
    );
}
