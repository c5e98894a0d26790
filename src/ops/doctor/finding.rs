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
    Finding { subject: subject.into(), grade: Grade::Good, text: text.into(), remedy: None, cure: None }
}

pub fn bad(grade: Grade, subject: &str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { grade, remedy: Some(remedy.into()), ..good(subject, text) }
}

impl Finding {
    /// With the command that mends it.
    pub fn cured_by(self, command: impl Into<String>) -> Finding {
        Finding { cure: Some(command.into()), ..self }
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
}
