//! See `pgcutover::wire::fuzzing::frontend_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::frontend_frames(data));
