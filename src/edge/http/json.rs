//! JSON to what a handler asks for. What is wrong with it is told by its place and its kind, and never quoted: a value
//! may be as large as a body.

use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use memchr::memchr2;
use serde::de::value::{
    BoolDeserializer, F64Deserializer, MapAccessDeserializer, SeqAccessDeserializer, U64Deserializer,
};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::error::{ScoreError, brief, cut};

/// The most bytes of the path to what is wrong. The caller's own names may stand in it.
const MOST_PATH: usize = 200;

/// Reads a body that has at most so many values.
///
/// # Errors
/// It has more, or where in it something is wrong, and what.
pub(super) fn message<T: DeserializeOwned>(body: &[u8], most_values: usize) -> Result<T, ScoreError> {
    if has_more_values(body, most_values) {
        return Err(ScoreError::invalid("body", format!("it has more than {most_values} values")));
    }
    read(body).map_err(|fault| ScoreError::invalid("body", fault))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let Structured(value) =
        serde_path_to_error::deserialize(&mut json).map_err(|fault| match cut(fault.path(), MOST_PATH) {
            path if path == "." => brief(fault.inner()),
            path => brief(format_args!("{path}: {}", fault.inner())),
        })?;
    json.end().map_err(brief)?;
    Ok(value)
}

/// A list or an object. A text in its place is refused without a word of it, where serde would quote it whole.
pub(super) struct Structured<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Structured<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Structure<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Structure<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list or an object")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<T, A::Error> {
                T::deserialize(SeqAccessDeserializer::new(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(object))
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<T, E> {
                Err(E::custom("invalid type: a string, expected a list or an object"))
            }
        }
        deserializer.deserialize_any(Structure(PhantomData)).map(Self)
    }
}

/// Bytes that stand in JSON as base64. They are decoded as they are read, so that the text is never copied.
pub(super) struct Base64(pub Bytes);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Base64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Base64, E> {
                let bytes =
                    STANDARD.decode(text).map_err(|fault| E::custom(format!("no base64: {fault}")))?;
                Ok(Base64(bytes.into()))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A number or a truth value. A text in its place is refused without a word of it, as one is in place of a list.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Plain<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Plain<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Value<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, true or false")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<T, E> {
                T::deserialize(BoolDeserializer::new(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
                T::deserialize(U64Deserializer::new(value))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<T, E> {
                T::deserialize(F64Deserializer::new(value))
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<T, E> {
                Err(E::custom("invalid type: a string, expected a number, true or false"))
            }
        }
        deserializer.deserialize_any(Value(PhantomData)).map(Self)
    }
}

/// Whether a text of JSON has more than so many values. Before each stands a comma or a bracket.
fn has_more_values(text: &[u8], most: usize) -> bool {
    let (mut rest, mut values) = (text, 0);
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        match byte {
            b',' | b'[' | b'{' => values += 1,
            b'"' => {
                // To the end of the string, which no escaped quote is.
                loop {
                    let Some(at) = memchr2(b'"', b'\\', rest) else { return false };
                    let escaped = rest.get(at) == Some(&b'\\');
                    rest = rest.get(at + 1 + usize::from(escaped)..).unwrap_or_default();
                    if !escaped {
                        break;
                    }
                }
            }
            _ => {}
        }
        if values > most {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_strings() {
        for (text, values) in [
            ("", 0),
            ("7", 0),
            ("[1,2,3]", 3),
            (r#"{"a": [[], {}], "b": null}"#, 6),
            (r#"["[,{", "\",[", "\\", ","]"#, 4),
            (r#"["no end,,,"#, 1),
            (r#"["no end\"#, 1),
        ] {
            assert!(!has_more_values(text.as_bytes(), values), "{text}");
            assert!(values == 0 || has_more_values(text.as_bytes(), values - 1), "{text}");
        }
    }
}
