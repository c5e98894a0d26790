//! Small made-up packages: each kind of violation is found, and what is none is not.

use crate::modules::Tree;
use crate::rules;

fn tree(files: &[(&str, &str)]) -> Tree {
    let sources: Vec<(String, String)> =
        files.iter().map(|(path, text)| (format!("src/{path}"), (*text).to_owned())).collect();
    Tree::new(&sources)
}

fn found(files: &[(&str, &str)]) -> Vec<String> {
    rules::layering(&tree(files))
}

/// One violation, which begins so.
#[track_caller]
fn one(files: &[(&str, &str)], wanted: &str) {
    let found = found(files);
    assert!(found.len() == 1 && found[0].starts_with(wanted), "wanted {wanted:?}, found {found:#?}");
}

#[track_caller]
fn none(files: &[(&str, &str)]) {
    assert_eq!(found(files), [""; 0]);
}

const ROOT: (&str, &str) =
    ("lib.rs", "pub mod chain; pub mod error; pub mod format; pub mod ops; pub mod server;\npub use error::Error;");

#[test]
fn imports_upwards() {
    let ops = ("ops/mod.rs", "pub fn mount() {}");
    let wanted = "src/chain/mod.rs:2: chain imports ops, which lies above";
    one(&[ROOT, ops, ("chain/mod.rs", "\nuse crate::ops::mount;")], wanted);
    one(&[ROOT, ops, ("chain/mod.rs", "\nfn f() { crate::ops::mount() }")], wanted);
    one(&[ROOT, ops, ("chain/mod.rs", "\nuse super::ops;")], wanted);
    one(
        &[
            ROOT,
            ops,
            ("chain/mod.rs", "\nuse {crate::{ops::mount as m, error::Error}};"),
            ("error.rs", "pub struct Error;"),
        ],
        wanted,
    );
    one(
        &[ROOT, ops, ("chain/mod.rs", "\nuse crate::ops::*;\n\nfn f() { mount() }")],
        "src/chain/mod.rs:4: chain imports ops",
    );
    one(&[ROOT, ops, ("chain/mod.rs", "mod inner {\nuse super::super::ops;\n}")], wanted);
    one(
        &[
            ROOT,
            ("ops/mod.rs", "pub mod mount;"),
            ("ops/mount.rs", ""),
            ("chain/mod.rs", "pub mod open;"),
            ("chain/open.rs", "\nuse super::super::ops::mount::Spec;"),
        ],
        "src/chain/open.rs:2: chain::open imports ops::mount, which lies above",
    );
}

#[test]
fn imports_beside() {
    let root = ("lib.rs", "pub mod capi;");
    one(
        &[root, ("capi/mod.rs", ""), ("bin/ploop/main.rs", "use ploop::capi;")],
        "src/bin/ploop/main.rs:1: bin::ploop imports capi, which lies beside",
    );
}

#[test]
fn imports_that_one_room_must_not_make() {
    let cases = [
        ("ops", "server", "src/ops/x.rs:1: ops::x imports server::x, which ops must not"),
        ("capi", "server", "src/capi/x.rs:1: capi::x imports server::x, which capi must not"),
        ("fs", "server", "src/fs/x.rs:1: fs::x imports server::x, which fs must not"),
        ("device", "server/worker", "src/device/x.rs:1: device::x imports server::worker::x, which device must not"),
        (
            "server/online",
            "server/supervisor",
            "src/server/online/x.rs:1: server::online::x imports server::supervisor::x, which server::online must not",
        ),
        (
            "server/worker",
            "server/transport/fuse_loop",
            "src/server/worker/x.rs:1: server::worker::x imports server::transport::fuse_loop::x, which server::worker must not",
        ),
        (
            "engine",
            "server/transport",
            "src/engine/x.rs:1: engine::x imports server::transport::x, which engine must not",
        ),
    ];
    for (from, to, wanted) in cases {
        let import = format!("use crate::{}::x::Thing;", to.replace('/', "::"));
        let (from, to) = (format!("{from}/x.rs"), format!("{to}/x.rs"));
        one(&[("lib.rs", ""), (&from, &import), (&to, "pub struct Thing;")], wanted);
    }
    one(
        &[
            ("lib.rs", ""),
            ("server/mod.rs", "pub fn serve() {}"),
            ("bin/ploop/main.rs", "fn main() { ploop::server::serve() }"),
        ],
        "src/bin/ploop/main.rs:1: bin::ploop imports server, which bin::ploop must not",
    );
    one(
        &[("lib.rs", ""), ("sys/mod.rs", "use crate::format::bat;"), ("format/mod.rs", "")],
        "src/sys/mod.rs:1: sys imports format, which lies above",
    );
    one(
        &[("lib.rs", ""), ("sys/mod.rs", "use crate::report::cancel;"), ("report/mod.rs", "")],
        "src/sys/mod.rs:1: sys imports report, which lies above",
    );
    one(&[("lib.rs", ""), ("misc/mod.rs", "")], "src/misc/mod.rs:1: misc is no room of the plan");
}

