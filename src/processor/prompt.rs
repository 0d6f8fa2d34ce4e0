//! A caller's prompt to token ids: the twin of the reference's `Qwen2_5_VLProcessor` and its kin on text.
//!
//! The conversation around the prompt never changes, so the chat template is rendered once, with a mark where
//! the prompt goes, and cut at its special tokens. What is left for a request is to encode the one stretch of
//! plain text that holds the prompt, and there no special token is ever matched: whatever a caller writes is
//! text to the model.

use tokenizers::{AddedToken, Tokenizer};

use super::template::ChatTemplate;
use crate::error::ScoreError;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles, RewardConfig, RewardToken};

const TOKENIZER: &str = "tokenizer.json";
const REWARD_CONFIG: &str = "reward_config.json";

/// Where the caller's prompt goes in the instruction.
const SLOT: &str = "{prompt}";

/// The most pictures of an item.
const MAX_PICTURES: usize = 16;

/// Stands for the prompt while the template is rendered: private-use characters, which no template looks at.
const MARK: &str = "\u{f8e0}prompt\u{f8e1}";

/// Prompts that show at load whether template and tokenizer leave a prompt as it is.
const PROBES: [&str; 4] = [
    "a red cube left of a blue ball",
    "  a  b \n",
    "\"<b> & 'c'\"\n\n{{ d }} {prompt}",
    "Ein Würfel 左边的球 🎈",
];

/// Turns prompts into token ids.
pub(super) struct PromptEncoder {
    /// Matches no special token.
    tokenizer: Tokenizer,
    /// The conversation up to the token at which the reward is read.
    plan: Vec<Piece>,
    /// How many pictures the conversation shows.
    pub pictures: usize,
}

/// A part of the rendered conversation.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    /// The same for every caller.
    Ids(Vec<u32>),
    /// Where the visual tokens stand; this placeholder's id once for each.
    Picture(u32),
    /// Plain text with the caller's prompt between each two parts.
    Caller(Vec<String>),
}

impl PromptEncoder {
    /// Renders the checkpoint's template and checks that prompts pass through it unchanged.
    ///
    /// # Errors
    ///
    /// A template that changes or drops the prompt or does not show each picture once, a reward token that is
    /// not one token or does not stand once behind prompt and picture, and a tokenizer whose ids for the whole
    /// conversation are not those of its parts.
    pub fn load(
        files: &CheckpointFiles,
        reward: &RewardConfig,
        image_token_id: u32,
    ) -> Result<Self, CheckpointError> {
        let reference = read_tokenizer(files)?;
        let conversation = Conversation {
            template: ChatTemplate::load(files)?,
            instruction: instruction(reward)?,
            pictures: pictures(reward)?,
        };
        let reward_id = reward_id(reward, &reference)?;
        let marked = conversation.with(MARK)?;
        let specials = fixed_tokens(&reference, &marked, reward_id, image_token_id);
        let tokenizer = without_specials(&reference, &specials)
            .map_err(|e| CheckpointError::invalid(TOKENIZER, e.to_string()))?;
        let mut plan = plan(&marked, &specials, image_token_id, &tokenizer)?;
        check_pictures(&plan, image_token_id, &conversation)?;
        let whole = Self { tokenizer, plan: plan.clone(), pictures: conversation.pictures };
        whole.check_probes(&conversation, &marked, &reference)?;
        if let Some(id) = reward_id {
            plan = up_to_reward(plan, id)?;
        }
        Ok(Self { plan, ..whole })
    }

