//! A checkpoint's tokenizer as transformers' `AutoTokenizer` makes it: which class it is, and which tokens are added
//! to the vocabulary, by whatever file names them.

use std::collections::BTreeMap;
use std::panic::catch_unwind;

use serde_json::{Map, Value as Json, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::model::checkpoint::python_json::is_falsy;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const ADDED_TOKENS: &str = "added_tokens.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const VOCABULARY: &str = "vocab.json";
const MERGES: &str = "merges.txt";

/// Of the form that `tokenizer.json` has.
const VERSION: &str = "1.0";

/// How Qwen2's class cuts text into words.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What Qwen2's class has for a special token that no file names.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The named special tokens that every tokenizer of transformers has.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer, and what its special tokens are called in a chat template.
pub(super) struct TextTokenizer {
    pub tokenizer: Tokenizer,
    /// `special_tokens_map`: `eos_token` and its like, with what they spell.
    pub special_tokens: Vec<(String, String)>,
    /// The file that holds the vocabulary.
    pub file: &'static str,
}

/// The classes of transformers that make a tokenizer for this family.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Class {
    /// `Qwen2Tokenizer`: takes vocabulary and merges, and brings normaliser and pre-tokeniser of its own.
    Qwen2,
    /// `PreTrainedTokenizerFast`: `tokenizer.json` as it is.
    File,
}

/// A special token as a file names it.
#[derive(Debug, Clone)]
enum Special {
    Text(String),
    Token(AddedToken),
}

impl Special {
    fn content(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Token(token) => &token.content,
        }
    }

    /// The token that is added where no file describes it any further.
    fn token(&self) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text.as_str(), true),
            Self::Token(token) => token.clone(),
        }
    }
}

impl TextTokenizer {
    /// Reads whichever files there are.
    ///
    /// # Errors
    ///
    /// A class or a key that transformers would follow, and this server does not.
    pub fn load(files: &CheckpointFiles) -> Result<Self, CheckpointError> {
        let config: Map<String, Json> = files.json(CONFIG)?.unwrap_or_default();
        let class = class(files, &config)?;
        check(&config)?;
        let from_file: Option<Json> = files.json(TOKENIZER)?;
        let file = if from_file.is_some() { TOKENIZER } else { VOCABULARY };
        let tokens = Tokens::read(files, &config, class, from_file.as_ref())?;
        let description = match (class, from_file) {
            (Class::Qwen2, Some(from_file)) => qwen2(&config, from_file)?,
            (Class::Qwen2, None) => qwen2(&config, from_vocabulary(files, &config)?)?,
            (Class::File, Some(from_file)) => from_file,
            (Class::File, None) => {
                return Err(CheckpointError::MissingFile(format!(
                    "{TOKENIZER} (which tokenizer_class of {CONFIG} needs; Qwen2Tokenizer also takes {VOCABULARY} \
                     with {MERGES})"
                )));
            }
        };
        if description.pointer("/model/dropout").is_some_and(|d| d.as_f64().is_some_and(|d| d != 0.0)) {
            return Err(CheckpointError::invalid(
                file,
                "model.dropout draws tokens by chance, and with them scores; it must be null",
            ));
        }
        let invalid = |e: tokenizers::Error| CheckpointError::invalid(file, e.to_string());
        let mut tokenizer = build(description).map_err(|reason| CheckpointError::invalid(file, reason))?;
        // A prompt is never cut short, and nothing is filled up here.
        tokenizer.with_truncation(None).map_err(invalid)?;
        tokenizer.with_padding(None);
        tokens.add_to(&mut tokenizer, class).map_err(invalid)?;
        let named = tokens.named.iter();
        let special_tokens = named.map(|(name, token)| (name.clone(), token.content().to_owned())).collect();
        Ok(Self { tokenizer, special_tokens, file })
    }
}

