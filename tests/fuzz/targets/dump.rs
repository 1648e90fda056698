//! See `pgcutover::migration::schema::fuzzing::dump`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::migration::schema::fuzzing::dump(data));
