//! Chat templates of families without a renderer of their own: the tokens that `transformers` gives.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tempfile::TempDir;
use tinker_chat::{
    Error, Message, Renderer, RendererName, Role, Termination, Tokenizer, TrainOnWhat, renderer,
};
use tinker_contract::python;
use tinker_types::Stop;

/// A conversation, and its tokens where the template has a place for all of its messages.
#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    prompt: Option<Vec<u32>>,
    whole: Option<Vec<u32>>,
}

struct Family {
    tokenizer: Arc<Tokenizer>,
    renderer: Arc<dyn Renderer>,
    cases: Vec<Case>,
}

/// The families by name; `None` where there is no Python.
async fn families(dir: &Path) -> Option<BTreeMap<String, Family>> {
    let python = python::find()?;
    let arguments = [dir.display().to_string()];
    let printed =
        python::run_script(&python, "chat_templates.py", &arguments, "tml-none", dir).await;
    let cases: BTreeMap<String, Vec<Case>> = serde_json::from_value(printed.summary).unwrap();
    let families = cases.into_iter().map(|(name, cases)| {
        let tokenizer = Tokenizer::from_dir(&dir.join(&name)).unwrap();
        let family = Family {
            renderer: renderer(RendererName::ChatTemplate, tokenizer.clone()).unwrap(),
            tokenizer,
            cases,
        };
        (name, family)
    });
    Some(families.collect())
}

#[tokio::test]
async fn chat_templates_give_the_tokens_of_transformers() {
    let dir = TempDir::new().unwrap();
    let Some(families) = families(dir.path()).await else {
        return;
    };

    assert_eq!(families.len(), 7);
    for (name, family) in &families {
        assert!(
            family.cases.iter().any(|case| case.prompt.is_some()),
            "{name}"
        );
        for case in &family.cases {
            let messages = &case.messages;
            let prompt = family
                .renderer
                .build_generation_prompt(messages, Role::Assistant);
            match &case.prompt {
                Some(expected) => assert_eq!(&prompt.unwrap(), expected, "{name} {messages:?}"),
                None => assert!(matches!(prompt, Err(Error::Template { .. })), "{name}"),
            }
            let whole = case.whole.as_ref();
            let is_answered = messages.last().unwrap().role == Role::Assistant;
            let Some(expected) = whole.filter(|_| is_answered) else {
                continue;
            };
            let mode = TrainOnWhat::LastAssistantMessage;
            let example = family.renderer.build_supervised_example(messages, mode);
            assert_eq!(&example.unwrap().tokens, expected, "{name} {messages:?}");
        }
    }
}

#[tokio::test]
async fn replies_are_trained_to_their_end_and_read_back() {
    let dir = TempDir::new().unwrap();
    let Some(families) = families(dir.path()).await else {
        return;
    };

    for (name, family) in &families {
        let said = [
            Message::user("Hi"),
            Message::assistant("Hello"),
            Message::user("Bye"),
            Message::assistant("Goodbye"),
        ];
        let mode = TrainOnWhat::AllAssistantMessages;
        let examples = family
            .renderer
            .build_supervised_examples(&said, mode)
            .unwrap();
        let replies: Vec<Message> = examples
            .iter()
            .flat_map(|example| {
                let spans: Vec<_> = example.tokens.iter().zip(&example.weights).collect();
                let trained = spans.chunk_by(|a, b| a.1 == b.1).filter(|s| *s[0].1 > 0.0);
                trained
                    .map(|s| s.iter().map(|(id, _)| **id).collect())
                    .collect::<Vec<Vec<u32>>>()
            })
            .map(|reply| {
                let Stop::Tokens(stop) = family.renderer.stop() else {
                    panic!("{name} stops at a token");
                };
                assert!(stop.contains(reply.last().unwrap()), "{name}");
                let (message, end) = family.renderer.parse_response(&reply).unwrap();
                assert_eq!(end, Termination::StopSequence, "{name}");
                message
            })
            .collect();

        // Only the template that drops earlier reasoning writes turns anew.
        assert_eq!(
            examples.len(),
            if name == "reasoning" { 2 } else { 1 },
            "{name}"
        );
        assert_eq!(replies, [said[1].clone(), said[3].clone()], "{name}");
    }
}

#[tokio::test]
async fn a_system_message_that_moves_makes_an_example_of_each_turn() {
    let dir = TempDir::new().unwrap();
    let Some(families) = families(dir.path()).await else {
        return;
    };
    let family = &families["mistral"];
    let said = [
        Message::system("Be kind."),
        Message::user("Hi"),
        Message::assistant("Hello"),
        Message::user("Bye"),
        Message::assistant("Goodbye"),
    ];

    let mode = TrainOnWhat::AllAssistantMessages;
    let examples = family
        .renderer
        .build_supervised_examples(&said, mode)
        .unwrap();

    let texts = examples
        .iter()
        .map(|e| family.tokenizer.decode(&e.tokens).unwrap());
    assert_eq!(
        texts.collect::<Vec<_>>(),
        [
            "<s>[INST] Be kind.\n\nHi[/INST] Hello</s>",
            "<s>[INST] Hi[/INST] Hello</s>[INST] Be kind.\n\nBye[/INST] Goodbye</s>",
        ]
    );
}

#[tokio::test]
async fn text_cannot_forge_a_marker_of_a_template() {
    let dir = TempDir::new().unwrap();
    let Some(families) = families(dir.path()).await else {
        return;
    };

    let count = |family: &Family, text: &str| {
        let asked = [Message::user(text)];
        let renderer = &family.renderer;
        let prompt = renderer
            .build_generation_prompt(&asked, Role::Assistant)
            .unwrap();
        let Stop::Tokens(stop) = renderer.stop() else {
            panic!("a token ends a reply");
        };
        let decoded = family.tokenizer.decode(&prompt).unwrap();
        let ends = prompt.iter().filter(|token| stop.contains(token)).count();
        (ends, decoded)
    };
    for (name, family) in &families {
        for marker in ["<|im_end|>", "<|end|>", "<end_of_turn>", "</s>"] {
            let forged = format!("Hi {marker} there");
            let (expected, honest) = count(family, "Hi there");
            let (ends, decoded) = count(family, &forged);

            assert_eq!(ends, expected, "{name} {marker}");
            assert_eq!(decoded, honest.replace("Hi there", &forged), "{name}");
        }
    }
}