fn class(files: &CheckpointFiles, config: &Map<String, Json>) -> Result<Class, CheckpointError> {
    let model: Map<String, Json> = files.json("config.json")?.unwrap_or_default();
    let said = [(CONFIG, config.get("tokenizer_class")), ("config.json", model.get("tokenizer_class"))];
    for (file, class) in said {
        return match class {
            None | Some(Json::Null) => continue,
            Some(Json::String(class)) if class.is_empty() => continue,
            Some(Json::String(class)) => match class.strip_suffix("Fast").unwrap_or(class) {
                "Qwen2Tokenizer" => Ok(Class::Qwen2),
                "PreTrainedTokenizer" | "TokenizersBackend" => Ok(Class::File),
                _ => Err(CheckpointError::invalid(
                    file,
                    format!(
                        "tokenizer_class is {class:?}; it must be \"Qwen2Tokenizer\" or \"PreTrainedTokenizerFast\""
                    ),
                )),
            },
            Some(other) => {
                Err(CheckpointError::invalid(file, format!("tokenizer_class is {other}, and no text")))
            }
        };
    }
    Ok(Class::Qwen2)
}

/// Refuses settings that give other tokens and are not followed here, or that the reference refuses.
fn check(config: &Map<String, Json>) -> Result<(), CheckpointError> {
    let refuse = |reason: &str| Err(CheckpointError::invalid(CONFIG, reason));
    if config.get("split_special_tokens").is_some_and(|value| *value != Json::Bool(false) && !value.is_null())
    {
        return refuse(
            "split_special_tokens makes plain text of the conversation's special tokens; it must be false",
        );
    }
    if config.get("model_specific_special_tokens").is_some_and(|value| !is_falsy(value)) {
        return refuse("model_specific_special_tokens is not read; name its tokens in extra_special_tokens");
    }
    if config.get("added_tokens_decoder").is_some_and(|value| !value.is_object()) {
        return refuse("added_tokens_decoder must be an object from ids to tokens");
    }
    if config.contains_key("add_special_tokens") {
        return refuse(
            "add_special_tokens is a method's name, which the reference refuses as a key; leave it out",
        );
    }
    Ok(())
}

/// The tokenizer of a description. What the library checks with a panic is refused as what it refuses in words.
fn build(description: Json) -> Result<Tokenizer, String> {
    catch_unwind(|| serde_json::from_value(description).map_err(|e| e.to_string()))
        .unwrap_or_else(|_| Err("its vocabulary and merges do not fit each other".into()))
}

/// The description of a tokenizer as Qwen2's class makes it of a vocabulary and merges.
fn qwen2(config: &Map<String, Json>, mut from_file: Json) -> Result<Json, CheckpointError> {
    if let Some(version) = from_file.get("version").filter(|version| *version != VERSION) {
        return Err(CheckpointError::invalid(
            TOKENIZER,
            format!("version is {version}, must be {VERSION:?}"),
        ));
    }
    let model = &from_file["model"];
    let byte_pairs = model["vocab"].is_object() && model["merges"].is_array();
    if !byte_pairs || model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return Err(CheckpointError::invalid(
            TOKENIZER,
            "model must be of type \"BPE\", with vocab and merges, for Qwen2Tokenizer",
        ));
    }
    let prefix_space = match config.get("add_prefix_space") {
        None | Some(Json::Null) => false,
        Some(Json::Bool(flag)) => *flag,
        Some(other) => {
            return Err(CheckpointError::invalid(
                CONFIG,
                format!("add_prefix_space is {other}; it must be true or false"),
            ));
        }
    };
    let byte_level = |prefix_space: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": VERSION,
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false},
            byte_level(prefix_space),
        ]},
        "post_processor": from_file["post_processor"].take(),
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": from_file["model"]["vocab"].take(),
            "merges": from_file["model"]["merges"].take(),
        },
    }))
}

