//! A small tree of elements from XML that untrusted users may have written: no DTD, no entities but the five of XML,
//! limited depth and number.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use crate::bail;
use crate::error::{Error, Kind, Result};

const MAX_DEPTH: usize = 16;
const MAX_ELEMENTS: usize = 100_000;
/// Characters of a message about what was found.
const MAX_MESSAGE: usize = 200;

/// An element: local name, text, children.
#[derive(Debug, Default)]
pub struct Element {
    pub name: String,
    pub text: String,
    pub children: Vec<Element>,
}

impl Element {
    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|c| c.name == name)
    }
}

/// An error with a cut message: the parser's own messages repeat the input, however long it is.
fn broken(at: u64, why: impl std::fmt::Display) -> Error {
    let why: String = why.to_string().chars().take(MAX_MESSAGE).collect();
    Error::new(Kind::DiskDescr, format!("XML is broken at byte {at}: {why}"))
}

/// Parses a document; returns its root element.
pub fn parse(bytes: &[u8]) -> Result<Element> {
    let text = std::str::from_utf8(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes))
        .map_err(|e| broken(e.valid_up_to() as u64, "not UTF-8"))?;
    let mut reader = Reader::from_str(text);
    let mut open: Vec<Element> = Vec::new();
    let mut root: Option<Element> = None;
    let mut count = 0;
    loop {
        let at = reader.buffer_position();
        let event = reader.read_event().map_err(|e| broken(at, e))?;
        match event {
            Event::Start(start) => {
                count += 1;
                if open.len() >= MAX_DEPTH || count > MAX_ELEMENTS {
                    bail!(DiskDescr, "XML has more than {MAX_DEPTH} levels or {MAX_ELEMENTS} elements");
                }
                if open.is_empty() && root.is_some() {
                    return Err(broken(at, "a second root element"));
                }
                open.push(Element { name: local_name(&start, at)?, ..Element::default() });
            }
            Event::Empty(start) => {
                count += 1;
                if count > MAX_ELEMENTS {
                    bail!(DiskDescr, "XML has more than {MAX_ELEMENTS} elements");
                }
                let element = Element { name: local_name(&start, at)?, ..Element::default() };
                close(element, &mut open, &mut root, at)?;
            }
            Event::End(_) => {
                let element = open.pop().ok_or_else(|| broken(at, "an end tag too many"))?;
                close(element, &mut open, &mut root, at)?;
            }
            Event::Text(t) => {
                let t = t.xml10_content().map_err(|e| broken(at, e))?;
                match open.last_mut() {
                    Some(element) => element.text.push_str(&t),
                    None if t.trim().is_empty() => {}
                    None => return Err(broken(at, "text outside the root element")),
                }
            }
            Event::CData(t) => {
                let t = t.xml10_content().map_err(|e| broken(at, e))?;
                let element = open.last_mut().ok_or_else(|| broken(at, "text outside the root element"))?;
                element.text.push_str(&t);
            }
            Event::GeneralRef(r) => {
                let c = match r.resolve_char_ref().map_err(|e| broken(at, e))? {
                    Some(c) => c,
                    None => match &*r.decode().map_err(|e| broken(at, e))? {
                        "amp" => '&',
                        "lt" => '<',
                        "gt" => '>',
                        "quot" => '"',
                        "apos" => '\'',
                        other => return Err(broken(at, format_args!("entity '{}' is not defined", cut(other)))),
                    },
                };
                let element = open.last_mut().ok_or_else(|| broken(at, "text outside the root element"))?;
                element.text.push(c);
            }
            Event::DocType(_) => return Err(broken(at, "a document type definition is not accepted")),
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) => {}
            Event::Eof => break,
        }
    }
    if let Some(element) = open.last() {
        return Err(broken(bytes.len() as u64, format_args!("element '{}' is not closed", cut(&element.name))));
    }
    root.ok_or_else(|| broken(bytes.len() as u64, "no element"))
}

fn local_name(start: &BytesStart<'_>, at: u64) -> Result<String> {
    let name = start.local_name();
    std::str::from_utf8(name.as_ref()).map(str::to_owned).map_err(|e| broken(at, e))
}

fn close(element: Element, open: &mut [Element], root: &mut Option<Element>, at: u64) -> Result<()> {
    match open.last_mut() {
        Some(parent) => parent.children.push(element),
        None if root.is_none() => *root = Some(element),
        None => return Err(broken(at, "a second root element")),
    }
    Ok(())
}

/// Untrusted text, cut for a message.
pub fn cut(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
