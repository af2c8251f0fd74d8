//! Optimiser states, schedules and averages.
