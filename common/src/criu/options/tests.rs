use std::ffi::{c_char, c_int, CStr, CString};
use std::sync::{Mutex, PoisonError};

use proptest::prelude::*;

use super::*;

fn cmdline(words: &[&str]) -> Vec<u8> {
    words
        .iter()
        .flat_map(|w| [w.as_bytes(), b"\0"].concat())
        .collect()
}

/// What CRIU is told by these files, and then by this command line.
fn read(files: &[&str], line: &str) -> Options {
    let words: Vec<&str> = line.split(' ').collect();
    let mut reading = Reading::new(false);
    files.iter().for_each(|file| reading.file(file.as_bytes()));
    reading.finish(&CommandLine::new(&cmdline(&words)))
}

#[test]
fn nothing_is_said() {
    let options = read(&[], "criu dump -t 12 -D /run/images");
    let nothing = Options {
        verb: Verb::Dump,
        stream: Seen::No,
        page_server: Seen::No,
        lazy_pages: Seen::No,
        pre_dump_mode: PreDumpMode::Splice,
        final_state: FinalState::Killed,
        image_cache_script: false,
    };
    assert_eq!(options, nothing);
}

#[test]
fn an_action_script_that_is_image_cache() {
    let named = |files: &[&str], line: &str| read(files, line).image_cache_script;
    for line in [
        "criu restore -D /run/images --action-script /usr/bin/image-cache",
        "criu restore --action-script=image-cache",
        "criu restore --action-script /bin/other --action-script /opt/image-cache --stream",
        "criu restore --action-script /opt/image-cache --action-script /bin/other",
    ] {
        assert!(named(&[], line), "{line}");
    }
    for line in [
        "criu restore --action-script /usr/bin/image-cache.sh",
        "criu restore --action-script /usr/bin/image-cache/script",
        "criu restore -D --action-script /usr/bin/image-cache",
        "criu swrk 3 --action-script /usr/bin/image-cache",
    ] {
        assert!(!named(&[], line), "{line}");
    }
    let file = "action-script /usr/bin/image-cache\n";
    assert!(named(&[file], "criu restore"));
}

#[test]
fn options_as_getopt_takes_them() {
    let lazy = |line| read(&[], line).lazy_pages;
    for line in [
        "criu dump --lazy-pages -t 1",
        "criu --lazy-pages dump -t 1",
        "criu dump --lazy -t 1",
        "criu dump --la",
        "criu dump -vvvv -t1 -D --stream --lazy-pages",
        "criu dump --cpu-cap --lazy-pages",
        "criu dump --from-the-future --lazy-pages",
    ] {
        assert_eq!(lazy(line), Seen::Yes, "{line}");
    }
    for line in [
        "criu dump -D --lazy-pages",
        "criu dump -lt --lazy-pages",
        "criu dump --log-file --lazy-pages",
        "criu dump --images-dir=--lazy-pages",
        "criu dump -- --lazy-pages",
    ] {
        assert_eq!(lazy(line), Seen::No, "{line}");
    }
    for line in [
        "criu dump --l",
        "criu dump --from-the-future",
        "criu dump --lazy-pages=no",
        "criu dump -t",
        "criu dump -q",
    ] {
        assert_eq!(lazy(line), Seen::Unknown, "{line}");
    }
}

#[test]
fn the_mode_of_a_pre_dump() {
    let mode = |line| read(&[], line).pre_dump_mode;
    assert_eq!(
        mode("criu pre-dump --pre-dump-mode read"),
        PreDumpMode::Read
    );
    assert_eq!(mode("criu pre-dump --pre-=read"), PreDumpMode::Read);
    assert_eq!(
        mode("criu pre-dump --pre-dump-mode splice"),
        PreDumpMode::Splice
    );
    assert_eq!(mode("criu pre-dump --pre read"), PreDumpMode::Unknown);
    // CRIU has no way back.
    let both = "criu pre-dump --pre-dump-mode read --pre-dump-mode=splice";
    assert_eq!(mode(both), PreDumpMode::Read);
}

