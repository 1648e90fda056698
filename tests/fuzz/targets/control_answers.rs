//! See `pgcutover::postgres::fuzzing::control_answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover_fuzz::scripted(pgcutover::postgres::fuzzing::control_answers, data));
