//! Shapes of models that can be made without a checkpoint, with random weights, to measure a device.

use serde_json::Value;

use super::config::Config;

/// A shape with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Qwen2.5-VL-7B, the base of the paper's reward model.
    Qwen25Vl7b,
    /// The same architecture, small enough for a test.
    Tiny,
}

impl Shape {
    /// `config.json`, as transformers reads it too.
    pub fn json(self) -> &'static str {
        match self {
            Self::Qwen25Vl7b => include_str!("shapes/qwen2.5-vl-7b.json"),
            Self::Tiny => include_str!("shapes/tiny.json"),
        }
    }

    /// The configuration, and the rows of the vocabulary.
    ///
    /// # Errors
    /// The file that this program carries is wrong.
    pub fn config(self) -> Result<(Config, i64), String> {
        let json: Value = serde_json::from_str(self.json()).map_err(|e| e.to_string())?;
        let rows = json.pointer("/text_config/vocab_size").and_then(Value::as_i64);
        Ok((Config::from_json(&json)?, rows.ok_or("no vocab_size")?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_large_shape_has_the_parameters_of_the_published_model() {
        let (config, rows) = Shape::Qwen25Vl7b.config().unwrap();
        let count = |(_, shape): (String, Vec<i64>)| shape.iter().product::<i64>();
        let parameters: i64 = config.tensors(rows).into_iter().map(count).sum();
        // Qwen/Qwen2.5-VL-7B-Instruct has 8,292,166,656 parameters, 152064 × 3584 of them lm_head's.
        assert_eq!(parameters, 8_292_166_656 - 152_064 * 3584);
        Shape::Tiny.config().unwrap();
    }
}
