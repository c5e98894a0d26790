//! One file per operation that a user knows: each orders its durable steps and undoes what it did when one fails.

#![forbid(unsafe_code)]

pub mod create;
mod scratch;
