//! Devices for uhmm.
