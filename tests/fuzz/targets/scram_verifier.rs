//! See `pgcutover::wire::fuzzing::scram_verifier`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::scram_verifier(data));
