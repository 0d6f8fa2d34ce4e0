//! Attention within sequences of different lengths that lie end to end, without padding.

use tch::{Device, Kind, Tensor};

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
                attention(&q, &k, &v, None, causal).flatten(0, 1).flatten(1, 2)
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
                attention(&queries, &group.rows(&k), &group.rows(&v), None, false).flatten(0, 1).flatten(1, 2)
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

/// `[batch, queries, heads, width]` attends to `[batch, keys, key-value heads, width]`, to those that `mask`
/// `[queries, keys]` lets through.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    let shared = q.size()[2] > k.size()[2];
    let [q, k, v] = [q, k, v].map(|t| t.transpose(1, 2));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, None, shared).transpose(1, 2)
}

/// Rows that go on from other rows: the ends of texts that begin alike.
///
/// They lie behind the rows from which they go on, those of one form together.
#[derive(Debug)]
pub struct Branches {
    /// The first of their rows.
    start: i64,
    groups: Vec<BranchGroup>,
    reads: Vec<ReadGroup>,
    /// The rows that are read, in the order of `reads`.
    last: Tensor,
}

/// Branches of one length on trunks of one length.
#[derive(Debug)]
struct BranchGroup {
    count: i64,
    length: i64,
    /// For each branch the rows of its trunk and its own, `[count × keys]`.
    keys: Tensor,
    /// Which key a branch's row attends to, `[length, keys]`.
    mask: Tensor,
}

/// Texts of one length, of each of which the last row is read.
#[derive(Debug)]
struct ReadGroup {
    count: i64,
    /// For each text its rows, `[count × keys]`.
    keys: Tensor,
}

impl Branches {
    /// `branches` lists for each branch, in the order in which they lie, its number of rows and the rows that it attends
    /// to, its own last; `texts` the rows of each text that is read. Gives them with the order in which
    /// [`Branches::last_rows`] has the texts.
    pub fn new(
        start: i64,
        branches: &[(i64, Vec<i64>)],
        texts: &[Vec<i64>],
        device: Device,
    ) -> (Self, Vec<i64>) {
        let indices = |rows: &[&[i64]]| upload(&Tensor::from_slice(&rows.concat()), device);
        let groups = branches.chunk_by(|a, b| (a.0, a.1.len()) == (b.0, b.1.len())).map(|group| {
            let (length, keys) = (group[0].0, group[0].1.len() as i64);
            let rows: Vec<&[i64]> = group.iter().map(|(_, rows)| rows.as_slice()).collect();
            let mask = Tensor::ones([length, keys], (Kind::Bool, device)).tril(keys - length);
            BranchGroup { count: group.len() as i64, length, keys: indices(&rows), mask }
        });
        let groups = groups.collect();
        let mut order: Vec<i64> = (0..texts.len() as i64).collect();
        order.sort_by_key(|&n| std::cmp::Reverse(texts[n as usize].len()));
        let sorted: Vec<&[i64]> = order.iter().map(|&n| texts[n as usize].as_slice()).collect();
        let last: Vec<i64> = sorted.iter().filter_map(|rows| rows.last().copied()).collect();
        let reads = sorted
            .chunk_by(|a, b| a.len() == b.len())
            .map(|group| ReadGroup { count: group.len() as i64, keys: indices(group) })
            .collect();
        (Self { start, groups, reads, last: upload(&Tensor::from_slice(&last), device) }, order)
    }

    /// Attention of the rows of `trunks` and of the branches, causal, as [`Segments::attend`] gives it.
    pub fn attend(&self, trunks: &Segments, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let [of_q, of_k, of_v] = [q, k, v].map(|t| t.narrow(0, 0, self.start));
        let mut outputs = vec![trunks.attend(&of_q, &of_k, &of_v, true)];
        let mut first = self.start;
        for group in &self.groups {
            let rows = group.count * group.length;
            let q = q.narrow(0, first, rows).unflatten(0, [group.count, group.length]);
            first += rows;
            let [k, v] = [k, v].map(|t| t.index_select(0, &group.keys).unflatten(0, [group.count, -1]));
            outputs.push(attention(&q, &k, &v, Some(&group.mask), false).flatten(0, 1).flatten(1, 2));
        }
        Tensor::cat(&outputs, 0)
    }

    /// As [`Segments::attend_last`], of each text.
    pub fn attend_last(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let mut first = 0;
        let outputs = self.reads.iter().map(|group| {
            let q = q.narrow(0, first, group.count).unsqueeze(1);
            first += group.count;
            let [k, v] = [k, v].map(|t| t.index_select(0, &group.keys).unflatten(0, [group.count, -1]));
            attention(&q, &k, &v, None, false).flatten(0, 1).flatten(1, 2)
        });
        one_or_cat(outputs.collect())
    }

    /// As [`Segments::last_rows`], of each text.
    pub fn last_rows(&self, rows: &Tensor) -> Tensor {
        rows.index_select(0, &self.last)
    }
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
