//! Positions and windows, as integers: the part of the model that is easiest to get wrong and cheapest to test.

use tch::{Device, Kind, Tensor};

/// `1 / theta^(2i / width)` for each pair of a head's `width` numbers: how far it turns per position.
pub fn inverse_frequencies(width: i64, theta: f64, device: Device) -> Tensor {
    let exponents = Tensor::arange_start_step(0, width, 2, (Kind::Float, Device::Cpu)) / width as f64;
    Tensor::from(theta as f32).pow(&exponents).reciprocal().to_device(device)
}

/// Row and column of each patch, in the order in which the processor cuts them: by merge block, blocks row by row.
///
/// The reference's `get_vision_position_ids`.
pub fn vision_positions(rows: usize, columns: usize, merge: usize) -> Vec<[i64; 2]> {
    let mut positions = Vec::with_capacity(rows * columns);
    for block_row in (0..rows).step_by(merge) {
        for block_column in (0..columns).step_by(merge) {
            for row in block_row..block_row + merge {
                for column in block_column..block_column + merge {
                    positions.push([row as i64, column as i64]);
                }
            }
        }
    }
    positions
}

/// The visual tokens of each attention window of a picture of `rows` × `columns` visual tokens. Windows at the
/// right and lower border are smaller.
///
/// The reference's `get_vision_window_index`.
pub fn windows(rows: usize, columns: usize, side: usize) -> Vec<Vec<usize>> {
    let mut windows = Vec::new();
    for top in (0..rows).step_by(side) {
        for left in (0..columns).step_by(side) {
            let in_row =
                |row: usize| (left..(left + side).min(columns)).map(move |column| row * columns + column);
            windows.push((top..(top + side).min(rows)).flat_map(in_row).collect());
        }
    }
    windows
}

/// The two places of a square of `side` learnt positions between which row (or column) `index` of `size` falls where
/// the square is stretched over a picture, corners on corners, and how much each counts.
///
/// The reference's `_interpolation_axis_taps_weights`, in its single precision.
pub fn grid_taps(index: usize, size: usize, side: i64) -> [(i64, f32); 2] {
    let place = index as f32 * (side - 1) as f32 / size.saturating_sub(1).max(1) as f32;
    let floor = place.floor();
    let tap = |offset: i64| {
        let weight = (1.0 - (place - floor - offset as f32).abs()).max(0.0);
        ((floor as i64 + offset).clamp(0, side - 1), weight)
    };
    [tap(0), tap(1)]
}

/// Time, height and width position of each token, for pictures of `rows` × `columns` visual tokens in the order of
/// their placeholders.
///
/// Text moves all three axes on together. A picture stands still in time, spreads over the other two, and moves
/// what follows on by its longer side. The reference's `get_rope_index`, the same in all families.
///
/// `None` where the placeholders are not one run of `rows × columns` for each picture.
pub fn mrope_positions(
    input_ids: &[u32],
    image_token_id: u32,
    pictures: &[(usize, usize)],
) -> Option<[Vec<i64>; 3]> {
    let mut axes: [Vec<i64>; 3] = Default::default();
    let mut pictures = pictures.iter();
    let mut start = 0;
    for run in input_ids.chunk_by(|&a, &b| (a == image_token_id) == (b == image_token_id)) {
        let picture = if run.first() == Some(&image_token_id) {
            Some(*pictures.next().filter(|(rows, columns)| rows * columns == run.len())?)
        } else {
            None
        };
        for n in 0..run.len() {
            let position = match picture {
                Some((_, columns)) => [start, start + n / columns, start + n % columns],
                None => [start + n; 3],
            };
            for (axis, p) in axes.iter_mut().zip(position) {
                axis.push(p as i64);
            }
        }
        start += picture.map_or(run.len(), |(rows, columns)| rows.max(columns));
    }
    pictures.next().is_none().then_some(axes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_numbered_by_merge_block() {
        let positions = vision_positions(2, 4, 2);
        assert_eq!(positions, [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]);
    }

    #[test]
    fn border_windows_are_smaller() {
        let lengths: Vec<usize> = windows(5, 6, 4).iter().map(Vec::len).collect();
        assert_eq!(lengths, [16, 8, 4, 2]);
        assert_eq!(windows(5, 6, 4)[1], [4, 5, 10, 11, 16, 17, 22, 23]);
    }

    #[test]
    fn a_picture_moves_the_text_on_by_its_longer_side() {
        let ids = [7, 9, 9, 9, 9, 9, 9, 5, 6];
        let [t, h, w] = mrope_positions(&ids, 9, &[(2, 3)]).unwrap();
        assert_eq!(t, [0, 1, 1, 1, 1, 1, 1, 4, 5]);
        assert_eq!(h, [0, 1, 1, 1, 2, 2, 2, 4, 5]);
        assert_eq!(w, [0, 1, 2, 3, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn pictures_stand_one_behind_the_other() {
        let ids = [9, 9, 9, 7, 9, 9, 5];
        let [t, h, w] = mrope_positions(&ids, 9, &[(3, 1), (1, 2)]).unwrap();
        assert_eq!(t, [0, 0, 0, 3, 4, 4, 6]);
        assert_eq!(h, [0, 1, 2, 3, 4, 4, 6]);
        assert_eq!(w, [0, 0, 0, 3, 4, 5, 6]);
    }

    #[test]
    fn placeholders_must_fill_each_grid_in_one_run() {
        assert!(mrope_positions(&[1, 9, 9, 2], 9, &[(1, 3)]).is_none());
        assert!(mrope_positions(&[9, 9, 9, 2, 9], 9, &[(1, 3)]).is_none());
        assert!(mrope_positions(&[1, 2], 9, &[(1, 1)]).is_none());
        assert!(mrope_positions(&[9, 9, 1, 9], 9, &[(1, 1), (1, 2)]).is_none());
        assert!(mrope_positions(&[9, 9], 9, &[(1, 1), (1, 1)]).is_none());
    }

    #[test]
    fn a_square_is_stretched_corner_on_corner() {
        assert_eq!([0, 1, 2].map(|row| grid_taps(row, 3, 5)[0]), [(0, 1.0), (2, 1.0), (4, 1.0)]);
        assert_eq!(grid_taps(1, 5, 3), [(0, 0.5), (1, 0.5)]);
        assert_eq!(grid_taps(0, 1, 5)[0], (0, 1.0));
        // At the border there is no further place, and it would count nothing.
        assert_eq!(grid_taps(2, 3, 5)[1], (4, 0.0));
    }
}
