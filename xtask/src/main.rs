//! Tasks of this repository that want Rust: `cargo xtask TASK`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod imports;
mod pages;

/// Tasks of this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Look for files that import each other, and for imports that lead upwards
    Imports {
        /// Only say what there is, and succeed
        #[arg(long)]
        report: bool,
        /// Show every import from one file into another, and look for nothing
        #[arg(long, conflicts_with = "report")]
        list: bool,
        /// Directories of crates, relative to the repository
        #[arg(value_name = "CRATE", default_values = ["common", "image-proxy", "image-cache", "xtask"])]
        crates: Vec<PathBuf>,
    },
    /// Write the man pages of the daemons
    Man {
        /// Where to [default: target/man]
        dir: Option<PathBuf>,
    },
    /// Write the completions of the daemons for bash, zsh and fish
    Completions {
        /// Where to [default: target/completions]
        dir: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let root = root.unwrap_or(Path::new("."));
    let written = match Cli::parse().task {
        Task::Man { dir } => pages::write_man(&dir.unwrap_or_else(|| target(root).join("man"))),
        Task::Completions { dir } => {
            let dir = dir.unwrap_or_else(|| target(root).join("completions"));
            pages::write_completions(&dir)
        }
        Task::Imports {
            report,
            list,
            crates,
        } => {
            if list {
                for line in imports::list(root, &crates)? {
                    println!("{line}");
                }
                return Ok(ExitCode::SUCCESS);
            }
            let found = imports::check(root, &crates)?;
            for line in &found.lines {
                println!("{line}");
            }
            println!(
                "files on import cycles: {} of {}",
                found.files_on_cycles, found.files
            );
            println!("imports that lead upwards: {}", found.upward);
            return Ok(match found.is_clean() || report {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            });
        }
    };
    for path in written? {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Where cargo builds.
fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}
