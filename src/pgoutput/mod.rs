//! pgoutput.
