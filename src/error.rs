//! One error for the whole library: a kind that maps to the classic `SYSEXIT_*` code, a message that names the
//! object, the value seen and the value wanted, and the error that caused it.

use std::fmt;

/// What went wrong, in the classic's terms. The number is the public `SYSEXIT_*` code and the exit status of `ploop`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(i32)]
pub enum Kind {
    Creat = 1,
    Device = 2,
    DevIoc = 3,
    Open = 4,
    Malloc = 5,
    Read = 6,
    Write = 7,
    Sysfs = 9,
    Format = 11,
    Sys = 12,
    Protocol = 13,
    Loop = 14,
    Fstat = 15,
    Fsync = 16,
    Busy = 17,
    Flock = 18,
    Ftruncate = 19,
    Fallocate = 20,
    Mount = 21,
    Umount = 22,
    Lock = 23,
    Mkfs = 24,
    ResizeFs = 26,
    Mkdir = 27,
    Rename = 28,
    Abort = 29,
    Reloc = 30,
    ChangeGpt = 33,
    Unlink = 35,
    Mknod = 36,
    InUse = 37,
    Param = 38,
    DiskDescr = 39,
    DevNotMounted = 40,
    Fsck = 41,
    NoSnap = 43,
}

impl Kind {
    /// The classic code.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// The kind of a classic code, for errors that come back from the server.
    pub fn from_code(code: i32) -> Option<Kind> {
        use Kind::*;
        [
            Creat,
            Device,
            DevIoc,
            Open,
            Malloc,
            Read,
            Write,
            Sysfs,
            Format,
            Sys,
            Protocol,
            Loop,
            Fstat,
            Fsync,
            Busy,
            Flock,
            Ftruncate,
            Fallocate,
            Mount,
            Umount,
            Lock,
            Mkfs,
            ResizeFs,
            Mkdir,
            Rename,
            Abort,
            Reloc,
            ChangeGpt,
            Unlink,
            Mknod,
            InUse,
            Param,
            DiskDescr,
            DevNotMounted,
            Fsck,
            NoSnap,
        ]
        .into_iter()
        .find(|k| k.code() == code)
    }
}

/// An error of any part of the library.
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a deeper cause.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    /// An error caused by another one; a system error's text is appended when printed.
    pub fn with(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, message: message.into(), source: Some(source.into()) }
    }

    /// Says what was being done: `context: message`.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The same error under another kind.
    pub fn as_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The classic `SYSEXIT_*` code.
    pub fn code(&self) -> i32 {
        self.kind.code()
    }

    /// The system's error number, if a system error lies below.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref()?.downcast_ref::<std::io::Error>()?.raw_os_error()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.source {
            Some(s) => write!(f, ": {s}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({}): {self}", self.kind, self.kind.code())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

/// Turns a system error into an [`Error`] with a kind and a message, which is made only when needed.
pub trait IoContext<T> {
    fn ctx<S: Into<String>>(self, kind: Kind, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn ctx<S: Into<String>>(self, kind: Kind, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::with(kind, message(), e))
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn ctx<S: Into<String>>(self, kind: Kind, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::with(kind, message(), std::io::Error::from_raw_os_error(e as i32)))
    }
}

/// `Err(Error::new(kind, format!(...)))`, returned.
#[macro_export]
macro_rules! bail {
    ($kind:ident, $($arg:tt)+) => {
        return Err($crate::error::Error::new($crate::error::Kind::$kind, format!($($arg)+)))
    };
}
