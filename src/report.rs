//! Messages to the user: console, log file, last error.
