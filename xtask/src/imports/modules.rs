//! The modules of one crate: what each declares, imports and names, read from its tokens.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context};

use super::tokens::{tokens, Token};

/// The number of a module in [`Crate::modules`].
pub type ModuleId = usize;

/// All modules that `lib.rs` and `main.rs` reach, without those that only tests have.
#[derive(Debug)]
pub struct Crate {
    /// As other crates and `main.rs` write it.
    pub name: String,
    /// The library's root, if there is one.
    pub library: Option<ModuleId>,
    pub modules: Vec<Module>,
}

/// A module: a file, or an inline `mod x { }` of one.
#[derive(Debug)]
pub struct Module {
    /// Below `src`.
    pub file: PathBuf,
    pub parent: Option<ModuleId>,
    pub children: HashMap<String, ModuleId>,
    /// What `use` brings here.
    pub uses: Vec<Use>,
    /// Paths of two and more words in the code.
    pub paths: Vec<Named>,
    /// Items that are defined here.
    pub items: HashSet<String>,
    /// All words outside of `use`, but those behind a dot.
    pub words: HashSet<String>,
    /// Where the files of its children are, below `src`.
    directory: PathBuf,
}

/// One leaf of a `use` tree.
#[derive(Debug)]
pub struct Use {
    pub path: Named,
    /// The name that it has here; `None` for `*` and `_`.
    pub name: Option<String>,
    pub is_glob: bool,
    /// `pub use`, however far.
    pub is_public: bool,
}

/// A path, and where it stands.
#[derive(Debug, Clone)]
pub struct Named {
    pub words: Vec<String>,
    pub line: usize,
}

impl Crate {
    /// Reads the crate in `dir`, which has `src/lib.rs`, `src/main.rs` or both.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let src = dir.join("src");
        let mut read = Crate {
            name: package_name(dir)?.replace('-', "_"),
            library: None,
            modules: Vec::new(),
        };
        for root in ["lib.rs", "main.rs"] {
            if src.join(root).is_file() {
                let id = read.add(root.into(), None, PathBuf::new());
                read.library = read.library.or((root == "lib.rs").then_some(id));
                read.read_file(&src, id)?;
            }
        }
        if read.modules.is_empty() {
            bail!(
                "{} has neither lib.rs nor main.rs: not a crate",
                src.display()
            );
        }
        Ok(read)
    }

    /// Each file once, in order.
    pub fn files(&self) -> Vec<&Path> {
        let files: BTreeMap<&Path, ()> = self
            .modules
            .iter()
            .map(|m| (m.file.as_path(), ()))
            .collect();
        files.into_keys().collect()
    }

    fn add(&mut self, file: PathBuf, parent: Option<ModuleId>, directory: PathBuf) -> ModuleId {
        self.modules.push(Module {
            file,
            parent,
            directory,
            children: HashMap::new(),
            uses: Vec::new(),
            paths: Vec::new(),
            items: HashSet::new(),
            words: HashSet::new(),
        });
        self.modules.len() - 1
    }

    fn read_file(&mut self, src: &Path, id: ModuleId) -> anyhow::Result<()> {
        let path = src.join(&self.modules[id].file);
        let source = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let tokens = tokens(&source);
        let mut parser = Parser {
            tokens: &tokens,
            at: 0,
        };
        self.read_module(src, id, &mut parser)
    }

    /// Reads up to the end of the module: that of the file, or the brace that closes an inline one.
    fn read_module(
        &mut self,
        src: &Path,
        id: ModuleId,
        parser: &mut Parser<'_>,
    ) -> anyhow::Result<()> {
        let mut depth = 0_usize;
        while let Some((token, line)) = parser.tokens.get(parser.at) {
            match token {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') if depth == 0 => {
                    parser.at += 1;
                    return Ok(());
                }
                Token::Mark('}') => depth -= 1,
                Token::Mark('#') if parser.is_for_tests() => {
                    parser.skip_item();
                    continue;
                }
                Token::Word(word) if word == "mod" => {
                    if let Some((name, is_inline)) = parser.module() {
                        self.read_child(src, id, &name, is_inline, parser)?;
                        continue;
                    }
                }
                Token::Word(word) if word == "use" && !parser.mark(1, '<') => {
                    let is_public = parser.is_public();
                    parser.at += 1;
                    let mut leaves = Vec::new();
                    parser.use_tree(&mut Vec::new(), &mut leaves);
                    let line = *line;
                    let uses = leaves
                        .into_iter()
                        .filter_map(|leaf| leaf.at(line, is_public));
                    self.modules[id].uses.extend(uses);
                    continue;
                }
                Token::Word(word) => {
                    let module = &mut self.modules[id];
                    let is_field = parser.is_behind(|before| before.is_mark('.'));
                    if !is_field {
                        module.words.insert(word.clone());
                    }
                    if depth == 0 && DEFINES.contains(&word.as_str()) {
                        module.items.extend(parser.word(1).map(str::to_owned));
                    }
                    let is_behind = |before: &Token| {
                        before.is_mark('.') || *before == Token::Colons || before.is_word("in")
                    };
                    if parser.tokens.get(parser.at + 1).map(|t| &t.0) == Some(&Token::Colons)
                        && !parser.is_behind(is_behind)
                    {
                        let line = *line;
                        let words = parser.path();
                        if words.len() > 1 {
                            module.paths.push(Named { words, line });
                        }
                        continue;
                    }
                }
                _ => {}
            }
            parser.at += 1;
        }
        Ok(())
    }

    fn read_child(
        &mut self,
        src: &Path,
        id: ModuleId,
        name: &str,
        is_inline: bool,
        parser: &mut Parser<'_>,
    ) -> anyhow::Result<()> {
        let directory = self.modules[id].directory.join(name);
        let file = match is_inline {
            true => self.modules[id].file.clone(),
            false => {
                let candidates = [directory.with_extension("rs"), directory.join("mod.rs")];
                let found = candidates.into_iter().find(|file| src.join(file).is_file());
                let parent = self.modules[id].file.display();
                found.with_context(|| format!("`mod {name};` in {parent} has no file"))?
            }
        };
        let child = self.add(file, Some(id), directory);
        self.modules[id].children.insert(name.to_owned(), child);
        match is_inline {
            true => self.read_module(src, child, parser),
            false => self.read_file(src, child),
        }
    }
}

