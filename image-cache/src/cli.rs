//! The command line, and what it means once it is checked.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use image_common::control::show::StatusArgs;
use image_common::control::trust::ControlArgs;
use image_common::daemon::DaemonArgs;
use image_common::net::tls::TlsArgs;
use image_common::net::ListenAddress;
use image_common::units::{parse_duration, parse_some, parse_some_size};

use crate::limits::Limits;

/// Receives CRIU's images from image-proxy, keeps them in memory and serves them to criu restore.
///
/// Start it on the target host before the dump. criu restore finds it by the sockets in its
/// images directory: img-cache.sock (--remote) and streamer-serve.sock (--stream). The sockets
/// in DIR serve the newest session, those in DIR/sessions/SESSION/ exactly that one.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
#[command(
    after_help = "EXIT STATUS: 0 stopped cleanly, 1 fatal error, 2 wrong usage, 3 stopped by a signal and sessions or unrestored sets were dropped."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// Address to listen on, a literal or a host name [default: every address with --tls or
    /// --insecure-listen, else 127.0.0.1]
    #[arg(long, value_name = "BIND", value_parser = parse_some::<String>)]
    pub address: Option<String>,

    /// TLS on the link, and on --page-server where its ADDR is not loopback; on loopback there
    /// CRIU's own --tls is taken, and plaintext too
    #[command(flatten)]
    pub tls: TlsArgs,

    /// Take connections only from those whose certificate has this name (DNS name or address,
    /// as subject alternative name); may be given several times [default: every certificate
    /// of the authorities]
    #[arg(long, value_name = "NAME", requires = "tls", value_parser = parse_some::<String>)]
    pub allow_peer: Vec<String>,

    /// Listen in plaintext where other hosts can connect. Whoever can, can put a set here that
    /// you may restore, and whoever is between can read the process's memory
    #[arg(long, conflicts_with = "tls")]
    pub insecure_listen: bool,

    /// TCP port for image-proxy; 0 takes a free one and logs it (-v3)
    #[arg(short = 'p', long, value_name = "PORT", required = true)]
    pub port: Option<u16>,

    /// Also be the page server of pre-dump and dump, without image-proxy between: `[ADDR:]PORT` to
    /// listen on, loopback without ADDR. May be given several times; of trees with equal pids
    /// that one host sends at once, each needs its own
    #[arg(long, value_name = "[ADDR:]PORT")]
    pub page_server: Vec<ListenAddress>,

    /// Keep sets after they were restored, for more restores of the same
    #[arg(long)]
    pub keep: bool,

    /// Give memory back page by page as a restore reads it: cache and restored process together
    /// take little more than the process alone
    ///
    /// Only pages, only of dumps that were committed by the action script, and only when restore
    /// reads them from a pipe (--stream, and --remote of May and June 2020). The first restore
    /// that reads pages takes the set: if it fails after that, the set is gone. It cannot be
    /// restored again, and if the process was killed on the source, as it is after a commit, the
    /// process is lost. Later readers are told so.
    #[arg(long, conflicts_with = "keep")]
    pub release_on_read: bool,

    /// Drop a complete set that nobody restored for this long; it may be the only copy of a
    /// process. 0: never [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub set_ttl: Option<Duration>,

    /// Memory for images; past it the dump fails and its process lives on. So it does before a
    /// control group, or this host, has no more memory [default: three quarters of this host's
    /// memory, or of the smallest limit of our control groups]
    #[arg(long, value_name = "SIZE", value_parser = parse_some_size)]
    pub memory_limit: Option<u64>,

    /// How long to wait for a link that broke, if image-proxy waits as long (its option of the
    /// same name). 0: what is being received is given up at once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub link_timeout: Duration,

    /// A set is in doubt when image-proxy, whose connection is there, has said nothing for this long
    /// between PREPARED and COMMIT, its word that the process is dead. It speaks every 2s; at least 5s
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = prepared_timeout)]
    pub prepared_timeout: Duration,

    /// Keep sets when image-cache is killed, crashes or is replaced: their memory and what became of them are held by systemd or
    /// by a small keeper process, and the next image-cache on the same directory has them again. auto: where that costs
    /// nothing. on: also where memory comes in small pages, which costs about half a second per GiB
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = KeepThroughRestart::Auto)]
    pub keep_through_restart: KeepThroughRestart,

    #[command(flatten)]
    pub limits: Limits,

    /// Make one snapshot of a --remote chain when its dump is complete: restore sees no parents
    #[arg(long)]
    pub squash: bool,

    /// Commit dumps of which criu restore leaves this out without an error; may be given several
    /// times
    #[arg(long, value_name = "WHAT", value_enum)]
    pub allow: Vec<Allow>,

    /// How --remote restores take their images; auto finds out by itself
    #[arg(long, value_enum, default_value_t = RemoteDialect::Auto)]
    pub remote_dialect: RemoteDialect,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Let a set in doubt be restored: its process is dead on the source
    ///
    /// A set is in doubt when the link broke, or image-proxy fell silent, after the cache had
    /// prepared the set and before the source said that the process is dead. It may be dead or alive:
    /// look there first. If it lives, `image-cache drop` is what you want.
    ///
    /// Where no image-cache runs, this and the other commands but `import` ask the scripts of the restores
    /// that hold a set in the directory: a held restore goes on when it is released, and fails when it is
    /// dropped.
    Release(ReleaseArgs),
    /// Make a set to restore of images that are files on this host
    ///
    /// For a dump whose pages went to this cache's page server: DIR has its other images. What
    /// the page server has of these tasks and the files together are the set.
    Import(ImportArgs),
    /// Drop a session and its images
    Drop(DropArgs),
    /// Show the sessions, their sets and rounds, and the memory they take
    Status(StatusArgs),
    /// What an image-cache starts to keep its memory
    #[command(hide = true)]
    Keeper,
    /// What an image-cache starts to make a file in memory
    #[command(hide = true)]
    ArenaFile,
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// CRIU's images directory
    #[arg(value_parser = parse_some::<PathBuf>)]
    pub dir: PathBuf,
    /// Name of the session [default: a new unique name]
    #[arg(long, value_name = "NAME")]
    pub session: Option<String>,
    #[command(flatten)]
    pub daemon: ControlArgs,
}

