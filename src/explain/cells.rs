//! Pictures with a part of them covered.

use std::ops::Range;

use crate::processor::Rgb;

/// Rows and columns that a picture is divided into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// From the top.
    pub rows: usize,
    /// From the left.
    pub columns: usize,
}

/// One part of a divided picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Counted from 0 at the top.
    pub row: usize,
    /// Counted from 0 at the left.
    pub column: usize,
}

impl Grid {
    /// At most `most` cells of a picture, as near to squares as they come, none without a pixel.
    pub fn of(picture: &Rgb, most: usize) -> Self {
        let (width, height) = (picture.width as usize, picture.height as usize);
        let ratio = |rows: usize, columns: usize| {
            let sides = (width * rows) as f64 / (height * columns).max(1) as f64;
            sides.max(1.0 / sides)
        };
        let fitting = (1..=most.min(height)).map(|rows| {
            let columns =
                (1..=(most / rows).min(width)).min_by(|&a, &b| ratio(rows, a).total_cmp(&ratio(rows, b)));
            Self { rows, columns: columns.unwrap_or_default() }
        });
        // Of those that are about as near to squares, the finest.
        let grids: Vec<Self> = fitting.filter(|grid| grid.columns > 0).collect();
        let square = |grid: &Self| ratio(grid.rows, grid.columns);
        let best = grids.iter().map(square).fold(f64::INFINITY, f64::min);
        let near = grids.into_iter().filter(|grid| square(grid) <= best * 1.3);
        near.max_by_key(|grid| grid.rows * grid.columns).unwrap_or(Self { rows: 0, columns: 0 })
    }

    /// How many cells on either side of a cell are covered with it: together about a third of the shorter side. Of a thing that
    /// shows in part a model makes out the whole, and a cell by itself would cost nothing.
    pub fn reach(self) -> usize {
        self.rows.min(self.columns) / 6
    }

    /// All of its cells, row by row.
    pub fn cells(self) -> impl Iterator<Item = Cell> {
        (0..self.rows).flat_map(move |row| (0..self.columns).map(move |column| Cell { row, column }))
    }
}

/// The pixels of one of so many parts of a side.
fn part(index: usize, parts: usize, side: u32) -> Range<usize> {
    let side = side as usize;
    index * side / parts.max(1)..(index + 1) * side / parts.max(1)
}

/// The pixels of a part of a side and of so many on either side of it.
fn block(index: usize, reach: usize, parts: usize, side: u32) -> Range<usize> {
    let last = (index + reach).min(parts.saturating_sub(1));
    part(index.saturating_sub(reach), parts, side).start..part(last, parts, side).end
}

/// The mean of each channel, rounded.
pub(super) fn mean_colour(picture: &Rgb) -> [u8; 3] {
    let pixels = picture.pixels.as_chunks::<3>().0;
    let count = (pixels.len() as u64).max(1);
    [0, 1, 2].map(|channel| {
        let sum: u64 = pixels.iter().map(|pixel| u64::from(pixel[channel])).sum();
        u8::try_from((sum + count / 2) / count).unwrap_or(u8::MAX)
    })
}

/// The picture with a cell, and those in reach of it, of one colour.
pub(super) fn covered(picture: &Rgb, grid: Grid, cell: Cell, colour: [u8; 3]) -> Rgb {
    let mut pixels = picture.pixels.to_vec();
    let reach = grid.reach();
    let columns = block(cell.column, reach, grid.columns, picture.width);
    let width = picture.width as usize;
    for row in block(cell.row, reach, grid.rows, picture.height) {
        let line = 3 * (row * width + columns.start)..3 * (row * width + columns.end);
        pixels[line].as_chunks_mut::<3>().0.fill(colour);
    }
    Rgb { pixels: pixels.into(), ..*picture }
}

/// The picture, left and right changed over.
pub(super) fn mirrored(picture: &Rgb) -> Rgb {
    let mut pixels = picture.pixels.to_vec();
    for line in pixels.chunks_exact_mut(3 * (picture.width as usize).max(1)) {
        line.as_chunks_mut::<3>().0.reverse();
    }
    Rgb { pixels: pixels.into(), ..*picture }
}

