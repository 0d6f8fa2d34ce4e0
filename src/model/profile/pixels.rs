//! Numbers of pixels in a profile.

use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use crate::model::checkpoint::python_json::{quote, whole};

/// The most pixels of a picture that may be asked for.
const MAX_PIXELS: u64 = 1 << 32;

/// A number of pixels, which Python's programs may write as a float.
pub(super) fn pixels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let wrong = |value: &Value| {
        de::Error::custom(format!("a number of pixels is {}, must be whole and at least 0", quote(value)))
    };
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        value => whole(&value).map(Some).ok_or_else(|| wrong(&value)),
    }
}

/// Refuses a number of pixels that cannot be meant.
pub(super) fn check_pixels(key: &str, pixels: u64) -> Result<(), String> {
    if (1..=MAX_PIXELS).contains(&pixels) {
        return Ok(());
    }
    Err(format!("{key} is {pixels}, must be 1 to {MAX_PIXELS}"))
}
