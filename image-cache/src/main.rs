use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use image_cache::action_script;
use image_cache::cli::{Cli, Command, ImportArgs};
use image_cache::control::holds;
use image_cache::keeper;
use image_cache::server;
use image_common::control::trust::ControlArgs;
use image_common::control::{self, Request, CACHE_CONTROL_SOCKET};
use rustix::thread::CapabilitySet;

/// As in the unit. What is here may be the only copy of a process.
const OOM_SCORE: i32 = -800;

fn main() -> ExitCode {
    if let Some(action) = image_common::control::script::action() {
        image_common::log::hook_panics();
        return action_script::run(&action);
    }
    let cli = Cli::parse();
    image_common::daemon::run_main("image-cache", || run(cli))
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    match &cli.command {
        Some(Command::Release(args)) => {
            let request = Request::Release {
                session: args.session.clone(),
                process_is_dead: args.process_is_dead,
            };
            decide(&args.daemon, &request)
        }
        Some(Command::Drop(args)) => {
            let request = Request::Drop {
                session: args.session.clone(),
                process_lives: args.process_lives,
            };
            decide(&args.daemon, &request)
        }
        Some(Command::Import(args)) => import(args),
        Some(Command::Status(args)) => {
            let socket = args.daemon.socket(CACHE_CONTROL_SOCKET);
            match args.show(CACHE_CONTROL_SOCKET) {
                Err(e) if is_absent(&e) => match holds::status(&socket) {
                    Some(status) => args.print(&status),
                    None => Err(e),
                },
                shown => shown,
            }
        }
        Some(Command::Keeper) => Ok(keeper::process::run()?),
        Some(Command::ArenaFile) => Ok(keeper::backing::make_in_user_namespace()?),
        None => daemon(cli),
    }
}

/// Asks the daemon; where none runs, the script of the restore that holds what is meant.
fn decide(daemon: &ControlArgs, request: &Request) -> anyhow::Result<u8> {
    let socket = daemon.socket(CACHE_CONTROL_SOCKET);
    match control::ask(&socket, request) {
        Err(e) if holds::is_absent(&e) => match holds::decide(&socket, request) {
            Some(decided) => decided?,
            None => return Err(e.into()),
        },
        asked => asked?,
    }
    Ok(0)
}

fn is_absent(e: &anyhow::Error) -> bool {
    e.downcast_ref().is_some_and(holds::is_absent)
}

fn import(args: &ImportArgs) -> anyhow::Result<u8> {
    let dir = std::fs::canonicalize(&args.dir)
        .and_then(|path| Ok((File::open(&path)?, path)))
        .with_context(|| format!("cannot open {}", args.dir.display()))?;
    image_common::criu_io::parents::check(&dir.0)?;
    let request = Request::Import {
        images_dir: dir.1.to_string_lossy().into_owned(),
        session: args.session.clone(),
    };
    let socket = args.daemon.socket(CACHE_CONTROL_SOCKET);
    control::ask_with(&socket, &request, Some(dir.0.as_fd()))?;
    Ok(0)
}

fn daemon(cli: Cli) -> anyhow::Result<u8> {
    let page_servers = cli.page_server.iter().map(|address| address.port);
    let ports: Vec<u16> = page_servers.chain(cli.port).collect();
    // While its file is ours.
    let score = image_common::daemon::oom::lower_score(OOM_SCORE);
    // As long as it has the rights that this may take.
    let prepared = keeper::prepare(cli.keep_through_restart);
    let starting = cli
        .daemon
        .start("image-cache", &ports, CapabilitySet::empty())?;
    tracing::info!("{score}");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(server::run(cli, starting, prepared));
    // Readers that never read must not hold us.
    runtime.shutdown_background();
    code
}
