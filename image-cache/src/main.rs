use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use image_cache::config::{Cli, Command, ImportArgs};
use image_cache::{script, server};
use image_common::control::{self, Request};

fn main() -> ExitCode {
    if let Some(action) = image_common::script::action() {
        return script::run(&action);
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
    let starting = cli.daemon.start(&ports)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(server::run(cli, starting));
    // Readers that never read must not hold us.
    runtime.shutdown_background();
    code
}