/// What `vocab.json` and `merges.txt` say, as `tokenizer.json` would.
fn from_vocabulary(files: &CheckpointFiles, config: &Map<String, Json>) -> Result<Json, CheckpointError> {
    let Some(vocabulary) = files.json::<Json>(VOCABULARY)? else {
        return Err(CheckpointError::MissingFile(format!(
            "the tokenizer ({TOKENIZER}, or {VOCABULARY} with {MERGES})"
        )));
    };
    // Where there is a tokenizer.json, it says what stands around a text; the class says it where there is none.
    for key in ["add_bos_token", "add_eos_token"] {
        if config.get(key).is_some_and(|value| *value != Json::Bool(false) && !value.is_null()) {
            return Err(CheckpointError::invalid(
                CONFIG,
                format!("{key} adds a token to every text, which is not supported; it must be false"),
            ));
        }
    }
    let text = String::from_utf8(files.require(MERGES)?.into_owned())
        .map_err(|e| CheckpointError::invalid(MERGES, e.to_string()))?;
    let merges: Vec<&str> = text.lines().filter(|line| !line.starts_with("#version")).collect();
    Ok(json!({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}))
}

/// The tokens that stand beside the vocabulary.
struct Tokens {
    /// By the ids that the files give, which are where the tokens are added, and not the ids that they get.
    added: BTreeMap<u64, AddedToken>,
    named: Vec<(String, Special)>,
    extra: Vec<Special>,
}

impl Tokens {
    fn read(
        files: &CheckpointFiles,
        config: &Map<String, Json>,
        class: Class,
        from_file: Option<&Json>,
    ) -> Result<Self, CheckpointError> {
        let mut said = Said::read(config)?;
        let mut added = BTreeMap::new();
        if let Some(decoder) = config.get("added_tokens_decoder") {
            let entries = decoder.as_object().into_iter().flatten();
            for (id, token) in entries {
                let index = id.parse().ok();
                let token = added_token(token, None);
                let (Some(index), Some(token)) = (index, token) else {
                    return Err(CheckpointError::invalid(
                        CONFIG,
                        format!("added_tokens_decoder holds no token under {id:?}"),
                    ));
                };
                added.insert(index, token);
            }
        } else {
            said.merge(files)?;
            if let Some(encoder) = files.json::<BTreeMap<String, u64>>(ADDED_TOKENS)? {
                for (content, index) in encoder {
                    let special = said.is_special(&content);
                    added.insert(index, AddedToken { special, ..AddedToken::from(content, special) });
                }
            }
            let tokens = from_file.and_then(|file| file["added_tokens"].as_array());
            for token in tokens.into_iter().flatten() {
                let (Some(index), Some(token)) = (token["id"].as_u64(), added_token(token, None)) else {
                    return Err(CheckpointError::invalid(TOKENIZER, format!("added_tokens holds {token}")));
                };
                added.insert(index, token);
            }
        }
        let mut named = said.named(class, from_file);
        // A named token is the one that an entry with its text describes.
        for (_, token) in &mut named {
            if let Some(known) = added.values().find(|known| known.content == token.content()) {
                *token = Special::Token(known.clone());
            }
        }
        for (name, token) in said.explicit {
            set(&mut said.model_specific, &name, token);
        }
        named.extend(said.model_specific);
        let extra = if said.extra.is_empty() { said.additional } else { said.extra };
        Ok(Self { added, named, extra })
    }

    /// Adds the tokens in the order in which transformers adds them, for the order gives those their ids that the
    /// vocabulary does not hold.
    fn add_to(&self, tokenizer: &mut Tokenizer, class: Class) -> Result<(), tokenizers::Error> {
        let mut tokens: Vec<AddedToken> = self.added.values().cloned().collect();
        let known = tokenizer.get_added_tokens_decoder();
        let mut contents: Vec<String> = known.into_values().map(|token| token.content).collect();
        contents.extend(tokens.iter().map(|token| token.content.clone()));
        for (is_named, special) in
            self.named.iter().map(|(_, s)| (true, s)).chain(self.extra.iter().map(|s| (false, s)))
        {
            if !contents.iter().any(|known| known == special.content()) {
                contents.push(special.content().to_owned());
                let token = special.token();
                tokens.push(AddedToken { special: token.special || is_named, ..token });
            }
        }
        for token in &mut tokens {
            token.special |= self.named.iter().any(|(_, special)| special.content() == token.content);
        }
        tokenizer.add_tokens(tokens)?;
        if class == Class::Qwen2 {
            // The class adds its special tokens once more, plain, whatever was said of them.
            let specials = self.named.iter().map(|(_, special)| special).chain(&self.extra);
            tokenizer.add_tokens(specials.map(|special| AddedToken::from(special.content(), true)))?;
        }
        Ok(())
    }
}

