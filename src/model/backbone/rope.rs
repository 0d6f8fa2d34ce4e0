//! Positions and windows, as integers: the part of the model that is easiest to get wrong and cheapest to test.

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

/// Time, height and width position of each token, for a picture of `rows` × `columns` visual tokens.
///
/// Text moves all three axes on together. A picture stands still in time, spreads over the other two, and moves
/// what follows on by its longer side. The reference's `Qwen2_5_VLModel.get_rope_index`.
///
/// `None` where the placeholders are not one run of `rows × columns`.
pub fn mrope_positions(
    input_ids: &[u32],
    image_token_id: u32,
    rows: usize,
    columns: usize,
) -> Option<[Vec<i64>; 3]> {
    let start = input_ids.iter().position(|&id| id == image_token_id)?;
    let run = input_ids.iter().skip(start).take_while(|&&id| id == image_token_id).count();
    let all = input_ids.iter().filter(|&&id| id == image_token_id).count();
    if run != rows * columns || all != run {
        return None;
    }
    let text = |from: usize, count: usize| (from..from + count).map(|p| [p as i64; 3]);
    let picture = (0..run).map(|n| [start, start + n / columns, start + n % columns].map(|p| p as i64));
    let after = start + rows.max(columns);
    let all = text(0, start).chain(picture).chain(text(after, input_ids.len() - start - run));
    let mut axes: [Vec<i64>; 3] = Default::default();
    for position in all {
        for (axis, p) in axes.iter_mut().zip(position) {
            axis.push(p);
        }
    }
    Some(axes)
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
        let [t, h, w] = mrope_positions(&ids, 9, 2, 3).unwrap();
        assert_eq!(t, [0, 1, 1, 1, 1, 1, 1, 4, 5]);
        assert_eq!(h, [0, 1, 1, 1, 2, 2, 2, 4, 5]);
        assert_eq!(w, [0, 1, 2, 3, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn placeholders_must_fill_the_grid_in_one_run() {
        assert!(mrope_positions(&[1, 9, 9, 2], 9, 1, 3).is_none());
        assert!(mrope_positions(&[9, 9, 9, 2, 9], 9, 1, 3).is_none());
        assert!(mrope_positions(&[1, 2], 9, 1, 1).is_none());
    }
}
