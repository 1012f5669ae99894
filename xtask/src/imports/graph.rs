//! Which file imports which, and the cycles in that.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use super::modules::{Crate, ModuleId, Named, Use};

/// A path in the file `from` that leads to an item of the file `to`. Both are below `src`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    pub from: PathBuf,
    pub to: PathBuf,
    pub line: usize,
    /// As it is written.
    pub path: String,
}

/// Every import of the crate from one of its files into another, in order.
///
/// An import leads to the file that defines the item, through whatever re-exports it. So `mod x;` is none, and `pub use` of an
/// item of a child is none, unless the parent uses that item itself. A `use` that only names a module is none: the paths
/// that begin with that name are.
pub fn imports(read: &Crate) -> Vec<Import> {
    let mut found = BTreeSet::new();
    for (id, module) in read.modules.iter().enumerate() {
        let mut add = |named: &Named, to: &Path| {
            if to != module.file {
                found.insert(Import {
                    from: module.file.clone(),
                    to: to.to_owned(),
                    line: named.line,
                    path: named.words.join("::"),
                });
            }
        };
        // `Header::new` says nothing that `use header::Header` does not.
        let is_known = |name: &String| {
            let of_name = |one: &&Use| one.name.as_ref() == Some(name);
            let mut uses = module.uses.iter().filter(of_name);
            uses.any(|one| {
                let target = read.resolve(id, &one.path.words);
                target.is_some_and(|target| target.is_item)
            })
        };
        for named in &module.paths {
            let target = read.resolve(id, &named.words);
            if let Some(target) = target.filter(|_| !is_known(&named.words[0])) {
                add(named, &read.modules[target.module].file);
            }
        }
        for one in &module.uses {
            let Some(target) = read.resolve(id, &one.path.words) else {
                continue;
            };
            let is_used = one.name.as_ref().is_some_and(|n| module.words.contains(n));
            let is_only_handed_on = one.is_public && read.is_below(target.module, id) && !is_used;
            if (target.is_item || one.is_glob) && !is_only_handed_on {
                add(&one.path, &read.modules[target.module].file);
            }
        }
    }
    found.into_iter().collect()
}

/// What a path leads to: a module, or an item in it.
#[derive(Debug, Clone, Copy)]
struct Target {
    module: ModuleId,
    is_item: bool,
}

/// The `use` lines that were followed for one path, by module and number. Each leads on once: `use x::x` is of another crate,
/// and not of itself.
type Followed = HashSet<(ModuleId, usize)>;

impl Crate {
    /// What `words` mean in the module `from`. `None`: something of another crate, or a local name.
    fn resolve(&self, from: ModuleId, words: &[String]) -> Option<Target> {
        self.resolve_in(from, words, &mut Followed::new())
    }

    fn resolve_in(
        &self,
        from: ModuleId,
        words: &[String],
        followed: &mut Followed,
    ) -> Option<Target> {
        let (first, rest) = words.split_first()?;
        match first.as_str() {
            "crate" => self.walk(self.root_of(from), rest, followed),
            "self" => self.walk(from, rest, followed),
            "super" => {
                let parent = self.modules[from].parent?;
                match rest.first().map(String::as_str) {
                    Some("super") => self.resolve_in(parent, rest, followed),
                    _ => self.walk(parent, rest, followed),
                }
            }
            name if name == self.name => self.walk(self.library?, rest, followed),
            _ => self.named(from, words, followed),
        }
    }

    /// What `words` mean behind the path of `module`. The item of an unknown name is the module's own: a macro made it.
    fn walk(&self, module: ModuleId, words: &[String], followed: &mut Followed) -> Option<Target> {
        let is_item = !words.is_empty();
        let own = Target { module, is_item };
        match is_item {
            true => self.named(module, words, followed).or(Some(own)),
            false => Some(own),
        }
    }

    /// What a name that stands in `module`, and the words behind it, mean.
    fn named(&self, module: ModuleId, words: &[String], followed: &mut Followed) -> Option<Target> {
        let (first, rest) = words.split_first()?;
        let here = &self.modules[module];
        if let Some(&child) = here.children.get(first) {
            return self.walk(child, rest, followed);
        }
        for (n, one) in here.uses.iter().enumerate() {
            if one.name.as_ref() != Some(first) || !followed.insert((module, n)) {
                continue;
            }
            let whole = [&one.path.words[..], rest].concat();
            if let Some(target) = self.resolve_in(module, &whole, followed) {
                return Some(target);
            }
        }
        if here.items.contains(first) {
            return Some(Target {
                module,
                is_item: true,
            });
        }
        here.uses.iter().enumerate().find_map(|(n, one)| {
            if !one.is_glob || !followed.insert((module, n)) {
                return None;
            }
            let target = self.resolve_in(module, &one.path.words, followed)?;
            match target.is_item {
                // The variants of an enum.
                true => None,
                false => self.named(target.module, words, followed),
            }
        })
    }

    fn root_of(&self, mut module: ModuleId) -> ModuleId {
        while let Some(parent) = self.modules[module].parent {
            module = parent;
        }
        module
    }

    /// Whether `module` is in `above`, at any depth.
    fn is_below(&self, module: ModuleId, above: ModuleId) -> bool {
        let parents = std::iter::successors(Some(module), |&id| self.modules[id].parent);
        parents.skip(1).any(|id| id == above)
    }
}

/// The files that import each other, directly or through others: each cycle with its files in order.
pub fn cycles(imports: &[Import]) -> Vec<Vec<PathBuf>> {
    let mut edges: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
    for import in imports {
        let to = edges.entry(&import.from).or_default();
        to.insert(&import.to);
    }
    let reached = |from: &Path| {
        let mut reached = BTreeSet::new();
        let mut left: Vec<&Path> = edges.get(from).into_iter().flatten().copied().collect();
        while let Some(file) = left.pop() {
            if reached.insert(file) {
                left.extend(edges.get(file).into_iter().flatten());
            }
        }
        reached
    };
    let reach: BTreeMap<&Path, BTreeSet<&Path>> =
        edges.keys().map(|&file| (file, reached(file))).collect();
    let mut done = HashSet::new();
    let mut cycles = Vec::new();
    for (&file, from_here) in &reach {
        if !from_here.contains(file) || done.contains(file) {
            continue;
        }
        let comes_back = |other: &&Path| reach.get(other).is_some_and(|there| there.contains(file));
        let cycle: Vec<&Path> = from_here.iter().copied().filter(comes_back).collect();
        done.extend(cycle.iter().copied());
        cycles.push(cycle.into_iter().map(Path::to_owned).collect());
    }
    cycles
}
