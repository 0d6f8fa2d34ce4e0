//! What the reference's configuration classes take, key by key, and which keys change the model into another.

use serde_json::{Map, Value};

use crate::model::checkpoint::python_json::{Type, check_types, is_falsy, quote};

/// The most blocks or layers: the published models have up to 80.
const MOST_LAYERS: i64 = 1024;
/// The greatest width of a vector, 32 times a published model's.
const MOST_WIDTH: i64 = 1 << 20;

const ANY_INTEGER: Type = Type::Integer(i64::MIN, i64::MAX);
const WIDTH: Type = Type::Integer(1, MOST_WIDTH);
const ID: Type = Type::Integer(0, u32::MAX as i64);
const INTEGER_OR_NULL: Type = Type::Either(&ANY_INTEGER, &Type::Null);

const TOP: [(&str, Type); 5] = [
    ("image_token_id", ID),
    ("video_token_id", ANY_INTEGER),
    ("vision_start_token_id", ANY_INTEGER),
    ("vision_end_token_id", ANY_INTEGER),
    ("tie_word_embeddings", Type::Flag),
];

const TEXT: [(&str, Type); 21] = [
    ("vocab_size", Type::Integer(1, u32::MAX as i64)),
    ("hidden_size", WIDTH),
    ("intermediate_size", WIDTH),
    ("num_hidden_layers", Type::Integer(1, MOST_LAYERS)),
    ("num_attention_heads", WIDTH),
    ("num_key_value_heads", Type::Either(&WIDTH, &Type::Null)),
    ("head_dim", INTEGER_OR_NULL),
    ("hidden_act", Type::Text),
    ("attention_bias", Type::Flag),
    ("max_position_embeddings", Type::Integer(1, i64::MAX)),
    ("initializer_range", Type::Float),
    ("rms_norm_eps", Type::FiniteFloat),
    ("use_cache", Type::Flag),
    ("use_sliding_window", Type::Either(&Type::Flag, &Type::Null)),
    ("sliding_window", INTEGER_OR_NULL),
    ("max_window_layers", INTEGER_OR_NULL),
    ("layer_types", Type::Either(&Type::Texts, &Type::Null)),
    ("attention_dropout", Type::Either(&Type::Number, &Type::Null)),
    ("bos_token_id", INTEGER_OR_NULL),
    ("eos_token_id", Type::Either(&Type::Integers, &INTEGER_OR_NULL)),
    ("pad_token_id", INTEGER_OR_NULL),
];

const VISION: [(&str, Type); 17] = [
    ("depth", Type::Integer(0, MOST_LAYERS)),
    ("hidden_size", WIDTH),
    ("hidden_act", Type::Text),
    ("intermediate_size", WIDTH),
    ("num_heads", WIDTH),
    ("head_dim", INTEGER_OR_NULL),
    ("in_channels", WIDTH),
    ("patch_size", Type::Integer(1, 256)),
    ("spatial_merge_size", Type::Integer(1, 16)),
    ("temporal_patch_size", Type::Integer(1, 16)),
    ("window_size", Type::Integer(1, MOST_WIDTH)),
    ("out_hidden_size", WIDTH),
    ("tokens_per_second", ANY_INTEGER),
    ("fullatt_block_indexes", Type::Integers),
    ("num_position_embeddings", Type::Integer(1, MOST_WIDTH)),
    ("deepstack_visual_indexes", Type::Integers),
    ("initializer_range", Type::Float),
];

/// Keys that make another model of this one, or have it read from other files, and what would be right.
const UNSUPPORTED: [(&str, &str); 5] = [
    ("quantization_config", "quantised weights are not served; save them as bfloat16"),
    ("compression_config", "compressed weights are not served; save them as bfloat16"),
    ("per_layer_config", "layers that differ from one another are not served"),
    ("configuration_files", "a configuration in other files is not read; save it as config.json"),
    ("transformers_weights", "weights under another name are not read; name them model.safetensors"),
];

/// A section's name, what it says, and what its keys may hold.
type Section<'a> = (&'a str, &'a Map<String, Value>, &'a [(&'static str, Type)]);

/// What is wrong with the values by themselves. `text` is the section of the decoder's keys, which `prefix` names.
pub fn faults(
    top: &Map<String, Value>,
    text: &Map<String, Value>,
    prefix: &str,
    vision: &Map<String, Value>,
) -> Vec<String> {
    let sections: [Section<'_>; 3] =
        [("", top, &TOP), (prefix, text, &TEXT), ("vision_config.", vision, &VISION)];
    let mut faults = Vec::new();
    for (name, section, keys) in sections {
        for (key, reason) in UNSUPPORTED {
            let fault = format!("{name}{key}: {reason}");
            // The older form has the decoder's keys at the top, which is looked at twice then.
            if section.get(key).is_some_and(|value| !says_nothing(name, key, value))
                && !faults.contains(&fault)
            {
                faults.push(fault);
            }
        }
        faults.extend(check_types(section, name, keys));
    }
    let integer = |key: &str| text.get(key).and_then(Value::as_i64);
    if let (Some(padding), Some(rows)) = (integer("pad_token_id"), integer("vocab_size"))
        && !(-rows..rows).contains(&padding)
    {
        faults.push(format!("{prefix}pad_token_id is {padding}, but vocab_size is {rows}"));
    }
    faults
}

/// Whether a key that would make another model is there in name only. Of quantisation the reference takes no
/// other value for that than these.
fn says_nothing(section: &str, key: &str, value: &Value) -> bool {
    match key {
        "quantization_config" => {
            value.is_null() || section.is_empty() && value.as_object().is_some_and(Map::is_empty)
        }
        _ => is_falsy(value),
    }
}

/// The vision tower's section under the names that the reference's class has for its keys, without the blocks with
/// full attention that are none.
pub fn vision_section(said: &Map<String, Value>) -> Map<String, Value> {
    let mut section = said.clone();
    // Where both are there, the reference lets the alias win.
    for (alias, key) in [("num_attention_heads", "num_heads"), ("num_hidden_layers", "depth")] {
        if let Some(value) = section.remove(alias) {
            section.insert(key.to_owned(), value);
        }
    }
    if let Some(Value::Array(blocks)) = section.get_mut("fullatt_block_indexes") {
        blocks.retain(|block| block.as_i64().is_none_or(|n| n >= 0));
    }
    section
}

/// A section of the file, or `None` where it is absent or null.
///
/// # Errors
/// It is something else.
pub fn section<'a>(top: &'a Map<String, Value>, key: &str) -> Result<Option<&'a Map<String, Value>>, String> {
    match top.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(section)) => Ok(Some(section)),
        Some(other) => Err(format!("{key} is {}, must be an object", quote(other))),
    }
}
