//! What a line of the audit log holds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A line: an item and what one model made of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// When it was answered, as of RFC 3339.
    pub time: String,
    /// Whose it was.
    pub caller: String,
    /// How urgent it was.
    pub priority: String,
    /// What judged it: the name,
    pub model: String,
    /// its revision,
    pub revision: String,
    /// the digest of its profile,
    pub profile_digest: String,
    /// its number format,
    pub dtype: String,
    /// and the server's version.
    pub server_version: String,
    /// BLAKE3 of the prompt, and of its questions where it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_hash: Option<String>,
    /// BLAKE3 of the judged picture: of its file, or of its sides and pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_hash: Option<String>,
    /// The same of the pictures before it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reference_hashes: Vec<String>,
    /// The score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<f32>,
    /// Its standard deviation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stddev: Option<f32>,
    /// What it is made of, where it is made of several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<Part>,
    /// The code of the error, where there is no score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The prompt, where it is recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The questions, where they are recorded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub questions: Vec<Question>,
    /// The judged picture, where it is recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// The pictures before it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<Image>,
}

/// A named part of a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// As of the score.
    pub mean: f32,
    /// As of the score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stddev: Option<f32>,
}

/// A question of an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// What is asked.
    pub text: String,
    /// The answers that are read, where they are its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<String>,
}

/// A picture as it was sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Its file; where it has sides, its pixels.
    #[serde(serialize_with = "to_base64", deserialize_with = "of_base64")]
    pub bytes: Bytes,
    /// The width of raw pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Their height.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
}

impl Entry {
    /// The time as a line has it.
    pub fn time(now: SystemTime) -> String {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let whole = UNIX_EPOCH + Duration::from_millis(since.as_millis() as u64);
        prost_types::Timestamp::from(whole).to_string()
    }
}

fn to_base64<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn of_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map(Bytes::from).map_err(|error| D::Error::custom(format!("no base64: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_back_as_it_was_to_the_bit() {
        let bits = [0x3f80_0001_u32, 0xc2f6_e979, 0x0000_0001, 0x7f7f_ffff, 0xbdcc_cccd];
        for mean in bits.map(f32::from_bits) {
            let entry = Entry {
                time: Entry::time(UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456)),
                mean: Some(mean),
                stddev: Some(mean),
                components: vec![Part { name: "a \"b\"\n".into(), mean, stddev: None }],
                prompt: Some("红 \u{0}\n".into()),
                image: Some(Image { bytes: Bytes::from_static(b"\x00\xff"), width: Some(1), height: None }),
                ..Entry::default()
            };
            let line = serde_json::to_string(&entry).unwrap();
            assert!(!line.contains('\n') && line.contains("2023-11-14T22:13:20.123Z"), "{line}");
            let back: Entry = serde_json::from_str(&line).unwrap();
            assert_eq!(back.mean.map(f32::to_bits), Some(mean.to_bits()));
            assert_eq!(back, entry);
        }
    }
}
