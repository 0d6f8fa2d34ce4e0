//! The decoder of every family: the reference's `Qwen2VLTextModel`, `Qwen2_5_VLTextModel` and `Qwen3VLTextModel`, as
//! far as the last token's hidden state needs them.

use tch::{Device, Kind, Tensor};

use super::activations::Activations;
use super::batch::TextBatch;
use super::config::TextConfig;
use super::rope::inverse_frequencies;
use super::vision::Visual;
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::layers::{GatedMlp, HeadNorm, Linear, RmsNorm, rotate, turns};

/// Tokens to the hidden state of each sample's last one.
#[derive(Debug)]
pub struct Decoder {
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// `[width of a head / 2]`, fp32.
    inverse_frequencies: Tensor,
    /// Which of the three axes turns each pair of a head's numbers, `[width of a head / 2]`.
    axes: Tensor,
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
            axes: Tensor::from_slice(&config.rotary_axes()).to_device(weights.device),
        })
    }

    /// The table of embeddings, `[rows, width]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
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
    /// The rows of `visual` are in the order of [`TextBatch::visual_rows`].
    pub fn forward(&self, batch: &TextBatch, visual: &Visual, activations: &mut Activations) -> Tensor {
        let mut x = self.embeddings.index_select(0, &batch.input_ids);
        x = x.index_copy_(0, &batch.visual_rows, &visual.tokens);
        activations.see("text.positions", || batch.positions.shallow_clone());
        // The layers add to this memory.
        activations.see("text.embeddings", || x.copy());

        let turns = self.turns(&batch.positions);
        let last = self.layers.len().saturating_sub(1);
        for (n, layer) in self.layers.iter().enumerate() {
            // Behind the last layer only the last token's row is read.
            x = if n == last {
                layer.forward_last(&x, &turns, batch)
            } else {
                layer.forward(x, &turns, batch)
            };
            activations.see(&format!("text.layers.{n}"), || x.copy());
            // Behind the last layer there is no row of a visual token.
            if let Some(features) = visual.deepstack.get(n).filter(|_| n != last) {
                x = x.index_add_(0, &batch.visual_rows, features);
            }
        }
        let hidden = batch.in_given_order(self.norm.forward(&x));
        activations.see("text.norm", || hidden.shallow_clone());
        hidden
    }

    /// How far the pairs of a head's numbers turn, each by the position on the axis that it follows.
    fn turns(&self, positions: &Tensor) -> Tensor {
        let positions = positions.transpose(0, 1).to_kind(Kind::Float).index_select(1, &self.axes);
        turns(&(positions * &self.inverse_frequencies))
    }
}

impl TextConfig {
    /// Every tensor of the decoder with its shape.
    pub(super) fn tensors(&self, vocabulary: i64) -> Vec<(String, Vec<i64>)> {
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let [q, kv] = [self.num_attention_heads, self.key_value_heads()].map(|heads| heads * self.head_dim());
        let mut list = vec![
            ("language_model.embed_tokens.weight".to_owned(), vec![vocabulary, d]),
            ("language_model.norm.weight".to_owned(), vec![d]),
        ];
        for n in 0..self.num_hidden_layers {
            let layer = format!("language_model.layers.{n}");
            list.push((format!("{layer}.input_layernorm.weight"), vec![d]));
            list.push((format!("{layer}.post_attention_layernorm.weight"), vec![d]));
            for (part, out) in [("q", q), ("k", kv), ("v", kv)] {
                list.extend(Linear::tensors(
                    &format!("{layer}.self_attn.{part}_proj"),
                    out,
                    d,
                    self.qkv_bias(),
                ));
            }
            list.extend(Linear::tensors(&format!("{layer}.self_attn.o_proj"), d, q, self.output_bias()));
            for part in ["q", "k"].into_iter().filter(|_| self.query_key_norm()) {
                list.push((format!("{layer}.self_attn.{part}_norm.weight"), vec![self.head_dim()]));
            }
            list.extend(Linear::tensors(&format!("{layer}.mlp.gate_proj"), i, d, false));
            list.extend(Linear::tensors(&format!("{layer}.mlp.up_proj"), i, d, false));
            list.extend(Linear::tensors(&format!("{layer}.mlp.down_proj"), d, i, false));
        }
        list
    }
}