/// What `tokenizer_config.json` and `special_tokens_map.json` say of special tokens.
#[derive(Default)]
struct Said {
    /// None where a file says null.
    standard: Vec<(String, Option<Special>)>,
    /// `image_token` and its like.
    model_specific: Vec<(String, Special)>,
    /// The same, by the keys whose values transformers lets go before and win over the others.
    explicit: Vec<(String, Special)>,
    extra: Vec<Special>,
    /// `additional_special_tokens`, the older name, which counts where the newer one gives no list.
    additional: Vec<Special>,
}

impl Said {
    fn read(config: &Map<String, Json>) -> Result<Self, CheckpointError> {
        let mut said = Self::default();
        for (name, value) in config {
            said.take(CONFIG, name, value)?;
        }
        // The named ones stand before the extra ones, wherever their keys stand.
        if let Some(Json::Object(tokens)) = config.get("extra_special_tokens") {
            said.take_explicit(CONFIG, tokens)?;
        }
        if let Some(list) = config.get("additional_special_tokens").filter(|_| said.extra.is_empty()) {
            said.extra = specials(CONFIG, "additional_special_tokens", list)?;
        }
        Ok(said)
    }

    /// Lets `special_tokens_map.json` speak over what was said.
    fn merge(&mut self, files: &CheckpointFiles) -> Result<(), CheckpointError> {
        let Some(map) = files.json::<Map<String, Json>>(SPECIAL_TOKENS)? else { return Ok(()) };
        for (name, value) in &map {
            self.take(SPECIAL_TOKENS, name, value)?;
        }
        if let Some(Json::Object(tokens)) = map.get("extra_special_tokens") {
            self.take_explicit(SPECIAL_TOKENS, tokens)?;
        }
        if let Some(list) = map.get("additional_special_tokens") {
            // Of all tokens in this file these alone must say what they are.
            self.additional = specials(CONFIG, "additional_special_tokens", list)?;
        }
        Ok(())
    }

    /// Takes an entry that names special tokens.
    fn take(&mut self, file: &str, name: &str, value: &Json) -> Result<(), CheckpointError> {
        if NAMED.contains(&name) {
            let token = if value.is_null() { None } else { Some(special(file, name, value)?) };
            set(&mut self.standard, name, token);
        } else if name == "extra_special_tokens" && !value.is_object() {
            for token in specials(file, name, value)? {
                if !self.extra.iter().any(|other| other.content() == token.content()) {
                    self.extra.push(token);
                }
            }
        } else if name.ends_with("_token") && (value.is_string() || value.is_object()) {
            let token = special(file, name, value)?;
            let explicit = file == CONFIG && value.is_string();
            set(if explicit { &mut self.explicit } else { &mut self.model_specific }, name, token);
        }
        Ok(())
    }

    fn take_explicit(&mut self, file: &str, tokens: &Map<String, Json>) -> Result<(), CheckpointError> {
        for (name, value) in tokens {
            set(&mut self.explicit, name, special(file, name, value)?);
        }
        Ok(())
    }

    fn is_special(&self, content: &str) -> bool {
        let standard = self.standard.iter().filter_map(|(_, token)| token.as_ref());
        standard.chain(&self.extra).any(|token| token.content() == content)
    }

