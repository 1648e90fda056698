//! Durations and sizes with units, as operators write them: `5s`, `250ms`, `2min`, `64MB`.
//!
//! The units are PostgreSQL's (documentation, section 20.1.1), so that a value can be carried over from
//! `postgresql.conf`; a bare number is refused because its unit would have to be guessed.

use std::time::Duration;

/// Units of time, longest first for printing, with their length in microseconds.
const TIME_UNITS: [(&str, u64); 6] =
    [("d", 86_400_000_000), ("h", 3_600_000_000), ("min", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];

/// Units of memory, largest first for printing, with their size in bytes. Multiples of 1024, as in PostgreSQL.
const SIZE_UNITS: [(&str, u64); 5] = [("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10), ("B", 1)];

/// Reads a duration. The error says which form is expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("{text:?} is not a duration: write a number with us, ms, s, min, h or d, such as \"5s\"");
    let (number, unit) = split(text).ok_or_else(expected)?;
    let scale = TIME_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(expected)?.1;
    number.checked_mul(scale).map(Duration::from_micros).ok_or_else(|| format!("{text:?} is too long"))
}

/// Reads a size in bytes. The error says which form is expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("{text:?} is not a size: write a number with B, kB, MB, GB or TB, such as \"64MB\"");
    let (number, unit) = split(text).ok_or_else(expected)?;
    let scale = SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(expected)?.1;
    number.checked_mul(scale).ok_or_else(|| format!("{text:?} is too large"))
}

/// A duration in the largest unit that says it exactly.
pub fn format_duration(duration: Duration) -> String {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    if micros == 0 {
        return "0s".to_owned();
    }
    in_largest_unit(micros, &TIME_UNITS)
}

/// A size in the largest unit that says it exactly.
pub fn format_size(bytes: u64) -> String {
    in_largest_unit(bytes, &SIZE_UNITS)
}

fn in_largest_unit(value: u64, units: &[(&str, u64)]) -> String {
    let (unit, scale) =
        units.iter().find(|(_, scale)| value >= *scale && value.is_multiple_of(*scale)).unwrap_or(&("B", 1));
    format!("{}{unit}", value / scale)
}

/// `5 s` or `5s` into number and unit; only whole numbers.
fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    Some((text[..digits].parse().ok()?, text[digits..].trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_of_postgres() {
        for (text, millis) in [("250ms", 250), ("5s", 5_000), ("2min", 120_000), ("1 h", 3_600_000), ("0s", 0)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for (text, bytes) in [("64MB", 64 << 20), ("1kB", 1024), ("1KB", 1024), ("7B", 7), ("1GB", 1 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "5", "s", "-5s", "5 m", "1.5s", "99999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?} must be refused");
        }
        for bad in ["", "64", "64M", "-1MB", "99999999TB"] {
            assert!(parse_size(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        for text in ["250ms", "5s", "2min", "1h", "7d", "90s", "0s"] {
            assert_eq!(format_duration(parse_duration(text).expect("valid")), text);
        }
        for text in ["64MB", "1GB", "3kB", "7B", "0B"] {
            assert_eq!(format_size(parse_size(text).expect("valid")), text);
        }
    }
}
