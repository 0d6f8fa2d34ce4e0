//! What a forward costs in floating-point operations.

use super::config::Config;
use super::rope::windows;

/// The floating-point operations of one sample's forward: of matrix products alone, a multiplication and an addition
/// each counted as one.
///
/// `pictures` are the rows and columns of patches of each, `tokens` all tokens of the sample. Counted is what the answer
/// needs, not what a plainer program would do: attention over the pairs that see one another (causal in the decoder,
/// within windows where the vision tower has them), the last layer's keys and values for every token and the rest of
/// it for one, no logits. For linear layers with `in` inputs and `out` outputs that is `2 · rows · in · out`, for
/// attention `2 · pairs · width` for the products of queries and keys and as much again for those with the values:
///
/// - patches `n`, width `d`, MLP `i` of `f` matrices: `2n·d·patch_bytes` once; in each block
///   `2n·(4d² + fdi) + 4·pairs·d`;
/// - each merger: `n / unit` rows through `(unit·d)²` and `unit·d·out`;
/// - tokens `t`, width `h`, MLP `m`, queries `q` wide, keys and values `k` wide each: in each layer but the last
///   `2t·(2hq + 2hk + 3hm) + 4·q·t(t+1)/2`, in the last `2t·2hk + 2·(2hq + 3hm) + 4·q·t`.
pub fn forward_flops(config: &Config, pictures: &[(usize, usize)], tokens: usize) -> f64 {
    let vision: f64 = pictures.iter().map(|&(rows, columns)| vision_flops(config, rows, columns)).sum();
    let t = &config.text;
    let (n, h, m) = (tokens as f64, t.hidden_size as f64, t.intermediate_size as f64);
    let [q, kv] = [t.num_attention_heads, t.key_value_heads()].map(|heads| (heads * t.head_dim()) as f64);
    let one_row = 2.0 * h * q + 3.0 * h * m;
    let layer = 2.0 * n * (one_row + 2.0 * h * kv) + 4.0 * q * n * (n + 1.0) / 2.0;
    let last = 2.0 * n * 2.0 * h * kv + 2.0 * one_row + 4.0 * q * n;
    vision + layer * t.num_hidden_layers.saturating_sub(1) as f64 + last
}

fn vision_flops(config: &Config, rows: usize, columns: usize) -> f64 {
    let v = &config.vision;
    let merge = v.spatial_merge_size as usize;
    let patches = (rows * columns) as f64;
    let (d, i) = (v.hidden_size as f64, v.intermediate_size as f64);
    let in_windows: usize = windows(rows / merge, columns / merge, v.window_tokens().max(1))
        .iter()
        .map(|window| (window.len() * v.merge_unit()).pow(2))
        .sum();
    let blocks: f64 = (0..v.depth)
        .map(|n| {
            let pairs = if v.attends_to_all(n) { patches * patches } else { in_windows as f64 };
            2.0 * patches * (4.0 * d * d + v.mlp_matrices() as f64 * d * i) + 4.0 * pairs * d
        })
        .sum();
    let unit = v.merge_unit() as f64;
    let merged = unit * d;
    let merger = 2.0 * patches / unit * (merged * merged + merged * v.out_hidden_size as f64);
    2.0 * patches * d * v.patch_bytes() as f64 + blocks + merger * v.mergers() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::backbone::Shape;

    /// Counted by hand for a picture of 8 × 12 patches, which has one whole window and one of half the width.
    #[test]
    fn a_small_forward_costs_what_counting_by_hand_gives() {
        let (config, _) = Shape::Tiny.config().unwrap();
        let (patches, tokens) = (96.0, 30.0);
        let embed = 2.0 * patches * 588.0 * 64.0;
        let projections = 2.0 * patches * (64.0 * 192.0 + 64.0 * 64.0 + 2.0 * 64.0 * 128.0 + 128.0 * 64.0);
        let windowed = 2.0 * 2.0 * 64.0 * (64.0 * 64.0 + 32.0 * 32.0);
        let whole = 2.0 * 2.0 * 64.0 * 96.0 * 96.0;
        let merger = 2.0 * 24.0 * (256.0 * 256.0 + 256.0 * 64.0);
        let first = 2.0 * tokens * (64.0 * 64.0 + 2.0 * 64.0 * 32.0 + 64.0 * 64.0 + 3.0 * 64.0 * 128.0)
            + 2.0 * 2.0 * 64.0 * 465.0;
        let last = 2.0 * tokens * 2.0 * 64.0 * 32.0
            + 2.0 * (2.0 * 64.0 * 64.0 + 3.0 * 64.0 * 128.0)
            + 4.0 * 64.0 * tokens;
        let by_hand = embed + 2.0 * projections + windowed + whole + merger + first + last;
        assert_eq!(forward_flops(&config, &[(8, 12)], 30), by_hand);
    }

    #[test]
    fn a_large_model_costs_about_two_operations_for_each_parameter_and_token() {
        let (config, _) = Shape::Qwen25Vl7b.config().unwrap();
        // 448 × 448: 1024 patches through 0.67 G parameters, 256 + 100 tokens through 6.5 G.
        let flops = forward_flops(&config, &[(32, 32)], 356);
        let rough = 2.0 * (1024.0 * 0.63e9 + 356.0 * 6.53e9 * 27.0 / 28.0);
        assert!((flops / rough - 1.0).abs() < 0.1, "{flops:e} against {rough:e}");
    }
}
