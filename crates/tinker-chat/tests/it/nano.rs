//! The shipped base model's own tokenizer with the renderer it was trained for.

use std::path::PathBuf;
use std::sync::Arc;

use tinker_chat::{Message, RendererName, Role, Tokenizer, TrainOnWhat, renderer};

fn nano() -> Arc<Tokenizer> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    Tokenizer::from_dir(&dir).unwrap()
}

#[test]
fn name_and_template_agree_on_the_renderer() {
    let expected = Some(RendererName::Qwen3Instruct);

    assert_eq!(RendererName::recommended_by_name("tinker/nano"), expected);
    assert_eq!(RendererName::recommended("models/nano", &nano()), expected);
}

#[test]
fn pieces_encode_as_the_whole_text_does() {
    let messages = [
        Message::system("Answer in capital letters."),
        Message::user("Spell cat."),
        Message::assistant("C-A-T"),
        Message::user("What is 12 + 7?"),
    ];
    let text = "<|im_start|>system\nAnswer in capital letters.<|im_end|>\n\
                <|im_start|>user\nSpell cat.<|im_end|>\n<|im_start|>assistant\nC-A-T<|im_end|>\n\
                <|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n";
    let renderer = renderer(RendererName::Qwen3Instruct, nano()).unwrap();

    let prompt = renderer
        .build_generation_prompt(&messages, Role::Assistant)
        .unwrap();

    assert_eq!(prompt, nano().encode(text).unwrap());
}

#[test]
fn the_end_of_a_reply_is_trained_and_ends_generation() {
    let renderer = renderer(RendererName::Qwen3Instruct, nano()).unwrap();
    let messages = [Message::user("Hi."), Message::assistant("Hello.")];

    let example = renderer
        .build_supervised_example(&messages, TrainOnWhat::LastAssistantMessage)
        .unwrap();

    let end = example.tokens.last().unwrap();
    assert_eq!(example.weights.last(), Some(&1.0));
    assert_eq!(nano().token_id("<|im_end|>"), Some(*end));
    assert_eq!(nano().eos_token_ids().first(), Some(end));
}
