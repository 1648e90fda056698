//! See `pgcutover::cli::fuzzing::properties`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::cli::fuzzing::properties(data));
