//! Which room may import from which, and the sizes of files and functions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::modules::{Import, Tree};

/// From the top down: a room imports from rooms of lower lines, never from one above or beside it. So `sys` imports from
/// `units` and `error` alone.
const ROOMS: &[&[&str]] = &[
    &["capi", "bin"],
    &["ops"],
    &["fs"],
    &["device"],
    &["server"],
    &["chain"],
    &["image"],
    &["descriptor"],
    &["engine"],
    &["format"],
    // Errors' texts and progress: it uses `sys` and serves all above.
    &["report"],
    &["sys"],
    &["units"],
    &["error"],
];

/// Beside the order: what is on the left does not import from what is on the right, and why.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("capi", "server", "`device` is the one door to it"),
    // The other program, `ploop-server`, is the server.
    ("bin::ploop", "server", "`device` is the one door to it"),
    ("ops", "server", "`device` is the one door to it"),
    ("fs", "server", "what is inside a disk does not depend on who serves it"),
    ("device", "server::worker", "a driver talks to the supervisor"),
    ("server::online", "server::supervisor", "operations on a running chain know their host, not the event loop"),
    ("server::worker", "server::transport::fuse_loop", "the worker serves any transport"),
    ("server::worker", "server::transport::ublk", "the worker serves any transport"),
    ("server::worker", "server::transport::nbd", "the worker serves any transport"),
    ("engine", "server::transport", "the engine serves any transport"),
];

const MEDIAN_BELOW: usize = 160;
const LONGEST_FILE: usize = 500;
const LONGEST_FUNCTION: usize = 90;

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().rev().position(|line| line.contains(&room))
}

/// The module's name for messages.
fn shown(tree: &Tree, file: usize) -> String {
    match tree.files[file].name.join("::") {
        root if root.is_empty() => "the root of the library".into(),
        name => name,
    }
}

fn within(name: &[String], module: &str) -> bool {
    let module: Vec<&str> = module.split("::").collect();
    name.len() >= module.len() && name.iter().zip(module).all(|(a, b)| a == b)
}

/// All violations of the order of rooms, each with file and line.
pub fn layering(tree: &Tree) -> Vec<String> {
    let imports = tree.imports();
    let mut out: Vec<String> = imports.iter().filter_map(|i| order(tree, i)).collect();
    for file in &tree.files {
        if let Some(room) = file.name.first().filter(|room| rank(room).is_none()) {
            out.push(format!("{}:1: {room} is no room of the plan", file.path));
        }
    }
    out.extend(cycles(tree, &imports));
    out
}

fn order(tree: &Tree, import: &Import) -> Option<String> {
    let (from, to) = (&tree.files[import.from], &tree.files[import.to]);
    // The root declares the rooms and re-exports; the commands' crates have their own roots.
    let (a, b) = (from.name.first()?, to.name.first()?);
    let place = format!("{}:{}", from.path, import.line);
    let names = format!("{} imports {}", shown(tree, import.from), shown(tree, import.to));
    let said = FORBIDDEN.iter().find(|(left, right, _)| within(&from.name, left) && within(&to.name, right));
    if let Some((left, right, why)) = said {
        return Some(format!("{place}: {names}, which {left} must not ({right}: {why})"));
    }
    match (rank(a)?, rank(b)?) {
        (x, y) if y > x => Some(format!("{place}: {names}, which lies above")),
        (x, y) if y == x && a != b => Some(format!("{place}: {names}, which lies beside")),
        _ => None,
    }
}

/// Whether a module uses what it is made of: a module below it, at any depth. The root of a crate is made of all its
/// modules.
fn composes(tree: &Tree, import: &Import) -> bool {
    let (from, to) = (&tree.files[import.from].name, &tree.files[import.to].name);
    to.len() > from.len() && to.starts_with(from)
}

/// For each import that lies in a cycle the shortest one, each cycle once. A module's use of its own descendants is
/// composition and no edge; the descendant's use of its ancestor is one, so that a way through a third file still counts.
fn cycles(tree: &Tree, imports: &[Import]) -> Vec<String> {
    let imports: Vec<&Import> = imports.iter().filter(|i| !composes(tree, i)).collect();
    let mut next: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in &imports {
        next.entry(i.from).or_default().push(i.to);
    }
    let mut seen: BTreeSet<BTreeSet<usize>> = BTreeSet::new();
    let mut out = Vec::new();
    for import in imports {
        let Some(back) = way(&next, import.to, import.from) else { continue };
        if seen.insert(back.iter().copied().collect()) {
            let way: Vec<String> = [&[import.from], &back[..]].concat().iter().map(|f| shown(tree, *f)).collect();
            let (place, names) = (format!("{}:{}", tree.files[import.from].path, import.line), &way[1]);
            out.push(format!("{place}: {} imports {names}, which forms a cycle: {}", way[0], way.join(" > ")));
        }
    }
    out
}

/// The shortest way from one file to another, both included.
fn way(next: &BTreeMap<usize, Vec<usize>>, from: usize, to: usize) -> Option<Vec<usize>> {
    let mut before = BTreeMap::from([(from, from)]);
    let mut queue = VecDeque::from([from]);
    while let Some(at) = queue.pop_front() {
        if at == to {
            let mut way = vec![to];
            while *way.last()? != from {
                way.push(before[way.last()?]);
            }
            way.reverse();
            return Some(way);
        }
        for n in next.get(&at).into_iter().flatten() {
            if !before.contains_key(n) {
                before.insert(*n, at);
                queue.push_back(*n);
            }
        }
    }
    None
}

/// Files and functions that are too long. `lines`: of every file below src, tests too.
pub fn sizes(tree: &Tree, lines: &[(String, usize)]) -> Vec<String> {
    let mut out = Vec::new();
    let mut sorted: Vec<usize> = lines.iter().map(|(_, n)| *n).collect();
    sorted.sort_unstable();
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
    if median >= MEDIAN_BELOW {
        out.push(format!("src: the median file has {median} lines, wanted: below {MEDIAN_BELOW}"));
    }
    for (path, n) in lines.iter().filter(|(_, n)| *n > LONGEST_FILE) {
        out.push(format!("{path}: {n} lines, wanted: at most {LONGEST_FILE}"));
    }
    for file in &tree.files {
        for (name, line, n) in file.source.functions.iter().filter(|(_, _, n)| *n > LONGEST_FUNCTION) {
            out.push(format!("{}:{line}: fn {name} has {n} lines, wanted: at most {LONGEST_FUNCTION}", file.path));
        }
    }
    out
}
