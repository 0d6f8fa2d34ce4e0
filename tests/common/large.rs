//! Pictures of any size in few bytes: what they hold is zeros, whose codes are as short as a format can have them.

use std::io::Write;

/// A JPEG of so many colours. `chroma_halved` says that the first colour has twice the samples of the others each way.
pub fn jpeg(width: u16, height: u16, colours: u8, progressive: bool, chroma_halved: bool) -> Vec<u8> {
    let segment = |marker: u8, content: &[u8]| {
        let length = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
        [&[0xff, marker], &length[..], content].concat()
    };
    let sampling = |colour: u8| if chroma_halved && colour == 0 { 0x22 } else { 0x11 };
    let mut frame = vec![8];
    frame.extend(height.to_be_bytes());
    frame.extend(width.to_be_bytes());
    frame.push(colours);
    frame.extend((0..colours).flat_map(|colour| [colour + 1, sampling(colour), 0]));
    let mut scan = vec![colours];
    scan.extend((0..colours).flat_map(|colour| [colour + 1, 0]));
    // All coefficients at once, or the first of each block alone.
    scan.extend(if progressive { [0, 0, 0] } else { [0, 63, 0] });
    // One code of one bit: no difference in the first table, no more coefficients in the second.
    let codes = |class: u8| [&[class], &[1][..], &[0; 15], &[0]].concat();
    let side = if chroma_halved { 16 } else { 8 };
    let units = usize::from(width).div_ceil(side) * usize::from(height).div_ceil(side);
    let blocks = units * (usize::from(colours) + if chroma_halved { 3 } else { 0 });
    let bits = blocks * if progressive { 1 } else { 2 };
    let mut file = vec![0xff, 0xd8];
    if colours == 4 {
        file.extend(segment(0xee, b"Adobe\0\x64\0\0\0\0\0"));
    }
    file.extend(segment(0xdb, &[&[0], &[1; 64][..]].concat()));
    file.extend(segment(if progressive { 0xc2 } else { 0xc0 }, &frame));
    file.extend(segment(0xc4, &codes(0x00)));
    file.extend(segment(0xc4, &codes(0x10)));
    file.extend(segment(0xda, &scan));
    file.resize(file.len() + bits / 8, 0);
    if bits % 8 > 0 {
        file.push(0xff >> (bits % 8));
    }
    file.extend([0xff, 0xd9]);
    file
}

/// A lossless WebP of a few dozen bytes.
pub fn webp(width: u32, height: u32) -> Vec<u8> {
    let mut bits = u64::from(width - 1) | u64::from(height - 1) << 14;
    // Behind the sizes: no alpha, version 0, no transform, no cache, one set of codes; then five codes of one symbol each.
    for code in 0..5 {
        bits |= 1 << (14 + 14 + 1 + 3 + 3 + 4 * code);
    }
    let chunk = [&[0x2f][..], &bits.to_le_bytes()[..7]].concat();
    let size = |bytes: usize| u32::try_from(bytes).unwrap().to_le_bytes();
    [b"RIFF", &size(4 + 8 + chunk.len())[..], b"WEBPVP8L", &size(chunk.len()), &chunk].concat()
}

/// A PNG.
pub fn png(width: u32, height: u32, color: png::ColorType, depth: png::BitDepth) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().unwrap();
    let row = vec![0; color.samples() * (depth as usize) * (width as usize) / 8];
    let mut rows = writer.stream_writer().unwrap();
    (0..height).for_each(|_| rows.write_all(&row).unwrap());
    rows.finish().unwrap();
    drop(writer);
    file
}
