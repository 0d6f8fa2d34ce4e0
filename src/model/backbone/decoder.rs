//! The decoder: the reference's `Qwen2_5_VLTextModel`, as far as the last token's hidden state needs it.

use tch::{Device, Kind, Tensor};

use super::activations::Activations;
use super::batch::TextBatch;
use super::config::TextConfig;
use super::varlen_attention::Segments;
use super::vision::inverse_frequencies;
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::layers::{GatedMlp, Linear, RmsNorm, rotate, turns};

/// Tokens to the hidden state of each sample's last one.
#[derive(Debug)]
pub struct Decoder {
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// `[width of a head / 2]`, fp32.
    inverse_frequencies: Tensor,
    /// Which of the three axes turns each pair of a head's numbers.
    section: [i64; 3],
}

impl Decoder {
    /// Takes the weights under `language_model`.
    pub fn load(weights: &mut Weights, config: &TextConfig) -> Result<Self, CheckpointError> {
        let layers = (0..config.num_hidden_layers).map(|n| Layer::load(weights, config, n));
        Ok(Self {
            layers: layers.collect::<Result<_, _>>()?,
            embeddings: weights.take("language_model.embed_tokens.weight")?,
            norm: RmsNorm::load(weights, "language_model.norm", config.rms_norm_eps)?,
            inverse_frequencies: inverse_frequencies(config.head_dim(), config.rope_theta(), weights.device),
            section: config.mrope_section(),
        })
    }

    /// Rows of the vocabulary.
    pub fn vocabulary(&self) -> i64 {
        self.embeddings.size()[0]
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embeddings.device()
    }

    /// The hidden state of each sample's last token, `[samples, width]`, normed.
    ///
    /// `visual` are the visual tokens, `[visual tokens, width]`, in the order of [`TextBatch::visual_rows`].
    pub fn forward(&self, batch: &TextBatch, visual: &Tensor, activations: &mut Activations) -> Tensor {
        let mut x = self.embeddings.index_select(0, &batch.input_ids);
        x = x.index_copy_(0, &batch.visual_rows, visual);
        activations.see("text.positions", || batch.positions.shallow_clone());
        // The layers add to this memory.
        activations.see("text.embeddings", || x.copy());

        let turns = self.turns(&batch.positions);
        let last = self.layers.len().saturating_sub(1);
        for (n, layer) in self.layers.iter().enumerate() {
            // Behind the last layer only the last token's row is read.
            x = if n == last {
                layer.forward_last(&x, &turns, &batch.samples)
            } else {
                layer.forward(x, &turns, &batch.samples)
            };
            activations.see(&format!("text.layers.{n}"), || x.copy());
        }
        let hidden = batch.in_given_order(self.norm.forward(&x));
        activations.see("text.norm", || hidden.shallow_clone());
        hidden
    }

    /// How far the pairs of a head's numbers turn, each by the position on the axis that it follows.
    fn turns(&self, positions: &Tensor) -> Tensor {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse_frequencies;
        let mut start = 0;
        let parts: Vec<Tensor> = (0..)
            .zip(self.section)
            .map(|(axis, length)| {
                start += length;
                angles.select(0, axis).narrow(-1, start - length, length)
            })
            .collect();
        turns(&Tensor::cat(&parts, -1))
    }
}

/// The reference's `Qwen2_5_VLDecoderLayer`.
#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    /// Queries, keys and values, stacked.
    qkv: Linear,
    output: Linear,
    post_norm: RmsNorm,
    mlp: GatedMlp,
    heads: i64,
    key_value_heads: i64,
    head_dim: i64,
}

impl Layer {
    fn load(weights: &mut Weights, config: &TextConfig, n: usize) -> Result<Self, CheckpointError> {
        let name = format!("language_model.layers.{n}");
        let [q, k, v, o] = ["q", "k", "v", "o"].map(|part| format!("{name}.self_attn.{part}_proj"));
        Ok(Self {
            input_norm: RmsNorm::load(weights, &format!("{name}.input_layernorm"), config.rms_norm_eps)?,
            qkv: Linear::load(weights, &[&q, &k, &v], true)?.with_pairs_together(
                config.num_attention_heads + config.key_value_heads(),
                config.head_dim(),
            ),
            output: Linear::load(weights, &[&o], false)?,
            post_norm: RmsNorm::load(
                weights,
                &format!("{name}.post_attention_layernorm"),
                config.rms_norm_eps,
            )?,
            mlp: GatedMlp::load(weights, &format!("{name}.mlp"), false)?,
            heads: config.num_attention_heads,
            key_value_heads: config.key_value_heads(),
            head_dim: config.head_dim(),
        })
    }

    /// `[tokens, width]` to `[tokens, width]`, in the same memory.
    fn forward(&self, x: Tensor, turns: &Tensor, samples: &Segments) -> Tensor {
        let heads = self.qkv.forward(&self.input_norm.forward(&x)).unflatten(1, [-1, self.head_dim]);
        // Queries and keys turn together.
        let turned = rotate(&heads.narrow(1, 0, self.heads + self.key_value_heads), turns);
        let q = turned.narrow(1, 0, self.heads);
        let k = turned.narrow(1, self.heads, self.key_value_heads);
        let v = heads.narrow(1, self.heads + self.key_value_heads, self.key_value_heads);
        self.after_attention(x, &samples.attend(&q, &k, &v, true))
    }

    /// The same for each sample's last token alone: `[samples, width]`, in the order of [`Segments::last_rows`].
    fn forward_last(&self, x: &Tensor, turns: &Tensor, samples: &Segments) -> Tensor {
        let normed = self.input_norm.forward(x);
        let width = self.heads * self.head_dim;
        let kv = self.qkv.narrow(width, 2 * self.key_value_heads * self.head_dim).forward(&normed);
        let kv = kv.unflatten(1, [2 * self.key_value_heads, self.head_dim]);
        let k = rotate(&kv.narrow(1, 0, self.key_value_heads), turns);
        let v = kv.narrow(1, self.key_value_heads, self.key_value_heads);

        let [x, normed, turns] = [x, &normed, turns].map(|t| samples.last_rows(t));
        let q = self.qkv.narrow(0, width).forward(&normed).unflatten(1, [self.heads, self.head_dim]);
        self.after_attention(x, &samples.attend_last(&rotate(&q, &turns), &k, &v))
    }

    fn after_attention(&self, x: Tensor, attended: &Tensor) -> Tensor {
        let x = self.output.add_to(x, attended);
        let normed = self.post_norm.forward(&x);
        self.mlp.add_to(x, &normed)
    }
}
