//! CRIU's options, as CRIU itself reads them: `getopt_long` on the command line, and its
//! configuration files (`criu/config.c`). Text in, values out: the files are read by
//! [`crate::criu_io::options`].
//!
//! What is not understood is a doubt, and a doubt makes each "no" an "unknown". A "yes" stands:
//! the CRIU that was started so runs, so it took the option.

/// What is known of an option that is on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seen {
    Yes,
    No,
    #[default]
    Unknown,
}

/// How a pre-dump gets at the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreDumpMode {
    Splice,
    Read,
    #[default]
    Unknown,
}

/// What becomes of the tasks when a dump has succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FinalState {
    Killed,
    /// `--leave-stopped`
    Stopped,
    /// `--leave-running`
    Running,
    #[default]
    Unknown,
}

/// CRIU's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verb {
    Dump,
    PreDump,
    Restore,
    /// `swrk`, `service`: the options are in the requests.
    Rpc,
    Other,
    /// It is no command line of CRIU.
    #[default]
    Unknown,
}

/// What can be known of a CRIU's options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    pub verb: Verb,
    pub stream: Seen,
    pub page_server: Seen,
    pub lazy_pages: Seen,
    pub pre_dump_mode: PreDumpMode,
    pub final_state: FinalState,
    /// One of its action scripts is called image-cache. `false`: it is not known to be.
    pub image_cache_script: bool,
}

/// What neither daemon can serve, so that the run must not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    #[error(
        "this CRIU has --lazy-pages (on its command line or in a configuration file), and its pages would stay \
         behind: nothing here asks for them later, and the dump would stand still with its tasks frozen. \
         Dump without --lazy-pages"
    )]
    LazyDump,
    #[error(
        "this CRIU has --leave-running and no action script: the tasks would run on while their pages are on the way, and \
         the copy would have memory of two moments. Give it --action-script with the path of image-proxy"
    )]
    LeaveRunning,
    #[error(
        "this CRIU has --lazy-pages and --stream: it skips pages without reading them, and takes wrong ones for \
         those that follow. Restore without --lazy-pages"
    )]
    LazyRestore,
    #[error(
        "this CRIU has --pre-dump-mode read (on its command line or in a configuration file), and so sends \
         wrong pages to a page server: it fills a buffer again that is still being sent. \
         Pre-dump without that option"
    )]
    ReadMode,
}

impl Options {
    /// What speaks against a dump or restore by way of the daemons. What is unknown does not.
    pub fn unserved(self) -> Option<Unserved> {
        match (self.verb, self.lazy_pages) {
            (Verb::Dump, Seen::Yes) => Some(Unserved::LazyDump),
            (Verb::Restore, Seen::Yes) => Some(Unserved::LazyRestore),
            _ => None,
        }
    }

    /// What speaks against a dump without action script: its pages pass by reference, and CRIU lets the tasks go
    /// when its last byte is in a pipe.
    pub fn unserved_without_script(self) -> Option<Unserved> {
        match self.after_dump() {
            FinalState::Running => Some(Unserved::LeaveRunning),
            _ => None,
        }
    }

    /// What becomes of the tasks of a dump.
    pub fn after_dump(self) -> FinalState {
        match self.verb {
            Verb::Dump => self.final_state,
            _ => FinalState::Unknown,
        }
    }

