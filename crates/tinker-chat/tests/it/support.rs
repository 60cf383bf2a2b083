//! The fixture tokenizer, and renderings written as readable strings.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use tinker_chat::{Message, Renderer, RendererName, SupervisedExample, Tokenizer, renderer};

static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Tokenizer::from_dir(&fixture("chat/bytes")).unwrap());

pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures")
        .join(name)
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    TOKENIZER.clone()
}

pub(crate) fn named(name: RendererName) -> Arc<dyn Renderer> {
    renderer(name, tokenizer()).unwrap()
}

/// The text of `example` with trained spans in guillemets.
pub(crate) fn marked(example: &SupervisedExample) -> String {
    assert_eq!(example.tokens.len(), example.weights.len());
    let mut text = String::new();
    let spans = example
        .tokens
        .iter()
        .zip(&example.weights)
        .collect::<Vec<_>>();
    for span in spans.chunk_by(|a, b| a.1 == b.1) {
        let ids: Vec<u32> = span.iter().map(|(id, _)| **id).collect();
        let piece = tokenizer().decode(&ids).unwrap();
        if *span[0].1 > 0.0 {
            text += &format!("«{piece}»")
        } else {
            text += &piece
        }
    }
    text
}

/// system, user, assistant, user, assistant.
pub(crate) fn two_turns() -> Vec<Message> {
    vec![
        Message::system("Be kind."),
        Message::user("Hi"),
        Message::assistant("Hello"),
        Message::user("Bye"),
        Message::assistant("Goodbye"),
    ]
}
