//! The modules below src and which file imports from which.
//!
//! An import is what a file names of another file's, in a `use` or by a path in code, followed through re-exports to the
//! file that defines it. The declaration of a module and the re-export of a module's own children are no imports, and tests
//! do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::source::{self, Named, Source};

pub type Name = Vec<String>;

#[derive(Default)]
struct Module {
    file: usize,
    children: BTreeSet<String>,
    items: BTreeSet<String>,
    /// What `use` brings in, by name.
    brought: BTreeMap<String, Name>,
    /// Modules of which all names are brought in.
    globs: Vec<Name>,
}

pub struct File {
    /// Below the package's folder.
    pub path: String,
    pub name: Name,
    pub source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    pub from: usize,
    pub to: usize,
    pub line: usize,
}

pub struct Tree {
    pub files: Vec<File>,
    modules: BTreeMap<Name, Module>,
}

enum Found {
    Module(Name),
    /// Something that this module defines.
    Item(Name),
}

/// The module of a file below src: `src/bin` is a module too, whose children are crates of their own.
fn name_of(path: &str) -> Name {
    let path = path.strip_prefix("src/").unwrap_or(path).trim_end_matches(".rs");
    let mut name: Name = path.split('/').map(str::to_owned).collect();
    let last = name.last().map_or("", String::as_str);
    if last == "mod" || path == "lib" || (last == "main" && name[0] == "bin") {
        name.pop();
    }
    name
}

/// The root of the crate that a module belongs to.
fn root(of: &[String]) -> Name {
    match of.first() {
        Some(bin) if bin == "bin" => of[..2.min(of.len())].to_vec(),
        _ => Name::new(),
    }
}

