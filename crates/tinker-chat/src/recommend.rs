//! Which renderer belongs to a model, by its name or by what its chat template mentions.

use crate::message::Message;
use crate::registry::RendererName;
use crate::renderers::Template;
use crate::tokenizer::Tokenizer;

impl RendererName {
    /// The renderer for the model called `model` with `tokenizer`.
    ///
    /// The name decides where it says which kind of model this is; a directory or an unknown name
    /// is judged by the chat template. `None` if that cannot be used.
    pub fn recommended(model: &str, tokenizer: &Tokenizer) -> Option<Self> {
        Self::recommended_by_name(model).or_else(|| by_template(tokenizer))
    }

    /// The renderer for a model whose hub id, such as `Qwen/Qwen3-8B`, is known to this table.
    pub fn recommended_by_name(model: &str) -> Option<Self> {
        let name = model
            .rsplit('/')
            .next()
            .unwrap_or(model)
            .to_ascii_lowercase();
        let is_instruct = name.contains("instruct");
        if model == "tinker/nano" {
            Some(Self::Qwen3Instruct)
        } else if name.starts_with("llama-3") || name.starts_with("meta-llama-3") {
            Some(if is_instruct {
                Self::Llama3
            } else {
                Self::RoleColon
            })
        } else if name.starts_with("qwen3-") && !name.starts_with("qwen3-vl") {
            Some(match (name.ends_with("-base"), is_instruct) {
                (true, _) => Self::RoleColon,
                (_, true) => Self::Qwen3Instruct,
                _ => Self::Qwen3,
            })
        } else {
            None
        }
    }
}

fn by_template(tokenizer: &Tokenizer) -> Option<RendererName> {
    let Some(source) = tokenizer.chat_template() else {
        return Some(RendererName::RoleColon);
    };
    if source.contains("<|start_header_id|>") {
        return Some(RendererName::Llama3);
    }
    let question = Template::of(tokenizer).and_then(|t| t.render(&[Message::user("Hi")], true));
    let is_plain = question.ok()? == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    Some(if !is_plain {
        // Also a relative of theirs that begins with a system message of its own, or with reasoning.
        RendererName::ChatTemplate
    } else if source.contains("enable_thinking") {
        RendererName::Qwen3
    } else {
        RendererName::Qwen3Instruct
    })
}