#[test]
fn what_cannot_be_served() {
    let round = |line| read(&[], line).unserved_round();
    assert_eq!(
        round("criu pre-dump --pre-dump-mode read"),
        Some(Unserved::ReadMode)
    );
    assert_eq!(round("criu dump --lazy-pages"), Some(Unserved::LazyDump));
    // The mode is one of pre-dumps alone; and to the streamer it does no harm.
    assert_eq!(round("criu dump --pre-dump-mode read"), None);
    let images = |line| read(&[], line).unserved();
    assert_eq!(images("criu pre-dump --stream --pre-dump-mode read"), None);
    assert_eq!(
        images("criu restore --lazy-pages"),
        Some(Unserved::LazyRestore)
    );
    for unknown in [
        "criu swrk 3",
        "lazy-pages",
        "criu dump --l",
        "criu pre-dump --pre read",
    ] {
        assert_eq!(round(unknown), None, "{unknown}");
    }
}

#[test]
fn switches_and_final_states_count_as_the_last_one_says() {
    let options = read(
        &["stream\npage-server\nleave-running"],
        "criu dump -s --no-stream",
    );
    assert_eq!(options.stream, Seen::No);
    assert_eq!(options.page_server, Seen::Yes);
    assert_eq!(options.final_state, FinalState::Stopped);
    let options = read(&[], "criu dump -ldR -t 1");
    assert_eq!(options.final_state, FinalState::Running);
}

#[test]
fn what_is_no_command_line_of_criu_is_unknown() {
    for line in [
        "timeout 15 criu dump --lazy-pages",
        "/bin/sh /opt/wrapper",
        "criu",
        "target/debug/deps/stream-0123 --lazy-pages",
    ] {
        assert_eq!(read(&["lazy-pages"], line), Options::default(), "{line}");
    }
    assert_eq!(CommandLine::new(b"").verb(), Verb::Unknown);
}

/// A request may say otherwise, and is not to be seen.
#[test]
fn rpc_is_unknown_whatever_the_files_say() {
    let title = |text: &[u8]| {
        let mut reading = Reading::new(false);
        reading.file(b"lazy-pages");
        reading.finish(&CommandLine::new(text))
    };
    for text in [
        &b"criu\0swrk\0three\0"[..],
        b"criu\0service\0-d\0",
        b"dump --rpc -t 12\0\0\0\0",
        b"pre-dump --rpc -t 12",
    ] {
        let rpc = Options {
            verb: Verb::Rpc,
            ..Options::default()
        };
        assert_eq!(title(text), rpc);
    }
}

#[test]
fn which_files_count() {
    let config = |words: &[&str]| {
        let line = cmdline(words);
        let (defaults, named) = CommandLine::new(&line).config();
        (
            defaults,
            named.map(|name| String::from_utf8_lossy(name).into_owned()),
        )
    };
    assert_eq!(config(&["criu", "dump"]), (true, None));
    let named = (false, Some("/a b".to_owned()));
    assert_eq!(config(&["criu", "dump", "--config", "/a b"]), named);
    assert_eq!(config(&["criu", "--config=/a b", "dump"]), named);
    // CRIU looks for the word itself.
    assert_eq!(config(&["criu", "dump", "--conf", "/a"]), (true, None));
    assert_eq!(
        config(&["criu", "dump", "--no-default-config"]),
        (false, None)
    );
    assert_eq!(config(&["criu", "dump", "--config"]), (false, None));
}

#[test]
fn lines_of_a_configuration_file() {
    let lazy = |file| read(&[file], "criu dump").lazy_pages;
    for file in [
        "lazy-pages",
        "lazy-pages\n",
        " \tlazy-pages  \n",
        "lazy-pages # until we have seen it\n",
        "# first\n\naction-script \"/opt/image proxy\" # quoted\nlazy\n",
        "log-file \"a \\\" b\"\nlazy-pages\n",
        // Up to 3.15.
        "stream\t# c\nlazy-pages\t# c\n",
        "images-dir /a --lazy-pages\n",
    ] {
        assert_eq!(lazy(file), Seen::Yes, "{file:?}");
    }
    for file in [
        "",
        "\n",
        "# lazy-pages",
        "images-dir lazy-pages",
        "log-file --lazy-pages",
    ] {
        assert_eq!(lazy(file), Seen::No, "{file:?}");
    }
    for file in ["--lazy-pages", "lazy-pages\r\n", "lazy-pages#", "future"] {
        assert_eq!(lazy(file), Seen::Unknown, "{file:?}");
    }
    let mode = |file| read(&[file], "criu pre-dump").pre_dump_mode;
    for file in [
        "pre-dump-mode read",
        "pre-dump-mode\tread",
        "pre-dump-mode \"read\" # quoted",
        "pre-dump-mode read#comment",
        "pre-dump-mode=read",
        "pre-dump-mode\t read",
    ] {
        assert_eq!(mode(file), PreDumpMode::Read, "{file:?}");
    }
    assert_eq!(mode("pre-dump-mode splice"), PreDumpMode::Splice);
    assert_eq!(mode("pre-dump-mode # read"), PreDumpMode::Unknown);
}

