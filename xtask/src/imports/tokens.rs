//! Rust source as tokens, as far as paths want them: words, `::` and punctuation, each with its line. Comments, literals
//! and lifetimes are left out.

/// A token. A literal is [`Token::Other`], so that the words before and behind it stay apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// An identifier or a keyword; a raw one without its `r#`.
    Word(String),
    /// `::`
    Colons,
    /// Any other character that is not white space.
    Mark(char),
    /// A literal or a lifetime.
    Other,
}

impl Token {
    /// Whether this is the word `text`.
    pub fn is_word(&self, text: &str) -> bool {
        self.word() == Some(text)
    }

    /// Whether this is the character `mark`.
    pub fn is_mark(&self, mark: char) -> bool {
        *self == Token::Mark(mark)
    }

    /// The word, if this is one.
    pub fn word(&self) -> Option<&str> {
        match self {
            Token::Word(word) => Some(word),
            _ => None,
        }
    }
}

/// The tokens of a source file, each with its line, from 1 on.
pub fn tokens(source: &str) -> Vec<(Token, usize)> {
    let mut lexer = Lexer {
        chars: source.chars().collect(),
        at: 0,
        line: 1,
    };
    let mut out = Vec::new();
    loop {
        let line = lexer.line;
        match lexer.next() {
            Step::Token(token) => out.push((token, line)),
            Step::Nothing => {}
            Step::End => return out,
        }
    }
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    line: usize,
}

enum Step {
    Token(Token),
    Nothing,
    End,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek(0)?;
        self.at += 1;
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let mut taken = String::new();
        while let Some(c) = self.peek(0).filter(|&c| wanted(c)) {
            taken.push(c);
            self.take();
        }
        taken
    }

    fn next(&mut self) -> Step {
        let Some(c) = self.peek(0) else {
            return Step::End;
        };
        match (c, self.peek(1)) {
            ('/', Some('/')) => {
                self.take_while(|c| c != '\n');
                Step::Nothing
            }
            ('/', Some('*')) => {
                self.block_comment();
                Step::Nothing
            }
            (':', Some(':')) => {
                self.take();
                self.take();
                Step::Token(Token::Colons)
            }
            ('"', _) => {
                self.quoted('"');
                Step::Token(Token::Other)
            }
            ('\'', next) => {
                match (next, self.peek(2)) {
                    (Some('\\'), _) | (_, Some('\'')) => self.quoted('\''),
                    _ => {
                        self.take();
                        self.take_while(is_part_of_word);
                    }
                }
                Step::Token(Token::Other)
            }
            _ if c.is_whitespace() => {
                self.take();
                Step::Nothing
            }
            _ if c.is_ascii_digit() => {
                self.take_while(is_part_of_word);
                Step::Token(Token::Other)
            }
            _ if is_part_of_word(c) => Step::Token(self.word()),
            _ => {
                self.take();
                Step::Token(Token::Mark(c))
            }
        }
    }

    /// A word, or a literal that begins like one: `b'x'`, `b"x"`, `r"x"`, `r#"x"#`.
    fn word(&mut self) -> Token {
        let word = self.take_while(is_part_of_word);
        let hashes = (0..).take_while(|&n| self.peek(n) == Some('#')).count();
        match (word.as_str(), self.peek(0), self.peek(hashes)) {
            ("r" | "br" | "cr", _, Some('"')) => {
                self.raw_string(hashes);
                Token::Other
            }
            ("b" | "c", Some('"'), _) => {
                self.quoted('"');
                Token::Other
            }
            ("b", Some('\''), _) => {
                self.quoted('\'');
                Token::Other
            }
            ("r", Some('#'), _) => {
                self.take();
                Token::Word(self.take_while(is_part_of_word))
            }
            _ => Token::Word(word),
        }
    }

    fn block_comment(&mut self) {
        let mut depth = 0;
        loop {
            match (self.take(), self.peek(0)) {
                (Some('/'), Some('*')) => depth += 1,
                (Some('*'), Some('/')) => depth -= 1,
                (None, _) => return,
                _ => continue,
            }
            self.take();
            if depth == 0 {
                return;
            }
        }
    }

    fn quoted(&mut self, quote: char) {
        self.take();
        while let Some(c) = self.take() {
            match c {
                '\\' => drop(self.take()),
                _ if c == quote => return,
                _ => {}
            }
        }
    }

    fn raw_string(&mut self, hashes: usize) {
        for _ in 0..=hashes {
            self.take();
        }
        while let Some(c) = self.take() {
            if c == '"' && (0..hashes).all(|n| self.peek(n) == Some('#')) {
                self.at += hashes;
                return;
            }
        }
    }
}

fn is_part_of_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        tokens(source)
            .iter()
            .filter_map(|(token, _)| token.word().map(str::to_owned))
            .collect()
    }

    #[test]
    fn comments_and_literals_have_no_words() {
        let source = r####"
            // crate::a
            /* crate::b /* nested */ crate::c */
            one("crate::d \" crate::e", 'x', '\'', b'\\', b"f", r"g", r#"h " i"#, br##"j"# k"##);
            two::<'static>(0x1f_u8, 1..2, r#type);
        "####;
        assert_eq!(words(source), ["one", "two", "type"]);
    }

    #[test]
    fn lines_count_through_strings_and_comments() {
        let source = "a\n/*\n\n*/ b \"\n\" c r\"\n\" d";
        let lines: Vec<usize> = tokens(source)
            .into_iter()
            .filter(|(token, _)| token.word().is_some())
            .map(|(_, line)| line)
            .collect();
        assert_eq!(lines, [1, 4, 5, 6]);
    }

    #[test]
    fn a_path_is_words_and_colons() {
        let found: Vec<Token> = tokens("a::b: c").into_iter().map(|t| t.0).collect();
        let word = |text: &str| Token::Word(text.into());
        let expected = [
            word("a"),
            Token::Colons,
            word("b"),
            Token::Mark(':'),
            word("c"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_file_that_ends_early_ends() {
        for source in ["/*", "\"", "'", "r#\"", "b'", "r#", "/", ":", "'\\"] {
            tokens(source);
        }
    }
}
