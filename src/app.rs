//! Builds everything, owns the tasks, and stops them in order.
