use std::process::ExitCode;

use clap::Parser;
use image_common::control::{self, Request, PROXY_CONTROL_SOCKET};
use image_common::daemon::run_main;
use image_proxy::action_script;
use image_proxy::cli::{Cli, Command};
use image_proxy::server;
use rustix::thread::CapabilitySet;

/// As in the unit. Dumps under way fail with us.
const OOM_SCORE: i32 = -500;

fn main() -> ExitCode {
    if let Some(action) = image_common::control::script::action() {
        image_common::log::hook_panics();
        return action_script::run(&action);
    }
    let cli = Cli::parse();
    run_main("image-proxy", || run(cli))
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    match &cli.command {
        Some(Command::Abort(args)) => {
            let request = Request::Abort {
                session: args.session.clone(),
                process_lives: args.process_lives,
            };
            control::ask(&args.daemon.socket(PROXY_CONTROL_SOCKET), &request)?;
            Ok(0)
        }
        Some(Command::Status(args)) => args.show(PROXY_CONTROL_SOCKET),
        None => daemon(cli),
    }
}

fn daemon(cli: Cli) -> anyhow::Result<u8> {
    let page_server = cli.page_server.as_ref().map(|address| address.port);
    // While its file is ours.
    let score = image_common::daemon::oom::lower_score(OOM_SCORE);
    // SYS_NICE: the thread that copies pages out of CRIU's pipe runs before others.
    let starting = cli.daemon.start(
        "image-proxy",
        page_server.as_slice(),
        CapabilitySet::SYS_NICE,
    )?;
    tracing::info!("{score}");
    image_common::daemon::heap::share_one_arena();
    // One thread: the work is moving bytes from pipes into one socket, and without a second
    // thread there is no handing over between threads while tasks are frozen.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(server::run(cli, starting));
    runtime.shutdown_background();
    code
}
