//! Attention within sequences of different lengths that lie end to end, without padding.

use tch::{Device, Kind, Tensor};

use crate::model::layers::upload;
use crate::model::libtorch_shim::{flash_attention, has_flash_attention};

/// Which rows of a `[rows, …]` tensor attend to one another.
///
/// On a GPU all are computed in one call. Elsewhere segments of one length are, so a batch costs one attention call for
/// each length in it.
#[derive(Debug)]
pub struct Segments {
    groups: Vec<Group>,
    /// The permutation of rows by which segments of one length lie together, and its inverse. `None` where they
    /// already do.
    order: Option<(Tensor, Tensor)>,
    /// For each segment, in the groups' order, its last row.
    last: Tensor,
    /// On a GPU: of queries and keys that are the segments' rows, and of queries that are the segments' last.
    ends: Option<[Ends; 2]>,
}

/// Where sequences of queries that lie end to end are to be cut, and those of their keys: what flash attention takes.
#[derive(Debug)]
struct Ends {
    /// Of queries and of keys, `[sequences + 1]`, from 0 on.
    at: [Tensor; 2],
    longest: [i64; 2],
}

impl Ends {
    /// Of sequences of so many queries and keys each.
    fn new(lengths: &[[i64; 2]], device: Device) -> Self {
        let ends = |of: usize| {
            let mut ends = vec![0i32];
            for length in lengths {
                ends.push(ends[ends.len() - 1] + length[of] as i32);
            }
            upload(&Tensor::from_slice(&ends), device)
        };
        let longest = |of: usize| lengths.iter().map(|length| length[of]).max().unwrap_or_default();
        Self { at: [ends(0), ends(1)], longest: [longest(0), longest(1)] }
    }

    /// `q` is `[rows, heads, width]`. `causal` aligns the last query with the last key. `[rows, heads × width]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
        flash_attention([q, k, v], self.at.each_ref(), self.longest, causal).flatten(1, 2)
    }
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
        let ends = device.is_cuda().then(|| {
            let lengths = || by_length.iter().map(|&s| segments[s].len() as i64);
            let all: Vec<_> = lengths().map(|length| [length, length]).collect();
            let last: Vec<_> = lengths().map(|length| [1, length]).collect();
            [all, last].map(|lengths| Ends::new(&lengths, device))
        });
        Self { groups, order: permutation(&order, device), last, ends }
    }

    /// Attention of each row to the rows of its segment; `causal`: to those that do not stand behind it.
    ///
    /// `q` is `[rows, heads, width]`; `k` and `v` are `[rows, key-value heads, width]`. Returns
    /// `[rows, heads × width]`.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
        let [q, k, v] = [q, k, v].map(|t| self.grouped(t));
        let of_group = |group: &Group| {
            let [q, k, v] = [&q, &k, &v].map(|t| group.rows(t));
            attention(&q, &k, &v, None, causal).flatten(0, 1).flatten(1, 2)
        };
        let output = match &self.ends {
            Some([all, _]) if has_flash_attention(&q) => all.attend(&q, &k, &v, causal),
            _ => one_or_cat(self.groups.iter().map(of_group).collect()),
        };
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
        if let Some([_, last]) = self.ends.as_ref().filter(|_| has_flash_attention(q)) {
            return last.attend(q, &k, &v, false);
        }
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
    /// On a GPU.
    ends: Option<Ends>,
}

