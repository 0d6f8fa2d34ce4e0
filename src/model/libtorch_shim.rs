//! What tch does not bind, through the C interface that libtorch exports for compiled models:
//! `torch/csrc/inductor/aoti_torch/c/shim.h` and `generated/c_shim_cuda.h`.
//!
//! The functions are looked up at run time, like CUDA's half of libtorch itself: this program is linked with neither.
//! A handle of that interface is an `at::Tensor*`, which is what tch's tensors hold. Where a libtorch lacks one of
//! them, what is offered here says so, and its callers take the longer way.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::Library;
use tch::{Device, Kind, Tensor};

/// An `at::Tensor*`.
type Handle = *mut c_void;

/// `aoti_torch_empty_strided_pinned`: dimensions, sizes, strides, number format, device type and index, result.
type EmptyPinned = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut Handle) -> i32;

/// `aoti_torch_cuda__flash_attention_forward`, which is `aten::_flash_attention_forward`.
type FlashAttention = unsafe extern "C" fn(
    query: Handle,
    key: Handle,
    value: Handle,
    cum_seq_q: *const Handle,
    cum_seq_k: *const Handle,
    max_q: i64,
    max_k: i64,
    dropout_p: f64,
    is_causal: i32,
    return_debug_mask: i32,
    scale: *const f64,
    window_size_left: *const i64,
    window_size_right: *const i64,
    seqused_k: *const Handle,
    alibi_slopes: *const Handle,
    output: *mut Handle,
    logsumexp: *mut Handle,
    rng_state: *mut Handle,
    unused: *mut Handle,
    debug_mask: *mut Handle,
) -> i32;

/// A function of the libraries that the process has opened.
///
/// # Safety
/// `F` is the type of the function of that name.
unsafe fn find<F: Copy>(name: &str) -> Option<F> {
    // SAFETY: the caller's. The libraries are never closed, so the function outlives the lookup.
    unsafe { Library::this().get::<F>(name.as_bytes()) }.ok().map(|symbol| *symbol)
}

/// A handle that stays the tensor's own.
fn lent(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}

/// Bytes of the host's memory that a CUDA device reads by itself, which tch's `pin_memory` gives too, with two lines of
/// deprecation on standard error for each. `None` where there is no such memory.
pub fn pinned(bytes: usize) -> Option<Tensor> {
    static EMPTY_PINNED: OnceLock<Option<EmptyPinned>> = OnceLock::new();
    const UINT8: i32 = 0;
    const CPU: i32 = 0;
    // SAFETY: the type is that of the header.
    let make = (*EMPTY_PINNED.get_or_init(|| unsafe { find("aoti_torch_empty_strided_pinned") }))?;
    let (size, stride) = (i64::try_from(bytes).ok()?, 1);
    let mut handle = ptr::null_mut();
    // SAFETY: one size and one stride, as said, and a place for the result, which is this function's own if it is made.
    unsafe {
        let failed = make(1, &raw const size, &raw const stride, UINT8, CPU, 0, &raw mut handle);
        (failed == 0).then(|| Tensor::from_ptr(handle.cast()))
    }
}

/// The memory of a tensor of bytes on the host, `None` for any other.
pub fn bytes_of(tensor: &mut Tensor) -> Option<&mut [u8]> {
    if tensor.kind() != Kind::Uint8 || tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return None;
    }
    // SAFETY: a contiguous tensor of bytes has as many of them from its pointer on as it has elements, and they are
    // borrowed for as long as it is.
    unsafe { Some(std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel())) }
}

/// Whether [`flash_attention`] is there for queries of this format and width.
pub fn has_flash_attention(query: &Tensor) -> bool {
    query.device().is_cuda()
        && matches!(query.kind(), Kind::BFloat16 | Kind::Half)
        && query.size().last().is_some_and(|width| width % 8 == 0 && *width <= 256)
        && flash(query.device()).is_some()
}

