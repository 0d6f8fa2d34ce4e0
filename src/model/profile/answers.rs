//! The answers whose probability is a reward.

use serde::{Deserialize, Serialize};

/// The most answers.
const MOST: usize = 64;

/// Answers, of which the first token of each is read, as the reference's tokenizer makes it of the answer alone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Answers {
    /// Their probability among all tokens of the vocabulary.
    Any(Vec<String>),
    /// The probability of one against the other alone.
    Pair(Pair),
}

/// Two answers against each other.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Whose probability is the reward.
    pub positive: OneOrMore,
    /// The other.
    pub negative: OneOrMore,
}

/// An answer, or the forms in which it may be written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum OneOrMore {
    /// In one form.
    One(String),
    /// In several.
    More(Vec<String>),
}

impl OneOrMore {
    /// Its forms.
    pub fn forms(&self) -> &[String] {
        match self {
            Self::One(form) => std::slice::from_ref(form),
            Self::More(forms) => forms,
        }
    }
}

impl Answers {
    pub(super) fn check(&self) -> Result<(), String> {
        let lists: Vec<&[String]> = match self {
            Self::Any(answers) => vec![answers],
            Self::Pair(pair) => vec![pair.positive.forms(), pair.negative.forms()],
        };
        for list in lists {
            if list.is_empty() || list.len() > MOST || list.iter().any(String::is_empty) {
                return Err(format!("answers must be 1 to {MOST} texts, none of them empty"));
            }
        }
        Ok(())
    }
}
