//! What a model reads: a list of chunks, nearly always one chunk of tokens.

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine as _, alphabet};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::TypeError;

/// The input of a sequence.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelInput {
    /// The parts, in order.
    pub chunks: Vec<Chunk>,
}

impl ModelInput {
    /// An input of tokens alone.
    #[must_use]
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        Self {
            chunks: vec![Chunk::EncodedText { tokens }],
        }
    }

    /// The tokens, if all chunks are text.
    #[must_use]
    pub fn tokens(&self) -> Option<Vec<u32>> {
        let mut all = Vec::new();
        for chunk in &self.chunks {
            match chunk {
                Chunk::EncodedText { tokens } => all.extend_from_slice(tokens),
                _ => return None,
            }
        }
        Some(all)
    }

    /// Positions the input takes in the model's context.
    ///
    /// # Errors
    /// If an image does not say how many tokens it takes.
    pub fn length(&self) -> Result<usize, TypeError> {
        self.chunks.iter().try_fold(0_usize, |total, chunk| {
            total
                .checked_add(chunk.length()?)
                .ok_or_else(|| TypeError::new("model input is too long"))
        })
    }
}

/// One part of a model input.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Chunk {
    /// Token ids.
    EncodedText {
        /// The tokens.
        tokens: Vec<u32>,
    },
    /// An image carried in the request.
    Image {
        /// Encoded file content.
        data: bytes::Bytes,
        /// `png` or `jpeg`.
        format: String,
        /// Positions it is expected to take; advisory.
        expected_tokens: Option<u32>,
    },
    /// An image the server fetches.
    ImageAssetPointer {
        /// `png` or `jpeg`.
        format: String,
        /// Path or address.
        location: String,
        /// Positions it is expected to take; advisory.
        expected_tokens: Option<u32>,
    },
    /// Audio tokens in a serialised container.
    Dmel {
        /// The container.
        dmel: bytes::Bytes,
    },
}

impl Chunk {
    /// Positions the chunk takes.
    ///
    /// # Errors
    /// If an image does not say how many tokens it takes, or an audio container has no header.
    pub fn length(&self) -> Result<usize, TypeError> {
        match self {
            Self::EncodedText { tokens } => Ok(tokens.len()),
            Self::Image {
                expected_tokens, ..
            }
            | Self::ImageAssetPointer {
                expected_tokens, ..
            } => expected_tokens
                .map(|n| n as usize)
                .ok_or_else(|| TypeError::new("image chunk does not say its expected_tokens")),
            Self::Dmel { dmel } => dmel_length(dmel),
        }
    }

    /// Size in bytes as the chunking rule of forward-backward counts it.
    #[must_use]
    pub fn estimated_bytes(&self) -> usize {
        match self {
            Self::EncodedText { tokens } => tokens.len() * 4,
            Self::Image { data, .. } => data.len(),
            Self::ImageAssetPointer { location, .. } => location.len(),
            Self::Dmel { dmel } => dmel.len(),
        }
    }
}

/// Reads dimension 0 of an audio container: optional marker 254, dtype byte, LEB128 dimensions.
fn dmel_length(container: &[u8]) -> Result<usize, TypeError> {
    let fault = || TypeError::new("dmel chunk does not start with a tensor container header");
    let header = container.strip_prefix(&[254]).unwrap_or(container);
    let (dtype, mut rest) = header.split_first().ok_or_else(fault)?;
    if *dtype > 7 {
        return Err(fault());
    }
    let n_dims = leb128(&mut rest).ok_or_else(fault)?;
    if n_dims == 0 {
        return Err(fault());
    }
    leb128(&mut rest).ok_or_else(fault)
}

fn leb128(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0_usize;
    for shift in (0..56).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

impl Serialize for Chunk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = serializer.serialize_map(None)?;
        match self {
            Self::EncodedText { tokens } => {
                map.serialize_entry("type", "encoded_text")?;
                map.serialize_entry("tokens", tokens)?;
            }
            Self::Image {
                data,
                format,
                expected_tokens,
            } => {
                map.serialize_entry("type", "image")?;
                map.serialize_entry("data", &BASE64.encode(data))?;
                map.serialize_entry("format", format)?;
                if let Some(n) = expected_tokens {
                    map.serialize_entry("expected_tokens", n)?;
                }
            }
            Self::ImageAssetPointer {
                format,
                location,
                expected_tokens,
            } => {
                map.serialize_entry("type", "image_asset_pointer")?;
                map.serialize_entry("format", format)?;
                map.serialize_entry("location", location)?;
                if let Some(n) = expected_tokens {
                    map.serialize_entry("expected_tokens", n)?;
                }
            }
            Self::Dmel { dmel } => {
                map.serialize_entry("type", "dmel")?;
                map.serialize_entry("dmel", &BASE64.encode(dmel))?;
            }
        }
        map.end()
    }
}