/// The reference's `Qwen2_5_VLDecoderLayer`, and with `head_norm` its `Qwen3VLTextDecoderLayer`.
#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    /// Queries, keys and values, stacked.
    qkv: Linear,
    /// Of queries and keys.
    head_norm: Option<HeadNorm>,
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
        let (heads, key_value_heads) = (config.num_attention_heads, config.key_value_heads());
        let norms = [("q", heads), ("k", key_value_heads)];
        let norms = norms.map(|(part, heads)| (format!("{name}.self_attn.{part}_norm"), heads));
        let head_norm = config.query_key_norm().then(|| HeadNorm::load(weights, &norms, config.rms_norm_eps));
        Ok(Self {
            head_norm: head_norm.transpose()?,
            input_norm: RmsNorm::load(weights, &format!("{name}.input_layernorm"), config.rms_norm_eps)?,
            qkv: Linear::load(weights, &[&q, &k, &v], config.qkv_bias())?
                .with_pairs_together(heads + key_value_heads, config.head_dim()),
            output: Linear::load(weights, &[&o], config.output_bias())?,
            post_norm: RmsNorm::load(
                weights,
                &format!("{name}.post_attention_layernorm"),
                config.rms_norm_eps,
            )?,
            mlp: GatedMlp::load(weights, &format!("{name}.mlp"), false)?,
            heads,
            key_value_heads,
            head_dim: config.head_dim(),
        })
    }

    /// `[tokens, width]` to `[tokens, width]`, in the same memory.
    fn forward(&self, x: Tensor, turns: &Tensor, texts: &TextBatch) -> Tensor {
        let heads = self.qkv.forward(&self.input_norm.forward(&x)).unflatten(1, [-1, self.head_dim]);
        // Queries and keys turn together.
        let turned = self.turned(&heads.narrow(1, 0, self.heads + self.key_value_heads), 0, turns);
        let q = turned.narrow(1, 0, self.heads);
        let k = turned.narrow(1, self.heads, self.key_value_heads);
        let v = heads.narrow(1, self.heads + self.key_value_heads, self.key_value_heads);
        self.after_attention(x, &texts.attend(&q, &k, &v))
    }

    /// The same for each text's last token alone: `[texts, width]`, in the order of [`TextBatch::last_rows`].
    fn forward_last(&self, x: &Tensor, turns: &Tensor, texts: &TextBatch) -> Tensor {
        let normed = self.input_norm.forward(x);
        let width = self.heads * self.head_dim;
        let kv = self.qkv.narrow(width, 2 * self.key_value_heads * self.head_dim).forward(&normed);
        let kv = kv.unflatten(1, [2 * self.key_value_heads, self.head_dim]);
        let k = self.turned(&kv.narrow(1, 0, self.key_value_heads), self.heads, turns);
        let v = kv.narrow(1, self.key_value_heads, self.key_value_heads);

        let [x, normed, turns] = [x, &normed, turns].map(|t| texts.last_rows(t));
        let q = self.qkv.narrow(0, width).forward(&normed).unflatten(1, [self.heads, self.head_dim]);
        self.after_attention(x, &texts.attend_last(&self.turned(&q, 0, &turns), &k, &v))
    }

    /// Queries or keys, `[rows, heads, width]`, of the heads from `first` on, normed where the family does, and turned.
    fn turned(&self, x: &Tensor, first: i64, turns: &Tensor) -> Tensor {
        match &self.head_norm {
            Some(norm) => rotate(&norm.narrow(first, x.size()[1]).forward(x), turns),
            None => rotate(x, turns),
        }
    }

    fn after_attention(&self, x: Tensor, attended: &Tensor) -> Tensor {
        let x = self.output.add_to(x, attended);
        let normed = self.post_norm.forward(&x);
        self.mlp.add_to(x, &normed)
    }
}
