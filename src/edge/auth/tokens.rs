//! Bearer tokens: a file of `subject:token` lines.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::{FileFault, Secret};
use crate::files;
use crate::request_context::Caller;

/// The least characters of a token: 96 bits in base64.
const MIN_TOKEN: usize = 16;
/// The most characters of a subject, which is a word in logs and metrics.
const MAX_SUBJECT: usize = 64;

/// The tokens that callers may show. Only their digests are kept.
#[derive(Debug, Clone)]
pub struct Tokens(Vec<(Caller, [u8; 32])>);

impl Tokens {
    /// Reads the text of a token file: `subject:token` on each line, with empty lines and lines that begin with `#`
    /// left out. A subject may have several tokens, so that one can take over from another.
    ///
    /// # Errors
    /// The first line that is not of that form, by its number, or a file without any token.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, FileFault> {
        let refuse = |fault: String| FileFault::new(path, fault);
        let text = std::str::from_utf8(text).map_err(|_| refuse("is not UTF-8 text".into()))?;
        let mut tokens: Vec<(Caller, [u8; 32])> = Vec::new();
        for (line, number) in text.lines().map(str::trim).zip(1..) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let refuse = |fault: &str| refuse(format!("line {number}: {fault}"));
            let (subject, token) = line.split_once(':').ok_or_else(|| refuse("must be subject:token"))?;
            check_subject(subject).map_err(refuse)?;
            check_token(token).map_err(refuse)?;
            let digest = Sha256::digest(token).into();
            if tokens.iter().any(|(_, other)| *other == digest) {
                return Err(refuse("this token stands on a line above already"));
            }
            tokens.push((Caller(Arc::from(subject)), digest));
        }
        if tokens.is_empty() {
            return Err(refuse("has no token; give at least one line of the form subject:token".into()));
        }
        Ok(Self(tokens))
    }

    /// Whose token this is. Takes as long for a token that is nearly right as for any other.
    pub fn caller(&self, token: &[u8]) -> Option<Caller> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let none = self.0.len() as u64;
        let found = self.0.iter().zip(0_u64..).fold(none, |found, ((_, known), index)| {
            u64::conditional_select(&found, &index, known.ct_eq(&digest))
        });
        self.0.get(usize::try_from(found).ok()?).map(|(caller, _)| caller.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// The token that a client shows: the file's one line, `token` or `subject:token`.
///
/// # Errors
/// The file cannot be read or does not hold one token.
pub fn client_token(path: &Path) -> Result<Secret, FileFault> {
    let text = files::read(path).map_err(|error| FileFault::new(path, error))?;
    let text = std::str::from_utf8(&text).map_err(|_| FileFault::new(path, "is not UTF-8 text"))?;
    one_token(text).map_err(|fault| FileFault::new(path, fault))
}

/// The token that a client shows, from a text of one line, `token` or `subject:token`.
///
/// # Errors
/// What is wrong with it; nothing of it is quoted.
pub fn one_token(text: &str) -> Result<Secret, &'static str> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err("must hold one line: the token, or subject:token");
    };
    let token = line.split_once(':').map_or(line, |(_, token)| token);
    check_token(token)?;
    Ok(Secret(token.to_owned()))
}

fn check_subject(subject: &str) -> Result<(), &'static str> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@/".contains(&byte);
    if subject.is_empty() || subject.len() > MAX_SUBJECT || !subject.bytes().all(allowed) {
        return Err("the subject must be 1 to 64 letters, digits or -_.@/");
    }
    Ok(())
}

fn check_token(token: &str) -> Result<(), &'static str> {
    if token.len() < MIN_TOKEN {
        return Err("the token must have at least 16 characters, as `openssl rand -hex 32` gives them");
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':') {
        return Err("the token must be visible ASCII without blanks or colons");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Tokens, String> {
        Tokens::parse(Path::new("tokens"), text.as_bytes()).map_err(|fault| fault.to_string())
    }

    #[test]
    fn several_subjects_and_several_tokens_of_one() {
        let tokens = parse(
            "# ours\n\ntrainer:0123456789abcdef\r\n eval:fedcba9876543210 \ntrainer:0000000000000000\n",
        )
        .unwrap();
        let caller = |token: &str| tokens.caller(token.as_bytes()).map(|caller| caller.0.to_string());
        assert_eq!(caller("0123456789abcdef").as_deref(), Some("trainer"));
        assert_eq!(caller("0000000000000000").as_deref(), Some("trainer"));
        assert_eq!(caller("fedcba9876543210").as_deref(), Some("eval"));
        for wrong in ["", "0123456789abcde", "0123456789abcdef0", "trainer:0123456789abcdef"] {
            assert_eq!(caller(wrong), None);
        }
        assert!(!format!("{tokens:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn a_fault_names_its_line_and_quotes_nothing() {
        for (text, fault) in [
            ("", "tokens: has no token"),
            ("# only\n", "tokens: has no token"),
            ("a:0123456789abcdef\nhunter2hunter2hunter2", "tokens: line 2: must be subject:token"),
            ("a:hunter2", "tokens: line 1: the token must have at least 16"),
            ("a:hunter2 hunter2 hunter2", "tokens: line 1: the token must be visible ASCII"),
            ("a b:hunter2hunter2hunter2", "tokens: line 1: the subject must be"),
            ("a:hunter2hunter2hunter2\nb:hunter2hunter2hunter2", "tokens: line 2: this token stands"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.starts_with(fault) && !said.contains("hunter2"), "{said}");
        }
    }

    #[test]
    fn a_client_reads_its_token_and_never_shows_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["0123456789abcdef\n", "trainer:0123456789abcdef"] {
            std::fs::write(file.path(), text).unwrap();
            let token = client_token(file.path()).unwrap();
            assert_eq!(token.reveal(), "0123456789abcdef");
            assert_eq!(format!("{token:?}"), "Secret(…)");
        }
        std::fs::write(file.path(), "0123456789abcdef\n0123456789abcdef").unwrap();
        assert!(client_token(file.path()).unwrap_err().fault.contains("one line"));
    }
}