    /// What speaks against a round to a page server.
    pub fn unserved_round(self) -> Option<Unserved> {
        match (self.verb, self.pre_dump_mode) {
            (Verb::PreDump, PreDumpMode::Read) => Some(Unserved::ReadMode),
            _ => self.unserved(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Optional,
    Value,
}

use Takes::{Nothing, Optional, Value};

/// Options that can be turned off again with `no-`.
const SWITCHES: &[&str] = &[
    "allow-uprobes",
    "auto-dedup",
    "daemon",
    "deprecated",
    "display-stats",
    "evasive-devices",
    "experimental",
    "extra",
    "file-locks",
    "force-irmap",
    "ghost-fiemap",
    "link-remap",
    "log-pid",
    "mntns-compat-mode",
    "page-server",
    "remote",
    "restore-detached",
    "restore-sibling",
    "shell-job",
    "skip-file-rwx-check",
    "skip-in-flight",
    "stream",
    "tcp-close",
    "tcp-established",
    "tls",
    "track-mem",
    "unprivileged",
    "weak-sysctls",
];

/// The other long options of 3.15 to 4.3, and of the builds with `--remote`.
const OTHERS: &[(&str, Takes)] = &[
    ("action-script", Value),
    ("address", Value),
    ("all", Nothing),
    ("cgroup-dump-controller", Value),
    ("cgroup-props", Value),
    ("cgroup-props-file", Value),
    ("cgroup-root", Value),
    ("cgroup-yard", Value),
    ("close", Value),
    ("config", Value),
    ("cpu-cap", Optional),
    ("empty-ns", Value),
    ("enable-external-masters", Nothing),
    ("enable-external-sharing", Nothing),
    ("enable-fs", Value),
    ("exec-cmd", Nothing),
    ("ext-mount-map", Value),
    ("ext-unix-sk", Optional),
    ("external", Value),
    ("feature", Value),
    ("file-validation", Value),
    ("freeze-cgroup", Value),
    ("ghost-limit", Value),
    ("help", Nothing),
    ("images-dir", Value),
    ("inherit-fd", Value),
    ("irmap-scan-path", Value),
    ("join-ns", Value),
    ("lazy-pages", Nothing),
    ("leave-running", Nothing),
    ("leave-stopped", Nothing),
    ("libdir", Value),
    ("log-file", Value),
    ("lsm-mount-context", Value),
    ("lsm-profile", Value),
    ("manage-cgroups", Optional),
    ("ms", Nothing),
    ("network-lock", Value),
    ("no-default-config", Nothing),
    ("pidfile", Value),
    ("port", Value),
    ("pre-dump-mode", Value),
    ("prev-images-dir", Value),
    ("ps-socket", Value),
    ("root", Value),
    ("skip-mnt", Value),
    ("status-fd", Value),
    ("timeout", Value),
    ("tls-cacert", Value),
    ("tls-cacrl", Value),
    ("tls-cert", Value),
    ("tls-key", Value),
    ("tls-no-cn-verify", Nothing),
    ("tree", Value),
    ("verbosity", Optional),
    ("version", Nothing),
    ("veth-pair", Value),
    ("work-dir", Value),
];

/// Short options as `getopt` wants them: a colon for a value, two for one that may be missing.
const SHORT: &[u8] = b"dSsRt:hD:o:v::x::Vr:jJ:lW:L:M:";

const COMMANDS: &[(&str, Verb)] = &[
    ("dump", Verb::Dump),
    ("pre-dump", Verb::PreDump),
    ("restore", Verb::Restore),
    ("swrk", Verb::Rpc),
    ("service", Verb::Rpc),
    ("check", Verb::Other),
    ("cpuinfo", Verb::Other),
    ("dedup", Verb::Other),
    ("image-cache", Verb::Other),
    ("image-proxy", Verb::Other),
    ("lazy-pages", Verb::Other),
    ("page-server", Verb::Other),
];

/// The arguments of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine<'a> {
    words: Vec<&'a [u8]>,
}

impl<'a> CommandLine<'a> {
    /// Of `/proc/PID/cmdline`: each word ends with a zero byte.
    pub fn new(cmdline: &'a [u8]) -> Self {
        let text = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
        Self {
            words: text.split(|&byte| byte == 0).collect(),
        }
    }

    /// Whether the files at the usual places count (`--no-default-config`), and the one that is
    /// named (`--config`). CRIU looks for exactly these words, before all else.
    pub fn config(&self) -> (bool, Option<&'a [u8]>) {
        const WITH_VALUE: &[u8] = b"--config=";
        let (mut defaults, mut named) = (true, None);
        for (at, word) in self.words.iter().enumerate() {
            match *word {
                b"--no-default-config" => defaults = false,
                b"--config" => {
                    defaults = false;
                    named = self.words.get(at + 1).copied();
                }
                word if memchr::memmem::find(word, WITH_VALUE).is_some() => {
                    defaults = false;
                    named = word.get(WITH_VALUE.len()..);
                }
                _ => {}
            }
        }
        (defaults, named)
    }

    /// Which command it is, whatever the options say.
    pub fn verb(&self) -> Verb {
        self.read(false).1
    }

    fn read(&self, posix: bool) -> (Words<'a>, Verb) {
        // An RPC worker calls itself "dump --rpc -t PID", in one word.
        let title = self.words.first().copied().unwrap_or_default();
        if memchr::memmem::find(title, b" --rpc").is_some() {
            return (Words::default(), Verb::Rpc);
        }
        let words = Words::new(self.words.get(1..).unwrap_or_default(), posix);
        let command = words.positional.first().copied().unwrap_or_default();
        let verb = COMMANDS
            .iter()
            .find(|(name, _)| name.as_bytes() == command)
            .map_or(Verb::Unknown, |(_, verb)| *verb);
        (words, verb)
    }
}

/// Options as they add up: configuration files in CRIU's order, then the command line.
#[derive(Debug, Clone)]
pub struct Reading {
    /// POSIXLY_CORRECT: options end at the first word that is none.
    posix: bool,
    doubt: bool,
    stream: bool,
    page_server: bool,
    lazy_pages: bool,
    read_mode: bool,
    final_state: FinalState,
    image_cache_script: bool,
}

impl Reading {
    pub fn new(posix: bool) -> Self {
        Self {
            posix,
            doubt: false,
            stream: false,
            page_server: false,
            lazy_pages: false,
            read_mode: false,
            final_state: FinalState::Killed,
            image_cache_script: false,
        }
    }

    /// Takes a configuration file.
    pub fn file(&mut self, text: &[u8]) {
        // The syntax is another one since 3.16. CRIU does not run with what it does not
        // understand, so the one that gives options is the right one.
        let ways: [fn(&[u8]) -> FileWords; 2] = [file_words, file_words_of_3_15];
        let mut newest = None;
        for way in ways {
            let (words, bad) = way(text);
            let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
            let mut trial = Self {
                doubt: bad,
                ..self.clone()
            };
            trial.take(&Words::new(&words, self.posix));
            if !trial.doubt {
                trial.doubt = self.doubt;
                *self = trial;
                return;
            }
            newest.get_or_insert(trial);
        }
        // In a doubt, what can be read of it counts.
        if let Some(trial) = newest {
            *self = trial;
        }
    }

    /// There is something that cannot be read.
    pub fn unreadable(&mut self) {
        self.doubt = true;
    }

    /// Takes the command line, which comes last.
    pub fn finish(mut self, line: &CommandLine) -> Options {
        let (words, verb) = line.read(self.posix);
        if matches!(verb, Verb::Rpc | Verb::Unknown) {
            // A request may say otherwise than the files; and it may be no CRIU at all.
            return Options {
                verb,
                ..Options::default()
            };
        }
        self.take(&words);
        let seen = |yes: bool| match (yes, self.doubt) {
            (true, _) => Seen::Yes,
            (false, false) => Seen::No,
            (false, true) => Seen::Unknown,
        };
        Options {
            verb,
            stream: seen(self.stream),
            page_server: seen(self.page_server),
            lazy_pages: seen(self.lazy_pages),
            pre_dump_mode: match seen(self.read_mode) {
                Seen::Yes => PreDumpMode::Read,
                Seen::No => PreDumpMode::Splice,
                Seen::Unknown => PreDumpMode::Unknown,
            },
            final_state: match self.final_state {
                FinalState::Killed if self.doubt => FinalState::Unknown,
                state => state,
            },
            image_cache_script: self.image_cache_script,
        }
    }

    fn take(&mut self, words: &Words) {
        self.doubt |= words.doubt;
        for (option, value) in &words.options {
            match option {
                Name::Short(b's') | Name::Long("leave-stopped") => {
                    self.final_state = FinalState::Stopped;
                }
                Name::Short(b'R') | Name::Long("leave-running") => {
                    self.final_state = FinalState::Running;
                }
                // Each that is named is run.
                Name::Long("action-script") => {
                    let name = value.and_then(|path| path.rsplit(|&byte| byte == b'/').next());
                    self.image_cache_script |= name == Some(b"image-cache");
                }
                Name::Long("lazy-pages") => self.lazy_pages = true,
                Name::Long("stream") => self.stream = true,
                Name::Long("page-server") => self.page_server = true,
                Name::Negated("stream") => self.stream = false,
                Name::Negated("page-server") => self.page_server = false,
                Name::Long("pre-dump-mode") => match value {
                    Some(b"read") => self.read_mode = true,
                    // No version takes an earlier "read" back for it.
                    Some(b"splice") => {}
                    _ => self.doubt = true,
                },
                Name::Short(_) | Name::Long(_) | Name::Negated(_) => {}
            }
        }
    }
}

/// Which option it is. Of a switch, `no-NAME` is the negated one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Short(u8),
    Long(&'static str),
    Negated(&'static str),
}

/// Words taken apart as `getopt_long` does it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Words<'a> {
    options: Vec<(Name, Option<&'a [u8]>)>,
    positional: Vec<&'a [u8]>,
    /// There are options that are not known, could be several, or lack their value.
    doubt: bool,
}

impl<'a> Words<'a> {
    fn new(words: &[&'a [u8]], posix: bool) -> Self {
        let mut all = Self::default();
        let mut rest = words;
        while let Some((&word, more)) = rest.split_first() {
            rest = more;
            match word {
                b"--" => {
                    all.positional.extend(rest);
                    break;
                }
                [b'-', b'-', long @ ..] => all.long(long, &mut rest),
                [b'-', short @ ..] if !short.is_empty() => all.short(short, &mut rest),
                _ if posix => {
                    all.positional.push(word);
                    all.positional.extend(rest);
                    break;
                }
                _ => all.positional.push(word),
            }
        }
        all
    }

    fn long(&mut self, word: &'a [u8], rest: &mut &[&'a [u8]]) {
        let equals = word.iter().position(|&byte| byte == b'=');
        let (text, given) = match equals {
            Some(at) => (&word[..at], Some(&word[at + 1..])),
            None => (word, None),
        };
        let Some((name, takes)) = long_option(text) else {
            self.doubt = true;
            return;
        };
        let value = match (takes, given) {
            (Nothing, Some(_)) => return self.doubt = true,
            (Value, None) => match rest.split_first() {
                Some((next, more)) => {
                    *rest = more;
                    Some(*next)
                }
                None => return self.doubt = true,
            },
            (Nothing | Optional, None) => None,
            (Value | Optional, Some(value)) => Some(value),
        };
        self.options.push((name, value));
    }

    /// Some in one word, the last one with its value.
    fn short(&mut self, word: &'a [u8], rest: &mut &[&'a [u8]]) {
        for (at, &letter) in word.iter().enumerate() {
            let behind = &word[at + 1..];
            let Some(takes) = short_option(letter) else {
                self.doubt = true;
                continue;
            };
            let value = match (takes, behind) {
                (Nothing, _) => {
                    self.options.push((Name::Short(letter), None));
                    continue;
                }
                (Optional, []) => None,
                (Value, []) => match rest.split_first() {
                    Some((next, more)) => {
                        *rest = more;
                        Some(*next)
                    }
                    None => return self.doubt = true,
                },
                (Value | Optional, _) => Some(behind),
            };
            return self.options.push((Name::Short(letter), value));
        }
    }
}

fn short_option(letter: u8) -> Option<Takes> {
    let at = SHORT.iter().position(|&b| b == letter && letter != b':')?;
    Some(match SHORT[at + 1..] {
        [b':', b':', ..] => Optional,
        [b':', ..] => Value,
        _ => Nothing,
    })
}

/// All long options, with what each takes.
fn long_options() -> impl Iterator<Item = (Name, Takes)> {
    let switches = SWITCHES.iter().flat_map(|&name| {
        let both = [Name::Long(name), Name::Negated(name)];
        both.map(|name| (name, Nothing))
    });
    let others = OTHERS
        .iter()
        .map(|&(name, takes)| (Name::Long(name), takes));
    switches.chain(others)
}

/// The option that is spelled so, or the only one that begins so.
fn long_option(text: &[u8]) -> Option<(Name, Takes)> {
    let mut beginning = None;
    let mut several = false;
    for (name, takes) in long_options() {
        let left = match name {
            Name::Long(name) => name.as_bytes().strip_prefix(text),
            Name::Negated(name) => match text.strip_prefix(b"no-") {
                Some(text) => name.as_bytes().strip_prefix(text),
                None => b"no-".strip_prefix(text),
            },
            Name::Short(_) => None,
        };
        match left {
            Some([]) => return Some((name, takes)),
            Some(_) => {
                several |= beginning.is_some();
                beginning = Some((name, takes));
            }
            None => {}
        }
    }
    beginning.filter(|_| !several)
}

/// C's `isspace` in the locale that CRIU runs in.
fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = text.split(|&byte| byte == b'\n');
    // CRIU handles lines as C strings.
    lines.map(|line| line.split(|&byte| byte == 0).next().unwrap_or_default())
}

fn trim_start(line: &[u8]) -> &[u8] {
    let start = line.iter().position(|byte| !is_space(byte));
    &line[start.unwrap_or(line.len())..]
}

fn option_word(name: &[u8]) -> Vec<u8> {
    [b"--", name].concat()
}

/// The words that a configuration file stands for, and whether a line cannot be understood.
type FileWords = (Vec<Vec<u8>>, bool);

/// The syntax of 3.16 and later: an option per line, with at most one value.
fn file_words(text: &[u8]) -> FileWords {
    let (mut words, mut bad) = (Vec::new(), false);
    for line in lines(text).map(trim_start) {
        if matches!(line, [] | [b'#', ..]) {
            continue;
        }
        let end = |of: u8| line.iter().position(|&byte| byte == of);
        // A tab separates only where there is no space.
        let Some(end) = end(b' ').or_else(|| end(b'\t')) else {
            words.push(option_word(line));
            continue;
        };
        words.push(option_word(&line[..end]));
        match trim_start(&line[end + 1..]) {
            [b'#', ..] => {}
            [b'"', quoted @ ..] => match up_to_quote(quoted) {
                Some((value, more)) => {
                    bad |= is_too_much(more);
                    words.push(without_comment(value));
                }
                None => bad = true,
            },
            plain => {
                let plain = without_comment(plain.to_vec());
                let end = plain.iter().position(|&byte| byte == b' ');
                let (value, more) = plain.split_at(end.unwrap_or(plain.len()));
                bad |= is_too_much(more);
                words.push(value.to_vec());
            }
        }
    }
    (words, bad)
}

/// Whether there is something other than a comment behind a value.
fn is_too_much(more: &[u8]) -> bool {
    !matches!(trim_start(more), [] | [b'#', ..])
}

/// A comment begins with each `#`, also in a value.
fn without_comment(mut value: Vec<u8>) -> Vec<u8> {
    if let Some(at) = value.iter().position(|&byte| byte == b'#') {
        value.truncate(at);
    }
    value
}

/// What is before the closing quote, with `\"` as a quote, and what is behind it.
fn up_to_quote(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut value = Vec::new();
    for (at, &byte) in text.iter().enumerate() {
        match byte {
            b'"' if value.last() == Some(&b'\\') => {
                value.pop();
                value.push(b'"');
            }
            b'"' => return Some((value, &text[at + 1..])),
            _ => value.push(byte),
        }
    }
    None
}

/// The syntax up to 3.15: as many words in a line as there are, of which the first is the option.
fn file_words_of_3_15(text: &[u8]) -> FileWords {
    let mut words = Vec::new();
    for line in lines(text) {
        let (mut rest, mut first) = (trim_start(line), true);
        while !matches!(rest, [] | [b'#', ..]) {
            let quoted = rest.strip_prefix(b"\"").and_then(up_to_quote);
            let (word, more) = quoted.unwrap_or_else(|| {
                let end = rest.iter().position(|b| matches!(b, b' ' | b'\t'));
                let (word, more) = rest.split_at(end.unwrap_or(rest.len()));
                (word.to_vec(), more)
            });
            words.push(match first {
                true => option_word(&word),
                false => word,
            });
            (rest, first) = (trim_start(more), false);
        }
    }
    (words, false)
}

#[cfg(test)]
mod tests;