/// Texts of one length, of each of which the last row is read.
#[derive(Debug)]
struct ReadGroup {
    count: i64,
    /// For each text its rows, `[count × keys]`.
    keys: Tensor,
    /// On a GPU.
    ends: Option<Ends>,
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
        let ends = |count: usize, lengths: [i64; 2]| {
            device.is_cuda().then(|| Ends::new(&vec![lengths; count], device))
        };
        let groups = branches.chunk_by(|a, b| (a.0, a.1.len()) == (b.0, b.1.len())).map(|group| {
            let (length, keys) = (group[0].0, group[0].1.len() as i64);
            let rows: Vec<&[i64]> = group.iter().map(|(_, rows)| rows.as_slice()).collect();
            let mask = Tensor::ones([length, keys], (Kind::Bool, device)).tril(keys - length);
            let ends = ends(group.len(), [length, keys]);
            BranchGroup { count: group.len() as i64, length, keys: indices(&rows), mask, ends }
        });
        let groups = groups.collect();
        let mut order: Vec<i64> = (0..texts.len() as i64).collect();
        order.sort_by_key(|&n| std::cmp::Reverse(texts[n as usize].len()));
        let sorted: Vec<&[i64]> = order.iter().map(|&n| texts[n as usize].as_slice()).collect();
        let last: Vec<i64> = sorted.iter().filter_map(|rows| rows.last().copied()).collect();
        let reads = sorted
            .chunk_by(|a, b| a.len() == b.len())
            .map(|group| {
                let ends = ends(group.len(), [1, group[0].len() as i64]);
                ReadGroup { count: group.len() as i64, keys: indices(group), ends }
            })
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
            let q = q.narrow(0, first, rows);
            first += rows;
            let [k, v] = [k, v].map(|t| t.index_select(0, &group.keys));
            if let Some(ends) = group.ends.as_ref().filter(|_| has_flash_attention(&q)) {
                outputs.push(ends.attend(&q, &k, &v, true));
                continue;
            }
            let q = q.unflatten(0, [group.count, group.length]);
            let [k, v] = [k, v].map(|t| t.unflatten(0, [group.count, -1]));
            outputs.push(attention(&q, &k, &v, Some(&group.mask), false).flatten(0, 1).flatten(1, 2));
        }
        Tensor::cat(&outputs, 0)
    }

    /// As [`Segments::attend_last`], of each text.
    pub fn attend_last(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let mut first = 0;
        let outputs = self.reads.iter().map(|group| {
            let q = q.narrow(0, first, group.count);
            first += group.count;
            let [k, v] = [k, v].map(|t| t.index_select(0, &group.keys));
            if let Some(ends) = group.ends.as_ref().filter(|_| has_flash_attention(&q)) {
                return ends.attend(&q, &k, &v, false);
            }
            let [k, v] = [k, v].map(|t| t.unflatten(0, [group.count, -1]));
            attention(&q.unsqueeze(1), &k, &v, None, false).flatten(0, 1).flatten(1, 2)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What flash attention is told, by plain arithmetic.
    fn by_ends(ends: &Ends, [q, k, v]: [&Tensor; 3], causal: bool) -> Tensor {
        let [queries, keys] = ends.at.each_ref().map(|at| Vec::<i32>::try_from(at).unwrap());
        let parts: Vec<Tensor> = queries
            .windows(2)
            .zip(keys.windows(2))
            .map(|(of_q, of_k)| {
                let [rows, keys] = [of_q, of_k].map(|at| i64::from(at[1] - at[0]));
                assert!(rows <= ends.longest[0] && keys <= ends.longest[1]);
                let q = q.narrow(0, of_q[0].into(), rows).transpose(0, 1);
                let [k, v] = [k, v].map(|t| {
                    let t = t.narrow(0, of_k[0].into(), keys).transpose(0, 1);
                    t.repeat_interleave_self_int(q.size()[0] / t.size()[0], 0, None)
                });
                let mut weights = q.matmul(&k.transpose(1, 2)) / (q.size()[2] as f64).sqrt();
                if causal {
                    let seen = Tensor::ones([rows, keys], (Kind::Bool, Device::Cpu)).tril(keys - rows);
                    weights = weights.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
                }
                weights.softmax(-1, Kind::Float).matmul(&v).transpose(0, 1).flatten(1, 2)
            })
            .collect();
        Tensor::cat(&parts, 0)
    }

    fn heads(rows: i64, heads: i64) -> Tensor {
        Tensor::randn([rows, heads, 8], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn all_at_once_is_group_by_group() {
        let segments = Segments::new(&[vec![0, 1], vec![2, 3, 4, 5, 6], vec![7, 8]], Device::Cpu);
        let (q, k, v) = (heads(9, 4), heads(9, 2), heads(9, 2));
        // The groups' order: longest first.
        let all = Ends::new(&[[5, 5], [2, 2], [2, 2]], Device::Cpu);
        let last = Ends::new(&[[1, 5], [1, 2], [1, 2]], Device::Cpu);
        let [gq, gk, gv] = [&q, &k, &v].map(|t| segments.grouped(t));
        for causal in [false, true] {
            let expected = segments.grouped(&segments.attend(&q, &k, &v, causal));
            assert!(by_ends(&all, [&gq, &gk, &gv], causal).allclose(&expected, 1e-5, 1e-5, false));
        }
        let q = segments.last_rows(&q);
        let expected = segments.attend_last(&q, &k, &v);
        assert!(by_ends(&last, [&q, &gk, &gv], false).allclose(&expected, 1e-5, 1e-5, false));
    }

    /// The last of a branch's rows sees all its keys, and each one before it one less.
    #[test]
    fn a_branch_sees_its_trunk_and_its_own_rows_before_it() {
        let trunk = Segments::new(&[vec![0, 1, 2]], Device::Cpu);
        let texts = [vec![0, 1, 2, 3, 4], vec![0, 1, 2, 5, 6]];
        let laid = texts.clone().map(|text| (2, text));
        let (branches, _) = Branches::new(3, &laid, &texts, Device::Cpu);
        let (q, k, v) = (heads(7, 4), heads(7, 2), heads(7, 2));
        let rows = Tensor::from_slice(&texts.concat());
        let [own_k, own_v] = [&k, &v].map(|t| t.index_select(0, &rows));
        let expected = branches.attend(&trunk, &q, &k, &v).narrow(0, 3, 4);
        let ends = Ends::new(&[[2, 5]; 2], Device::Cpu);
        let got = by_ends(&ends, [&q.narrow(0, 3, 4), &own_k, &own_v], true);
        assert!(got.allclose(&expected, 1e-5, 1e-5, false));
        let last = branches.last_rows(&q);
        let expected = branches.attend_last(&last, &k, &v);
        let got = by_ends(&Ends::new(&[[1, 5]; 2], Device::Cpu), [&last, &own_k, &own_v], false);
        assert!(got.allclose(&expected, 1e-5, 1e-5, false));
    }
}
