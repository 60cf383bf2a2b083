//! A tokenizer read from a model directory or from embedded bytes, shared by `Arc`.
//!
//! There are two ways to encode. Rendered markers are looked up by name, and body text goes through
//! [`Tokenizer::encode_text`], in which `<|im_end|>` is ten ordinary characters: text cannot forge
//! a marker. [`Tokenizer::encode`] recognises markers, for prompts that a person writes by hand.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::error::{Error, Result};

/// The contents of a model directory's tokenizer files; all but the first are optional.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`: the names of the beginning and end tokens, and the chat template.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `generation_config.json`: further end tokens.
    pub generation_config: Option<&'a [u8]>,
}

/// Text to token ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// A copy that does not recognise special tokens; made when first needed, since a large
    /// vocabulary takes tens of megabytes.
    plain: OnceLock<tokenizers::Tokenizer>,
    bos: Option<u32>,
    eos: Vec<u32>,
    chat_template: Option<String>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory in the Hugging Face layout.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or malformed, or an optional file is malformed.
    pub fn from_dir(dir: &Path) -> Result<Arc<Self>> {
        let tokenizer = read(dir, "tokenizer.json")?;
        let config = read_optional(dir, "tokenizer_config.json")?;
        let generation = read_optional(dir, "generation_config.json")?;
        let mut loaded = Self::parse(TokenizerFiles {
            tokenizer: &tokenizer,
            tokenizer_config: config.as_deref(),
            generation_config: generation.as_deref(),
        })?;
        // As `transformers` has it, the file counts for more than the configuration.
        let template = read_optional(dir, "chat_template.jinja")?;
        if let Some(template) = template.and_then(|bytes| String::from_utf8(bytes).ok()) {
            loaded.chat_template = Some(template);
        }
        Ok(Arc::new(loaded))
    }

    /// Builds a tokenizer from files that are already in memory.
    ///
    /// # Errors
    /// A file is malformed.
    pub fn from_files(files: TokenizerFiles<'_>) -> Result<Arc<Self>> {
        Self::parse(files).map(Arc::new)
    }

    fn parse(files: TokenizerFiles<'_>) -> Result<Self> {
        let bad = |reason: tokenizers::Error| bad_file("tokenizer.json", &reason);
        let mut inner = tokenizers::Tokenizer::from_bytes(files.tokenizer).map_err(bad)?;
        // Some published files carry the truncation of their training run; it would cut prompts.
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        let config = parse_json("tokenizer_config.json", files.tokenizer_config)?;
        let generation = parse_json("generation_config.json", files.generation_config)?;
        let id_of = |key: &str| token_name(&config[key]).and_then(|name| inner.token_to_id(name));
        let bos = id_of("bos_token");
        let mut eos: Vec<u32> = id_of("eos_token").into_iter().collect();
        for id in token_ids(&generation["eos_token_id"]) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let chat_template = template_of(&config["chat_template"]).map(str::to_owned);
        Ok(Self {
            inner,
            plain: OnceLock::new(),
            bos,
            eos,
            chat_template,
        })
    }

    /// Encodes `text`, recognising special tokens in it; adds none.
    ///
    /// # Errors
    /// The tokenizer's model refuses the text, for example for lack of an unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.inner, text, false)
    }

    /// Encodes `text` as [`Self::encode`] and adds what the tokenizer's own template adds, such as
    /// the beginning token.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_template(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.inner, text, true)
    }

    /// Encodes `text` as plain text: the names of special tokens in it are ordinary characters.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = self.inner.clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        encode(plain, text, false)
    }

    /// Decodes `tokens`, special tokens included; bytes that are not UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// The tokenizer's decoder fails. Ids outside the vocabulary are skipped.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, false).map_err(tokenize_error)
    }

    /// Decodes `tokens` as [`Self::decode`], leaving special tokens out.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_without_special(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(tokenize_error)
    }

    /// The id of the token spelled exactly `token`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of `id` in the vocabulary, which for byte-level models is not its text.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// How the special tokens are spelled.
    pub(crate) fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        let special = added.into_values().filter(|token| token.special);
        special.map(|token| token.content).collect()
    }

    /// The token that begins every text, where the model has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a generation: the tokenizer's own first, then the generation config's.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The model's chat template (Jinja), where it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The highest id that text is encoded to, added tokens aside: a model may have no weights for those of
    /// its images, say.
    pub fn highest_id(&self) -> Option<u32> {
        self.inner.get_vocab(false).into_values().max()
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, template: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode_fast(text, template)
        .map_err(tokenize_error)?;
    Ok(encoding.get_ids().to_vec())
}

fn tokenize_error(error: tokenizers::Error) -> Error {
    Error::Tokenize(error.to_string())
}

fn bad_file(file: &str, reason: &dyn fmt::Display) -> Error {
    Error::BadTokenizer {
        file: file.to_owned(),
        reason: reason.to_string(),
    }
}

fn read(dir: &Path, name: &str) -> Result<Vec<u8>> {
    let path = dir.join(name);
    std::fs::read(&path).map_err(|source| Error::ReadFile { path, source })
}

fn read_optional(dir: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    match read(dir, name) {
        Err(Error::ReadFile { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn parse_json(file: &str, bytes: Option<&[u8]>) -> Result<Value> {
    let Some(bytes) = bytes else {
        return Ok(Value::Null);
    };
    serde_json::from_slice(bytes).map_err(|error| bad_file(file, &error))
}

/// `chat_template` in `tokenizer_config.json` is a template or a list of named ones.
fn template_of(value: &Value) -> Option<&str> {
    let is_default = |named: &&Value| named["name"] == "default";
    value.as_str().or_else(|| {
        let default = value.as_array()?.iter().find(is_default)?;
        default["template"].as_str()
    })
}

/// A token in `tokenizer_config.json` is its name or an object that holds it as `content`.
fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// `eos_token_id` in `generation_config.json` is one id or a list.
fn token_ids(value: &Value) -> Vec<u32> {
    let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(as_id).collect(),
        other => as_id(other).into_iter().collect(),
    }
}