#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    /// Name of the session, or its id as `status` shows it (@...). Where several have the name, the
    /// id is wanted
    pub session: String,
    /// You have looked, and the process is dead: wanted as long as image-proxy is connected and may
    /// say so itself. Said of a process that lives it gives two of it
    #[arg(long)]
    pub process_is_dead: bool,
    #[command(flatten)]
    pub daemon: ControlArgs,
}

#[derive(Debug, clap::Args)]
pub struct DropArgs {
    /// Name of the session, or its id as `status` shows it (@...). Where several have the name, the
    /// id is wanted
    pub session: String,
    /// You have looked, and the process lives: wanted as long as a CRIU may have killed it. Said of
    /// a dead process it loses it
    #[arg(long)]
    pub process_lives: bool,
    #[command(flatten)]
    pub daemon: ControlArgs,
}

/// What `criu restore` leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Allow {
    /// The nftables rules of a network namespace, which a restore by --stream does not make
    Nftables,
}

/// When sets are kept through a restart of image-cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeepThroughRestart {
    Auto,
    On,
    Off,
}

/// The two ways in which `--remote` CRIUs take an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RemoteDialect {
    /// What the dump of the same CRIU showed; both are served
    Auto,
    /// On the unix socket (criu-dev until May 2020)
    Socket,
    /// On a pipe handed over (criu-dev May and June 2020)
    Pipe,
}

/// image-proxy speaks every two seconds, and may be late.
fn prepared_timeout(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).map_err(|e| e.to_string())?;
    match time >= Duration::from_secs(5) {
        true => Ok(time),
        false => Err("at least 5s: image-proxy speaks every 2s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["image-cache", "--port", "7", "-D", "a", "-D", "b"]).unwrap();
        assert_eq!(cli.port, Some(7));
        assert_eq!(cli.daemon.images_dir.len(), 2);
        assert!(
            Cli::try_parse_from(["image-cache"]).is_err(),
            "the port is required"
        );
        let cli = Cli::try_parse_from(["image-cache", "-p", "7", "--allow", "nftables"]).unwrap();
        assert_eq!(cli.allow, [Allow::Nftables]);
        let cli = Cli::try_parse_from(["image-cache", "release", "web"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Release(a)) if a.session == "web"));
        let drop = ["image-cache", "drop", "@dc4a9c109090", "--process-lives"];
        let cli = Cli::try_parse_from(drop).unwrap();
        assert!(matches!(cli.command, Some(Command::Drop(a)) if a.process_lives));
        for time in ["0", "4s"] {
            let silent = ["image-cache", "-p", "7", "--prepared-timeout", time];
            assert!(Cli::try_parse_from(silent).is_err(), "{time}");
        }
        let both = ["image-cache", "-p", "7", "--keep", "--release-on-read"];
        assert!(Cli::try_parse_from(both).is_err(), "they contradict");
    }
}
