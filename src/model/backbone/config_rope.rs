//! How a section of `config.json` says at which angles the positions turn.

use serde_json::{Map, Value};

use crate::model::checkpoint::python_json::{is_falsy, number, one_of, quote};

/// The rotary positions of one tower.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rope {
    /// The base of the angles.
    pub theta: f64,
    /// How many of a head's frequencies turn with time, height, width, time again, and so on.
    pub sections: Vec<i64>,
    /// What the file says of `sections`.
    pub said_of_sections: String,
}

/// What a tower takes.
pub struct Kind {
    types: &'static [&'static str],
    default_theta: f64,
    /// Where the file says nothing.
    default_sections: [i64; 3],
}

/// The decoder's, by the grid of the picture.
pub const MULTIMODAL: Kind =
    Kind { types: &["default", "mrope"], default_theta: 1e6, default_sections: [16, 24, 24] };
/// The decoder's of Qwen3-VL, whose sections are interleaved.
pub const INTERLEAVED: Kind =
    Kind { types: &["default"], default_theta: 5e5, default_sections: [24, 20, 20] };
/// The vision tower's, by row and column.
pub const AXIAL: Kind =
    Kind { types: &["axial", "default"], default_theta: 1e4, default_sections: [16, 24, 24] };

impl Rope {
    /// Reads a section. transformers 5 keeps all of it in `rope_parameters`, its forerunners in `rope_scaling` and
    /// `rope_theta`, and it reads both.
    ///
    /// # Errors
    /// A rope that the reference refuses, or one that is not supported.
    pub fn read(section: &Map<String, Value>, prefix: &str, kind: &Kind) -> Result<Self, String> {
        let said = |key: &'static str| Some((key, section.get(key).filter(|value| !is_falsy(value))?));
        let (name, rope) = match said("rope_scaling").or_else(|| said("rope_parameters")) {
            None => ("rope_parameters", Map::new()),
            Some((key, Value::Object(rope))) => (key, rope.clone()),
            Some((key, other)) => {
                return Err(format!("{prefix}{key} is {}, must be an object", quote(other)));
            }
        };
        if rope.contains_key("full_attention") {
            return Err(format!("{prefix}{name} by kinds of layers is not supported, must be one for all"));
        }
        let (key, said) = ["rope_type", "type"]
            .into_iter()
            .find_map(|key| Some((key, rope.get(key)?.clone())))
            .unwrap_or_else(|| ("rope_type", "default".into()));
        if said.as_str().is_none_or(|said| !kind.types.contains(&said)) {
            let (said, supported) = (quote(&said), one_of(kind.types));
            return Err(format!(
                "{prefix}{name}.{key} is {said}, must be {supported}: others are not supported"
            ));
        }
        let theta = match rope.get("rope_theta").or_else(|| section.get("rope_theta")) {
            None => kind.default_theta,
            Some(said) => {
                number(said).filter(|theta| theta.is_finite() && *theta > 0.0).ok_or_else(|| {
                    format!("{prefix}{name}.rope_theta is {}, must be a finite number above 0", quote(said))
                })?
            }
        };
        let (sections, said_of_sections) = match rope.get("mrope_section") {
            None => (
                kind.default_sections.into(),
                format!("mrope_section is absent, which means {:?}; it", kind.default_sections),
            ),
            Some(said) => {
                let said_of = format!("{name}.mrope_section is {}; it", quote(said));
                let parts = said.as_array().and_then(|list| list.iter().map(Value::as_i64).collect());
                (parts.ok_or_else(|| format!("{prefix}{said_of} must be a list of integers"))?, said_of)
            }
        };
        Ok(Self { theta, sections, said_of_sections })
    }
}