    /// The ids of the conversation about pictures of so many visual tokens each, up to the one at which the reward
    /// is read.
    pub fn encode(&self, prompt: &str, visual_tokens: &[usize]) -> Result<Vec<u32>, ScoreError> {
        let mut ids = Vec::new();
        let mut visual_tokens = visual_tokens.iter();
        for piece in &self.plan {
            match piece {
                Piece::Ids(fixed) => ids.extend_from_slice(fixed),
                Piece::Picture(id) => {
                    ids.extend(std::iter::repeat_n(*id, visual_tokens.next().copied().unwrap_or_default()));
                }
                Piece::Caller(parts) => {
                    let text = parts.join(prompt);
                    let encoding = self
                        .tokenizer
                        .encode_fast(text, false)
                        .map_err(|e| ScoreError::invalid("prompt", format!("it cannot be tokenised: {e}")))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
            }
        }
        Ok(ids)
    }

    /// Compares, for each probe, the parts' ids with those of the whole text as the reference encodes it.
    fn check_probes(
        &self,
        conversation: &Conversation,
        marked: &str,
        reference: &Tokenizer,
    ) -> Result<(), CheckpointError> {
        for probe in PROBES {
            let rendered = conversation.with(probe)?;
            if rendered != marked.replace(MARK, probe) {
                return Err(CheckpointError::invalid(
                    conversation.template.file,
                    format!("the chat template changes the prompt {probe:?}; it must pass it on unchanged"),
                ));
            }
            let refuse = |e: String| CheckpointError::invalid(TOKENIZER, e);
            let whole = reference.encode_fast(rendered, true).map_err(|e| refuse(e.to_string()))?;
            let parts = self.encode(probe, &vec![1; self.pictures]).map_err(|e| refuse(e.to_string()))?;
            if whole.get_ids() != parts {
                return Err(refuse(format!(
                    "the conversation with the prompt {probe:?} has other ids as a whole than part by part, cut \
                     at its special tokens"
                )));
            }
        }
        Ok(())
    }
}

/// The conversation as a function of the prompt.
struct Conversation<'a> {
    template: ChatTemplate,
    instruction: &'a str,
    pictures: usize,
}

impl Conversation<'_> {
    fn with(&self, prompt: &str) -> Result<String, CheckpointError> {
        self.template.render(self.pictures, &self.instruction.replace(SLOT, prompt))
    }
}

fn read_tokenizer(files: &CheckpointFiles) -> Result<Tokenizer, CheckpointError> {
    let refuse = |e: tokenizers::Error| CheckpointError::invalid(TOKENIZER, e.to_string());
    let mut tokenizer = Tokenizer::from_bytes(files.require(TOKENIZER)?).map_err(refuse)?;
    // A prompt is never cut short, and nothing is filled up here.
    tokenizer.with_truncation(None).map_err(refuse)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

fn instruction(reward: &RewardConfig) -> Result<&str, CheckpointError> {
    if !reward.instruction.contains(SLOT) || reward.instruction.contains(MARK) {
        return Err(CheckpointError::invalid(
            REWARD_CONFIG,
            format!("instruction must say with {SLOT} where the prompt goes"),
        ));
    }
    Ok(&reward.instruction)
}

/// How many pictures an item has.
fn pictures(reward: &RewardConfig) -> Result<usize, CheckpointError> {
    match reward.pictures {
        count @ 1..=MAX_PICTURES => Ok(count),
        count => {
            let reason = format!("pictures is {count}, must be from 1 to {MAX_PICTURES}");
            Err(CheckpointError::invalid(REWARD_CONFIG, reason))
        }
    }
}

/// The id of the token at which the reward is read, or `None` where that is the last one.
fn reward_id(reward: &RewardConfig, tokenizer: &Tokenizer) -> Result<Option<u32>, CheckpointError> {
    if reward.reward_token == RewardToken::Last {
        return Ok(None);
    }
    let refuse = |reason: String| CheckpointError::invalid(REWARD_CONFIG, reason);
    let token = reward
        .special_token
        .as_deref()
        .ok_or_else(|| refuse("reward_token is \"special\", so special_token must name it".into()))?;
    let id = tokenizer
        .token_to_id(token)
        .ok_or_else(|| refuse(format!("special_token {token:?} is not in the vocabulary of {TOKENIZER}")))?;
    match reward.instruction.matches(token).count() {
        1 => Ok(Some(id)),
        count => Err(refuse(format!(
            "special_token {token:?} stands {count} times in instruction; it must stand once"
        ))),
    }
}

/// The tokens that a caller's text must never become, longest first: those that the checkpoint calls special,
/// and any other added token that the conversation itself uses or the model reads.
fn fixed_tokens(
    tokenizer: &Tokenizer,
    marked: &str,
    reward_id: Option<u32>,
    image_token_id: u32,
) -> Vec<(String, u32)> {
    let needed = |id: u32| Some(id) == reward_id || id == image_token_id;
    let mut tokens: Vec<(String, u32)> = tokenizer
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(id, token)| token.special || needed(*id) || marked.contains(&token.content))
        .map(|(id, token)| (token.content, id))
        .collect();
    tokens.sort_by_key(|(content, _)| std::cmp::Reverse(content.len()));
    tokens
}

