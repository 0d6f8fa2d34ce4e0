//! A caller's prompt to token ids: the twin of the reference's `Qwen2_5_VLProcessor` and its kin on text.
//!
//! The conversation around the prompt never changes, so the chat template is rendered once, with a mark where
//! the prompt goes, and cut at its special tokens. What is left for a request is to encode the one stretch of
//! plain text that holds the prompt, and there no special token is ever matched: whatever a caller writes is
//! text to the model.

mod spans;

use tokenizers::{AddedToken, Tokenizer};

use super::chat_template::ChatTemplate;
use super::tokenizer::TextTokenizer;
use crate::error::ScoreError;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};
use crate::model::profile::{Pass, RewardConfig, RewardToken};

pub use self::spans::{Span, SpanKind};

const REWARD_CONFIG: &str = "reward_config.json";

/// Where the caller's prompt goes in the instruction.
const SLOT: &str = "{prompt}";

/// The longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 64 << 10;
/// The longest conversation around a prompt, in bytes.
const MAX_CONVERSATION: usize = 1 << 20;
/// How often a prompt may stand in the conversation: each costs every caller tokens.
const MAX_SLOTS: usize = 16;
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
    /// The tokenizer's file.
    file: &'static str,
    /// Rows of the model's vocabulary: its ids are below.
    rows: u32,
    /// How many pictures the conversation shows.
    pub pictures: usize,
}

/// A part of the rendered conversation.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    /// The same for every caller.
    Fixed { ids: Vec<u32>, text: String },
    /// Where the visual tokens stand; this placeholder's id once for each.
    Picture(u32),
    /// Plain text with the caller's prompt between each two parts.
    Caller { parts: Vec<String>, trim: Trim },
}

/// Whether the tokens beside a text take the spaces at its ends, as their `rstrip` and `lstrip` say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Trim {
    start: bool,
    end: bool,
}

