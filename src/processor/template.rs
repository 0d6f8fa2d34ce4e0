//! The checkpoint's chat template: where it stands, and Jinja as transformers runs it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use crate::model::checkpoint::{CheckpointError, CheckpointFiles};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A chat template, compiled, with the checkpoint's special tokens as its variables.
pub(super) struct ChatTemplate {
    /// The file that the template stands in.
    pub file: &'static str,
    environment: Environment<'static>,
    variables: Value,
}

impl ChatTemplate {
    /// Finds the template in the order of the reference: `chat_template.jinja`, `chat_template.json`,
    /// `tokenizer_config.json`.
    pub fn load(files: &CheckpointFiles) -> Result<Self, CheckpointError> {
        let tokenizer_config: Json = files.json(TOKENIZER_CONFIG)?.unwrap_or_default();
        let (file, source) = find(files, &tokenizer_config)?;
        let environment = environment()
            .and_then(|mut jinja| jinja.add_template_owned("chat", source).map(|()| jinja))
            .map_err(|e| CheckpointError::invalid(file, format!("the chat template: {e:#}")))?;
        let variables = Value::from_iter(special_tokens(&tokenizer_config));
        Ok(Self { file, environment, variables })
    }

    /// The conversation up to where the model would answer: one user turn, so many pictures first, then `text`.
    pub fn render(&self, pictures: usize, text: &str) -> Result<String, CheckpointError> {
        let mut content = vec![context! { type => "image" }; pictures];
        content.push(context! { type => "text", text => text });
        let turn = context! { role => "user", content => content };
        let conversation = context! {
            messages => [turn],
            add_generation_prompt => true,
            tools => (),
            documents => (),
            ..self.variables.clone()
        };
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(conversation))
            .map_err(|e| CheckpointError::invalid(self.file, format!("the chat template: {e:#}")))
    }
}

fn find(files: &CheckpointFiles, tokenizer_config: &Json) -> Result<(&'static str, String), CheckpointError> {
    const JINJA: &str = "chat_template.jinja";
    const JSON: &str = "chat_template.json";
    if let Some(bytes) = files.read(JINJA)? {
        let source = String::from_utf8(bytes.into_owned());
        return Ok((JINJA, source.map_err(|e| CheckpointError::invalid(JINJA, e.to_string()))?));
    }
    let wrapped: Option<Json> = files.json(JSON)?;
    if let Some(source) = wrapped.as_ref().and_then(|w| w.get("chat_template")?.as_str()) {
        return Ok((JSON, source.to_owned()));
    }
    let named_default = |list: &Vec<Json>| {
        let entry = list.iter().find(|t| t.get("name").and_then(Json::as_str) == Some("default"))?;
        entry.get("template")?.as_str().map(str::to_owned)
    };
    let source = match tokenizer_config.get("chat_template") {
        Some(Json::String(source)) => Some(source.clone()),
        Some(Json::Array(list)) => named_default(list),
        _ => None,
    };
    source.map(|s| (TOKENIZER_CONFIG, s)).ok_or_else(|| {
        CheckpointError::MissingFile(format!(
            "the chat template ({JINJA}, {JSON}, or chat_template in {TOKENIZER_CONFIG})"
        ))
    })
}

/// `bos_token`, `eos_token` and their like, whether written as text or as a token with its settings.
fn special_tokens(tokenizer_config: &Json) -> impl Iterator<Item = (String, Value)> + '_ {
    let entries = tokenizer_config.as_object().into_iter().flatten();
    entries.filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, token)| {
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some((name.clone(), Value::from(content)))
    })
}

/// Jinja with the settings and helpers that transformers' `apply_chat_template` gives it.
fn environment() -> Result<Environment<'static>, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // The template is rendered once, at load: a date in it would be the day of the start, and a score that
    // depends on the day is no score.
    environment.add_function("strftime_now", |_format: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "it writes today's date, on which no score may depend"))
    });
    Ok(environment)
}
