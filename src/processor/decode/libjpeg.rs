//! The one door to libjpeg: a JPEG file's samples, as Pillow asks libjpeg for them.
//!
//! The library is C (mozjpeg's libjpeg-turbo, through `mozjpeg-sys`), and what it reads is from strangers. So: its
//! fatal errors come back as [`Err`] and never end the process; it is told how much memory the coefficients may take
//! and how many scans there may be; its input is the caller's slice and nothing else; and it is told the
//! frame that the caller has read from the file's header, so that nothing is allocated for another.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_long};
use std::marker::PhantomData;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

use mozjpeg_sys::{
    J_COLOR_SPACE, boolean, jpeg_common_struct, jpeg_create_decompress, jpeg_decompress_struct,
    jpeg_destroy_decompress, jpeg_error_mgr, jpeg_finish_decompress, jpeg_progress_mgr, jpeg_read_header,
    jpeg_read_scanlines, jpeg_resync_to_restart, jpeg_source_mgr, jpeg_start_decompress, jpeg_std_error,
};

/// The most scans of a progressive file. Encoders write about ten; each costs a pass over all coefficients, however
/// few bytes it has.
const MAX_SCANS: c_int = 64;

/// How many bytes Pillow gives to libjpeg at a time. What is wrong with a later block is not seen where all rows have
/// come.
const BLOCK: usize = 65_536;

/// What `jpeg_read_header` returns when there are pixels to come, and when it wants more bytes.
const HEADER_READ: c_int = 1;
const SUSPENDED: c_int = 0;

/// What the library needs beside the coefficients: tables, and some rows of the picture.
const ROOM: u64 = 64 << 20;

/// The frame that a file's header states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub width: u32,
    pub height: u32,
    /// 1 is grey, 3 is RGB, 4 is CMYK.
    pub components: u8,
}

impl Frame {
    /// The most bytes that the coefficients of all components take, which are held where there are several scans.
    pub fn coefficients(self) -> u64 {
        // A component's sides are filled up to whole blocks of 8, and up to 4 of those.
        let side = |length: u32| u64::from(length).next_multiple_of(32);
        side(self.width) * side(self.height) * u64::from(self.components) * 2
    }
}

/// Hands every row of samples to `row`, from the top: `components` bytes a pixel, 255 for full light (ink, in CMYK, as
/// it stands in the file).
pub(super) fn decode(bytes: &[u8], frame: Frame, mut row: impl FnMut(u32, &[u8])) -> Result<(), String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut stream = Stream::new(bytes, frame);
        stream.open(frame)?;
        let mut samples = vec![0; frame.width as usize * usize::from(frame.components)];
        for y in 0..frame.height {
            stream.read_row(&mut samples)?;
            row(y, &samples);
        }
        stream.finish();
        Ok(())
    }));
    outcome.unwrap_or_else(|thrown| match thrown.downcast::<Fatal>() {
        Ok(fatal) => Err(fatal.0),
        Err(panic) => resume_unwind(panic),
    })
}

/// What the library says when it cannot go on: thrown by [`error_exit`], caught by [`decode`].
struct Fatal(String);

/// A decompressor on its way through a file.
struct Stream<'a> {
    /// From a box. Whatever points into it is made from this pointer, so that the library and we may take turns.
    library: *mut Library,
    bytes: PhantomData<&'a [u8]>,
}

/// A decompressor and all that it points to.
#[repr(C)]
struct Library {
    decompressor: jpeg_decompress_struct,
    errors: jpeg_error_mgr,
    source: Source,
    progress: jpeg_progress_mgr,
}

/// `base` comes first: the library knows no more of it.
#[repr(C)]
struct Source {
    base: jpeg_source_mgr,
    /// Bytes behind those in `base` that the library has not been shown.
    unseen: usize,
    /// Bytes to come that belong to a marker nobody reads.
    skip: usize,
}

impl<'a> Stream<'a> {
    /// May throw [`Fatal`], as everything here that calls the library.
    fn new(bytes: &'a [u8], frame: Frame) -> Self {
        // SAFETY: the library's structures are numbers, pointers and optional functions, for all of which zeros are
        // values.
        let library: *mut Library = Box::into_raw(unsafe { Box::new(mem::zeroed()) });
        // From here on dropping it frees everything: a decompressor of zeros has nothing to be freed.
        let stream = Self { library, bytes: PhantomData };
        // SAFETY: `library` is a box of our own that is neither moved nor freed before the stream; each structure is
        // filled in before the next call looks at it.
        unsafe {
            let errors = &mut (*library).errors;
            jpeg_std_error(errors);
            // Its own print to standard error, and end the process.
            errors.error_exit = Some(error_exit);
            errors.output_message = Some(print_nothing);
            (*library).source = Source {
                base: jpeg_source_mgr {
                    next_input_byte: bytes.as_ptr(),
                    bytes_in_buffer: 0,
                    init_source: Some(do_nothing),
                    fill_input_buffer: Some(suspend),
                    skip_input_data: Some(skip_input_data),
                    resync_to_restart: Some(jpeg_resync_to_restart),
                    term_source: Some(do_nothing),
                },
                unseen: bytes.len(),
                skip: 0,
            };
            (*library).progress.progress_monitor = Some(bound_scans);
            let decompressor = &raw mut (*library).decompressor;
            (*decompressor).common.err = &raw mut (*library).errors;
            jpeg_create_decompress(decompressor);
            (*decompressor).src = (&raw mut (*library).source).cast();
            (*decompressor).common.progress = &raw mut (*library).progress;
            let limit = frame.coefficients() + ROOM;
            (*(*decompressor).common.mem).max_memory_to_use = c_long::try_from(limit).unwrap_or(c_long::MAX);
        }
        stream
    }