impl Trim {
    fn apply(self, text: &str) -> &str {
        let text = if self.start { text.trim_start() } else { text };
        if self.end { text.trim_end() } else { text }
    }
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
        pass: &Pass,
        image_token_id: u32,
    ) -> Result<Self, CheckpointError> {
        let TextTokenizer { tokenizer: mut reference, special_tokens, file } = TextTokenizer::load(files)?;
        let added = reward.added_tokens.iter().filter(|token| reference.token_to_id(token).is_none());
        let added: Vec<AddedToken> = added.map(|token| AddedToken::from(token.as_str(), true)).collect();
        let refuse = |e: tokenizers::Error| CheckpointError::invalid(file, e.to_string());
        reference.add_special_tokens(added).map_err(refuse)?;
        let conversation = Conversation {
            template: ChatTemplate::load(files, special_tokens)?,
            instruction: instruction(pass)?,
            pictures: pictures(reward)?,
        };
        let reward_id = reward_id(reward.reward_token, pass, &reference, file)?;
        let marked = conversation.with(MARK)?;
        check_slots(&marked, conversation.template.file)?;
        let specials = fixed_tokens(&reference, &marked, reward_id, image_token_id);
        let tokenizer = without_specials(&reference, &specials).map_err(refuse)?;
        check_words(&specials, &marked, file)?;
        let mut plan = plan(&marked, &specials, image_token_id, &tokenizer).map_err(refuse)?;
        check_pictures(&plan, image_token_id, &conversation)?;
        let pictures = conversation.pictures;
        let whole = Self { tokenizer, plan: plan.clone(), file, rows: u32::MAX, pictures };
        whole.check_probes(&conversation, &marked, &reference, file)?;
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
                Piece::Fixed { ids: fixed, .. } => ids.extend_from_slice(fixed),
                Piece::Picture(id) => {
                    ids.extend(std::iter::repeat_n(*id, visual_tokens.next().copied().unwrap_or_default()));
                }
                Piece::Caller { parts, trim } => {
                    let text = parts.join(prompt);
                    let encoding = self
                        .tokenizer
                        .encode_fast(trim.apply(&text), false)
                        .map_err(|e| ScoreError::invalid("prompt", format!("it cannot be tokenised: {e}")))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
            }
        }
        match ids.iter().find(|&&id| id >= self.rows) {
            Some(id) => Err(ScoreError::invalid(
                "prompt",
                format!("its token {id} is not among the {} of the model's vocabulary", self.rows),
            )),
            None => Ok(ids),
        }
    }

    /// The first token of an answer, as the tokenizer makes it of the answer alone.
    pub fn first_id(&self, answer: &str) -> Result<u32, String> {
        let encoding = self.tokenizer.encode_fast(answer, false).map_err(|e| e.to_string())?;
        match encoding.get_ids().first() {
            Some(&id) if id < self.rows => Ok(id),
            Some(id) => {
                Err(format!("its token {id} is not among the {} of the model's vocabulary", self.rows))
            }
            None => Err("has no token".into()),
        }
    }

    /// Refuses what the model's vocabulary of so many rows has no room for: the conversation's tokens and those of
    /// plain text here, and any other where a prompt brings it in.
    pub fn limit_vocabulary(&mut self, rows: u32) -> Result<(), CheckpointError> {
        let of_plan = self.plan.iter().flat_map(|piece| match piece {
            Piece::Fixed { ids, .. } => ids.as_slice(),
            Piece::Picture(id) => std::slice::from_ref(id),
            Piece::Caller { .. } => &[],
        });
        let of_plan = of_plan.copied().max();
        let of_text = self.tokenizer.get_vocab(false).into_values().max();
        if let Some(id) = of_plan.max(of_text).filter(|&id| id >= rows) {
            let token = self.tokenizer.id_to_token(id).unwrap_or_default();
            return Err(CheckpointError::invalid(
                self.file,
                format!(
                    "the token {token:?} has the id {id}, and the model's embeddings have {rows} rows; they must \
                     have a row for every token"
                ),
            ));
        }
        self.rows = rows;
        Ok(())
    }

    /// Compares, for each probe, the parts' ids with those of the whole text as the reference encodes it.
    fn check_probes(
        &self,
        conversation: &Conversation,
        marked: &str,
        reference: &Tokenizer,
        file: &str,
    ) -> Result<(), CheckpointError> {
        for probe in PROBES {
            let rendered = conversation.with(probe)?;
            if rendered != marked.replace(MARK, probe) {
                return Err(CheckpointError::invalid(
                    conversation.template.file,
                    format!("the chat template changes the prompt {probe:?}; it must pass it on unchanged"),
                ));
            }
            let refuse = |e: String| CheckpointError::invalid(file, e);
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

fn instruction<'a>(pass: &Pass<'a>) -> Result<&'a str, CheckpointError> {
    let length = pass.instruction.len();
    if length > MAX_INSTRUCTION {
        return Err(CheckpointError::invalid(
            REWARD_CONFIG,
            format!("instruction has {length} bytes; it may have {MAX_INSTRUCTION}"),
        ));
    }
    let slots = pass.instruction.matches(SLOT).count();
    if slots > MAX_SLOTS {
        return Err(CheckpointError::invalid(
            REWARD_CONFIG,
            format!("instruction has {SLOT} {slots} times; it may have it {MAX_SLOTS} times"),
        ));
    }
    if slots == 0 || pass.instruction.contains(MARK) {
        return Err(CheckpointError::invalid(
            REWARD_CONFIG,
            format!("instruction must say with {SLOT} where the prompt goes"),
        ));
    }
    Ok(pass.instruction)
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
fn reward_id(
    read_at: RewardToken,
    pass: &Pass,
    tokenizer: &Tokenizer,
    file: &str,
) -> Result<Option<u32>, CheckpointError> {
    if read_at == RewardToken::Last {
        return Ok(None);
    }
    let refuse = |reason: String| CheckpointError::invalid(REWARD_CONFIG, reason);
    let token = pass
        .special_token
        .ok_or_else(|| refuse("reward_token is \"special\", so special_token must name it".into()))?;
    let id = tokenizer
        .token_to_id(token)
        .ok_or_else(|| refuse(format!("special_token {token:?} is not in the vocabulary of {file}")))?;
    match pass.instruction.matches(token).count() {
        1 => Ok(Some(id)),
        count => Err(refuse(format!(
            "special_token {token:?} stands {count} times in instruction; it must stand once"
        ))),
    }
}

/// Bounds what a template makes of the instruction.
fn check_slots(marked: &str, file: &str) -> Result<(), CheckpointError> {
    let refuse = |reason: String| Err(CheckpointError::invalid(file, reason));
    if marked.len() > MAX_CONVERSATION {
        return refuse(format!(
            "the chat template makes a conversation of {} bytes around the prompt; it may have {MAX_CONVERSATION}",
            marked.len()
        ));
    }
    match marked.matches(MARK).count() {
        0 => refuse("the chat template changes the prompt, or leaves it out".into()),
        1..=MAX_SLOTS => Ok(()),
        slots => {
            refuse(format!("the chat template writes the prompt {slots} times; it may {MAX_SLOTS} times"))
        }
    }
}

/// Refuses tokens of the conversation that are tokens between spaces alone: a prompt beside one would unmake it.
fn check_words(specials: &[(AddedToken, u32)], marked: &str, file: &str) -> Result<(), CheckpointError> {
    match specials.iter().find(|(token, _)| token.single_word && marked.contains(&token.content)) {
        Some((token, _)) => Err(CheckpointError::invalid(
            file,
            format!("the token {:?} is single_word, which is not supported in a conversation", token.content),
        )),
        None => Ok(()),
    }
}

/// The tokens that a caller's text must never become, longest first: those that the checkpoint calls special,
/// and any other added token that the conversation itself uses or the model reads.
fn fixed_tokens(
    tokenizer: &Tokenizer,
    marked: &str,
    reward_id: Option<u32>,
    image_token_id: u32,
) -> Vec<(AddedToken, u32)> {
    let needed = |id: u32| Some(id) == reward_id || id == image_token_id;
    let mut tokens: Vec<(AddedToken, u32)> = tokenizer
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(id, token)| token.special || needed(*id) || marked.contains(&token.content))
        .map(|(id, token)| (token, id))
        .collect();
    tokens.sort_by_key(|(token, _)| std::cmp::Reverse(token.content.len()));
    tokens
}

