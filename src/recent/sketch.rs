//! What is kept of a picture: how colourful and how sharp it is, and a small one of it.

use crate::processor::Rgb;

/// The longer side of a small picture.
const SIDE: usize = 96;
/// The most bytes of its pixels.
pub const MOST_THUMBNAIL: usize = SIDE * SIDE * 3;

/// What is known of a picture, without it.
#[derive(Debug)]
pub struct Sketch {
    /// The mean of HSV's saturation, from 0 of a grey picture to 1.
    pub saturation: f32,
    /// The variance of the Laplacian of its luma, in grey levels: the less, the blurrier.
    pub sharpness: f32,
    /// The picture, made small, where it is kept.
    pub thumbnail: Option<Rgb>,
}

impl Sketch {
    /// Of a picture; with a small one, or without.
    pub fn of(picture: &Rgb, with_thumbnail: bool) -> Self {
        Self {
            saturation: saturation(picture),
            sharpness: sharpness(picture),
            thumbnail: with_thumbnail.then(|| thumbnail(picture)),
        }
    }
}

fn saturation(picture: &Rgb) -> f32 {
    let pixels = picture.pixels.as_chunks::<3>().0;
    let of = |&[r, g, b]: &[u8; 3]| {
        let (most, least) = (r.max(g).max(b), r.min(g).min(b));
        if most == 0 { 0.0 } else { f64::from(most - least) / f64::from(most) }
    };
    (pixels.iter().map(of).sum::<f64>() / pixels.len().max(1) as f64) as f32
}

/// Over all pixels that have four neighbours; 0 where none has.
fn sharpness(picture: &Rgb) -> f32 {
    let luma =
        |&[r, g, b]: &[u8; 3]| (299 * i32::from(r) + 587 * i32::from(g) + 114 * i32::from(b) + 500) / 1000;
    let line = |pixels: &[[u8; 3]]| pixels.iter().map(luma).collect::<Vec<_>>();
    let mut lines = picture.pixels.as_chunks::<3>().0.chunks_exact((picture.width as usize).max(1)).map(line);
    let (Some(mut above), Some(mut middle)) = (lines.next(), lines.next()) else { return 0.0 };
    let (mut count, mut sum, mut squares) = (0_i64, 0_i64, 0_i64);
    for below in lines {
        let vertical = above.iter().zip(&below).skip(1);
        for ((up, down), row) in vertical.zip(middle.windows(3)) {
            let &[left, here, right] = row else { continue };
            let laplacian = i64::from(up + down + left + right - 4 * here);
            count += 1;
            sum += laplacian;
            squares += laplacian * laplacian;
        }
        above = std::mem::replace(&mut middle, below);
    }
    if count == 0 {
        return 0.0;
    }
    let mean = sum as f64 / count as f64;
    (squares as f64 / count as f64 - mean * mean) as f32
}

/// Each pixel is the mean of those that it stands for.
fn thumbnail(picture: &Rgb) -> Rgb {
    let (width, height) = (picture.width as usize, picture.height as usize);
    let longer = width.max(height);
    if longer <= SIDE {
        return Rgb { pixels: picture.pixels.to_vec().into(), ..*picture };
    }
    let [columns, rows] = [width, height].map(|side| (side * SIDE / longer).max(1));
    let part = |index: usize, parts: usize, side: usize| index * side / parts..(index + 1) * side / parts;
    let source = picture.pixels.as_chunks::<3>().0;
    let mut pixels = Vec::with_capacity(columns * rows * 3);
    for row in 0..rows {
        for column in 0..columns {
            let (mut sums, mut count) = ([0_u64; 3], 0);
            let across = part(column, columns, width);
            for y in part(row, rows, height) {
                for pixel in source.get(y * width + across.start..y * width + across.end).unwrap_or_default()
                {
                    count += 1;
                    sums.iter_mut().zip(pixel).for_each(|(sum, &value)| *sum += u64::from(value));
                }
            }
            pixels.extend(sums.map(|sum| ((sum + count / 2) / count.max(1)) as u8));
        }
    }
    Rgb { width: columns as u32, height: rows as u32, pixels: pixels.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Rgb {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let pixels: Vec<u8> = pixels.flat_map(|(x, y)| pixel(x, y)).collect();
        Rgb { width, height, pixels: pixels.into() }
    }

    /// The values of Python's `colorsys.rgb_to_hsv`, and of numpy: the variance of the Laplacian of the rounded luma.
    #[test]
    fn saturation_and_sharpness_are_those_of_the_references() {
        let near = |got: f32, wanted: f32| {
            assert!((got - wanted).abs() <= wanted.abs() * 1e-5, "{got}, not {wanted}")
        };
        let noise = picture(7, 5, |x, y| {
            [x * 31 + y * 7, x * x * 11 + y, (x + 3) * (y + 2) * 13].map(|v| (v % 256) as u8)
        });
        let sketch = Sketch::of(&noise, false);
        near(sketch.saturation, 0.698_052_3);
        near(sketch.sharpness, 11_991.582);
        assert!(sketch.thumbnail.is_none());
        let flat = Sketch::of(&picture(9, 9, |_, _| [90; 3]), false);
        assert_eq!((flat.saturation, flat.sharpness), (0.0, 0.0));
        let red = Sketch::of(&picture(3, 3, |_, _| [255, 0, 0]), false);
        assert_eq!((red.saturation, red.sharpness), (1.0, 0.0));
        assert_eq!(Sketch::of(&picture(3, 3, |_, _| [0; 3]), false).saturation, 0.0);
        let board = |x: u32, y: u32| [if (x + y).is_multiple_of(2) { 255 } else { 0 }; 3];
        assert_eq!(Sketch::of(&picture(6, 6, board), false).sharpness, 1020.0 * 1020.0);
        // Nothing in it has four neighbours.
        for (width, height) in [(1, 1), (2, 9), (9, 2), (1, 9)] {
            assert_eq!(Sketch::of(&picture(width, height, board), true).sharpness, 0.0);
        }
    }

    #[test]
    fn a_small_picture_is_the_mean_of_what_it_stands_for() {
        let halves = |x: u32, _| if x < 400 { [200, 10, 30] } else { [x as u8 / 2 * 2, 0, 255] };
        let small = Sketch::of(&picture(800, 300, halves), true).thumbnail.unwrap();
        assert_eq!((small.width, small.height, small.pixels.len()), (96, 36, 96 * 36 * 3));
        assert_eq!(small.pixels[..3], [200, 10, 30]);
        assert_eq!(small.pixels[small.pixels.len() - 1], 255);
        assert!(small.pixels.len() <= MOST_THUMBNAIL);
        let stripes = picture(192, 2, |x, _| [(x % 2) as u8 * 255; 3]);
        let grey = Sketch::of(&stripes, true).thumbnail.unwrap();
        assert_eq!((grey.width, grey.height), (96, 1));
        assert!(grey.pixels.iter().all(|&value| value == 128));
        let tiny = picture(3, 2, |x, y| [x as u8, y as u8, 9]);
        assert_eq!(Sketch::of(&tiny, true).thumbnail.unwrap().pixels, tiny.pixels);
    }
}
