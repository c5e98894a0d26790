//! An error as it travels between processes: its code and its text.
#![forbid(unsafe_code)]

use std::fmt;

use serde::ser::SerializeTuple;
use serde::{Deserialize, Serialize, Serializer};

use crate::error::{Error, Kind};

/// An error of another process. On the wire it is an array of code and text.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RemoteError {
    /// A `SYSEXIT_*` code.
    pub code: i32,
    pub message: String,
}

impl Serialize for RemoteError {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut pair = to.serialize_tuple(2)?;
        pair.serialize_element(&self.code)?;
        pair.serialize_element(&self.message)?;
        pair.end()
    }
}

impl From<&Error> for RemoteError {
    fn from(e: &Error) -> RemoteError {
        RemoteError { code: e.code(), message: e.to_string() }
    }
}

impl From<Error> for RemoteError {
    fn from(e: Error) -> RemoteError {
        RemoteError::from(&e)
    }
}

/// A code that this build does not know becomes [`Kind::Sys`].
impl From<RemoteError> for Error {
    fn from(e: RemoteError) -> Error {
        Error::new(Kind::from_code(e.code).unwrap_or(Kind::Sys), e.message)
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_travels_as_a_pair() {
        let e = RemoteError::from(&Error::new(Kind::Busy, "in the way"));
        let text = serde_json::to_string(&e).unwrap();
        assert_eq!(text, "[17,\"in the way\"]");
        assert_eq!(serde_json::from_str::<(i32, String)>(&text).unwrap(), (17, "in the way".into()));
        let back: RemoteError = serde_json::from_str(&text).unwrap();
        assert_eq!(back, e);
        assert_eq!(Error::from(back).kind(), Kind::Busy);
        assert_eq!(Error::from(RemoteError { code: 999, message: String::new() }).kind(), Kind::Sys);
    }
}
