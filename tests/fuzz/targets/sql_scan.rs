//! See `pgcutover::proxy::handoff::fuzzing::sql_scan`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::handoff::fuzzing::sql_scan(data));
