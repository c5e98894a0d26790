//! The library's soname, and the C header made from `src/capi` into OUT_DIR. The header that is installed is the committed
//! one in `include/`; a test compares the two.

use std::env;
use std::fs;
use std::path::PathBuf;

/// Files with public items of the C header, in the header's order.
const SOURCES: [&str; 7] = ["consts", "types", "descriptor", "devices", "mount", "snapshots", "log"];

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libploop.so.1");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cbindgen.toml");

    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is readable");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in SOURCES {
        let file = format!("src/capi/{name}.rs");
        println!("cargo::rerun-if-changed={file}");
        builder = builder.with_src(root.join(file));
    }
    let mut header = Vec::new();
    builder.generate().expect("src/capi can be described in C").write(&mut header);
    let header = String::from_utf8(header).expect("the sources are UTF-8");
    fs::write(out.join("libploop.h"), tidy(&header)).expect("OUT_DIR is writable");
}

/// What cbindgen cannot be told: short comments on one line, no `//` comments and no comma after the last enumerator
/// (C89 has neither), negative numbers in parentheses.
fn tidy(header: &str) -> String {
    let lines: Vec<&str> = header.lines().collect();
    let mut out: Vec<String> = Vec::new();
    let mut i = 0;
    while i < lines.len() {
        let line = lines[i];
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim() == "/*" {
            let length = lines[i..].iter().position(|l| l.trim() == "*/").expect("a comment ends");
            let body: Vec<&str> = lines[i + 1..i + length].iter().map(|l| l.trim().trim_start_matches("* ")).collect();
            match body[..] {
                [only] => out.push(format!("{indent}/* {only} */")),
                _ => {
                    out.push(line.to_string());
                    out.extend(body.iter().map(|l| format!("{indent} * {l}").trim_end().replace(" * *", " *")));
                    out.push(format!("{indent} */"));
                }
            }
            i += length;
        } else if let Some((code, comment)) = line.split_once("//") {
            out.push(format!("{} /* {} */", code.trim_end(), comment.trim()));
        } else {
            if line.trim() == "};"
                && let Some(last) = out.last_mut()
            {
                *last = last.trim_end_matches(',').to_string();
            }
            match line.split_once(" -") {
                Some((define, number)) if define.starts_with("#define") => out.push(format!("{define} (-{number})")),
                _ => out.push(line.replace("enum  {", "enum {")),
            }
        }
        i += 1;
    }
    out.dedup_by(|a, b| a.is_empty() && b.is_empty());
    out.join("\n") + "\n"
}
