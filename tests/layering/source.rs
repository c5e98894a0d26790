//! What one file declares and names: its modules, its items, its imports.

use crate::lex::{self, Token};

/// A path that the file names, with the module inside the file (the empty one: the file's own) that names it.
#[derive(Clone, Debug)]
pub struct Named {
    pub within: Vec<String>,
    pub path: Vec<String>,
    pub line: usize,
    /// Of a `use`: the name that it brings in; `*` for all names.
    pub brings: Option<String>,
    /// Of a `use`: it says `pub`.
    pub public: bool,
}

#[derive(Default, Debug)]
pub struct Source {
    pub named: Vec<Named>,
    /// Modules that the file declares, those in braces among them, each with the module it stands in.
    pub modules: Vec<(Vec<String>, String)>,
    /// Modules in files of their own that only tests compile.
    pub test_modules: Vec<String>,
    /// Items, each with the module it stands in.
    pub items: Vec<(Vec<String>, String)>,
    /// Macros that `#[macro_export]` puts into the root of the crate.
    pub exported_macros: Vec<String>,
    /// All identifiers, for the names that a `use …::*` brings in.
    pub words: Vec<(String, usize)>,
    /// Functions: name, line, number of lines.
    pub functions: Vec<(String, usize, usize)>,
}

const ITEMS: &[&str] = &["fn", "struct", "enum", "trait", "type", "const", "static", "union"];

pub fn read(text: &str) -> Source {
    let (tokens, test_modules) = lex::without_tests(&lex::tokens(text));
    let mut reader = Reader { tokens: &tokens, source: Source { test_modules, ..Source::default() } };
    reader.module(0, tokens.len(), &[]);
    reader.functions();
    let mut source = reader.source;
    source.words = tokens.iter().filter(|t| t.is_ident()).map(|t| (t.text.clone(), t.line)).collect();
    source
}

struct Reader<'a> {
    tokens: &'a [Token],
    source: Source,
}

impl Reader<'_> {
    fn text(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |t| t.text.as_str())
    }

    fn before(&self, at: usize) -> &str {
        at.checked_sub(1).map_or("", |i| self.text(i))
    }

    /// Reads the tokens of a module's body.
    fn module(&mut self, from: usize, to: usize, within: &[String]) {
        let (mut at, mut depth) = (from, 0);
        while at < to {
            match self.text(at) {
                "{" => depth += 1,
                "}" => depth -= 1,
                "mod" if self.text(at + 2) == ";" => {
                    self.source.modules.push((within.to_vec(), self.text(at + 1).to_owned()));
                    at += 2;
                }
                "mod" if self.text(at + 2) == "{" => {
                    let end = lex::closing(self.tokens, at + 2);
                    let name = self.text(at + 1).to_owned();
                    self.source.modules.push((within.to_vec(), name.clone()));
                    self.module(at + 3, end, &[within, &[name]].concat());
                    at = end;
                }
                "use" if !["<", ","].contains(&self.before(at)) && self.text(at + 1) != "<" => {
                    let end = (at..to).find(|i| self.text(*i) == ";").unwrap_or(to);
                    let public = self.is_public(at);
                    self.tree(at + 1, end, &[], within, public);
                    at = end;
                }
                "macro_rules" => {
                    let name = self.text(at + 2).to_owned();
                    if at >= 4 && self.text(at - 2) == "macro_export" {
                        self.source.exported_macros.push(name.clone());
                    }
                    self.source.items.push((within.to_vec(), name));
                }
                word if depth == 0 && ITEMS.contains(&word) => {
                    let name = self.text(at + 1).to_owned();
                    self.source.items.push((within.to_vec(), name));
                }
                _ => at = self.path(at, within),
            }
            at += 1;
        }
    }

    /// A path in code: `crate::…`, `super::…`, `self::…`, or any other `name::…`; returns its last token.
    fn path(&mut self, at: usize, within: &[String]) -> usize {
        let starts = self.tokens[at].is_ident() && self.text(at + 1) == "::" && self.before(at) != "::";
        let restricts = self.before(at) == "in" && at >= 3 && self.text(at - 2) == "(" && self.text(at - 3) == "pub";
        if !starts || restricts {
            return at;
        }
        let mut path = vec![self.text(at).to_owned()];
        let mut end = at;
        while self.text(end + 1) == "::" && self.tokens.get(end + 2).is_some_and(Token::is_ident) {
            end += 2;
            path.push(self.text(end).to_owned());
        }
        let line = self.tokens[at].line;
        self.source.named.push(Named { within: within.to_vec(), path, line, brings: None, public: false });
        end
    }

    fn is_public(&self, at: usize) -> bool {
        match self.before(at) {
            "pub" => true,
            // pub(crate), pub(super), pub(in …)
            ")" => (at.saturating_sub(8)..at).rev().any(|i| self.text(i) == "pub" && self.text(i + 1) == "("),
            _ => false,
        }
    }

    /// The leaves of a tree of imports.
    fn tree(&mut self, from: usize, to: usize, prefix: &[String], within: &[String], public: bool) {
        let mut path = prefix.to_vec();
        let (mut at, mut alias, mut line) = (from, None, self.tokens[from.min(self.tokens.len() - 1)].line);
        while at < to {
            match self.text(at) {
                "::" => {}
                "{" => {
                    let end = lex::closing(self.tokens, at);
                    let mut start = at + 1;
                    while start < end {
                        let stop = self.comma(start, end);
                        self.tree(start, stop, &path, within, public);
                        start = stop + 1;
                    }
                    return;
                }
                "as" => {
                    alias = Some(self.text(at + 1).to_owned());
                    at += 1;
                }
                "self" if !path.is_empty() => {}
                name => {
                    path.push(name.to_owned());
                    line = self.tokens[at].line;
                }
            }
            at += 1;
        }
        if path.len() > prefix.len() || from < to {
            let brings = alias.or_else(|| path.last().cloned());
            self.source.named.push(Named { within: within.to_vec(), path, line, brings, public });
        }
    }

    /// The next comma outside of braces, or `end`.
    fn comma(&self, from: usize, end: usize) -> usize {
        let mut at = from;
        while at < end && self.text(at) != "," {
            at = if self.text(at) == "{" { lex::closing(self.tokens, at) } else { at } + 1;
        }
        at
    }

    /// Functions with a body.
    fn functions(&mut self) {
        for at in 0..self.tokens.len() {
            if self.text(at) != "fn" || !self.tokens.get(at + 1).is_some_and(Token::is_ident) {
                continue;
            }
            let mut open = at + 2;
            while open < self.tokens.len() && !["{", ";"].contains(&self.text(open)) {
                open = if ["(", "["].contains(&self.text(open)) { lex::closing(self.tokens, open) } else { open } + 1;
            }
            if self.text(open) == "{" {
                let (first, last) = (self.tokens[at].line, self.tokens[lex::closing(self.tokens, open)].line);
                self.source.functions.push((self.text(at + 1).to_owned(), first, last - first + 1));
            }
        }
    }
}
