//! `scripts/soak`: see `e2e_tests::soak`.

use std::process::ExitCode;

use clap::Parser;
use e2e_tests::bins::use_built_here;
use e2e_tests::machine::temp_dir;
use e2e_tests::soak;

/// Thousands of short sessions through one pair, which must be as it was afterwards
///
/// Exits with 1 if memory, descriptors or threads grew, if bytes were wrong, a session, a socket or a file was left, or
/// the daemons logged what they should not.
#[derive(Parser)]
#[command(name = "scripts/soak")]
struct Args {
    #[command(flatten)]
    soak: soak::Args,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let run = || soak::run(&args.soak, temp_dir()?.path());
    match use_built_here().and_then(|()| run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
