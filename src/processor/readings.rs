//! The readings of an item: by the passes of a profile, or by the item's own questions.

use super::prompt::PromptEncoder;
use super::{Processor, QUESTIONS, Question};
use crate::error::{ScoreError, quoted};
use crate::model::checkpoint::CheckpointError;
use crate::model::profile::Answers;
use crate::model::{AnswerIds, Branch};

/// The most answers of one question.
const MOST_ANSWERS: usize = 64;

impl Processor {
    /// The token ids of all that is read of an item: what they begin with, and where there are several, each's end.
    pub(super) fn texts(
        &self,
        prompt: &str,
        questions: &[Question],
        visual_tokens: &[usize],
    ) -> Result<(Vec<u32>, Vec<Branch>), ScoreError> {
        if let ([only], []) = (self.prompts.as_slice(), questions) {
            return Ok((only.encode(prompt, visual_tokens)?, Vec::new()));
        }
        let branches: Result<Vec<Branch>, ScoreError> = if questions.is_empty() {
            let encode = |pass: &PromptEncoder| {
                Ok(Branch { input_ids: pass.encode(prompt, visual_tokens)?, answers: Vec::new() })
            };
            self.prompts.iter().map(encode).collect()
        } else {
            let encode =
                |(n, question)| self.question(question, visual_tokens).map_err(|e| of_question(n, e));
            questions.iter().enumerate().map(encode).collect()
        };
        let mut branches = branches?;
        let shared = common_beginning(&branches);
        let input_ids =
            branches.first().map(|branch| branch.input_ids[..shared].to_vec()).unwrap_or_default();
        for branch in &mut branches {
            branch.input_ids.drain(..shared);
        }
        Ok((input_ids, branches))
    }

    fn question(&self, question: &Question, visual_tokens: &[usize]) -> Result<Branch, ScoreError> {
        let encoder = &self.prompts[0];
        let answers =
            first_ids(&question.answers, encoder).map_err(|reason| ScoreError::invalid(QUESTIONS, reason))?;
        Ok(Branch { input_ids: encoder.encode(&question.text, visual_tokens)?, answers })
    }

    /// Whether questions can be answered, as far as their number and lengths tell.
    pub(super) fn check_questions(&self, questions: &[Question]) -> Result<(), ScoreError> {
        let refuse = |reason: String| Err(ScoreError::invalid(QUESTIONS, reason));
        if !self.takes_questions {
            return refuse("the model takes none: it reads a head, or several passes, or a logit".into());
        }
        let (count, most) = (questions.len(), self.limits.max_questions);
        if count > most {
            return refuse(format!("there are {count}; an item may have {most}"));
        }
        for (n, Question { text, answers }) in questions.iter().enumerate() {
            self.check_prompt(text).map_err(|error| of_question(n, error))?;
            if answers.len() > MOST_ANSWERS {
                return refuse(format!(
                    "[{n}]: it has {} answers; it may have {MOST_ANSWERS}",
                    answers.len()
                ));
            }
            if !answers.is_empty() && !matches!(self.answers, Some(AnswerIds::Any(_))) {
                return refuse(format!(
                    "[{n}]: it has answers of its own, and the model reads one against another"
                ));
            }
            for answer in answers {
                let (length, limit) = (answer.len(), self.limits.max_prompt_bytes);
                if !(1..=limit).contains(&length) {
                    return refuse(format!(
                        "[{n}]: an answer has {length} bytes of UTF-8; it may have 1 to {limit}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// How many tokens the texts of several readings begin with alike. Each keeps one of its own at least.
fn common_beginning(branches: &[Branch]) -> usize {
    let Some((first, rest)) = branches.split_first() else { return 0 };
    let shortest = branches.iter().map(|branch| branch.input_ids.len()).min().unwrap_or_default();
    let alike =
        |other: &Branch| first.input_ids.iter().zip(&other.input_ids).take_while(|(a, b)| a == b).count();
    rest.iter().map(alike).min().unwrap_or(usize::MAX).min(shortest.saturating_sub(1))
}

/// An error of a question, as one of the item.
fn of_question(n: usize, error: ScoreError) -> ScoreError {
    match error {
        ScoreError::Invalid { reason, .. } => ScoreError::invalid(QUESTIONS, format!("[{n}]: {reason}")),
        other => other,
    }
}

/// The first tokens of answers, each once.
fn first_ids(answers: &[String], encoder: &PromptEncoder) -> Result<Vec<u32>, String> {
    let id = |answer: &String| {
        encoder.first_id(answer).map_err(|reason| format!("the answer {} {reason}", quoted(answer)))
    };
    let mut ids = answers.iter().map(id).collect::<Result<Vec<_>, _>>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The first tokens of a profile's answers.
pub(super) fn answer_ids(answers: &Answers, encoder: &PromptEncoder) -> Result<AnswerIds, CheckpointError> {
    let ids = |forms: &[String]| {
        first_ids(forms, encoder).map_err(|reason| CheckpointError::invalid("reward_config.json", reason))
    };
    Ok(match answers {
        Answers::Any(forms) => AnswerIds::Any(ids(forms)?),
        Answers::Pair(pair) => {
            let (positive, negative) = (ids(pair.positive.forms())?, ids(pair.negative.forms())?);
            if let Some(id) = positive.iter().find(|id| negative.contains(id)) {
                let reason = format!("answers begin with one token, {id}, positive and negative ones alike");
                return Err(CheckpointError::invalid("reward_config.json", reason));
            }
            AnswerIds::Pair { positive, negative }
        }
    })
}
