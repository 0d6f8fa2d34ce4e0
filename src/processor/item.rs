//! What a caller wants scored, as it was sent.

use std::sync::Arc;

use bytes::Bytes;

/// A picture as a caller sends it.
#[derive(Clone)]
pub enum Picture {
    /// A PNG, JPEG or WebP file, told apart by its first bytes.
    Encoded(Bytes),
    /// Raw pixels.
    Raw {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// `[height, width, 3]` bytes: red, green, blue.
        rgb8: Bytes,
    },
}

impl Picture {
    /// What was sent: a file, or pixels.
    pub fn bytes(&self) -> &Bytes {
        match self {
            Self::Encoded(bytes) | Self::Raw { rgb8: bytes, .. } => bytes,
        }
    }

    /// The same with bytes of its own: those of a caller's picture are a part of its message, which goes once all of them have.
    pub fn copied(&self) -> Self {
        let bytes = Bytes::copy_from_slice(self.bytes());
        match *self {
            Self::Encoded(_) => Self::Encoded(bytes),
            Self::Raw { width, height, .. } => Self::Raw { width, height, rgb8: bytes },
        }
    }
}

/// What a caller wants scored.
#[derive(Clone)]
pub struct Item {
    /// What the picture should show. May be empty where there are questions.
    pub prompt: Arc<str>,
    /// The pictures, as many as the model reads: references first, the judged one last.
    pub pictures: Vec<Picture>,
    /// What is asked about them in place of the prompt.
    pub questions: Vec<Question>,
}

impl Item {
    /// A prompt and the picture drawn from it.
    pub fn new(prompt: &str, picture: Picture) -> Self {
        Self { prompt: prompt.into(), pictures: vec![picture], questions: Vec::new() }
    }
}

/// One of several questions about one item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Stands where the prompt goes.
    pub text: String,
    /// The answers whose probability is read, by the first token of each; none: the profile's.
    pub answers: Vec<String>,
}
