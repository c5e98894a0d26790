//! Rust source as tokens with their lines: no comments, no contents of strings, no code that only tests compile.

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

impl Token {
    pub fn is_ident(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// Tokens are identifiers, numbers, `::`, and single characters; a literal in quotes is one token `"`.
pub fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut out = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let rest = &chars[at..];
        let len = match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            [c, ..] if c.is_whitespace() => 1,
            _ => {
                let (text, len) = token(rest);
                out.push(Token { text, line });
                len
            }
        };
        line += chars[at..at + len].iter().filter(|c| **c == '\n').count();
        at += len;
    }
    out
}

fn block_comment(rest: &[char]) -> usize {
    let (mut at, mut depth) = (2, 1);
    while depth > 0 && at < rest.len() {
        match rest[at..] {
            ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
            ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
            _ => at += 1,
        }
    }
    at
}

/// The token at the beginning of `rest`, and how many characters it takes.
fn token(rest: &[char]) -> (String, usize) {
    if let Some(len) = raw_string(rest) {
        return ("\"".into(), len);
    }
    match rest {
        ['"', ..] => ("\"".into(), quoted(rest, '"')),
        ['b' | 'c', '"', ..] => ("\"".into(), 1 + quoted(&rest[1..], '"')),
        ['b', '\'', ..] => ("\"".into(), 1 + quoted(&rest[1..], '\'')),
        ['\'', '\\', ..] | ['\'', _, '\'', ..] => ("\"".into(), quoted(rest, '\'')),
        // A lifetime.
        ['\'', ..] => ("'".into(), 1 + word(&rest[1..])),
        ['r', '#', ..] => (rest[2..2 + word(&rest[2..])].iter().collect(), 2 + word(&rest[2..])),
        [':', ':', ..] => ("::".into(), 2),
        [c, ..] if c.is_alphanumeric() || *c == '_' => (rest[..word(rest)].iter().collect(), word(rest)),
        _ => (rest[0].to_string(), 1),
    }
}

fn word(rest: &[char]) -> usize {
    rest.iter().position(|c| !c.is_alphanumeric() && *c != '_').unwrap_or(rest.len())
}

fn quoted(rest: &[char], quote: char) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string(rest: &[char]) -> Option<usize> {
    let prefix = match rest {
        ['r', '"' | '#', ..] => 1,
        ['b' | 'c', 'r', '"' | '#', ..] => 2,
        _ => return None,
    };
    let hashes = rest[prefix..].iter().take_while(|c| **c == '#').count();
    if rest.get(prefix + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = prefix + hashes + 1;
    let len = rest[body..].windows(end.len()).position(|w| w == end)?;
    Some(body + len + end.len())
}

/// Where the bracket at `at` is closed.
pub fn closing(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    tokens.len().saturating_sub(1)
}

/// An attribute for tests: `#[test]`, `#[cfg(test)]`, `#[cfg(all(test, …))]`; not `#[cfg(not(test))]`.
fn is_for_tests(attribute: &[Token]) -> bool {
    let words: Vec<&str> = attribute.iter().map(|t| t.text.as_str()).collect();
    match words.first() {
        Some(&"test") => true,
        Some(&"cfg") => words.contains(&"test") && !words.contains(&"not") && !words.contains(&"any"),
        _ => false,
    }
}

/// The tokens without what only tests compile, and the modules (`mod name;`) that only tests have.
pub fn without_tests(tokens: &[Token]) -> (Vec<Token>, Vec<String>) {
    let (mut out, mut modules) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let opens = |n: usize, what| tokens.get(n).is_some_and(|t: &Token| t.text == what);
        if !(opens(at, "#") && opens(at + 1, "[")) {
            out.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let end = closing(tokens, at + 1);
        if !is_for_tests(&tokens[at + 2..end]) {
            out.extend_from_slice(&tokens[at..=end]);
            at = end + 1;
            continue;
        }
        let mut item = end + 1;
        while opens(item, "#") && opens(item + 1, "[") {
            item = closing(tokens, item + 1) + 1;
        }
        let end = end_of_item(tokens, item);
        if let Some(i) = (item..end).find(|i| tokens[*i].text == "mod")
            && opens(i + 2, ";")
        {
            modules.push(tokens[i + 1].text.clone());
        }
        at = end;
    }
    (out, modules)
}

/// The first token behind an item, statement, field or match arm.
fn end_of_item(tokens: &[Token], start: usize) -> usize {
    const KEYWORDS: &[&str] = &[
        "fn",
        "struct",
        "enum",
        "impl",
        "mod",
        "use",
        "static",
        "const",
        "type",
        "trait",
        "unsafe",
        "extern",
        "let",
        "if",
        "for",
        "while",
        "loop",
        "match",
        "macro_rules",
        "async",
        "union",
    ];
    let mut first = start;
    if tokens.get(first).is_some_and(|t| t.text == "pub") {
        first += 1;
        if tokens.get(first).is_some_and(|t| t.text == "(") {
            first = closing(tokens, first) + 1;
        }
    }
    let keyword = tokens.get(first).map_or("", |t| t.text.as_str());
    let whole = KEYWORDS.contains(&keyword);
    let mut at = first;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            ";" => return at + 1,
            "," if !whole => return at + 1,
            "}" | ")" | "]" => return at,
            "(" | "[" => at = closing(tokens, at),
            "{" => {
                at = closing(tokens, at);
                let more = ["else", "."].contains(&tokens.get(at + 1).map_or("", |t| t.text.as_str()));
                if whole && !["use", "let", "const", "static"].contains(&keyword) && !more {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    at
}
