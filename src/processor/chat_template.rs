//! The checkpoint's chat template: where it stands, and Jinja as transformers runs it.

use serde_json::Value as Json;

use super::jinja::{Template, Value};
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};

const PROCESSOR: &str = "processor_config.json";
const JINJA: &str = "chat_template.jinja";
const JSON: &str = "chat_template.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A chat template that has been read, with the tokenizer's special tokens as its variables.
pub(super) struct ChatTemplate {
    /// The file that the template stands in.
    pub file: &'static str,
    template: Template,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Finds the template: the processor's (`chat_template` in `processor_config.json`, `chat_template.json`,
    /// `chat_template.jinja`), else the tokenizer's (`tokenizer_config.json`).
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
    let processors = of_processor(files)?;
    if let Some((file, source)) = processors.first() {
        return match processors.iter().find(|(_, other)| other != source) {
            None => Ok((*file, source.clone())),
            Some((other, _)) => Err(CheckpointError::invalid(
                file,
                format!(
                    "it holds another chat template than {other}; which of them counts differs between versions of \
                     transformers, so keep one"
                ),
            )),
        };
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

/// The templates of the processor's own files, in the order in which transformers 5 takes the first.
fn of_processor(files: &CheckpointFiles) -> Result<Vec<(&'static str, String)>, CheckpointError> {
    let mut found = Vec::new();
    for file in [PROCESSOR, JSON] {
        match files
            .json::<Json>(file)?
            .map(|mut json| json.get_mut("chat_template").map(Json::take).unwrap_or_default())
        {
            Some(Json::String(source)) => found.push((file, source)),
            None => {}
            Some(Json::Null) if file == PROCESSOR => {}
            Some(other) => {
                return Err(CheckpointError::invalid(
                    file,
                    format!("chat_template is {other}, must be a text"),
                ));
            }
        }
    }
    if let Some(bytes) = files.read(JINJA)? {
        let source = String::from_utf8(bytes.into_owned());
        found.push((JINJA, source.map_err(|e| CheckpointError::invalid(JINJA, e.to_string()))?));
    }
    Ok(found)
}
