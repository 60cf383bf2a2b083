//! The fixture tokenizer, and renderings written as readable strings.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use tinker_chat::{
    Message, Renderer, RendererName, SupervisedExample, Tokenizer, TokenizerFiles, renderer,
};

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
    if name == RendererName::ChatTemplate {
        return renderer(name, templated(CHATML)).unwrap();
    }
    renderer(name, tokenizer()).unwrap()
}

/// `ChatML` with a line feed between messages.
pub(crate) const CHATML: &str = r"{% for m in messages %}
{{- ('' if loop.first else '\n') + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}";

/// The fixture tokenizer with a chat template.
pub(crate) fn templated(template: &str) -> Arc<Tokenizer> {
    let json = std::fs::read(fixture("chat/bytes/tokenizer.json")).unwrap();
    let config = serde_json::json!({"chat_template": template, "eos_token": "<|endoftext|>"});
    let config = config.to_string();
    let files = TokenizerFiles {
        tokenizer: &json,
        tokenizer_config: Some(config.as_bytes()),
        ..Default::default()
    };
    Tokenizer::from_files(files).unwrap()
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