/// What an item's name stands behind.
const DEFINES: [&str; 8] = [
    "fn", "struct", "enum", "union", "trait", "type", "const", "static",
];

/// The name of the package in `dir`.
fn package_name(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    let name = name.with_context(|| format!("{} has no `name = \"...\"`", path.display()))?;
    Ok(name.to_owned())
}

/// A leaf of a `use` tree: its words, and the name behind `as`.
struct Leaf {
    words: Vec<String>,
    renamed: Option<String>,
    is_glob: bool,
}

impl Leaf {
    fn at(mut self, line: usize, is_public: bool) -> Option<Use> {
        if self.words.len() > 1 && self.words.last().is_some_and(|word| word == "self") {
            self.words.pop();
        }
        let name = self.renamed.or_else(|| self.words.last().cloned());
        let name = name.filter(|name| name != "_" && !self.is_glob);
        let is_glob = self.is_glob;
        let words = self.words;
        (!words.is_empty()).then_some(Use {
            path: Named { words, line },
            name,
            is_glob,
            is_public,
        })
    }
}

struct Parser<'a> {
    tokens: &'a [(Token, usize)],
    at: usize,
}

impl Parser<'_> {
    fn token(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead).map(|(token, _)| token)
    }

    fn word(&self, ahead: usize) -> Option<&str> {
        self.token(ahead)?.word()
    }

    fn mark(&self, ahead: usize, mark: char) -> bool {
        self.token(ahead).is_some_and(|token| token.is_mark(mark))
    }

    /// What stands before satisfies `wanted`.
    fn is_behind(&self, wanted: impl Fn(&Token) -> bool) -> bool {
        let before = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        before.is_some_and(|(token, _)| wanted(token))
    }

    /// `pub` or `pub(...)` stands before.
    fn is_public(&self) -> bool {
        let before = &self.tokens[..self.at];
        let Some(((last, _), rest)) = before.split_last() else {
            return false;
        };
        if last.is_word("pub") {
            return true;
        }
        let open = rest.iter().rposition(|(token, _)| token.is_mark('('));
        let word = open
            .and_then(|open| open.checked_sub(1))
            .map(|at| &rest[at].0);
        last.is_mark(')') && word.is_some_and(|word| word.is_word("pub"))
    }

    /// At `mod`: the name, and whether its text follows. Stands behind the `;` or the `{` then.
    fn module(&mut self) -> Option<(String, bool)> {
        let name = self.word(1)?.to_owned();
        let is_inline = self.mark(2, '{');
        if !is_inline && !self.mark(2, ';') {
            return None;
        }
        self.at += 3;
        Some((name, is_inline))
    }

    /// At the first word of a path. Stands behind its last word then.
    fn path(&mut self) -> Vec<String> {
        let mut words = Vec::new();
        while let Some(word) = self.word(0) {
            words.push(word.to_owned());
            self.at += 1;
            if self.token(0) != Some(&Token::Colons) || self.word(1).is_none() {
                break;
            }
            self.at += 1;
        }
        words
    }

    /// A `use` tree whose words so far are `stem`. Stands at the `;`, `,` or `}` behind it then.
    fn use_tree(&mut self, stem: &mut Vec<String>, leaves: &mut Vec<Leaf>) {
        let length = stem.len();
        let mut is_done = false;
        while let Some(token) = self.token(0).cloned() {
            match token {
                Token::Word(word) if word == "as" => {
                    let renamed = self.word(1).map(str::to_owned);
                    self.at += 2;
                    let words = stem.clone();
                    leaves.push(Leaf {
                        words,
                        renamed,
                        is_glob: false,
                    });
                    is_done = true;
                }
                Token::Word(word) => {
                    stem.push(word);
                    self.at += 1;
                }
                Token::Colons => self.at += 1,
                Token::Mark('*') => {
                    self.at += 1;
                    let words = stem.clone();
                    leaves.push(Leaf {
                        words,
                        renamed: None,
                        is_glob: true,
                    });
                    is_done = true;
                }
                Token::Mark('{') => {
                    self.at += 1;
                    while !self.mark(0, '}') && self.token(0).is_some() {
                        self.use_tree(stem, leaves);
                        self.at += usize::from(self.mark(0, ','));
                    }
                    self.at += 1;
                    is_done = true;
                }
                _ => break,
            }
        }
        if !is_done && stem.len() > length {
            let words = stem.clone();
            leaves.push(Leaf {
                words,
                renamed: None,
                is_glob: false,
            });
        }
        // What is no part of a tree would be looked at for ever.
        self.at += usize::from(stem.len() == length && !is_done);
        stem.truncate(length);
    }

    /// At `#`: whether this attribute, or one of those that follow it, leaves the item to tests.
    fn is_for_tests(&self) -> bool {
        let mut at = self.at;
        while self.tokens.get(at).is_some_and(|(t, _)| t.is_mark('#')) {
            let Some(end) = self.end_of_group(at + 1) else {
                return false;
            };
            let inside: Vec<&Token> = self.tokens[at + 2..end].iter().map(|t| &t.0).collect();
            if let [first, _, predicate @ .., _] = &inside[..] {
                if first.is_word("cfg") && is_test(predicate) {
                    return true;
                }
            }
            at = end + 1;
        }
        false
    }

    /// The place of what closes the group that opens at `at`.
    fn end_of_group(&self, at: usize) -> Option<usize> {
        let mut depth = 0_usize;
        for (n, (token, _)) in self.tokens.iter().enumerate().skip(at) {
            match token {
                Token::Mark('(' | '[' | '{') => depth += 1,
                Token::Mark(')' | ']' | '}') => depth = depth.checked_sub(1)?,
                _ => {}
            }
            if depth == 0 {
                return matches!(token, Token::Mark(')' | ']' | '}')).then_some(n);
            }
        }
        None
    }

    /// At the first attribute of an item, a statement, a field or an arm: goes behind it.
    fn skip_item(&mut self) {
        while self.mark(0, '#') {
            match self.end_of_group(self.at + 1) {
                Some(end) => self.at = end + 1,
                None => return self.at += 1,
            }
        }
        let is_item = |word: &str| {
            DEFINES.contains(&word)
                || ["pub", "mod", "use", "impl", "async", "unsafe", "extern"].contains(&word)
        };
        let is_item = self.word(0).is_some_and(is_item);
        while let Some(token) = self.token(0) {
            match token {
                Token::Mark(';') => return self.at += 1,
                Token::Mark(',') if !is_item => return self.at += 1,
                // Of what the item is in.
                Token::Mark(')' | ']' | '}') => return,
                Token::Mark('(' | '[' | '{') => {
                    let is_body = token.is_mark('{');
                    match self.end_of_group(self.at) {
                        Some(end) => self.at = end + 1,
                        None => self.at = self.tokens.len(),
                    }
                    if is_body {
                        self.at += usize::from(self.mark(0, ';') || self.mark(0, ','));
                        return;
                    }
                }
                _ => self.at += 1,
            }
        }
    }
}

/// Whether this predicate of `cfg` holds in tests alone.
fn is_test(predicate: &[&Token]) -> bool {
    let parts = |inside: &[&Token]| {
        let mut parts = vec![Vec::new()];
        let mut depth = 0_i32;
        for &token in inside {
            match token {
                Token::Mark('(') => depth += 1,
                Token::Mark(')') => depth -= 1,
                _ => {}
            }
            match (token, parts.last_mut()) {
                (Token::Mark(','), _) if depth == 0 => parts.push(Vec::new()),
                (_, Some(part)) => part.push(token.clone()),
                _ => {}
            }
        }
        parts.retain(|part| !part.is_empty());
        parts
    };
    let holds = |part: &Vec<Token>| is_test(&part.iter().collect::<Vec<_>>());
    match predicate {
        [word] => word.is_word("test"),
        [word, _, inside @ .., _] if word.is_word("all") => parts(inside).iter().any(holds),
        [word, _, inside @ .., _] if word.is_word("any") => {
            let parts = parts(inside);
            !parts.is_empty() && parts.iter().all(holds)
        }
        _ => false,
    }
}
