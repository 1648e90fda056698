//! In front of a scripted server, which does what no real one does on demand.