#[test]
fn a_file_that_cannot_be_read_is_a_doubt() {
    let mut reading = Reading::new(false);
    reading.unreadable();
    let line = cmdline(&["criu", "dump", "--stream"]);
    let options = reading.finish(&CommandLine::new(&line));
    assert_eq!(options.stream, Seen::Yes);
    assert_eq!(options.lazy_pages, Seen::Unknown);
    assert_eq!(options.pre_dump_mode, PreDumpMode::Unknown);
    assert_eq!(options.final_state, FinalState::Unknown);
}

// --- beside the C library's own -----------------------------------------------------------------

#[repr(C)]
struct COption {
    name: *const c_char,
    has_arg: c_int,
    flag: *mut c_int,
    val: c_int,
}

extern "C" {
    static mut optind: c_int;
    static mut opterr: c_int;
    static mut optarg: *mut c_char;
    fn getopt_long(
        argc: c_int,
        argv: *const *mut c_char,
        short: *const c_char,
        long: *const COption,
        index: *mut c_int,
    ) -> c_int;
}

/// `getopt_long` has its state in global variables.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What `getopt_long` makes of these words: options with their values, the words that are none,
/// and whether it complained.
#[allow(clippy::type_complexity)]
fn by_the_c_library(words: &[Vec<u8>]) -> (Vec<(Name, Option<Vec<u8>>)>, Vec<Vec<u8>>, bool) {
    const FIRST: c_int = 1000;
    let names: Vec<(Name, CString)> = long_options()
        .map(|(name, _)| match name {
            Name::Long(text) => (name, CString::new(text).unwrap()),
            Name::Negated(text) => (name, CString::new(format!("no-{text}")).unwrap()),
            Name::Short(_) => unreachable!("a long option"),
        })
        .collect();
    let mut table: Vec<COption> = (FIRST..)
        .zip(names.iter().zip(long_options()))
        .map(|(val, ((_, text), (_, takes)))| COption {
            name: text.as_ptr(),
            has_arg: match takes {
                Nothing => 0,
                Value => 1,
                Optional => 2,
            },
            flag: std::ptr::null_mut(),
            val,
        })
        .collect();
    table.push(COption {
        name: std::ptr::null(),
        has_arg: 0,
        flag: std::ptr::null_mut(),
        val: 0,
    });
    let short = CString::new(SHORT).unwrap();
    let all: Vec<CString> = std::iter::once(&b"criu"[..])
        .chain(words.iter().map(Vec::as_slice))
        .map(|word| CString::new(word).unwrap())
        .collect();
    let mut argv: Vec<*mut c_char> = all.iter().map(|word| word.as_ptr().cast_mut()).collect();
    let argc = c_int::try_from(argv.len()).unwrap();
    argv.push(std::ptr::null_mut());
    let (mut options, mut bad) = (Vec::new(), false);
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the lock makes this the only use of the C library's state. `argv` has `argc`
    // strings and a null behind them, `table` ends with a null name, and both, with the strings
    // that they point to, live until the end of the block. getopt moves the pointers of `argv`
    // and writes to no string. `optarg`, where it is not null, points into one of these strings.
    let positional = unsafe {
        optind = 0;
        opterr = 0;
        loop {
            let (at, from) = (argv.as_ptr(), table.as_ptr());
            let found = getopt_long(argc, at, short.as_ptr(), from, std::ptr::null_mut());
            let name = match found {
                -1 => break,
                63 => {
                    bad = true;
                    continue;
                }
                val if val >= FIRST => names[usize::try_from(val - FIRST).unwrap()].0,
                letter => Name::Short(u8::try_from(letter).unwrap()),
            };
            let value = (!optarg.is_null()).then(|| CStr::from_ptr(optarg).to_bytes().to_vec());
            options.push((name, value));
        }
        let first = usize::try_from(optind).unwrap();
        let rest = &argv[first..argv.len() - 1];
        rest.iter()
            .map(|word| CStr::from_ptr(*word).to_bytes().to_vec())
            .collect()
    };
    (options, positional, bad)
}

