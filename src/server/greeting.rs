//! What each side of a connection knows: the version of its protocol and the names of the messages that it understands.
//!
//! The supervisor publishes its greeting in the record of the device, which a client reads before it sends a command.
//! Supervisor and worker send theirs with their first message, the program in its mode `version`. A side that sends
//! none is of version 1. A message that the receiver does not understand is answered with an error that has its name;
//! the connection stays open.
#![forbid(unsafe_code)]

use std::fmt;

use serde::de::value::Error as NoValue;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde::{Deserialize as DeserializeDerive, Serialize};

use crate::error::{Error, Kind, Result};

/// Version 2 has greetings, and answers what it does not know. Version 3 gives each descriptor its role; before, they
/// went by position.
pub const VERSION: u32 = 3;

/// Longest name of a message that is repeated in an answer or a log line.
const NAME_MAX: usize = 64;

/// Most names that are shown in an error.
const SHOWN: usize = 8;

/// All that the first version knew.
const FIRST_COMMANDS: [&str; 11] = [
    "Info",
    "Stop",
    "Flush",
    "HoldForSpace",
    "Abort",
    "Switch",
    "Freeze",
    "Merge",
    "MergeLevels",
    "CancelMerge",
    "Reload",
];
const FIRST_ORDERS: [&str; 7] = ["Start", "Close", "Flush", "HoldForSpace", "Retire", "Go", "Yield"];

/// What one side knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, DeserializeDerive)]
pub struct Greeting {
    pub version: u32,
    /// Names of the commands that it takes from clients as a supervisor.
    #[serde(default)]
    pub commands: Vec<String>,
    /// Names of the messages that it takes from a supervisor as a worker.
    #[serde(default)]
    pub orders: Vec<String>,
}

/// The first version, which sent no greeting.
impl Default for Greeting {
    fn default() -> Greeting {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Greeting { version: 1, commands: names(&FIRST_COMMANDS), orders: names(&FIRST_ORDERS) }
    }
}

impl Greeting {
    /// The greeting of this build, whose commands and orders are these enums.
    pub fn of<Commands: DeserializeOwned, Orders: DeserializeOwned>() -> Greeting {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Greeting { version: VERSION, commands: names(variants::<Commands>()), orders: names(variants::<Orders>()) }
    }

    /// The error for a command that this side does not know: `None` if it does. `who` it is, for people.
    pub fn refuse(&self, command: &impl Serialize, who: &str) -> Option<Error> {
        let name = name_of(command);
        (!self.commands.contains(&name)).then(|| unsupported(&name, who, self.version))
    }

    /// Whether a program with this greeting may replace one with `running`. A running device may depend on all that its
    /// server knows, so that an older program is refused.
    pub fn replaces(&self, running: &Greeting) -> Result<()> {
        let lacks: Vec<&str> =
            running.commands.iter().filter(|c| !self.commands.contains(c)).map(String::as_str).take(SHOWN).collect();
        if self.version > running.version || self.version == running.version && lacks.is_empty() {
            return Ok(());
        }
        let mut message = format!(
            "the program is older than the running server: it has version {} of the protocol, the server has version {}",
            self.version, running.version
        );
        if self.version == running.version {
            message = format!("{message}, and the program does not know {}", lacks.join(", "));
        }
        Err(Error::new(Kind::Param, message))
    }
}

/// An operation that the other side does not know; its `version`.
pub fn unsupported(what: &str, who: &str, version: u32) -> Error {
    let message = format!(
        "unsupported operation {what}: {who} has version {version} of the protocol, this program has version {VERSION}"
    );
    Error::new(Kind::Param, message)
}

/// A message as it came.
#[derive(Debug)]
pub enum Incoming<T> {
    Known(T),
    Unknown(Unknown),
}

/// A message of a version that has more of them, or other fields in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// Short, without control characters; empty: the message has no name.
    pub name: String,
    /// The whole message, JSON.
    pub raw: String,
}

/// Decodes a message; an error: it is not JSON.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<Incoming<T>> {
    let error = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok(Incoming::Known(value)),
        Err(error) => error,
    };
    let Name(name) = serde_json::from_slice(bytes)?;
    let raw = std::str::from_utf8(bytes).map_err(|_| error)?;
    Ok(Incoming::Unknown(Unknown { name, raw: raw.to_owned() }))
}

