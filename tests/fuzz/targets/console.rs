//! See `pgcutover::admin::console::fuzzing::console`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::admin::console::fuzzing::console(data));