    /// The named tokens in their order, with what the class has for those that no file names.
    fn named(&self, class: Class, from_file: Option<&Json>) -> Vec<(String, Special)> {
        let of_class = |name: &str| match (class, name) {
            (Class::Qwen2, "unk_token" | "eos_token" | "pad_token") => Some(END_OF_TEXT),
            (Class::File, "pad_token") => from_file?.pointer("/padding/pad_token")?.as_str(),
            _ => None,
        };
        let token = |name: &&str| {
            let token = match self.standard.iter().find(|(other, _)| other == name) {
                Some((_, token)) => token.clone()?,
                None => Special::Text(of_class(name)?.to_owned()),
            };
            Some(((*name).to_owned(), token))
        };
        NAMED.iter().filter_map(token).collect()
    }
}

/// Sets the entry of a name, where it stands or at the end.
fn set<T>(entries: &mut Vec<(String, T)>, name: &str, value: T) {
    match entries.iter_mut().find(|(other, _)| other == name) {
        Some(entry) => entry.1 = value,
        None => entries.push((name.to_owned(), value)),
    }
}

/// A token that is written with its settings; `special` where the file does not say.
fn added_token(value: &Json, special: Option<bool>) -> Option<AddedToken> {
    let flag = |key: &str| value.get(key).and_then(Json::as_bool);
    let special = special.or(flag("special")).unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special);
    Some(AddedToken {
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        ..token
    })
}

/// A special token: its text, or an object with its settings.
fn special(file: &str, name: &str, value: &Json) -> Result<Special, CheckpointError> {
    // In tokenizer_config.json the object says what it is; in special_tokens_map.json it is special by its place.
    let in_map = file == SPECIAL_TOKENS;
    let is_token = in_map || value.get("__type").and_then(Json::as_str) == Some("AddedToken");
    match value {
        Json::String(text) => Ok(Special::Text(text.clone())),
        Json::Object(_) if is_token => added_token(value, in_map.then_some(true))
            .map(Special::Token)
            .ok_or_else(|| CheckpointError::invalid(file, format!("{name} has no content"))),
        _ => Err(CheckpointError::invalid(
            file,
            format!("{name} is {value}; it must be a text, or an object with \"__type\": \"AddedToken\""),
        )),
    }
}