/// The same tokenizer, to which none of these tokens is more than its characters.
fn without_specials(
    reference: &Tokenizer,
    specials: &[(String, u32)],
) -> Result<Tokenizer, tokenizers::Error> {
    let mut tokenizer = reference.clone();
    let known = reference.get_added_tokens_decoder();
    let tokens = specials.iter().filter_map(|(_, id)| known.get(id)).cloned();
    tokenizer.add_special_tokens(tokens.map(|token| AddedToken { special: true, ..token }))?;
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Cuts the rendered conversation at its special tokens and encodes what is the same for every caller.
fn plan(
    marked: &str,
    specials: &[(String, u32)],
    image_token_id: u32,
    tokenizer: &Tokenizer,
) -> Result<Vec<Piece>, CheckpointError> {
    let mut plan = Vec::new();
    let mut rest = marked;
    while !rest.is_empty() {
        // The leftmost token, and the longest of those that start there.
        let next = specials
            .iter()
            .filter_map(|(content, id)| Some((rest.find(content.as_str())?, content.len(), *id)))
            .min_by_key(|&(at, length, _)| (at, std::cmp::Reverse(length)));
        let (at, length) = next.map_or((rest.len(), 0), |(at, length, _)| (at, length));
        if at > 0 {
            plan.push(plain(&rest[..at], tokenizer)?);
        }
        if let Some((_, _, id)) = next {
            plan.push(if id == image_token_id { Piece::Picture(id) } else { Piece::Ids(vec![id]) });
        }
        rest = &rest[at + length..];
    }
    Ok(plan)
}

fn plain(text: &str, tokenizer: &Tokenizer) -> Result<Piece, CheckpointError> {
    if text.contains(MARK) {
        return Ok(Piece::Caller(text.split(MARK).map(str::to_owned).collect()));
    }
    tokenizer
        .encode_fast(text, false)
        .map(|encoding| Piece::Ids(encoding.get_ids().to_vec()))
        .map_err(|e| CheckpointError::invalid(TOKENIZER, e.to_string()))
}

/// Each picture has one placeholder, with something between any two: the reference takes what lies side by side for one.
fn check_pictures(
    plan: &[Piece],
    image_token_id: u32,
    conversation: &Conversation,
) -> Result<(), CheckpointError> {
    let is_picture = |piece: &Piece| matches!(piece, Piece::Picture(_));
    let (count, wanted) = (plan.iter().filter(|piece| is_picture(piece)).count(), conversation.pictures);
    let beside = plan.windows(2).any(|pair| pair.iter().all(is_picture));
    if count == wanted && !beside {
        return Ok(());
    }
    let placeholder = format!("the chat template writes the picture's placeholder (id {image_token_id})");
    let turn = match wanted {
        1 => "a turn with one picture; it must do so once".to_owned(),
        _ => format!("a turn with {wanted} pictures; it must do so once for each, with other tokens between"),
    };
    let found = if beside { "side by side".to_owned() } else { format!("{count} times") };
    Err(CheckpointError::invalid(conversation.template.file, format!("{placeholder} {found} for {turn}")))
}

/// Drops what stands behind the reward token: under causal attention it cannot matter.
fn up_to_reward(mut plan: Vec<Piece>, reward_id: u32) -> Result<Vec<Piece>, CheckpointError> {
    let refuse = |reason| Err(CheckpointError::invalid(REWARD_CONFIG, reason));
    let is_reward = |piece: &Piece| *piece == Piece::Ids(vec![reward_id]);
    if plan.iter().filter(|piece| is_reward(piece)).count() != 1 {
        return refuse("special_token must stand exactly once in the rendered conversation, as one token");
    }
    let end = plan.iter().position(is_reward).map_or(plan.len(), |at| at + 1);
    let late = |piece: &Piece| matches!(piece, Piece::Picture(_) | Piece::Caller(_));
    if plan[end..].iter().any(late) {
        return refuse(
            "special_token stands before the picture or the prompt, which the reward could not see",
        );
    }
    plan.truncate(end);
    Ok(plan)
}