    fn decompressor(&mut self) -> &mut jpeg_decompress_struct {
        // SAFETY: as in `new`; the borrow of `self` keeps a second one away.
        unsafe { &mut (*self.library).decompressor }
    }

    /// Reads the header and makes ready for the rows, which for a file of several scans is most of the work.
    fn open(&mut self, frame: Frame) -> Result<(), String> {
        let expected = (frame.width, frame.height, c_int::from(frame.components));
        loop {
            // SAFETY: a decompressor that is created and has a source.
            match unsafe { jpeg_read_header(self.decompressor(), 0) } {
                HEADER_READ => break,
                SUSPENDED => self.feed()?,
                // Tables alone, before the picture.
                _ => {}
            }
        }
        let header = self.decompressor();
        if (header.image_width, header.image_height, header.num_components) != expected {
            return Err("its header states two sizes".into());
        }
        header.out_color_space = match frame.components {
            1 => J_COLOR_SPACE::JCS_GRAYSCALE,
            3 => J_COLOR_SPACE::JCS_RGB,
            _ => J_COLOR_SPACE::JCS_CMYK,
        };
        // SAFETY: the header is read.
        while unsafe { jpeg_start_decompress(self.decompressor()) } == 0 {
            self.feed()?;
        }
        let output = self.decompressor();
        if (output.output_width, output.output_height, output.output_components) != expected {
            return Err("its rows have another size than its header states".into());
        }
        Ok(())
    }

    /// The next row. `samples` is as long as [`Stream::open`] has found a row to be.
    fn read_row(&mut self, samples: &mut [u8]) -> Result<(), String> {
        let mut rows = [samples.as_mut_ptr()];
        // SAFETY: the decompressor is started, and writes `output_width * output_components` bytes into one row.
        while unsafe { jpeg_read_scanlines(self.decompressor(), rows.as_mut_ptr(), 1) } == 0 {
            self.feed()?;
        }
        Ok(())
    }

    /// What is wrong behind the last row, in the same block, is an error. That the end is missing is none.
    fn finish(&mut self) {
        // SAFETY: all rows have been read.
        unsafe { jpeg_finish_decompress(self.decompressor()) };
    }

    /// Shows the library the next block of the file.
    fn feed(&mut self) -> Result<(), String> {
        // SAFETY: as in `decompressor`; the library is not at work.
        let Source { base, unseen, skip } = unsafe { &mut (*self.library).source };
        if *unseen == 0 {
            return Err("it ends before its pixels do".into());
        }
        let block = BLOCK.min(*unseen);
        *unseen -= block;
        base.bytes_in_buffer += block;
        let skipped = base.bytes_in_buffer.min(*skip);
        *skip -= skipped;
        advance(base, skipped);
        Ok(())
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // SAFETY: the box is given back once. Destroying frees what the library has allocated, and calls no handler.
        unsafe {
            jpeg_destroy_decompress(self.decompressor());
            drop(Box::from_raw(self.library));
        }
    }
}

/// Leaves the library by unwinding through its frames: they are compiled for that (`-fexceptions`, and these functions
/// are `C-unwind`), and what they hold is freed with the decompressor.
unsafe extern "C-unwind" fn error_exit(common: &mut jpeg_common_struct) {
    let mut text = [0_u8; 200];
    // SAFETY: libjpeg.h wants a buffer of JMSG_LENGTH_MAX bytes, which are 200; the binding's type states fewer, so the
    // function is called by its C type, whose arguments are two pointers.
    unsafe {
        if let Some(format) = (*common.err).format_message {
            type Format = unsafe extern "C-unwind" fn(*mut jpeg_common_struct, *mut c_char);
            let format = mem::transmute::<*const (), Format>(format as *const ());
            format(common, text.as_mut_ptr().cast());
        }
    }
    let text: Vec<u8> = text.into_iter().take_while(|&byte| byte != 0).collect();
    throw(String::from_utf8_lossy(&text).into_owned());
}

fn throw(reason: String) -> ! {
    resume_unwind(Box::new(Fatal(reason)))
}

unsafe extern "C-unwind" fn print_nothing(_: &mut jpeg_common_struct) {}

unsafe extern "C-unwind" fn do_nothing(_: &mut jpeg_decompress_struct) {}

/// There is no more for now: the library goes back to where it can begin again.
unsafe extern "C-unwind" fn suspend(_: &mut jpeg_decompress_struct) -> boolean {
    0
}

unsafe extern "C-unwind" fn skip_input_data(decompressor: &mut jpeg_decompress_struct, count: c_long) {
    // SAFETY: `src` is the first field of a `Source`, and nobody else looks at it during the call.
    let source = unsafe { &mut *decompressor.src.cast::<Source>() };
    let count = usize::try_from(count).unwrap_or(0);
    let here = count.min(source.base.bytes_in_buffer);
    advance(&mut source.base, here);
    source.skip = count - here;
}

/// `count` is at most what is in the buffer.
fn advance(source: &mut jpeg_source_mgr, count: usize) {
    // SAFETY: the result is within the slice, or one past its end.
    source.next_input_byte = unsafe { source.next_input_byte.add(count) };
    source.bytes_in_buffer -= count;
}

/// Is called between the passes over a file's scans.
unsafe extern "C-unwind" fn bound_scans(common: &mut jpeg_common_struct) {
    // SAFETY: it is called for decompressors alone, of whose structure `common` is the first field.
    let decompressor = unsafe { &*ptr::from_mut(common).cast::<jpeg_decompress_struct>() };
    if decompressor.input_scan_number > MAX_SCANS {
        throw(format!("it has more than {MAX_SCANS} scans, and at most {MAX_SCANS} are decoded"));
    }
}
