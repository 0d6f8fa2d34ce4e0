//! A call as a form: pictures as files, and fields beside them. One line of curl makes one.

use bytes::Bytes;
use futures::executor::block_on;
use futures::stream;
use http::{HeaderMap, header};
use multer::{Field, Multipart};
use serde::de::DeserializeOwned;

use super::score::{Asked, ItemAsked, QuestionAsked};
use crate::edge::http::json;
use crate::error::{ScoreError, quoted};

/// What reads a call's body, which is a form or JSON and is told how many values it may have. `own` names the field of a form
/// that only this call has; `of_form` makes the call of what the form says, and of what stands in that field.
///
/// # Errors
/// The body says that it is a form, and not where its parts end.
pub(super) fn or_json<J, T, F>(
    headers: &HeaderMap,
    own: &'static str,
    of_form: F,
) -> Result<impl FnOnce(Bytes, usize) -> Result<T, ScoreError> + use<J, T, F>, ScoreError>
where
    J: DeserializeOwned + Into<T>,
    F: FnOnce(Asked, Option<String>) -> Result<T, ScoreError>,
{
    let boundary = boundary(headers)?;
    Ok(move |body: Bytes, most| match boundary {
        Some(boundary) => read(body, boundary, most, own).and_then(|(asked, option)| of_form(asked, option)),
        None => json::message::<J>(&body, most).map(Into::into),
    })
}

/// The boundary of a form, where a body is one.
fn boundary(headers: &HeaderMap) -> Result<Option<String>, ScoreError> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_form = value.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/"));
    is_form.then(|| multer::parse_boundary(value).map_err(unreadable)).transpose()
}

/// Reads a form of at most so many fields. One `prompt` is that of all pictures, several are those of each; `reference` and
/// `question` are of all. What the field `own` says is given as it stands.
///
/// # Errors
/// It is none, or has a field that there is not.
fn read(
    body: Bytes,
    boundary: String,
    most: usize,
    own: &'static str,
) -> Result<(Asked, Option<String>), ScoreError> {
    // It is all there: nothing is waited for.
    block_on(async {
        let mut form = Multipart::new(stream::iter([Ok::<_, std::convert::Infallible>(body)]), boundary);
        let (mut prompts, mut images, mut references) = (Vec::new(), Vec::new(), Vec::new());
        let (mut questions, mut models, mut option) = (Vec::new(), Vec::new(), None);
        let mut count = 0;
        while let Some(field) = form.next_field().await.map_err(unreadable)? {
            count += 1;
            if count > most {
                return Err(ScoreError::invalid("body", format!("it has more than {most} fields")));
            }
            match field.name() {
                Some("image") => images.push(bytes(field).await?),
                Some("reference") => references.push(bytes(field).await?),
                Some("prompt") => prompts.push(text(field, "prompt").await?),
                Some("question") => questions.push(text(field, "question").await?),
                Some("model") => models.push(text(field, "model").await?),
                Some(name) if name == own => option = Some(text(field, own).await?),
                other => {
                    let reason = format!(
                        "has a field {}; there are image, prompt, model, reference, question and {own}",
                        quoted(other.unwrap_or_default())
                    );
                    return Err(ScoreError::invalid("body", reason));
                }
            }
        }
        let shared = if prompts.len() == 1 { prompts.pop() } else { None };
        if !prompts.is_empty() && prompts.len() != images.len() {
            let (texts, files) = (prompts.len(), images.len());
            let reason = format!("stands {texts} times for {files} pictures; send one for all or for each");
            return Err(ScoreError::invalid("prompt", reason));
        }
        let mut prompts = prompts.into_iter();
        let item = |image| ItemAsked {
            prompt: prompts.next(),
            image,
            references: references.clone(),
            questions: questions.iter().cloned().map(QuestionAsked::plain).collect(),
        };
        let items = images.into_iter().map(item).collect();
        Ok((Asked { prompt: shared, items, models, inspect: false }, option))
    })
}

async fn bytes(field: Field<'_>) -> Result<Bytes, ScoreError> {
    field.bytes().await.map_err(unreadable)
}

async fn text(field: Field<'_>, name: &'static str) -> Result<String, ScoreError> {
    let bytes = bytes(field).await?;
    String::from_utf8(bytes.into()).map_err(|_| ScoreError::invalid(name, "is no UTF-8"))
}

fn unreadable(fault: multer::Error) -> ScoreError {
    ScoreError::invalid("body", format!("is no form: {fault}"))
}