#[test]
fn re_exports_are_followed_to_the_definition() {
    let root = ("lib.rs", "pub mod chain; pub mod ops; pub mod image;");
    one(
        &[root, ("ops/mod.rs", "pub fn f() {}"), ("chain/mod.rs", "\npub use crate::ops::f;"), ("image/mod.rs", "")],
        "src/chain/mod.rs:2: chain imports ops, which lies above",
    );
    // What a facade re-exports of its children is theirs: no import of the facade, and no cycle with it.
    none(&[
        root,
        ("chain/mod.rs", "mod open; mod close;\npub use open::open; pub(crate) use close::close;"),
        ("chain/open.rs", "use super::close;\npub fn open() { close() }"),
        ("chain/close.rs", "pub fn close() {}"),
        ("ops/mod.rs", "use crate::chain::open;"),
    ]);
}

#[test]
fn cycles_between_files() {
    let root = ("lib.rs", "pub mod chain; pub mod error;");
    let parent = ("chain/mod.rs", "mod a; mod b; mod c;");
    one(
        &[
            root,
            parent,
            ("chain/a.rs", "use super::b::B;\npub struct A;"),
            ("chain/b.rs", "use super::a::A;\npub struct B;"),
        ],
        "src/chain/a.rs:1: chain::a imports chain::b, which forms a cycle: chain::a > chain::b > chain::a",
    );
    one(
        &[
            root,
            parent,
            ("chain/a.rs", "use super::b::B;"),
            ("chain/b.rs", "\nuse super::c::C;"),
            ("chain/c.rs", "fn f() { super::a::f() }"),
        ],
        "src/chain/a.rs:1: chain::a imports chain::b, which forms a cycle: chain::a > chain::b > chain::c > chain::a",
    );
    // The same name that goes through the parent's private import.
    none(&[root, parent, ("chain/a.rs", "use super::b::B;"), ("chain/b.rs", "pub struct B;")]);
}

#[test]
fn a_module_is_made_of_its_descendants() {
    let root = ("lib.rs", "pub mod chain; pub mod error;\nuse chain::Chain;\npub struct Root;");
    // The parent uses its child, by an import or a path, and the child uses the parent's items.
    none(&[
        root,
        ("chain/mod.rs", "mod a;\nuse a::A;\npub struct Chain(A);"),
        ("chain/a.rs", "use super::Chain;\nuse crate::Root;\npub struct A;"),
    ]);
    none(&[
        root,
        ("chain/mod.rs", "mod a;\nfn f() { a::g() }\npub struct Chain;"),
        ("chain/a.rs", "use super::Chain;\npub fn g() {}"),
    ]);
    // The parent's file stands beside the folder, and the descendant is a grandchild.
    none(&[
        root,
        ("chain.rs", "mod a;\nuse a::b::B;\npub struct Chain(B);"),
        ("chain/a.rs", "pub mod b;"),
        ("chain/a/b.rs", "use crate::chain::Chain;\npub struct B;"),
    ]);
    // The same of a command's root.
    none(&[
        root,
        ("chain.rs", "pub struct Chain;"),
        ("bin/x/main.rs", "mod a;\nfn main() { a::run() }\npub struct Options;"),
        ("bin/x/a.rs", "use crate::Options;\npub fn run() {}"),
    ]);
}

