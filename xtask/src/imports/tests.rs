//! Small crates, each with what has to be found in it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{check, Findings};

/// A crate `a-b` of these files.
fn found(files: &[(&str, &str)]) -> anyhow::Result<Findings> {
    let root = tempfile::tempdir()?;
    let write = |name: &str, text: &str| {
        let path = root.path().join("dir").join(name);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        fs::write(path, text)
    };
    write("Cargo.toml", "[package]\nname = \"a-b\"\n")?;
    for (name, text) in files {
        write(name, text)?;
    }
    check(root.path(), &[PathBuf::from("dir")])
}

/// The imports that are shown, as `file:line: path -> file`.
fn shown(findings: &Findings) -> Vec<&str> {
    let lines = findings.lines.iter();
    lines
        .filter_map(|line| line.strip_prefix("  dir/src/"))
        .collect()
}

#[test]
fn two_files_that_import_each_other_are_a_cycle() {
    let found = found(&[
        ("src/lib.rs", "mod a;\npub mod b;\nmod c;"),
        ("src/a.rs", "use crate::b::Beta;\n\npub struct Alpha(Beta);"),
        (
            "src/b.rs",
            "\npub struct Beta;\nfn f(x: crate::a::Alpha) {}",
        ),
        ("src/c.rs", "use crate::a::Alpha;\nuse crate::b::Beta;"),
    ])
    .unwrap();
    assert_eq!((found.files_on_cycles, found.files), (2, 4));
    assert!(!found.is_clean());
    assert_eq!(found.lines[0], "dir/src: a cycle of 2 files");
    assert_eq!(found.lines[1], "  a.rs b.rs");
    assert_eq!(
        shown(&found),
        [
            "a.rs:1: crate::b::Beta -> b.rs",
            "b.rs:3: crate::a::Alpha -> a.rs"
        ]
    );
}

#[test]
fn a_longer_cycle_is_one_with_all_its_files() {
    let found = found(&[
        ("src/lib.rs", "mod a; mod b; mod c; mod d;"),
        ("src/a.rs", "use crate::b; fn f() { b::f() }"),
        (
            "src/b.rs",
            "use super::{c::{self as other}}; fn f() { other::h() }",
        ),
        (
            "src/c.rs",
            "use crate::{a::f as g, d::f}; pub fn h() { g(); f() }",
        ),
        ("src/d.rs", "pub fn f() {}"),
    ])
    .unwrap();
    assert_eq!(found.files_on_cycles, 3);
    assert_eq!(found.lines[1], "  a.rs b.rs c.rs");
}

#[test]
fn parent_and_child_are_a_cycle_if_both_use_the_other() {
    let child = (
        "src/p/c.rs",
        "use super::Parent;\npub struct Child(Parent);",
    );
    for user in [
        "use c::Child; pub struct Parent;",
        "pub struct Parent; fn f(c: c::Child) {}",
        "pub use c::Child; pub struct Parent(Child);",
        "pub(crate) use self::c::*; pub struct Parent; fn f(c: c::Child) {}",
    ] {
        for parent in ["src/p.rs", "src/p/mod.rs"] {
            let text = format!("mod c; {user}");
            let files = [("src/lib.rs", "mod p;"), child, (parent, &text)];
            assert_eq!(found(&files).unwrap().files_on_cycles, 2, "{text}");
        }
    }
    for handed_on in [
        "",
        "pub use c::Child;",
        "pub(super) use c::{Child};",
        "pub use c::*;",
    ] {
        let text = format!("mod c; {handed_on} pub struct Parent;");
        let files = [("src/lib.rs", "mod p;"), child, ("src/p.rs", &text)];
        assert_eq!(found(&files).unwrap().files_on_cycles, 0, "{text}");
    }
}

#[test]
fn an_import_leads_through_what_hands_it_on() {
    for parent in [
        "mod a; mod b; pub use a::Alpha; pub use b::Beta;",
        "mod a; mod b; pub use {a::*, b::*};",
        "mod a; mod b; pub use again::*; mod again { pub use super::a::Alpha; pub use super::b::*; }",
    ] {
        let found = found(&[
            ("src/lib.rs", "mod p;"),
            ("src/p/mod.rs", parent),
            ("src/p/a.rs", "use super::Beta; pub struct Alpha(Beta);"),
            ("src/p/b.rs", "use crate::p::Alpha; pub struct Beta(Alpha);"),
        ])
        .unwrap();
        assert_eq!(found.lines[1], "  p/a.rs p/b.rs", "{parent}");
        assert_eq!(found.files_on_cycles, 2, "{parent}");
    }
}

