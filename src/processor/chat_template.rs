//! The checkpoint's chat template: where it stands, and Jinja as transformers runs it.

use serde_json::Value as Json;

use super::jinja::{Template, Value};
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A chat template that has been read, with the tokenizer's special tokens as its variables.
pub(super) struct ChatTemplate {
    /// The file that the template stands in.
    pub file: &'static str,
    template: Template,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Finds the template in the order of the reference: `chat_template.jinja`, `chat_template.json`,
    /// `tokenizer_config.json`.
    pub fn load(
        files: &CheckpointFiles,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self, CheckpointError> {
        let (file, source) = find(&files.of_chat_template()?)?;
        let template = Template::parse(&source)
            .map_err(|e| CheckpointError::invalid(file, format!("the chat template: {e}")))?;
        Ok(Self { file, template, special_tokens })
    }

    /// The conversation up to where the model would answer: one user turn, so many pictures first, then `text`.
    pub fn render(&self, pictures: usize, text: &str) -> Result<String, CheckpointError> {
        let mut content = vec![Value::map([("type", "image".into())]); pictures];
        content.push(Value::map([("type", "text".into()), ("text", text.into())]));
        let turn = Value::map([("role", "user".into()), ("content", Value::list(content))]);
        let conversation = [
            ("messages", Value::list(vec![turn])),
            ("add_generation_prompt", Value::Bool(true)),
            ("tools", Value::None),
            ("documents", Value::None),
        ];
        let conversation = conversation.into_iter().map(|(name, value)| (name.to_owned(), value));
        let specials = self.special_tokens.iter().map(|(name, token)| (name.clone(), token.as_str().into()));
        self.template
            .render(specials.chain(conversation).collect())
            .map_err(|e| CheckpointError::invalid(self.file, format!("the chat template: {e}")))
    }
}

fn find(files: &CheckpointFiles) -> Result<(&'static str, String), CheckpointError> {
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
    let tokenizer_config: Json = files.json(TOKENIZER_CONFIG)?.unwrap_or_default();
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
