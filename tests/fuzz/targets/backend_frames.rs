//! See `pgcutover::postgres::fuzzing::backend_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::postgres::fuzzing::backend_frames(data));
