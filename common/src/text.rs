//! Text that a peer chose, made harmless for a terminal and for a log: one line stays one line, and
//! is read in the order in which it was written.

use std::borrow::Cow;
use std::fmt::Write;

/// Characters beyond ASCII that are not seen, or change how the text around them is shown: Unicode's categories Cc
/// (C1), Cf, Zl and Zp.
const UNSEEN: [(u32, u32); 22] = [
    (0x80, 0x9f),
    (0xad, 0xad),
    (0x600, 0x605),
    (0x61c, 0x61c),
    (0x6dd, 0x6dd),
    (0x70f, 0x70f),
    (0x890, 0x891),
    (0x8e2, 0x8e2),
    (0x180e, 0x180e),
    (0x200b, 0x200f),
    (0x2028, 0x202e),
    (0x2060, 0x2064),
    (0x2065, 0x206f),
    (0xfeff, 0xfeff),
    (0xfff0, 0xfffb),
    (0x110bd, 0x110bd),
    (0x110cd, 0x110cd),
    (0x13430, 0x1343f),
    (0x1bca0, 0x1bca3),
    (0x1d173, 0x1d17a),
    (0xe0000, 0xe0001),
    (0xe0020, 0xe007f),
];

/// Whether a character must not reach a terminal as it is.
pub fn is_unseen(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    let code = u32::from(c);
    UNSEEN.iter().any(|&(from, to)| from <= code && code <= to)
}

/// The text with `\n`, `\u{202e}` and the like instead of what is not seen.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escaped_but(text, |_| false)
}

/// The same; characters that `may` are left as they are.
pub fn escaped_but(text: &str, may: impl Fn(char) -> bool) -> Cow<'_, str> {
    let bad = |c: char| is_unseen(c) && !may(c);
    if !text.contains(bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match bad(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out.into()
}

/// A JSON text in which no string has such a character: `\u202e`, as JSON writes it. What is between the strings is
/// ASCII, line ends included, and stays.
pub fn escaped_json(text: &str) -> Cow<'_, str> {
    let bad = |c: char| !c.is_ascii() && is_unseen(c);
    if !text.contains(bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match bad(c) {
            true => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            false => out.push(c),
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_is_escaped() {
        assert_eq!(escaped("web-1 ümlaut 日本 é"), "web-1 ümlaut 日本 é");
        assert_eq!(escaped("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(escaped("a\u{2028}b\u{2029}"), "a\\u{2028}b\\u{2029}");
        assert_eq!(escaped("a\nb\tc\x1b[2J\x7f"), "a\\nb\\tc\\u{1b}[2J\\u{7f}");
        for c in ['\u{9b}', '\u{200b}', '\u{2066}', '\u{feff}', '\u{e0041}'] {
            assert!(is_unseen(c), "{c:?}");
        }
        assert_eq!(escaped_but("a\x1b[1m\n", |c| c == '\x1b'), "a\x1b[1m\\n");
    }

    #[test]
    fn json_says_the_same() {
        let said = serde_json::to_string_pretty(&["a\u{202e}b", "c\u{e0041}d\ne"]).unwrap();
        let shown = escaped_json(&said);
        assert!(shown.contains("a\\u202eb") && shown.contains("\\udb40\\udc41"));
        assert!(!shown.contains('\u{202e}'));
        let heard: Vec<String> = serde_json::from_str(&shown).unwrap();
        assert_eq!(heard, ["a\u{202e}b", "c\u{e0041}d\ne"]);
    }
}