/// Written by hand: an internally tagged enum buffers every number before it knows the variant,
/// which makes token lists 1.8 times slower to read. Fields are told apart by name instead.
impl<'de> Deserialize<'de> for Chunk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ChunkVisitor)
    }
}

struct ChunkVisitor;

#[derive(Default)]
struct ChunkFields {
    kind: Option<String>,
    tokens: Option<Vec<u32>>,
    data: Option<String>,
    format: Option<String>,
    location: Option<String>,
    expected_tokens: Option<u32>,
    dmel: Option<String>,
}

impl<'de> Visitor<'de> for ChunkVisitor {
    type Value = Chunk;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a chunk with a `type`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Chunk, A::Error> {
        let mut fields = ChunkFields::default();
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match key.as_ref() {
                "type" => fields.kind = Some(map.next_value()?),
                "tokens" => fields.tokens = Some(map.next_value()?),
                "data" => fields.data = map.next_value()?,
                "format" => fields.format = map.next_value()?,
                "location" => fields.location = map.next_value()?,
                "expected_tokens" => fields.expected_tokens = map.next_value()?,
                "dmel" => fields.dmel = map.next_value()?,
                _ => {
                    map.next_value::<de::IgnoredAny>()?;
                }
            }
        }
        fields.build()
    }
}

impl ChunkFields {
    fn build<E: de::Error>(self) -> Result<Chunk, E> {
        let decode = |text: String| {
            BASE64
                .decode(&text)
                .map_err(|_| E::custom("chunk data is not valid base64"))
        };
        // Old clients leave the tag out of text chunks.
        let kind = self.kind.as_deref().unwrap_or("encoded_text");
        match kind {
            "encoded_text" => Ok(Chunk::EncodedText {
                tokens: self.tokens.ok_or_else(|| E::missing_field("tokens"))?,
            }),
            "image" => Ok(Chunk::Image {
                data: decode(self.data.ok_or_else(|| E::missing_field("data"))?)?.into(),
                format: self.format.ok_or_else(|| E::missing_field("format"))?,
                expected_tokens: self.expected_tokens,
            }),
            "image_asset_pointer" => Ok(Chunk::ImageAssetPointer {
                format: self.format.ok_or_else(|| E::missing_field("format"))?,
                location: self.location.ok_or_else(|| E::missing_field("location"))?,
                expected_tokens: self.expected_tokens,
            }),
            "dmel" => Ok(Chunk::Dmel {
                dmel: decode(self.dmel.ok_or_else(|| E::missing_field("dmel"))?)?.into(),
            }),
            other => Err(E::unknown_variant(
                other,
                &["encoded_text", "image", "image_asset_pointer", "dmel"],
            )),
        }
    }
}

/// Standard base64 (RFC 4648, section 4), with padding when written and with or without when read.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_fields_in_any_order_and_ignores_unknown_ones() {
        let chunk: Chunk =
            serde_json::from_str(r#"{"tokens":[1,2],"later":{"x":[1]},"type":"encoded_text"}"#)
                .unwrap();

        assert_eq!(chunk, Chunk::EncodedText { tokens: vec![1, 2] });
    }

    #[test]
    fn refuses_a_negative_token() {
        assert!(serde_json::from_str::<Chunk>(r#"{"type":"encoded_text","tokens":[-1]}"#).is_err());
    }

    #[test]
    fn images_travel_as_base64() {
        for len in 0..7_u8 {
            let chunk = Chunk::Image {
                data: (0..len).map(|i| i.wrapping_mul(97)).collect(),
                format: "png".into(),
                expected_tokens: Some(5),
            };
            let text = serde_json::to_string(&chunk).unwrap();
            assert_eq!(serde_json::from_str::<Chunk>(&text).unwrap(), chunk);
        }
    }

    #[test]
    fn audio_length_is_dimension_zero() {
        let dmel = Chunk::Dmel {
            dmel: vec![254, 1, 2, 0x96, 0x01, 80, 9, 9].into(),
        };

        assert_eq!(dmel.length().unwrap(), 150);
        assert!(
            Chunk::Dmel {
                dmel: vec![].into()
            }
            .length()
            .is_err()
        );
    }
}
