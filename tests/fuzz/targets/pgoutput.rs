//! See `pgcutover::pgoutput::fuzzing::pgoutput`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::pgoutput::fuzzing::pgoutput(data));
