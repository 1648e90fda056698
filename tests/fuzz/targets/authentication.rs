//! See `pgcutover::postgres::fuzzing::authentication`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover_fuzz::scripted(pgcutover::postgres::fuzzing::authentication, data));