/// The function, if this libtorch has it and the device can run it: cards before Ampere cannot.
fn flash(device: Device) -> Option<FlashAttention> {
    static FLASH: OnceLock<Option<FlashAttention>> = OnceLock::new();
    *FLASH.get_or_init(|| {
        // SAFETY: the type is that of the header.
        let flash = unsafe { find("aoti_torch_cuda__flash_attention_forward") }?;
        let row = Tensor::zeros([1, 1, 64], (Kind::Half, device));
        let ends = Tensor::from_slice(&[0i32, 1]).to_device(device);
        let tried = call(flash, [&row; 3], [&ends; 2], [1, 1], false);
        if tried.is_none() {
            tracing::warn!("no flash attention on this device: batches of many lengths are slower");
        }
        tried.map(|_| flash)
    })
}

/// Attention within sequences that lie end to end, FlashAttention's `varlen` forward.
///
/// `query` is `[rows, heads, width]`, `key` and `value` are `[rows, key-value heads, width]`. `ends` are the ends of
/// the sequences of queries and those of keys, `[sequences + 1]` from 0 on, 32-bit, on the device; `longest` are the
/// longest of both. `causal` aligns the last query with the last key. Returns `[rows, heads, width]`.
///
/// # Panics
/// As other operations of libtorch do; its reason stands on standard error.
#[allow(clippy::panic)]
pub fn flash_attention(
    [query, key, value]: [&Tensor; 3],
    ends: [&Tensor; 2],
    longest: [i64; 2],
    causal: bool,
) -> Tensor {
    let output =
        flash(query.device()).and_then(|flash| call(flash, [query, key, value], ends, longest, causal));
    match output {
        Some(output) => output,
        None => panic!("libtorch's flash attention failed; its reason stands on standard error"),
    }
}

fn call(
    flash: FlashAttention,
    [query, key, value]: [&Tensor; 3],
    ends: [&Tensor; 2],
    longest: [i64; 2],
    causal: bool,
) -> Option<Tensor> {
    let [query_ends, key_ends] = ends.map(lent);
    let mut results: [Handle; 5] = [ptr::null_mut(); 5];
    let [output, logsumexp, rng_state, unused, debug_mask] = results.each_mut().map(ptr::from_mut);
    // SAFETY: handles are lent for the call by tensors that outlive it, null stands for what is left to its default, and
    // there is a place for each result.
    let failed = unsafe {
        flash(
            lent(query),
            lent(key),
            lent(value),
            &raw const query_ends,
            &raw const key_ends,
            longest[0],
            longest[1],
            0.0,
            causal.into(),
            0,
            ptr::null(),
            ptr::null(),
            ptr::null(),
            ptr::null(),
            ptr::null(),
            output,
            logsumexp,
            rng_state,
            unused,
            debug_mask,
        )
    };
    // SAFETY: what is not null was made by the call, and is nobody else's.
    let mut made =
        results.map(|handle| (!handle.is_null()).then(|| unsafe { Tensor::from_ptr(handle.cast()) }));
    made[0].take().filter(|_| failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_tensor() {
        let mut tensor = Tensor::zeros([5], (Kind::Uint8, Device::Cpu));
        bytes_of(&mut tensor).unwrap().copy_from_slice(&[1, 2, 3, 4, 5]);
        assert_eq!(Vec::<u8>::try_from(&tensor).unwrap(), [1, 2, 3, 4, 5]);
        assert!(bytes_of(&mut tensor.to_kind(Kind::Float)).is_none());
        assert!(bytes_of(&mut Tensor::zeros([4, 4], (Kind::Uint8, Device::Cpu)).tr()).is_none());
    }

    /// The interface is the one that the types here are of: without a device it answers with an error, and does not crash.
    #[test]
    fn without_a_device_there_is_neither() {
        if tch::Cuda::is_available() {
            return;
        }
        // SAFETY: nothing is called.
        assert!(unsafe { find::<EmptyPinned>("aoti_torch_empty_strided_pinned") }.is_some());
        assert!(pinned(16).is_none());
        assert!(!has_flash_attention(&Tensor::zeros([1, 1, 8], (Kind::BFloat16, Device::Cpu))));
    }
}
