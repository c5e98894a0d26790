//! The library's soname, and the C header made from `src/capi` into OUT_DIR. The header that is installed is the committed
//! one in `include/`; a test compares the two.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Files with public items of the C header, in the header's order.
const SOURCES: [&str; 12] = [
    "consts",
    "types",
    "descriptor",
    "devices",
    "mount",
    "snapshots",
    "log",
    "sizes",
    "conversions",
    "copies",
    "discard",
    "descriptor_files",
];

/// File with the functions of the feature `vz`.
const NEWER: &str = "vz";

/// File with the table of dynload.h.
const TABLE: &str = "dynload";

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libploop.so.1");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cbindgen.toml");

    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is readable");
    for name in SOURCES.iter().chain(&[TABLE, NEWER]) {
        println!("cargo::rerun-if-changed=src/capi/{name}.rs");
    }
    fs::write(out.join("libploop.h"), header(&root, config.clone(), &SOURCES)).expect("OUT_DIR is writable");
    let table = dynload(&header(&root, config.clone(), &["types", TABLE]));
    fs::write(out.join("dynload.h"), table).expect("OUT_DIR is writable");
    let newer = newer(&header(&root, config, &["types", NEWER]));
    fs::write(out.join("libploop_vz.h"), newer).expect("OUT_DIR is writable");
}

/// The header of these files of `src/capi`.
fn header(root: &Path, config: cbindgen::Config, sources: &[&str]) -> String {
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in sources {
        builder = builder.with_src(root.join(format!("src/capi/{name}.rs")));
    }
    let mut header = Vec::new();
    builder.generate().expect("src/capi can be described in C").write(&mut header);
    tidy(&String::from_utf8(header).expect("the sources are UTF-8"))
}

/// dynload.h, which follows libploop.h: of a header with the types of both, the table and its function.
fn dynload(header: &str) -> String {
    let from = |title: &str, end: &str| {
        let at = header.find(title).expect("the table has a comment");
        let length = header[at..].find(end).expect("the item ends") + end.len();
        &header[at..at + length]
    };
    let table = from("/*\n * The functions of libploop.h", "\n};\n");
    let function = from("/* Stores the address", ");\n");
    format!(
        "/* For programs that load libploop.so.1 by dlopen(). Generated from src/capi. */\n\n\
         #ifndef _PLOOP_DYNLOAD_H_\n#define _PLOOP_DYNLOAD_H_\n\n#include \"libploop.h\"\n\n{table}\n#ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n\
         {function}\n#ifdef __cplusplus\n}}\n#endif\n\n#endif /* _PLOOP_DYNLOAD_H_ */\n"
    )
}

/// libploop_vz.h, which adds to libploop.h: of a header with the types of both, its struct and functions.
fn newer(header: &str) -> String {
    let (_, of_struct) =
        header.split_once("/* Size and use of a disk's file system, and its nodes. */\n").expect("the struct");
    let (of_struct, _) = of_struct.split_once("\n};\n").expect("the struct ends");
    let (_, functions) = header.split_once("#endif /* __cplusplus */\n").expect("the functions begin");
    let (functions, _) = functions.split_once("#ifdef __cplusplus").expect("the functions end");
    format!(
        "/*\n * Functions of the newer line of the library (Virtuozzo) beside those of the classic: of a library built with the Cargo\n \
         * feature vz. Generated from src/capi.\n */\n\n#ifndef _LIBPLOOP_VZ_H_\n#define _LIBPLOOP_VZ_H_\n\n#include \
         <ploop/libploop.h>\n\n/* Size and use of a disk's file system, and its nodes. */\n{of_struct}\n}};\n\n#ifdef \
         __cplusplus\nextern \"C\" {{\n#endif\n{functions}#ifdef __cplusplus\n}}\n#endif\n\n#endif /* _LIBPLOOP_VZ_H_ */\n"
    )
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