/// All `.rs` files below src, with their text.
pub fn read_all(package: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![package.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let below = path.strip_prefix(package).unwrap().to_str().unwrap().to_owned();
                found.push((below, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

impl Tree {
    pub fn new(sources: &[(String, String)]) -> Tree {
        let mut files: Vec<File> = (sources.iter())
            .map(|(path, text)| File { path: path.clone(), name: name_of(path), source: source::read(text) })
            .collect();
        // Files that only tests compile, and what is below them.
        let tests: Vec<Name> = (files.iter())
            .flat_map(|f| f.source.test_modules.iter().map(|m| [&f.name[..], std::slice::from_ref(m)].concat()))
            .collect();
        files.retain(|f| !tests.iter().any(|t| f.name.starts_with(t)));
        let mut tree = Tree { files: Vec::new(), modules: BTreeMap::new() };
        for (at, file) in files.iter().enumerate() {
            tree.enter(at, file);
        }
        for (at, file) in files.iter().enumerate() {
            tree.modules.entry(file.name.clone()).or_default().file = at;
            // A folder is a module even if its file is missing; the crates of the commands have no parent.
            for n in root(&file.name).len()..file.name.len() {
                let children = &mut tree.modules.entry(file.name[..n].to_vec()).or_default().children;
                children.insert(file.name[n].clone());
            }
        }
        tree.files = files;
        tree
    }

    fn enter(&mut self, at: usize, file: &File) {
        let inside = |within: &Name| [&file.name[..], within].concat();
        for (within, child) in &file.source.modules {
            self.modules.entry(inside(within)).or_default().children.insert(child.clone());
            let own = [&inside(within)[..], std::slice::from_ref(child)].concat();
            self.modules.entry(own).or_default().file = at;
        }
        for (within, item) in &file.source.items {
            self.modules.entry(inside(within)).or_default().items.insert(item.clone());
        }
        for named in &file.source.named {
            let module = self.modules.entry(inside(&named.within)).or_default();
            match named.brings.as_deref() {
                None => {}
                Some("*") => module.globs.push(named.path[..named.path.len() - 1].to_vec()),
                Some(name) => drop(module.brought.insert(name.to_owned(), named.path.clone())),
            }
        }
        for name in &file.source.exported_macros {
            let place = [&["crate".to_owned()], &file.name[..], std::slice::from_ref(name)].concat();
            self.modules.entry(root(&file.name)).or_default().brought.insert(name.clone(), place);
        }
    }

    /// What a name means inside a module.
    fn look(&self, module: &[String], name: &str, seen: &mut Vec<(Name, String)>) -> Option<Found> {
        let key = (module.to_vec(), name.to_owned());
        let here = self.modules.get(module)?;
        if here.children.contains(name) {
            return Some(Found::Module([module, &[name.to_owned()]].concat()));
        }
        if here.items.contains(name) {
            return Some(Found::Item(module.to_vec()));
        }
        if seen.contains(&key) {
            return None;
        }
        seen.push(key);
        if let Some(path) = here.brought.get(name) {
            return self.resolve(module, path, seen);
        }
        here.globs.iter().find_map(|glob| match self.resolve(module, glob, seen)? {
            Found::Module(m) => self.look(&m, name, seen),
            Found::Item(_) => None,
        })
    }

    /// Follows a path that a module names; nothing if it leads out of the package.
    fn resolve(&self, from: &[String], path: &[String], seen: &mut Vec<(Name, String)>) -> Option<Found> {
        let mut rest = path;
        let mut now = match path[0].as_str() {
            "crate" => Found::Module(root(from)),
            "self" => Found::Module(from.to_vec()),
            "super" => Found::Module(from[..from.len().checked_sub(1)?].to_vec()),
            // The commands name the library by its crate.
            "ploop" if from.first().is_some_and(|f| f == "bin") => Found::Module(Name::new()),
            first => self.look(from, first, seen)?,
        };
        rest = &rest[1..];
        while let (Found::Module(module), [next, ..]) = (&now, rest) {
            now = match next.as_str() {
                "super" => Found::Module(module[..module.len().checked_sub(1)?].to_vec()),
                // What a macro defines is not seen here: it belongs to the module that the path names.
                next => match self.look(module, next, seen) {
                    Some(found) => found,
                    None if self.modules.contains_key(module) => Found::Item(module.clone()),
                    None => return None,
                },
            };
            rest = &rest[1..];
        }
        Some(now)
    }

    /// The files that a path of `file` leads to, with the lines.
    fn targets(&self, file: &File, named: &Named) -> Vec<(usize, usize)> {
        let module = [&file.name[..], &named.within].concat();
        let file_of = |found: Found| {
            let (Found::Module(name) | Found::Item(name)) = found;
            self.modules.get(&name).map(|m| m.file)
        };
        if named.brings.as_deref() != Some("*") {
            let found = self.resolve(&module, &named.path, &mut Vec::new()).and_then(file_of);
            return found.map(|to| (to, named.line)).into_iter().collect();
        }
        match self.resolve(&module, &named.path[..named.path.len() - 1], &mut Vec::new()) {
            // Of a module's names those that the file uses.
            Some(Found::Module(from)) => (file.source.words.iter())
                .filter(|(word, _)| !["self", "super", "crate"].contains(&word.as_str()))
                .filter_map(|(word, line)| Some((self.look(&from, word, &mut Vec::new()).and_then(file_of)?, *line)))
                .collect(),
            other => other.and_then(file_of).map(|to| (to, named.line)).into_iter().collect(),
        }
    }

    /// One for each pair of files, with the first line that makes it.
    pub fn imports(&self) -> Vec<Import> {
        let mut first = BTreeMap::new();
        for (from, file) in self.files.iter().enumerate() {
            for named in &file.source.named {
                for (to, line) in self.targets(file, named) {
                    let below = self.files[to].name.starts_with(&file.name);
                    if to == from || (named.public && below) {
                        continue;
                    }
                    let at: &mut usize = first.entry((from, to)).or_insert(line);
                    *at = line.min(*at);
                }
            }
        }
        first.into_iter().map(|((from, to), line)| Import { from, to, line }).collect()
    }
}
