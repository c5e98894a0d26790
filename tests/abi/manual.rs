//! The part of libploop(3) that is made from the headers: functions, structs, error codes, each with its comment.

use std::fmt::Write;
use std::path::Path;

const BEGIN: &str = "cargo test --test abi\n";
const END: &str = ".\\\" Up to here.\n";

/// A comment and the item that follows it.
struct Item {
    comment: String,
    code: Vec<String>,
}

/// The commented items of a header, in its order.
fn items(header: &str) -> Vec<Item> {
    let mut items = Vec::new();
    let mut lines = header.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(first) = line.strip_prefix("/*") else { continue };
        let mut comment = first.to_owned();
        while !comment.ends_with("*/") {
            let next = lines.next().expect("a comment ends").trim_start();
            comment.push(' ');
            comment.push_str(next.strip_prefix("* ").unwrap_or(next));
        }
        let mut code = Vec::new();
        while let Some(line) = lines.next_if(|l| !l.trim().is_empty()) {
            code.push(line.to_owned());
        }
        let comment = comment.trim_end_matches("*/").split_whitespace().collect::<Vec<_>>().join(" ");
        items.push(Item { comment, code });
    }
    items
}

/// Text as the typesetter wants it.
fn escaped(text: &str) -> String {
    let out = text.replace('\\', "\\e").replace('-', "\\-").replace('~', "\\(ti");
    if out.starts_with(['.', '\'']) { format!("\\&{out}") } else { out }
}

/// A function's prototype, without the mark of old ones.
fn prototype(item: &Item) -> Option<(String, bool)> {
    let code = item.code.join(" ");
    let old = code.starts_with("PLOOP_DEPRECATED ");
    let code = code.trim_start_matches("PLOOP_DEPRECATED ").to_owned();
    (code.ends_with(");") && !code.starts_with('#')).then_some((code, old))
}

/// Values and comments of the error codes.
fn codes(item: &Item, page: &mut String) {
    let mut comment = "";
    for line in &item.code {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("/* ") {
            comment = text.trim_end_matches(" */");
        } else if let Some((name, number)) = line.trim_end_matches(',').split_once(" = ") {
            if !name.contains("RESERVED") {
                let _ = writeln!(page, ".TP\n.B {name} {number}\n{}", escaped(comment));
            }
            comment = "";
        }
    }
}

/// The made part of the page.
pub fn made(header: &str, table: &str) -> String {
    let (mut functions, mut structs, mut errors, mut defines) =
        (String::new(), String::new(), String::new(), String::new());
    for item in items(header).iter().chain(&items(table)) {
        let text = escaped(&item.comment);
        let first = item.code.first().map_or("", String::as_str);
        if let Some((code, old)) = prototype(item) {
            let note = if old { " Deprecated." } else { "" };
            let _ = writeln!(functions, ".TP\n.B {}\n{text}{note}", escaped(&code));
        } else if first.starts_with("enum {") {
            codes(item, &mut errors);
        } else if let Some(define) = first.strip_prefix("#define ") {
            let _ = writeln!(defines, ".TP\n.B {}\n{text}", escaped(define));
        } else if item.code.len() > 1 && (first.starts_with("struct ") || first.starts_with("enum ")) {
            let code = item.code.iter().map(|l| escaped(l) + "\n").collect::<String>();
            let between = if structs.is_empty() { "" } else { ".PP\n" };
            let _ = writeln!(structs, "{between}{text}\n.PP\n.RS 4\n.nf\n{code}.fi\n.RE");
        }
    }
    format!(
        "{functions}.SH STRUCTURES\n{structs}.SH CONSTANTS\n{defines}.SH ERRORS\n\
         Functions that return 0 on success return one of these otherwise; a few return \\-1, as their text says.\n{errors}"
    )
}

/// The page, the made part taken out of it.
pub fn split(page: &str) -> (&str, &str, &str) {
    let begin = page.find(BEGIN).expect("the page has the first mark") + BEGIN.len();
    let end = page.find(END).expect("the page has the second mark");
    (&page[..begin], &page[begin..end], &page[end..])
}

pub fn path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man/libploop.3")
}
