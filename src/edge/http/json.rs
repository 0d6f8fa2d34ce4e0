//! JSON to what a handler asks for. What is wrong with it is told by its place and its kind, and never quoted: a value
//! may be as large as a body.

use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::error::{brief, cut};

/// The most bytes of the path to what is wrong. The caller's own names may stand in it.
const MOST_PATH: usize = 200;

/// Reads a body.
///
/// # Errors
/// Where in it something is wrong, and what.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
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
