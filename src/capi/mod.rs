//! The C ABI of the classic `libploop.so.1`: thin functions that check pointers, convert, call [`ops`](crate::ops) and
//! return classic codes. Panics never cross; memory handed out comes from malloc.
//!
//! What is exported, by file:
//! - [`descriptor`]: ploop_open_dd, ploop_close_dd, ploop_set_component_name, ploop_get_top_delta_fname,
//!   ploop_get_base_delta_fname, ploop_uuid_generate
//! - [`log`]: ploop_get_last_error, ploop_set_log_file, ploop_set_log_level, ploop_set_verbose_level,
//!   ploop_cancel_operation
//!
//! [`types`] and [`consts`] are the source of the C header, together with these functions and their comments.

mod boundary;
pub mod consts;
mod convert;
pub mod descriptor;
mod handle;
pub mod kernel_consts;
pub mod log;
pub mod types;