#[test]
fn cycles_across_folders() {
    let root = ("lib.rs", "pub mod chain;");
    // Two folders whose children use each other's modules.
    one(
        &[
            root,
            ("chain/mod.rs", "pub mod a; pub mod b;\npub struct Chain;"),
            ("chain/a/mod.rs", "pub mod x;\npub struct A;"),
            ("chain/a/x.rs", "use crate::chain::b::B;\npub struct X;"),
            ("chain/b/mod.rs", "use super::a::x::X;\npub struct B;"),
        ],
        "src/chain/a/x.rs:1: chain::a::x imports chain::b, which forms a cycle: chain::a::x > chain::b > chain::a::x",
    );
    // The child uses its parent, which gets back to the child through its sibling.
    one(
        &[
            root,
            ("chain/mod.rs", "pub mod a; pub mod b;"),
            ("chain/a/mod.rs", "pub mod x;\nuse super::b::B;\npub struct A(B);"),
            ("chain/a/x.rs", "use super::A;\npub struct X;"),
            ("chain/b.rs", "use super::a::x::X;\npub struct B;"),
        ],
        "src/chain/a/mod.rs:2: chain::a imports chain::b, which forms a cycle: \
         chain::a > chain::b > chain::a::x > chain::a",
    );
    // Two siblings in a folder.
    one(
        &[
            root,
            ("chain/mod.rs", "mod a; mod b;\nuse a::A;\nuse b::B;"),
            ("chain/a.rs", "pub struct A(super::b::B);"),
            ("chain/b.rs", "pub struct B(super::a::A);"),
        ],
        "src/chain/a.rs:1: chain::a imports chain::b, which forms a cycle: chain::a > chain::b > chain::a",
    );
}

#[test]
fn what_is_no_import() {
    let ops = ("ops/mod.rs", "pub fn mount() {}");
    for text in [
        "// use crate::ops::mount;\n/* crate::ops::mount() /* */ */\n/// [`mount`](crate::ops::mount)\nfn f() {}",
        "fn f() { let _ = (\"crate::ops::mount\", r#\"\" crate::ops::mount\"#, b\"crate::ops::mount\", '\"', 'a'); }",
        "#[cfg(test)]\nmod tests {\n use crate::ops::mount;\n}",
        "#[cfg(test)]\nuse crate::ops::{mount};\n#[test]\nfn t() { crate::ops::mount() }",
        "pub(in crate::chain) fn f() {}\nuse std::{io, fs::File};",
        "struct S<'a> { #[cfg(test)] a: crate::ops::T<'a>, b: &'a u8 }",
    ] {
        none(&[ROOT, ops, ("chain/mod.rs", text)]);
    }
    none(&[ROOT, ops, ("chain/mod.rs", "#[cfg(test)]\nmod tests;"), ("chain/tests.rs", "use crate::ops::mount;")]);
    none(&[
        ROOT,
        ops,
        ("chain/mod.rs", "#[cfg(test)]\n#[allow(unused)]\npub mod kit;"),
        ("chain/kit/mod.rs", "mod x;"),
        ("chain/kit/x.rs", "use crate::ops;"),
    ]);
    one(&[ROOT, ops, ("chain/mod.rs", "#[cfg(not(test))]\nuse crate::ops;")], "src/chain/mod.rs:2: chain imports ops");
    one(
        &[ROOT, ops, ("chain/mod.rs", "#[cfg(test)]\nfn a() { {} }\nuse crate::ops;")],
        "src/chain/mod.rs:3: chain imports ops",
    );
}

#[test]
fn macros_belong_to_their_file() {
    let error = ("error.rs", "#[macro_export]\nmacro_rules! bail { () => {} }\npub struct Error;");
    none(&[ROOT, error, ("format/mod.rs", "fn f() { crate::bail!() }\nfn g() -> crate::Error { crate::Error }")]);
}

#[test]
fn sizes() {
    let body = |n: usize| format!("fn f(a: [u8; 2]) {{\n{}}}\n", "    ();\n".repeat(n - 2));
    let sizes = |files: &[(&str, &str)]| {
        let lines: Vec<(String, usize)> = files.iter().map(|(p, t)| (format!("src/{p}"), t.lines().count())).collect();
        rules::sizes(&tree(files), &lines)
    };
    assert_eq!(sizes(&[("lib.rs", &body(90))]), [""; 0]);
    assert_eq!(sizes(&[("lib.rs", &body(91))]), ["src/lib.rs:1: fn f has 91 lines, wanted: at most 90"]);
    let test = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", body(120));
    assert_eq!(sizes(&[("lib.rs", &test)]), [""; 0]);
    let long = "//\n".repeat(501);
    assert_eq!(sizes(&[("a.rs", &long), ("b.rs", ""), ("c.rs", "")]), ["src/a.rs: 501 lines, wanted: at most 500"]);
    let middle = "//\n".repeat(160);
    assert_eq!(sizes(&[("a.rs", &middle)]), ["src: the median file has 160 lines, wanted: below 160"]);
}
