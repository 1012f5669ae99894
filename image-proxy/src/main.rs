use std::process::ExitCode;

use clap::Parser;
use image_common::daemon::exit_code;
use image_proxy::config::Cli;
use image_proxy::{script, server};

fn main() -> ExitCode {
    if let Some(action) = image_common::script::action() {
        return script::run(&action);
    }
    exit_code("image-proxy", daemon(Cli::parse()))
}

fn daemon(cli: Cli) -> anyhow::Result<u8> {
    let starting = cli.daemon.start()?;
    // One thread: the work is moving bytes from pipes into one socket, and without a second
    // thread there is no handing over between threads while tasks are frozen.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(server::run(cli, starting));
    runtime.shutdown_background();
    code
}