fn specials(file: &str, name: &str, list: &Json) -> Result<Vec<Special>, CheckpointError> {
    match list {
        Json::Null => Ok(Vec::new()),
        Json::Array(tokens)
            if file == SPECIAL_TOKENS && tokens.iter().any(|t| t.get("special").is_some()) =>
        {
            Err(CheckpointError::invalid(
                file,
                format!("{name} holds a token with the key special, which it must not"),
            ))
        }
        Json::Array(tokens) => tokens.iter().map(|token| special(file, name, token)).collect(),
        _ => Err(CheckpointError::invalid(file, format!("{name} must be a list of tokens"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::fs;
    use std::path::{Path, PathBuf};

    use serde_json::{Map, Value as Json, json};

    use super::TextTokenizer;
    use crate::model::checkpoint::CheckpointFiles;

    /// A merge patch in which null is a value.
    fn merge(base: &mut Json, patch: Json) {
        match (base, patch) {
            (Json::Object(base), Json::Object(patch)) => {
                for (key, value) in patch {
                    merge(base.entry(key).or_insert(Json::Null), value);
                }
            }
            (base, patch) => *base = patch,
        }
    }

    fn write(directory: &Path, base: &Json, files: &Map<String, Json>) {
        fs::write(directory.join("config.json"), r#"{"model_type": "qwen2_5_vl"}"#).unwrap();
        let mut files = files.clone();
        if let Some(patch) =
            Some(files.remove("tokenizer.json").unwrap_or(json!({}))).filter(|p| !p.is_null())
        {
            let mut content = base.clone();
            merge(&mut content, patch);
            fs::write(directory.join("tokenizer.json"), content.to_string()).unwrap();
        }
        for (name, content) in files {
            let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
            fs::write(directory.join(name), text).unwrap();
        }
    }

    /// What `tests/reference/make_tokenizer_fixtures.py` had transformers make of each layout of files.
    /// `SPATIALSCORE_TOKENIZERS` names another such file, and the checkpoint that its layouts change.
    #[test]
    fn each_layout_of_files_is_read_as_transformers_reads_it_or_refused() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let named = std::env::var("SPATIALSCORE_TOKENIZERS").ok();
        let (made, checkpoint) = match named.as_deref().map(|named| named.split_once(':').unwrap()) {
            Some((made, checkpoint)) => (PathBuf::from(made), PathBuf::from(checkpoint)),
            None => (fixtures.join("processor/tokenizers.json"), fixtures.join("mlp/checkpoint")),
        };
        let read = |path: PathBuf| -> Json { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let (made, base) = (read(made), read(checkpoint.join("tokenizer.json")));
        let texts: Vec<String> = serde_json::from_value(made["texts"].clone()).unwrap();
        let (mut refused, mut wrong) = (Vec::new(), Vec::new());
        for (name, layout) in made["layouts"].as_object().unwrap() {
            let directory = tempfile::tempdir().unwrap();
            write(directory.path(), &base, layout["files"].as_object().unwrap());
            let files = CheckpointFiles::open(directory.path().to_str().unwrap(), None, None).unwrap();
            match TextTokenizer::load(&files) {
                Ok(_) if layout["ids"].is_null() => wrong.push(format!("{name}: the reference refuses it")),
                Ok(ours) => wrong.extend(difference(&ours, layout, &texts).map(|d| format!("{name}: {d}"))),
                Err(_) if layout["ids"].is_null() => {}
                Err(error) => {
                    println!("{name}: {error}");
                    refused.push(name.as_str());
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        if named.is_none() {
            assert_eq!(refused, ["slow, bos", "model specific", "split special"]);
        }
    }

    /// Its normalizer is held against transformers' among the layouts above.
    #[test]
    fn the_checkpoint_in_the_box_reads_a_prompt_alike_however_it_is_typed() {
        let files = CheckpointFiles::open("spatialscore-mini", None, None).unwrap();
        let tokenizer = TextTokenizer::load(&files).unwrap().tokenizer;
        let tokens = |prompt: &str| {
            let text = format!("Rate how well the picture keeps this prompt: {prompt}\n");
            tokenizer.encode(text, false).unwrap().get_tokens().to_vec()
        };
        let plain = tokens("a cat is left of a dog");
        // What stands before the prompt is as it was when the weights were trained.
        assert_eq!((&*plain[0], &*plain[8], &*plain[9], &*plain[plain.len() - 1]), ("Rate", ":", "Ġa", "Ċ"));
        for typed in [
            "A Cat Is Left Of A Dog",
            "A CAT IS LEFT OF A DOG",
            "  a  cat\tis left\u{a0}of a\u{3000}dog",
            "a cat is left of a dog \r\n\n",
            "a cat\r\nis left\nof a dog",
        ] {
            assert_eq!(tokens(typed), plain, "{typed:?}");
        }
        assert_ne!(tokens("a dog is left of a cat"), plain);
        let system = tokenizer.encode("system\nYou are a helpful assistant.", false).unwrap();
        assert_eq!(system.get_tokens()[..3], ["system", "Ċ", "You"]);
    }

    /// The first thing in which a tokenizer is not the reference's.
    fn difference(ours: &TextTokenizer, layout: &Json, texts: &[String]) -> Option<String> {
        let specials = layout["special_tokens"].as_object().unwrap();
        let mut expected: Vec<(String, String)> = specials
            .iter()
            .filter_map(|(name, token)| Some((name.clone(), token.as_str()?.to_owned())))
            .collect();
        let mut special_tokens = ours.special_tokens.clone();
        special_tokens.sort();
        expected.sort();
        if special_tokens != expected {
            return Some(format!("special tokens {special_tokens:?}, and not {expected:?}"));
        }
        texts.iter().zip(layout["ids"].as_array().unwrap()).find_map(|(text, ids)| {
            let expected: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            let encoding = ours.tokenizer.encode_fast(text.as_str(), true).unwrap();
            let ids = encoding.get_ids();
            (ids != expected).then(|| format!("{text:?}: {ids:?}, and not {expected:?}"))
        })
    }
}
