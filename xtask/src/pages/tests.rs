use std::collections::BTreeSet;
use std::process::{Command as Process, Stdio};

use super::*;

/// The page as roff, and its lines without escapes.
fn text(program: &Program) -> (String, String) {
    let roff = page(program).unwrap();
    let plain = roff.replace("\\-", "-").replace("\\e\n", "\\\n");
    let plain = ["\\fB", "\\fI", "\\fR"]
        .iter()
        .fold(plain, |text, font| text.replace(font, ""));
    (roff, plain)
}

/// What `--help` shows of a command's options: `-D`, `--images-dir` and so on.
fn options_in_help(command: &mut Command) -> BTreeSet<String> {
    let help = command.render_long_help().to_string();
    let lines = help.lines().map(str::trim_start);
    let heads = lines.filter(|line| line.starts_with('-') && !line.starts_with("- "));
    let words = heads.flat_map(|line| line.split([' ', ',']).take(3));
    let options = words.filter(|word| word.starts_with('-'));
    options.map(str::to_owned).collect()
}

fn found(program: &str) -> bool {
    let mut process = Process::new(program);
    process
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    process.stderr(Stdio::null()).status().is_ok()
}

#[test]
fn a_page_has_every_option_and_command_of_the_help() {
    for program in programs() {
        let (_, plain) = text(&program);
        let mut command = program.command.clone();
        command.build();
        let mut options = options_in_help(&mut command);
        assert!(
            options.contains("-D") && options.contains("--grace-period"),
            "{options:?}"
        );
        assert!(options.len() > 30, "{options:?}");
        for command in commands(&mut command) {
            assert!(
                plain.contains(&format!(".SS \"{}\"", usage_of(command))),
                "{plain}"
            );
            options.extend(options_in_help(command));
        }
        assert!(options.contains("--control") && options.contains("--json"));
        let heads: Vec<&str> = plain
            .split(".TP\n")
            .filter_map(|item| item.lines().next())
            .collect();
        for option in options {
            let is_head = |head: &&str| head.split([' ', ',']).any(|word| word == option);
            assert!(heads.iter().any(is_head), "{option} in {heads:?}");
        }
    }
}

#[test]
fn a_page_has_its_sections_in_order() {
    let expected = [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "COMMANDS",
        "ACTION SCRIPT",
        "SETS IN DOUBT",
        "EXIT STATUS",
        "ENVIRONMENT",
        "FILES",
        "UNITS",
        "SIGNALS",
        "EXAMPLES",
        "SEE ALSO",
    ];
    for program in programs() {
        let (roff, plain) = text(&program);
        let sections = roff.lines().filter_map(|line| line.strip_prefix(".SH "));
        let sections: Vec<&str> = sections.map(|name| name.trim_matches('"')).collect();
        let is_cache = program.command.get_name() == "image-cache";
        let of_both = expected
            .into_iter()
            .filter(|&name| name != "SETS IN DOUBT" || is_cache);
        assert_eq!(sections, of_both.collect::<Vec<_>>());
        // What `whatis` and `apropos` read: one line, a name and a purpose.
        let name = plain
            .split(".SH NAME\n")
            .nth(1)
            .and_then(|rest| rest.lines().next());
        let expected = format!("{} - {}", program.command.get_name(), program.purpose);
        assert_eq!(name, Some(expected.as_str()));
    }
}

/// The text beside clap's is by hand, so its commands are tried on clap.
#[test]
fn the_examples_are_commands_that_the_daemons_take() {
    for program in programs() {
        let (_, plain) = text(&program);
        let name = program.command.get_name().to_owned();
        let examples = plain
            .split(".EX\n")
            .skip(1)
            .filter_map(|rest| rest.split(".EE").next());
        let examples = examples.collect::<String>().replace("\\\n", " ");
        let own = examples
            .lines()
            .filter(|line| line.split(' ').next() == Some(&name));
        let mut tried = 0;
        for line in own {
            let parsed = program
                .command
                .clone()
                .try_get_matches_from(line.split_whitespace());
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
            tried += 1;
        }
        assert!(tried >= 3, "{examples}");
    }
}

/// The variables and the files are in the daemons' sources under these names.
#[test]
fn variables_and_sockets_of_a_page_are_those_of_the_daemons() {
    use image_common::control::{CACHE_CONTROL_SOCKET, PROXY_CONTROL_SOCKET};
    use image_common::criu::remote::{CACHE_SOCKET, PROXY_SOCKET};
    use image_common::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
    let [proxy, cache] = programs().map(|program| text(&program).1);
    let names = [
        (&proxy, [PROXY_CONTROL_SOCKET, PROXY_SOCKET, CAPTURE_SOCKET]),
        (&cache, [CACHE_CONTROL_SOCKET, CACHE_SOCKET, SERVE_SOCKET]),
    ];
    for (page, sockets) in names {
        for socket in sockets {
            assert!(page.contains(&format!("DIR/{socket}\n")), "{socket}");
        }
    }
}

#[test]
fn groff_has_nothing_to_say_about_a_page() {
    if !found("groff") {
        // scripts/test has it.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for path in write_man(dir.path()).unwrap() {
        let mut groff = Process::new("groff");
        let groff = groff
            .args(["-man", "-ww", "-z", "-Tutf8"])
            .arg(&path)
            .output()
            .unwrap();
        assert!(groff.status.success());
        assert_eq!(String::from_utf8_lossy(&groff.stderr), "");
    }
}

#[test]
fn completions_are_scripts_of_their_shells() {
    let dir = tempfile::tempdir().unwrap();
    let written = write_completions(dir.path()).unwrap();
    assert_eq!(written.len(), programs().len() * SHELLS.len());
    for path in written {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap();
        let shell = match name {
            _ if name.ends_with(".bash") => "bash",
            _ if name.ends_with(".fish") => "fish",
            _ => "zsh",
        };
        // bash is on every Debian.
        if shell == "bash" || found(shell) {
            let status = Process::new(shell).arg("-n").arg(&path).status().unwrap();
            assert!(status.success(), "{name}");
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.contains("link-timeout") && text.contains("status"),
            "{name}"
        );
    }
}

#[test]
fn bash_completes_options_commands_and_values() {
    let dir = tempfile::tempdir().unwrap();
    write_completions(dir.path()).unwrap();
    let completed = |words: &str, count: usize| {
        let script = format!(
            ". {}/image-proxy.bash; COMP_WORDS=({words}); COMP_CWORD={count}; \
             _image__proxy image-proxy \"${{COMP_WORDS[{count}]}}\" \"${{COMP_WORDS[{count}-1]}}\"; echo \"${{COMPREPLY[@]}}\"",
            dir.path().display()
        );
        let bash = Process::new("bash")
            .args(["--norc", "-c", &script])
            .output()
            .unwrap();
        String::from_utf8_lossy(&bash.stdout).trim().to_owned()
    };
    assert_eq!(completed("image-proxy --commit-t", 1), "--commit-timeout");
    assert_eq!(completed("image-proxy sta", 1), "status");
    assert_eq!(completed("image-proxy --parents a", 2), "auto always");
    assert_eq!(completed("image-proxy abort --proc", 2), "--process-lives");
}
