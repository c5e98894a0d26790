//! GUIDs as descriptors write them: `{8-4-4-4-12}` hex digits in braces.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// A GUID. Either case is equal; it is printed in the case in which it was read.
#[derive(Clone, Copy)]
pub struct Guid {
    /// 38 ASCII characters, braces included.
    text: [u8; 38],
}

/// GUID of every writable top delta.
pub const TOP: Guid = Guid { text: *b"{5fbaabe3-6958-40ff-92a7-860e329aab41}" };

/// Parent of the base.
pub const NONE: Guid = Guid { text: *b"{00000000-0000-0000-0000-000000000000}" };

impl Guid {
    /// Reads the form with braces (38 characters) or without (36).
    pub fn parse(text: &str) -> Result<Guid> {
        let bad = || {
            let shown: String = text.chars().take(64).collect();
            Error::new(
                Kind::Param,
                format!("'{shown}' is not a GUID: must look like {{5fbaabe3-6958-40ff-92a7-860e329aab41}}"),
            )
        };
        let bytes = text.as_bytes();
        let inner = match bytes.len() {
            36 => bytes,
            38 if bytes[0] == b'{' && bytes[37] == b'}' => &bytes[1..37],
            _ => return Err(bad()),
        };
        for (i, c) in inner.iter().enumerate() {
            let fits = if matches!(i, 8 | 13 | 18 | 23) { *c == b'-' } else { c.is_ascii_hexdigit() };
            if !fits {
                return Err(bad());
            }
        }
        let mut out = [b'{'; 38];
        out[1..37].copy_from_slice(inner);
        out[37] = b'}';
        Ok(Guid { text: out })
    }

    /// A random one (version 4).
    pub fn generate() -> Guid {
        let mut out = [b'{'; 38];
        let mut hex = [0u8; 36];
        uuid::Uuid::new_v4().hyphenated().encode_lower(&mut hex);
        out[1..37].copy_from_slice(&hex);
        out[37] = b'}';
        Guid { text: out }
    }

    /// With braces, as read.
    pub fn as_str(&self) -> &str {
        // Only ASCII is ever stored.
        std::str::from_utf8(&self.text).unwrap_or_default()
    }

    /// The all-zero GUID, parent of the base.
    pub fn is_none(&self) -> bool {
        *self == NONE
    }
}

impl PartialEq for Guid {
    fn eq(&self, other: &Guid) -> bool {
        self.text.eq_ignore_ascii_case(&other.text)
    }
}

impl Eq for Guid {}

impl Hash for Guid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.to_ascii_lowercase().hash(state);
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Guid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Guid> {
        Guid::parse(text)
    }
}
