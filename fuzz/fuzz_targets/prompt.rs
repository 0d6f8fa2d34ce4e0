#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| spatialscore_fuzz::prompt(data));
