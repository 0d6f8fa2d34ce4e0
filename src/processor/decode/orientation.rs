//! How a picture is to be turned: EXIF's tag, else XMP's, as PIL's `Image.getexif` looks for it.

use image::metadata::Orientation;

/// The tag's number.
const ORIENTATION: u16 = 0x0112;

/// What a file says of itself beside its pixels, as far as it turns them.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// With or without `Exif\0\0` in front.
    pub exif: Option<Vec<u8>>,
    pub xmp: Option<Vec<u8>>,
}

impl Metadata {
    /// A segment of a JPEG, where EXIF may be spread over several.
    pub fn add_app1(&mut self, content: &[u8]) {
        if let Some(part) = content.strip_prefix(b"Exif\0\0") {
            self.exif.get_or_insert_default().extend_from_slice(part);
        } else if let Some(xmp) = content.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
            self.xmp = Some(xmp.to_vec());
        }
    }

    pub fn orientation(&self) -> Orientation {
        let exif = self.exif.as_deref().map_or(Exif::Silent, read_exif);
        let value = match exif {
            Exif::Says(value) => value,
            Exif::Silent => self.xmp.as_deref().and_then(read_xmp),
        };
        value.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
    }
}

/// What EXIF says of the orientation.
#[derive(Debug, PartialEq)]
enum Exif {
    /// A number, or something that PIL takes for none.
    Says(Option<u8>),
    /// Nothing: XMP is asked.
    Silent,
}

/// Reads integers in the order of bytes that the header states.
#[derive(Clone, Copy)]
struct Tiff<'a> {
    bytes: &'a [u8],
    little_endian: bool,
}

impl<'a> Tiff<'a> {
    fn take<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        let mut bytes: [u8; N] = *self.bytes.get(at..)?.first_chunk()?;
        if !self.little_endian {
            bytes.reverse();
        }
        Some(bytes)
    }

    fn u16(self, at: usize) -> Option<u16> {
        self.take(at).map(u16::from_le_bytes)
    }

    fn u32(self, at: usize) -> Option<u32> {
        self.take(at).map(u32::from_le_bytes)
    }

    /// The tag's first value in an entry of the directory, whatever number it is written as. Behind `None` the rest of
    /// the directory is not read.
    fn value(self, entry: usize) -> Option<Exif> {
        let (kind, count) = (self.u16(entry + 2)?, self.u32(entry + 4)? as usize);
        let size = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 => 8,
            _ => return Some(Exif::Silent),
        };
        let length = size * count;
        let at = match length {
            0 => return Some(Exif::Silent),
            1..=4 => entry + 8,
            _ if length > self.bytes.len() => return Some(Exif::Silent),
            _ => self.u32(entry + 8)? as usize,
        };
        self.bytes.get(at..at + length)?;
        let number = match kind {
            3 => self.u16(at)?.into(),
            4 | 13 => self.u32(at)?.into(),
            6 => i8::from_le_bytes(self.take(at)?).into(),
            8 => i16::from_le_bytes(self.take(at)?).into(),
            9 => i32::from_le_bytes(self.take(at)?).into(),
            5 => f64::from(self.u32(at)?) / f64::from(self.u32(at + 4)?),
            10 => {
                f64::from(i32::from_le_bytes(self.take(at)?))
                    / f64::from(i32::from_le_bytes(self.take(at + 4)?))
            }
            11 => f32::from_le_bytes(self.take(at)?).into(),
            12 => f64::from_le_bytes(self.take(at)?),
            16 => u64::from_le_bytes(self.take(at)?) as f64,
            // Bytes and text, which PIL compares with no number.
            _ => f64::NAN,
        };
        let whole = (1.0..=8.0).contains(&number) && number.fract() == 0.0;
        Some(Exif::Says(whole.then_some(number as u8)))
    }
}

fn read_exif(mut exif: &[u8]) -> Exif {
    for _ in 0..2 {
        exif = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    }
    let little_endian = match exif.first_chunk() {
        None if exif.is_empty() => return Exif::Silent,
        Some(b"II\x2a\0" | b"II\0\x2a") => true,
        Some(b"MM\0\x2a" | b"MM\x2a\0" | b"MM\0\x2b") => false,
        // PIL gives up on the picture at some such headers, and never looks at XMP.
        _ => return Exif::Says(None),
    };
    let tiff = Tiff { bytes: exif, little_endian };
    let Some(directory) = tiff.u32(4) else { return Exif::Says(None) };
    find_orientation(tiff, directory as usize).unwrap_or(Exif::Silent)
}

/// `None` where the directory ends early.
fn find_orientation(tiff: Tiff<'_>, directory: usize) -> Option<Exif> {
    for index in 0..usize::from(tiff.u16(directory)?) {
        let entry = directory + 2 + 12 * index;
        tiff.bytes.get(entry..entry + 12)?;
        if tiff.u16(entry)? == ORIENTATION {
            match tiff.value(entry)? {
                Exif::Silent => {}
                said => return Some(said),
            }
        }
    }
    None
}

/// `tiff:Orientation="6"` or `<tiff:Orientation>6`, wherever it first stands.
fn read_xmp(xmp: &[u8]) -> Option<u8> {
    const TAG: &[u8] = b"tiff:Orientation";
    let digit = memchr::memmem::find_iter(xmp, TAG).find_map(|at| {
        let rest = &xmp[at + TAG.len()..];
        let rest = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?;
        rest.first().filter(|digit| digit.is_ascii_digit())
    })?;
    Some(digit - b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
        Metadata { exif: exif.map(<[u8]>::to_vec), xmp: xmp.map(<[u8]>::to_vec) }.orientation()
    }

    #[test]
    fn xmp_turns_a_picture_where_exif_does_not() {
        let little_endian = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0";
        let without = b"II*\0\x08\0\0\0\x01\0\x13\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0";
        let prefixed = [b"Exif\0\0Exif\0\0", &little_endian[..]].concat();
        let attribute: &[u8] = b"<x tiff:Orientation='6' tiff:Orientation=\"6\"/>";
        let element: &[u8] = b"<tiff:Orientation>8</tiff:Orientation>";
        let cases = [
            (None, None, Orientation::NoTransforms),
            (None, Some(attribute), Orientation::Rotate90),
            (None, Some(element), Orientation::Rotate270),
            (Some(&little_endian[..]), Some(element), Orientation::Rotate180),
            (Some(&without[..]), Some(element), Orientation::Rotate270),
            (Some(&little_endian[..20]), Some(element), Orientation::Rotate270),
            (Some(&prefixed[..]), None, Orientation::Rotate180),
            (Some(b"nothing"), Some(element), Orientation::NoTransforms),
        ];
        for (exif, xmp, expected) in cases {
            assert_eq!(orientation(exif, xmp), expected, "{exif:?}");
        }
    }
}
