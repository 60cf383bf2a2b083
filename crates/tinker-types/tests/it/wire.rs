//! Protobuf read by the official SDK's schema instead of by our messages: an independent reader.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Deserialize;

use crate::support::fixture;

/// The official schema.
#[derive(Debug, Deserialize)]
pub(crate) struct Schema {
    messages: BTreeMap<String, Vec<Field>>,
    pub(crate) enums: BTreeMap<String, BTreeMap<String, i32>>,
}

/// A field of a message.
#[derive(Debug, Deserialize)]
pub(crate) struct Field {
    pub(crate) number: u64,
    #[serde(rename = "type")]
    kind: String,
    label: String,
}

/// A value of a field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Value {
    Varint(u64),
    Fixed(Vec<u8>),
    Bytes(Vec<u8>),
    Message(Fields),
}

/// The fields of a message, sorted, since the order of map entries means nothing.
pub(crate) type Fields = Vec<(u64, Value)>;

impl Schema {
    pub(crate) fn load() -> Self {
        serde_json::from_str(&fixture("tinker_public.descriptor.json")).unwrap()
    }

    pub(crate) fn fields(&self, message: &str) -> &[Field] {
        &self.messages[message]
    }

    pub(crate) fn messages(&self) -> impl Iterator<Item = &String> {
        self.messages.keys()
    }

    /// `bytes` as a tree that is equal for equal meanings.
    pub(crate) fn canonical(&self, message: &str, mut bytes: &[u8]) -> Fields {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let (number, wire_type) = (key >> 3, key & 7);
            let field = self.messages.get(message).map(|fields| {
                fields
                    .iter()
                    .find(|field| field.number == number)
                    .unwrap_or_else(|| panic!("{message} has no field {number}"))
            });
            if let Some(field) = field {
                assert_eq!(wire_type, field.wire_type(), "{message} field {number}");
            }
            let value = match wire_type {
                0 => Value::Varint(varint(&mut bytes)),
                1 => Value::Fixed(take(&mut bytes, 8)),
                5 => Value::Fixed(take(&mut bytes, 4)),
                2 => {
                    let len = varint(&mut bytes);
                    let content = take(&mut bytes, usize::try_from(len).unwrap());
                    self.delimited(field, content)
                }
                other => panic!("{message} field {number} has wire type {other}"),
            };
            fields.push((number, value));
        }
        // Stable by number; entries of a map, whose order means nothing, by content too.
        fields.sort_by(|(a, x), (b, y)| {
            let by_content = if self.is_map(message, *a) {
                x.cmp(y)
            } else {
                Ordering::Equal
            };
            a.cmp(b).then(by_content)
        });
        fields
    }

    fn is_map(&self, message: &str, number: u64) -> bool {
        let fields = self.messages.get(message).into_iter().flatten();
        fields
            .filter(|field| field.number == number)
            .any(|field| field.kind.ends_with("Entry"))
    }

    fn delimited(&self, field: Option<&Field>, content: Vec<u8>) -> Value {
        match field {
            // A map entry is a message of a key and a value, which is not in the schema: the value
            // stays bytes. No value of a map holds a map itself.
            Some(field)
                if field.kind.ends_with("Entry") || self.messages.contains_key(&field.kind) =>
            {
                Value::Message(self.canonical(&field.kind, &content))
            }
            _ => Value::Bytes(content),
        }
    }
}

impl Field {
    /// The wire type of the protobuf encoding specification; repeated numbers are packed.
    fn wire_type(&self) -> u64 {
        match self.kind.as_str() {
            "bool" | "int32" | "int64" | "uint32" | "uint64" | "DType" | "StopReason" => {
                if self.label == "repeated" { 2 } else { 0 }
            }
            "double" => 1,
            "float" => 5,
            _ => 2,
        }
    }
}

fn take(bytes: &mut &[u8], len: usize) -> Vec<u8> {
    let (head, rest) = bytes.split_at(len);
    *bytes = rest;
    head.to_vec()
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
    }
    panic!("varint of more than ten bytes")
}
