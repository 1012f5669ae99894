//! Tasks of this repository that want Rust: `cargo xtask TASK`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod imports;

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
        /// Directories of crates, relative to the repository
        #[arg(value_name = "CRATE", default_values = ["common", "image-proxy", "image-cache", "xtask"])]
        crates: Vec<PathBuf>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let root = root.unwrap_or(Path::new("."));
    match Cli::parse().task {
        Task::Imports { report, crates } => {
            let found = imports::check(root, &crates)?;
            for line in &found.lines {
                println!("{line}");
            }
            println!(
                "files on import cycles: {} of {}",
                found.files_on_cycles, found.files
            );
            println!("imports that lead upwards: {}", found.upward);
            Ok(match found.is_clean() || report {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            })
        }
    }
}
