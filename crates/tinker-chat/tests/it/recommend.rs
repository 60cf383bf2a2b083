//! Which renderer a model gets, by name and by template.

use tinker_chat::{RendererName, Tokenizer, TokenizerFiles};

use crate::support::{CHATML, fixture};

#[test]
fn hub_names_decide() {
    let check = |model: &str, expected| {
        assert_eq!(
            RendererName::recommended_by_name(model),
            expected,
            "{model}"
        );
    };

    check("tinker/nano", Some(RendererName::Qwen3Instruct));
    check(
        "meta-llama/Llama-3.1-8B-Instruct",
        Some(RendererName::Llama3),
    );
    check("meta-llama/Llama-3.2-1B", Some(RendererName::RoleColon));
    check("Qwen/Qwen3-8B", Some(RendererName::Qwen3));
    check("Qwen/Qwen3-8B-Base", Some(RendererName::RoleColon));
    check(
        "Qwen/Qwen3-4B-Instruct-2507",
        Some(RendererName::Qwen3Instruct),
    );
    check("Qwen/Qwen3-30B-A3B", Some(RendererName::Qwen3));
    check(
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        Some(RendererName::Qwen3Instruct),
    );
    check("Qwen/Qwen3-VL-30B-A3B-Instruct", None);
    check("someone/else", None);
}

#[test]
fn the_template_decides_for_unknown_names() {
    let json = std::fs::read(fixture("chat/bytes/tokenizer.json")).unwrap();
    let check = |template: Option<&str>, expected| {
        let config = serde_json::json!({ "chat_template": template }).to_string();
        let files = TokenizerFiles {
            tokenizer: &json,
            tokenizer_config: Some(config.as_bytes()),
            ..Default::default()
        };
        let tokenizer = Tokenizer::from_files(files).unwrap();
        assert_eq!(
            RendererName::recommended("my-model", &tokenizer),
            expected,
            "{template:?}"
        );
    };

    check(None, Some(RendererName::RoleColon));
    check(
        Some("{{ '<|start_header_id|>' }}"),
        Some(RendererName::Llama3),
    );
    check(Some(CHATML), Some(RendererName::Qwen3Instruct));
    let hybrid = format!("{CHATML}{{% if enable_thinking is false %}}<think>{{% endif %}}");
    check(Some(&hybrid), Some(RendererName::Qwen3));
    let greeting = format!("<|im_start|>system\nBe kind.<|im_end|>\n{CHATML}");
    check(Some(&greeting), Some(RendererName::ChatTemplate));
    let brackets = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}";
    check(Some(brackets), Some(RendererName::ChatTemplate));
    check(Some("{% for m in messages %}"), None);
}

#[test]
fn an_unknown_renderer_lists_the_known_ones() {
    let error = "qwen9".parse::<RendererName>().unwrap_err().to_string();

    assert_eq!(
        error,
        "unknown renderer `qwen9`; known: role_colon, llama3, qwen3, qwen3_disable_thinking, \
         qwen3_instruct, chat_template"
    );
}
