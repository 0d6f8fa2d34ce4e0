//! JPEG: the header, read here as Pillow's `JpegImageFile` reads it, and the pixels, which libjpeg decodes.

use super::libjpeg::{self, Frame};
use super::orientation::Metadata;
use super::{Decoded, cmyk_to_rgb, put_rgb};

/// The size, and the most bytes that decoding holds beside the RGB.
pub(super) fn header(bytes: &[u8]) -> Result<((u32, u32), u64), String> {
    let Header { frame, several_scans, .. } = Header::read(bytes)?;
    Ok(((frame.width, frame.height), if several_scans { frame.coefficients() } else { 0 }))
}

/// What stands before the first scan.
struct Header {
    frame: Frame,
    /// Whether all coefficients are held at once.
    several_scans: bool,
    metadata: Metadata,
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut frame = None;
        let mut progressive = false;
        let mut metadata = Metadata::default();
        let mut rest = bytes.strip_prefix(b"\xff\xd8").ok_or("it does not begin as a JPEG")?;
        loop {
            let (marker, behind) = next_marker(rest)?;
            rest = behind;
            // These stand alone.
            if matches!(marker, 0xc8 | 0xd0..=0xd9 | 0xf0..=0xfd) {
                continue;
            }
            let content = segment(&mut rest).ok_or("its header is cut short")?;
            match marker {
                0xc0..=0xc3 | 0xc5..=0xcb | 0xcd..=0xcf | 0xde => {
                    frame = Some(read_frame(content)?);
                    progressive = matches!(marker, 0xc2 | 0xc6 | 0xca | 0xce);
                }
                0xe1 => metadata.add_app1(content),
                0xda => {
                    let frame = frame.ok_or("it has no frame")?;
                    let interleaved = content.first() == Some(&frame.components);
                    return Ok(Self { frame, several_scans: progressive || !interleaved, metadata });
                }
                _ => {}
            }
        }
    }
}

/// The next marker's second byte, and what stands behind it. Fill bytes, and rubbish between segments, are passed over.
fn next_marker(bytes: &[u8]) -> Result<(u8, &[u8]), String> {
    let mut at = 0;
    while let Some(pair) = bytes.get(at..at + 2) {
        match *pair {
            [0xff, 0xff] => at += 1,
            [0xff, 0] => at += 2,
            [0xff, marker @ 0xc0..=0xfe] => return Ok((marker, &bytes[at + 2..])),
            [0xff, other] => return Err(format!("its header has a marker 0x{other:02x}, which is none")),
            _ => at += 1,
        }
    }
    Err("it has no scan".into())
}

/// The content of a segment, which begins with its own length.
fn segment<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
    let content = rest.get(2..length.max(2))?;
    *rest = &rest[2 + content.len()..];
    Some(content)
}

fn read_frame(content: &[u8]) -> Result<Frame, String> {
    let &[precision, h1, h0, w1, w0, components] = content.first_chunk().ok_or("its frame is cut short")?;
    if precision != 8 {
        return Err(format!("samples of {precision} bits are not supported"));
    }
    if ![1, 3, 4].contains(&components) {
        return Err(format!("{components} components are not supported"));
    }
    let (width, height) = (u16::from_be_bytes([w1, w0]).into(), u16::from_be_bytes([h1, h0]).into());
    Ok(Frame { width, height, components })
}

pub(super) fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    let Header { frame, metadata, .. } = Header::read(bytes)?;
    let (width, height) = (frame.width as usize, frame.height as usize);
    let mut rgb = vec![0; width * height * 3];
    libjpeg::decode(bytes, frame, |y, samples| {
        let row = &mut rgb[y as usize * width * 3..][..width * 3];
        match frame.components {
            1 => put_rgb(row, samples, |[grey]: [u8; 1]| [grey; 3]),
            3 => row.copy_from_slice(samples),
            // As Photoshop writes it, which Pillow assumes: 255 is no ink.
            _ => put_rgb(row, samples, |ink: [u8; 4]| cmyk_to_rgb(ink.map(|value| u8::MAX - value))),
        }
    })?;
    Ok(Decoded { rgb, metadata })
}