/// The same tokenizer, to which none of these tokens is more than its characters.
fn without_specials(
    reference: &Tokenizer,
    specials: &[(AddedToken, u32)],
) -> Result<Tokenizer, tokenizers::Error> {
    let mut tokenizer = reference.clone();
    let tokens = specials.iter().map(|(token, _)| token.clone());
    tokenizer.add_special_tokens(tokens.map(|token| AddedToken { special: true, ..token }))?;
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Cuts the rendered conversation at its special tokens and encodes what is the same for every caller.
fn plan(
    marked: &str,
    specials: &[(AddedToken, u32)],
    image_token_id: u32,
    tokenizer: &Tokenizer,
) -> Result<Vec<Piece>, tokenizers::Error> {
    let mut plan = Vec::new();
    let mut rest = marked;
    let mut trim = Trim::default();
    while !rest.is_empty() {
        // The leftmost token, and the longest of those that start there.
        let next = specials
            .iter()
            .filter_map(|(token, id)| Some((rest.find(token.content.as_str())?, token, *id)))
            .min_by_key(|&(at, token, _)| (at, std::cmp::Reverse(token.content.len())));
        let end = next.map_or(rest.len(), |(at, ..)| at);
        trim.end = next.is_some_and(|(_, token, _)| token.lstrip);
        plan.extend(plain(&rest[..end], trim, tokenizer)?);
        let Some((_, token, id)) = next else { break };
        plan.push(if id == image_token_id {
            Piece::Picture(id)
        } else {
            Piece::Fixed { ids: vec![id], text: token.content.clone() }
        });
        trim.start = token.rstrip;
        rest = &rest[end + token.content.len()..];
    }
    Ok(plan)
}

fn plain(text: &str, trim: Trim, tokenizer: &Tokenizer) -> Result<Option<Piece>, tokenizers::Error> {
    if text.contains(MARK) {
        let parts = text.split(MARK).map(str::to_owned).collect();
        return Ok(Some(Piece::Caller { parts, trim }));
    }
    let text = trim.apply(text);
    let ids = tokenizer.encode_fast(text, false)?.get_ids().to_vec();
    Ok((!ids.is_empty()).then(|| Piece::Fixed { ids, text: text.to_owned() }))
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
    let is_reward = |piece: &Piece| matches!(piece, Piece::Fixed { ids, .. } if *ids == [reward_id]);
    if plan.iter().filter(|piece| is_reward(piece)).count() != 1 {
        return refuse("special_token must stand exactly once in the rendered conversation, as one token");
    }
    let end = plan.iter().position(is_reward).map_or(plan.len(), |at| at + 1);
    let late = |piece: &Piece| matches!(piece, Piece::Picture(_) | Piece::Caller { .. });
    if plan[end..].iter().any(late) {
        return refuse(
            "special_token stands before the picture or the prompt, which the reward could not see",
        );
    }
    plan.truncate(end);
    Ok(plan)
}
