//! See `pgcutover::proxy::handoff::fuzzing::handoff_answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover_fuzz::scripted(pgcutover::proxy::handoff::fuzzing::handoff_answers, data));