fn word() -> impl Strategy<Value = Vec<u8>> {
    let names: Vec<String> = long_options()
        .map(|(name, _)| match name {
            Name::Long(name) => format!("--{name}"),
            Name::Negated(name) => format!("--no-{name}"),
            Name::Short(_) => unreachable!("a long option"),
        })
        .collect();
    let long = (proptest::sample::select(names), 2usize..30, 0u8..4);
    prop_oneof![
        3 => long.prop_map(|(name, length, value)| {
            let name = &name.as_bytes()[..length.min(name.len())];
            match value {
                0 => [name, b"=read"].concat(),
                _ => name.to_vec(),
            }
        }),
        2 => "-[dSsRthDovxVrjJlWLMq:;=-]{1,4}".prop_map(String::into_bytes),
        2 => "(dump|pre-dump|read|splice|-|--|[a-c ]{0,2})".prop_map(String::into_bytes),
        1 => proptest::collection::vec(1u8.., 0..6),
    ]
}

/// A word as a configuration file may have it.
fn quoted(value: &str) -> String {
    format!("\"{}\"", value.replace('"', "\\\""))
}

proptest! {
    #[test]
    fn words_are_taken_as_the_c_library_takes_them(words in proptest::collection::vec(word(), 0..8)) {
        let slices: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        let ours = Words::new(&slices, false);
        let (options, positional, bad) = by_the_c_library(&words);
        let owned: Vec<_> = ours.options.iter().map(|(n, v)| (*n, v.map(<[u8]>::to_vec))).collect();
        prop_assert_eq!(owned, options);
        prop_assert_eq!(ours.positional, positional);
        prop_assert_eq!(ours.doubt, bad);
    }

    #[test]
    fn no_bytes_do_harm(file in proptest::collection::vec(any::<u8>(), 0..200), line: Vec<u8>) {
        let mut reading = Reading::new(line.len() % 2 == 0);
        reading.file(&file);
        let line = CommandLine::new(&line);
        let _ = line.config();
        let _ = reading.finish(&line);
    }

    #[test]
    fn no_text_does_harm(file in "([a-z-]|[ \t\r\n\"\\\\#=]|lazy-pages|read){0,40}") {
        Reading::new(false).file(file.as_bytes());
    }

    /// What a file says comes out of it, in whatever way it is written.
    #[test]
    fn a_file_says_what_was_written(
        lines in proptest::collection::vec(
            ("[a-z]{1,3}", "[a-z/ \"]{0,6}[a-z/]", 0u8..3, "[ \t]{0,2}", "( #.*)?"),
            0..6,
        ),
        lazy: bool,
    ) {
        let mut text = String::new();
        let mut expected = Vec::new();
        for (name, value, kind, indent, comment) in &lines {
            let value = value.trim();
            let plain = !value.contains([' ', '"']);
            expected.push(format!("--{name}").into_bytes());
            text += &match kind {
                0 => format!("{indent}{name} {comment}\n"),
                1 if plain => {
                    expected.push(value.as_bytes().to_vec());
                    format!("{indent}{name} {value}{comment}\n")
                }
                _ => {
                    expected.push(value.as_bytes().to_vec());
                    format!("{indent}{name} {}{comment}\n", quoted(value))
                }
            };
        }
        if lazy {
            text += "lazy-pages";
            expected.push(b"--lazy-pages".to_vec());
        }
        let (words, bad) = file_words(text.as_bytes());
        let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
        prop_assert!(!bad, "{:?}", text);
        prop_assert_eq!(words, expected, "{:?}", text);
    }
}