/// The name under which a message travels.
pub fn name_of(message: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(message).unwrap_or_default();
    serde_json::from_slice(&bytes).map(|Name(name)| name).unwrap_or_default()
}

/// The name of a message: the text that it is, or the first key of the object that it is.
struct Name(String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Name, D::Error> {
        from.deserialize_any(NameVisitor).map(Name)
    }
}

struct NameVisitor;

impl<'de> Visitor<'de> for NameVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<String, E> {
        Ok(text.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<String, A::Error> {
        let Some((Name(name), IgnoredAny)) = map.next_entry()? else { return Ok(String::new()) };
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(name)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<String, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(String::new())
    }

    fn visit_unit<E>(self) -> std::result::Result<String, E> {
        Ok(String::new())
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<String, E> {
        Ok(String::new())
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<String, E> {
        Ok(String::new())
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<String, E> {
        Ok(String::new())
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<String, E> {
        Ok(String::new())
    }
}

/// The names of the variants of an enum, as they travel.
fn variants<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut found: &'static [&'static str] = &[];
    // It always fails, after it has noted the names.
    let _ = T::deserialize(VariantNames(&mut found));
    found
}

struct VariantNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for VariantNames<'_> {
    type Error = NoValue;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> std::result::Result<V::Value, NoValue> {
        *self.0 = variants;
        Err(NoValue::custom("names only"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> std::result::Result<V::Value, NoValue> {
        Err(NoValue::custom("an enum is wanted"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, DeserializeDerive)]
    enum Old {
        Info,
        Hold(bool),
    }

    #[test]
    fn what_is_not_understood_keeps_its_name() {
        let unknown = |bytes: &[u8]| match decode::<Old>(bytes).unwrap() {
            Incoming::Unknown(unknown) => (unknown.name, unknown.raw),
            Incoming::Known(known) => panic!("{known:?}"),
        };
        assert!(matches!(decode::<Old>(b"{\"Hold\":true}").unwrap(), Incoming::Known(Old::Hold(true))));
        for (message, name) in [
            ("\"Grow\"", "Grow"),
            ("{\"Grow\":{\"to\":[1,2,{}]}}", "Grow"),
            ("{\"Hold\":{\"for\":3}}", "Hold"),
            ("{\"Info\":null,\"more\":1}", "Info"),
            ("[1,\"x\"]", ""),
            ("null", ""),
            ("1e3", ""),
            ("{}", ""),
            ("\"a\\u0007b\\n\"", "ab"),
        ] {
            assert_eq!(unknown(message.as_bytes()), (name.into(), message.into()));
        }
        let long = format!("\"{}\"", "x".repeat(1000));
        assert_eq!(unknown(long.as_bytes()).0.len(), NAME_MAX);
        for bytes in [&b"{not json"[..], b"", b"\"Info\" 1", b"\"\xff\""] {
            assert!(decode::<Old>(bytes).is_err());
        }
    }

    #[test]
    fn an_older_program_is_refused_by_name() {
        let own = Greeting::of::<Old, Old>();
        assert_eq!((own.version, &own.commands[..]), (VERSION, &["Info".to_owned(), "Hold".to_owned()][..]));
        own.replaces(&own).unwrap();
        own.replaces(&Greeting::default()).unwrap();
        let e = Greeting::default().replaces(&own).unwrap_err();
        assert_eq!(e.kind(), Kind::Param);
        assert!(e.to_string().contains("version 1") && e.to_string().contains(&format!("version {VERSION}")), "{e}");
        let less = Greeting { commands: vec!["Info".into()], ..own.clone() };
        assert!(less.replaces(&own).unwrap_err().to_string().contains("does not know Hold"));
        own.replaces(&less).unwrap();
        let later = Greeting { version: VERSION + 1, ..less };
        later.replaces(&own).unwrap();
    }

    #[test]
    fn a_command_is_refused_before_it_is_sent() {
        assert!(Greeting::default().refuse(&"Info", "the server").is_none());
        let e = Greeting::default().refuse(&Old::Hold(true), "the server of ploop0").unwrap();
        assert_eq!(e.kind(), Kind::Param);
        assert!(e.to_string().starts_with("unsupported operation Hold: the server of ploop0 has version 1"), "{e}");
        let old: Greeting = serde_json::from_str("{\"version\":7}").unwrap();
        assert_eq!(old, Greeting { version: 7, commands: vec![], orders: vec![] });
    }
}