#[test]
fn what_only_tests_have_does_not_count() {
    let tests = "
        #[cfg(test)]
        use crate::b::Beta;
        #[allow(dead_code)] #[cfg(all(test, unix))]
        fn f<A, B>(x: crate::b::Beta) -> [u8; 3] { crate::b::f() }
        struct S { #[cfg(test)] field: crate::b::Beta, other: u8 }
        #[cfg(test)]
        mod tests { use crate::b::Beta; fn f() { { } } }
        #[cfg(test)]
        mod more;
        pub struct Alpha;";
    let with = |text: &str| {
        let files = [
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", text),
            ("src/b.rs", "use crate::a::Alpha; pub struct Beta(Alpha);"),
        ];
        found(&files).unwrap().files_on_cycles
    };
    assert_eq!(with(tests), 0);
    for counts in ["any(test, unix)", "not(test)", "feature = \"test\""] {
        let text = format!("#[cfg({counts})] use crate::b::Beta; pub struct Alpha;");
        assert_eq!(with(&text), 2, "{counts}");
    }
    // What stands behind an item of tests does.
    let text = format!("{tests} fn g(x: crate::b::Beta) {{}}");
    assert_eq!(with(&text), 2);
}

#[test]
fn names_of_other_crates_are_no_imports() {
    let found = found(&[
        ("src/lib.rs", "mod a; mod bytes;"),
        ("src/a.rs", "use bytes::Buf; use log::log; use ::bytes::X; use log::{self as b}; fn f() { log::g(); self.bytes::<u8>(); b::c() }"),
        ("src/bytes.rs", "use crate::a::f; fn bytes() -> impl Sized + use<> { \"crate::a\" }"),
    ])
    .unwrap();
    assert_eq!((found.files_on_cycles, found.files), (0, 3));
}

#[test]
fn the_program_imports_from_its_library() {
    let found = found(&[
        ("src/lib.rs", "pub mod a;"),
        ("src/a.rs", "pub struct Alpha;"),
        ("src/main.rs", "use a_b::a::Alpha; fn main() {}"),
        ("rooms", "a # the only one\n"),
    ])
    .unwrap();
    assert!(found.is_clean(), "{found:?}");
    assert_eq!(found.files, 3);
}

#[test]
fn an_import_upwards_is_shown_with_its_place() {
    let files = |rooms| {
        [
            ("src/lib.rs", "mod high; mod low; pub struct Root;"),
            (
                "src/high.rs",
                "mod part; use crate::low::Low; pub struct High;",
            ),
            ("src/high/part.rs", "use crate::high::High;"),
            ("src/low/mod.rs", "mod deep; pub struct Low;"),
            ("src/low/deep.rs", "use super::Low;\nuse crate::high::High;"),
            ("rooms", rooms),
        ]
    };
    let upward = |rooms| found(&files(rooms)).unwrap();
    let clear = upward("low\n\n# a comment\nlow/deep\nhigh\n");
    assert_eq!(
        clear.upward, 2,
        "the list is the wrong way round: {clear:?}"
    );
    let one = upward("high\nlow\n");
    assert_eq!(one.upward, 1);
    assert_eq!(
        one.lines.last().map(String::as_str),
        Some("  dir/src/low/deep.rs:2: crate::high::High -> high.rs")
    );
    assert!(one
        .lines
        .contains(&"dir/src: low imports from high, which lies above it".to_owned()));
    // The longest name is a file's room.
    assert_eq!(upward("low/deep\nhigh\nlow\n").upward, 0);
}

#[test]
fn a_list_that_does_not_fit_the_files_is_an_error() {
    let with = |rooms| {
        found(&[
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", ""),
            ("src/b.rs", ""),
            ("rooms", rooms),
        ])
    };
    let missing = with("a\n").unwrap();
    assert_eq!(missing.upward, 1);
    assert_eq!(
        missing.lines,
        ["dir/src/b.rs: in no room of dir/rooms; add its line there"]
    );
    for (rooms, error) in [
        ("a\nb\nc\n", "rooms:3: "),
        ("a\nb\na\n", "rooms:3: a is listed twice"),
    ] {
        let text = format!("{:#}", with(rooms).unwrap_err());
        assert!(text.contains(error), "{text}");
    }
}

#[test]
fn what_is_no_crate_is_an_error() {
    assert!(found(&[]).is_err());
    let text = format!("{:#}", found(&[("src/lib.rs", "mod gone;")]).unwrap_err());
    assert!(text.contains("`mod gone;` in lib.rs has no file"), "{text}");
}