/// The picture, grey, with what covering each cell costs over it: red where the score falls, blue where it rises, the
/// stronger the more of the largest. A cell without a number stays grey.
pub fn heat_map(picture: &Rgb, grid: Grid, costs: &[Option<f64>]) -> Rgb {
    let largest = costs.iter().flatten().fold(0.0, |most: f64, cost| most.max(cost.abs()));
    let mut pixels = picture.pixels.to_vec();
    let width = picture.width as usize;
    for (cell, cost) in grid.cells().zip(costs) {
        let share = cost.filter(|_| largest > 0.0).map_or(0.0, |cost| cost / largest);
        let over = if share > 0.0 { [215.0, 48.0, 31.0] } else { [33.0, 102.0, 172.0] };
        let columns = part(cell.column, grid.columns, picture.width);
        for row in part(cell.row, grid.rows, picture.height) {
            let line = 3 * (row * width + columns.start)..3 * (row * width + columns.end);
            for pixel in pixels[line].as_chunks_mut::<3>().0 {
                let [r, g, b] = pixel.map(f64::from);
                let grey = 0.299 * r + 0.587 * g + 0.114 * b;
                let alpha = 0.75 * share.abs();
                *pixel = over.map(|over: f64| (grey * (1.0 - alpha) + over * alpha).round() as u8);
            }
        }
    }
    Rgb { pixels: pixels.into(), ..*picture }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32) -> Rgb {
        let pixels: Vec<u8> = (0..3 * width * height).map(|n| (n * 7919 % 251) as u8).collect();
        Rgb { width, height, pixels: pixels.into() }
    }

    #[test]
    fn cells_are_near_to_squares_and_no_more_than_asked_for() {
        for ((width, height), most, (rows, columns)) in [
            ((512, 512), 64, (8, 8)),
            ((512, 512), 70, (8, 8)),
            ((800, 400), 50, (5, 10)),
            ((400, 800), 50, (10, 5)),
            ((1000, 10), 64, (1, 64)),
            ((512, 512), 1, (1, 1)),
            ((512, 512), 0, (0, 0)),
            ((2, 1), 64, (1, 2)),
        ] {
            let grid = Grid::of(&picture(width, height), most);
            assert_eq!(grid, Grid { rows, columns }, "{width} x {height} in {most}");
        }
        for most in 1..300 {
            let grid = Grid::of(&picture(300, 170), most);
            assert!((1..=most).contains(&(grid.rows * grid.columns)), "{most}: {grid:?}");
        }
    }

    /// Every pixel is of one cell, whatever the sides, and is covered with that cell and those in reach of it, and no other.
    #[test]
    fn a_cell_is_covered_with_those_around_it() {
        let sizes =
            [(7, 5, 3, 2, 0), (8, 8, 8, 8, 1), (64, 30, 7, 9, 1), (64, 30, 5, 16, 0), (50, 60, 13, 12, 2)];
        for (width, height, rows, columns, reach) in sizes {
            let (plain, grid) = (picture(width, height), Grid { rows, columns });
            assert_eq!(grid.reach(), reach, "{grid:?}");
            let of = |pixel: usize, parts, side| {
                let mut found = (0..parts).filter(|&index| part(index, parts, side).contains(&pixel));
                let index = found.next().unwrap();
                assert_eq!(found.next(), None);
                index
            };
            for cell in grid.cells() {
                let covered = covered(&plain, grid, cell, [255, 254, 253]);
                let pixels = covered.pixels.as_chunks::<3>().0.iter().zip(plain.pixels.as_chunks::<3>().0);
                for (index, (now, before)) in pixels.enumerate() {
                    let (y, x) = (index / width as usize, index % width as usize);
                    let near = of(y, rows, height).abs_diff(cell.row) <= reach
                        && of(x, columns, width).abs_diff(cell.column) <= reach;
                    assert_eq!(
                        now,
                        if near { &[255, 254, 253] } else { before },
                        "{grid:?} {cell:?} {x} {y}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_mirrored_picture_mirrored_again_is_itself_and_the_mean_is_the_mean() {
        let plain = picture(7, 5);
        let turned = mirrored(&plain);
        assert_ne!(turned.pixels, plain.pixels);
        assert_eq!(turned.pixels[..3], plain.pixels[18..21]);
        assert_eq!(mirrored(&turned).pixels, plain.pixels);
        let two = Rgb { width: 2, height: 1, pixels: vec![0, 10, 255, 1, 20, 255].into() };
        assert_eq!(mean_colour(&two), [1, 15, 255]);
    }

    #[test]
    fn a_map_is_red_where_covering_costs_and_blue_where_it_helps() {
        let grey = Rgb { width: 4, height: 1, pixels: vec![100; 12].into() };
        let map = heat_map(&grey, Grid { rows: 1, columns: 4 }, &[Some(2.0), Some(-1.0), None, Some(0.0)]);
        let [red, blue, none, zero] = map.pixels.as_chunks::<3>().0 else { panic!() };
        assert!(red[0] > red[2] && blue[2] > blue[0], "{map:?}");
        assert!(red[0] - red[2] > blue[2] - blue[0]);
        assert_eq!((none, zero), (&[100; 3], &[100; 3]));
    }
}
