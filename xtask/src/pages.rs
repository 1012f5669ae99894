//! `cargo xtask man` and `cargo xtask completions`: what is made of the daemons' command lines.
//!
//! Options and commands of a page come from clap, so they cannot differ from `--help`. What clap does not know (exit
//! status, environment, files, signals, examples) is in `pages/*.roff`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::{Generator, Shell};
use clap_mangen::Man;

/// The shells that get completions.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// A program, and what its page has beside its options.
struct Program {
    command: Command,
    /// Behind the name in the page: what `whatis` shows.
    purpose: &'static str,
    /// Sections behind the commands, in this order.
    sections: [&'static str; 3],
}

fn programs() -> [Program; 2] {
    let shared = include_str!("pages/shared.roff");
    [
        Program {
            command: image_proxy::cli::Cli::command(),
            purpose: "send the images of a CRIU dump to another host while CRIU writes them",
            sections: [
                include_str!("pages/image-proxy.roff"),
                shared,
                include_str!("pages/image-proxy-examples.roff"),
            ],
        },
        Program {
            command: image_cache::cli::Cli::command(),
            purpose: "keep the images of a CRIU dump in memory for a restore on this host",
            sections: [
                include_str!("pages/image-cache.roff"),
                shared,
                include_str!("pages/image-cache-examples.roff"),
            ],
        },
    ]
}

/// Writes `image-proxy.1` and `image-cache.1` to `dir`, and says which files these are.
pub fn write_man(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut written = Vec::new();
    for program in programs() {
        let path = dir.join(format!("{}.1", program.command.get_name()));
        fs::write(&path, page(&program)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

/// Writes the completions for bash, zsh and fish to `dir`, under the names by which these shells find them.
pub fn write_completions(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut written = Vec::new();
    for mut program in programs() {
        let name = program.command.get_name().to_owned();
        for shell in SHELLS {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut program.command, &name, &mut script);
            let mut script = String::from_utf8(script)?;
            if shell == Shell::Bash {
                // clap_complete 4.6.12 spells the hyphen of a program's name in two ways, and completes nothing behind a
                // command then.
                let (spelled, wanted) = (name.replace('-', "__subcmd__"), name.replace('-', "__"));
                script = script.replace(&spelled, &wanted);
            }
            let path = dir.join(shell.file_name(&name));
            fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
            written.push(path);
        }
    }
    Ok(written)
}

/// The whole page.
fn page(program: &Program) -> anyhow::Result<String> {
    let mut command = program.command.clone();
    command.build();
    let name = command.get_name().to_owned();
    let version = command.get_version().unwrap_or_default().to_owned();
    let described = program.command.clone().about(program.purpose);
    let described = described.override_usage(usage(&mut command));
    let man = Man::new(described);
    let mut out = Vec::new();
    // Not by clap_mangen, which leaves an empty date out and shows the next word in its place.
    let title = name.to_uppercase();
    writeln!(
        out,
        ".TH {title} 1 \"\" \"{name} {version}\" \"CRIU images\""
    )?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    writeln!(out, ".SH COMMANDS")?;
    for command in commands(&mut command) {
        write_command(command, &mut out)?;
    }
    let rendered = String::from_utf8(out)?;
    // clap_mangen says what an apostrophe is before each part.
    let lines = rendered.lines().filter(|line| !APOSTROPHE.contains(line));
    let lines = APOSTROPHE.into_iter().chain(lines);
    let sections = program.sections.iter().flat_map(|section| section.lines());
    Ok(lines
        .chain(sections)
        .flat_map(|line| [line, "\n"])
        .collect())
}

/// Lines of roff that make `\*(Aq` an apostrophe.
const APOSTROPHE: [&str; 2] = [r".ie \n(.g .ds Aq \(aq", ".el .ds Aq '"];

/// The commands that are the program's own.
fn commands(command: &mut Command) -> impl Iterator<Item = &mut Command> {
    let all = command.get_subcommands_mut();
    all.filter(|command| command.get_name() != "help")
}

/// How the daemon is started, and each command: a line each.
fn usage(command: &mut Command) -> String {
    let mut lines = vec![usage_of(command)];
    lines.extend(commands(command).map(usage_of));
    lines.join("\n")
}

fn usage_of(command: &mut Command) -> String {
    let usage = command.render_usage().to_string();
    let lines = usage.trim_start_matches("Usage: ").lines();
    // Not the line for all commands: each has its own.
    let lines = lines.filter(|line| !line.contains("<COMMAND>"));
    lines.map(str::trim).collect::<Vec<_>>().join("\n")
}

/// A command in the page of its program: its usage, what it does and its options.
fn write_command(command: &mut Command, out: &mut Vec<u8>) -> anyhow::Result<()> {
    writeln!(out, ".SS \"{}\"", usage_of(command).replace('-', "\\-"))?;
    // The program's own options have it.
    let shown = command.clone().mut_arg("help", |help| help.hide(true));
    let man = Man::new(shown);
    let mut body = Vec::new();
    man.render_description_section(&mut body)?;
    man.render_options_section(&mut body)?;
    // They are parts of this section and not sections.
    for line in String::from_utf8(body)?.lines() {
        if !line.starts_with(".SH ") {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
