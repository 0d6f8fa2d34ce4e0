//! Attention within sequences of different lengths that lie end to end, without padding and without a mask.

use tch::{Device, Tensor};

use crate::model::layers::upload;

/// Which rows of a `[rows, …]` tensor attend to one another.
///
/// Segments of one length are computed together, so a batch costs one attention call for each length in it.
#[derive(Debug)]
pub struct Segments {
    groups: Vec<Group>,
    /// The permutation of rows by which segments of one length lie together, and its inverse. `None` where they
    /// already do.
    order: Option<(Tensor, Tensor)>,
    /// For each segment, in the groups' order, its last row.
    last: Tensor,
}

#[derive(Debug, PartialEq)]
struct Group {
    start: i64,
    count: i64,
    length: i64,
}

impl Segments {
    /// `segments[s]` lists the rows of segment `s`, in its order. Together they name each row once.
    pub fn new(segments: &[Vec<i64>], device: Device) -> Self {
        let mut by_length: Vec<usize> = (0..segments.len()).collect();
        by_length.sort_by_key(|&s| std::cmp::Reverse(segments[s].len()));

        let (mut groups, mut order, mut last): (Vec<Group>, Vec<i64>, Vec<i64>) = Default::default();
        for &s in &by_length {
            let length = segments[s].len() as i64;
            match groups.last_mut() {
                Some(group) if group.length == length => group.count += 1,
                _ => groups.push(Group { start: order.len() as i64, count: 1, length }),
            }
            order.extend(&segments[s]);
            last.extend(segments[s].last());
        }
        let last = upload(&Tensor::from_slice(&last), device);
        Self { groups, order: permutation(&order, device), last }
    }

    /// Attention of each row to the rows of its segment; `causal`: to those that do not stand behind it.
    ///
    /// `q` is `[rows, heads, width]`; `k` and `v` are `[rows, key-value heads, width]`. Returns
    /// `[rows, heads × width]`.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
        let [q, k, v] = [q, k, v].map(|t| self.grouped(t));
        let outputs: Vec<Tensor> = self
            .groups
            .iter()
            .map(|group| {
                let [q, k, v] = [&q, &k, &v].map(|t| group.rows(t));
                attention(&q, &k, &v, causal).flatten(0, 1).flatten(1, 2)
            })
            .collect();
        let output = one_or_cat(outputs);
        match &self.order {
            Some((_, inverse)) => output.index_select(0, inverse),
            None => output,
        }
    }

    /// Attention of each segment's last row to its whole segment.
    ///
    /// `q` is `[segments, heads, width]`, as [`Segments::last_rows`] picks them. Returns
    /// `[segments, heads × width]`.
    pub fn attend_last(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let [k, v] = [k, v].map(|t| self.grouped(t));
        let mut first = 0;
        let outputs = self
            .groups
            .iter()
            .map(|group| {
                let queries = q.narrow(0, first, group.count).unsqueeze(1);
                first += group.count;
                attention(&queries, &group.rows(&k), &group.rows(&v), false).flatten(0, 1).flatten(1, 2)
            })
            .collect();
        one_or_cat(outputs)
    }

    /// The last row of each segment, `[segments, …]`, in the order in which [`Segments::attend_last`] works.
    pub fn last_rows(&self, rows: &Tensor) -> Tensor {
        rows.index_select(0, &self.last)
    }

    fn grouped(&self, rows: &Tensor) -> Tensor {
        match &self.order {
            Some((order, _)) => rows.index_select(0, order),
            None => rows.shallow_clone(),
        }
    }
}

impl Group {
    /// `[count, length, heads, width]` of this group's rows.
    fn rows(&self, t: &Tensor) -> Tensor {
        t.narrow(0, self.start, self.count * self.length).unflatten(0, [self.count, self.length])
    }
}

/// `[batch, queries, heads, width]` attends to `[batch, keys, key-value heads, width]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    let shared = q.size()[2] > k.size()[2];
    let [q, k, v] = [q, k, v].map(|t| t.transpose(1, 2));
    Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, causal, None, shared)
        .transpose(1, 2)
}

fn one_or_cat(mut parts: Vec<Tensor>) -> Tensor {
    match (parts.len(), parts.pop()) {
        (1, Some(only)) => only,
        (_, Some(last)) => {
            parts.push(last);
            Tensor::cat(&parts, 0)
        }
        (_, None) => Tensor::cat(&parts, 0),
    }
}

/// A permutation and its inverse; `None` for the identity.
pub(super) fn permutation(order: &[i64], device: Device) -> Option<(Tensor, Tensor)> {
    if order.iter().zip(0..).all(|(&a, b)| a == b) {
        return None;
    }
    let mut inverse = vec![0; order.len()];
    for (place, &row) in (0..).zip(order) {
        inverse[row as usize] = place;
    }
    Some((upload(&Tensor::from_slice(order), device), upload(&Tensor::from_slice(&inverse), device)))
}
