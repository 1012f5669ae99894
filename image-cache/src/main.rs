use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use image_cache::config::{Cli, Command, ImportArgs};
use image_cache::server;
use image_common::control::{self, chain, Request, Run, CACHE_CONTROL_SOCKET};

/// As in the unit. What is here may be the only copy of a process.
const OOM_SCORE: i32 = -800;

fn main() -> ExitCode {
    if let Some(action) = image_common::script::action() {
        return script(&action);
    }
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Some(Command::Release(args)) => {
            let session = args.session.clone();
            control::ask(&args.control, &Request::Release { session })
                .map(|()| 0)
                .map_err(Into::into)
        }
        Some(Command::Drop(args)) => {
            let session = args.session.clone();
            control::ask(&args.control, &Request::Drop { session })
                .map(|()| 0)
                .map_err(Into::into)
        }
        Some(Command::Import(args)) => import(args),
        Some(Command::Status(args)) => image_common::status::show(&args.control, args.json),
        None => daemon(cli),
    };
    image_common::daemon::exit_code("image-cache", outcome)
}

fn import(args: &ImportArgs) -> anyhow::Result<u8> {
    let dir = std::fs::canonicalize(&args.dir)
        .and_then(|path| Ok((File::open(&path)?, path)))
        .with_context(|| format!("cannot open {}", args.dir.display()))?;
    let request = Request::Import {
        images_dir: dir.1.to_string_lossy().into_owned(),
        session: args.session.clone(),
    };
    control::ask_with(&args.control, &request, Some(dir.0.as_fd()))?;
    Ok(0)
}

fn daemon(cli: Cli) -> anyhow::Result<u8> {
    let page_servers = cli.page_server.iter().map(|address| address.port);
    let ports: Vec<u16> = page_servers.chain(cli.port).collect();
    // While its file is ours.
    let score = image_common::oom::lower_score(OOM_SCORE);
    let starting = cli.daemon.start(&ports)?;
    tracing::info!("{score}");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(server::run(cli, starting));
    // Readers that never read must not hold us.
    runtime.shutdown_background();
    code
}

/// `criu restore --action-script image-cache`: tells the daemon that restore has come to its
/// end. At `post-resume` CRIU has closed its images directory, which is how we find the daemon;
/// `pre-resume` is the last action before.
fn script(action: &str) -> ExitCode {
    if action != "pre-resume" {
        return ExitCode::SUCCESS;
    }
    let path = image_common::script::control_path("IMAGE_CACHE_CONTROL", CACHE_CONTROL_SOCKET);
    let path: PathBuf = path.unwrap_or_else(|| CACHE_CONTROL_SOCKET.into());
    let run = Run {
        criu_pid: image_common::script::criu_pid(),
        images_dir: None,
        root_pid: None,
        expected_bytes: None,
    };
    if let Err(e) = control::ask(&path, &Request::Resuming(run)) {
        // CRIU resumes the tasks all the same; the cache may keep their images.
        eprintln!("image-cache: {}", chain(&e));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
