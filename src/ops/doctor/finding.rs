//! What doctor has found.

use std::path::Path;

/// Result of one check.
#[derive(Clone, Debug)]
pub struct Finding {
    pub subject: String,
    pub grade: Grade,
    /// What was seen.
    pub text: String,
    /// What to do, if it is not in order.
    pub remedy: Option<String>,
    /// The command that mends it, for a shell; none: no command alone does.
    pub cure: Option<String>,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Grade {
    Good,
    /// Works, but not as well as it could, or needs a look.
    Warning,
    /// Something cannot work.
    Missing,
}

pub fn good(subject: &str, text: impl Into<String>) -> Finding {
    let text = shown(&text.into());
    Finding { subject: shown(subject), grade: Grade::Good, text, remedy: None, cure: None }
}

pub fn bad(grade: Grade, subject: &str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { grade, remedy: Some(shown(&remedy.into())), ..good(subject, text) }
}

/// A file's name can hold line ends, which would forge lines of a page, and characters that hide or reorder text.
fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// On one line, as it is: what misleads is escaped.
fn shown(text: &str) -> String {
    text.chars().flat_map(|c| if misleads(c) { c.escape_default().collect() } else { vec![c] }).collect()
}

impl Finding {
    /// With the command that mends it, and destroys nothing if it is run without a look. A command that names a path whose
    /// bytes a page cannot show as they are (no UTF-8, control characters) is left out.
    pub fn cured_by(self, command: impl Into<String>) -> Finding {
        let command = command.into();
        let exact = !command.chars().any(|c| misleads(c) || c == char::REPLACEMENT_CHARACTER);
        Finding { cure: exact.then_some(command), ..self }
    }

    /// With that command, if there is one.
    pub fn cured_if(self, command: Option<String>) -> Finding {
        match command {
            Some(command) => self.cured_by(command),
            None => self,
        }
    }
}

/// A path as one word of a shell.
pub fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    match !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_shell() {
        let of = |text: &str| word(Path::new(text));
        assert_eq!(of("/vz/1/root.hdd"), "/vz/1/root.hdd");
        assert_eq!(of("/vz/a b"), "'/vz/a b'");
        assert_eq!(of("/vz/{1}$(x)"), "'/vz/{1}$(x)'");
        assert_eq!(of("it's"), "'it'\\''s'");
        assert_eq!(of("-x"), "'-x'");
    }

    #[test]
    fn names_forge_no_lines_and_no_commands() {
        use std::os::unix::ffi::OsStrExt;
        let found = |name: &[u8]| {
            let path = Path::new(std::ffi::OsStr::from_bytes(name));
            bad(Grade::Warning, "x", path.display().to_string(), "look").cured_by(format!("rm {}", word(path)))
        };
        assert_eq!(found(b"/a\n  $ rm b").text, "/a\\n  $ rm b");
        for name in [&b"/a\n$ rm b"[..], b"/a\x1b[2K", b"/\xff", "/\u{202e}a".as_bytes()] {
            assert_eq!(found(name).cure, None, "{name:?}");
        }
        assert_eq!(found("/ü b".as_bytes()).cure.as_deref(), Some("rm '/ü b'"));
    }
}
