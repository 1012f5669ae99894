//! The command line, and what it means once it is checked.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use image_common::daemon::DaemonArgs;
use image_common::net::ListenAddress;
use image_common::tls::TlsArgs;
use image_common::units::{parse_duration, parse_size};

use crate::limits::Limits;

/// Receives CRIU's images from image-proxy, keeps them in memory and serves them to criu restore.
///
/// Start it on the target host before the dump. criu restore finds it by the sockets in its
/// images directory: img-cache.sock (--remote) and streamer-serve.sock (--stream). The sockets
/// in DIR serve the newest session, those in DIR/SESSION/ exactly that one.
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
    #[arg(long, value_name = "BIND")]
    pub address: Option<String>,

    /// TLS on the link, and on --page-server where its ADDR is not loopback; on loopback there
    /// CRIU's own --tls is taken, and plaintext too
    #[command(flatten)]
    pub tls: TlsArgs,

    /// Take connections only from those whose certificate has this name (DNS name or address,
    /// as subject alternative name); may be given several times [default: every certificate
    /// of the authorities]
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub allow_peer: Vec<String>,

    /// Listen in plaintext where other hosts can connect. Whoever can, can put a set here that
    /// you may restore, and whoever is between can read the process's memory
    #[arg(long, conflicts_with = "tls")]
    pub insecure_listen: bool,

    /// TCP port for image-proxy; 0 takes a free one and logs it (-v3)
    #[arg(short = 'p', long, value_name = "PORT", required = true)]
    pub port: Option<u16>,

    /// Also be the page server of pre-dump and dump, without image-proxy between: [ADDR:]PORT to
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
    /// process [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub set_ttl: Option<Duration>,

    /// Memory for images; past it the dump fails and its process lives on. So it does before a
    /// control group, or this host, has no more memory [default: three quarters of this host's
    /// memory, or of the smallest limit of our control groups]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_limit: Option<u64>,

    /// How long to wait for a link that broke, if image-proxy waits as long (its option of the
    /// same name). 0: what is being received is given up at once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub link_timeout: Duration,

    #[command(flatten)]
    pub limits: Limits,

    /// Make one snapshot of a --remote chain when its dump is complete: restore sees no parents
    #[arg(long)]
    pub squash: bool,

    /// How --remote restores take their images; auto finds out by itself
    #[arg(long, value_enum, default_value_t = RemoteDialect::Auto)]
    pub remote_dialect: RemoteDialect,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Let a set in doubt be restored: its process is dead on the source
    ///
    /// A set is in doubt when the link broke after the cache said "committed" and before the
    /// source confirmed that it heard it. The process on the source may be dead or alive;
    /// look there first. If it lives, `image-cache drop` is what you want.
    Release(SessionArgs),
    /// Make a set to restore of images that are files on this host
    ///
    /// For a dump whose pages went to this cache's page server: DIR has its other images. What
    /// the page server has of these tasks and the files together are the set.
    Import(ImportArgs),
    /// Drop a session and its images
    Drop(SessionArgs),
    /// Show the sessions, their sets and rounds, and the memory they take
    Status(StatusArgs),
}

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = image_common::control::CACHE_CONTROL_SOCKET)]
    pub control: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// CRIU's images directory
    pub dir: PathBuf,
    /// Name of the session [default: a new unique name]
    #[arg(long, value_name = "NAME")]
    pub session: Option<String>,
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = image_common::control::CACHE_CONTROL_SOCKET)]
    pub control: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct SessionArgs {
    /// Name of the session
    pub session: String,
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = image_common::control::CACHE_CONTROL_SOCKET)]
    pub control: PathBuf,
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
        let cli = Cli::try_parse_from(["image-cache", "release", "web"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Release(a)) if a.session == "web"));
        let both = ["image-cache", "-p", "7", "--keep", "--release-on-read"];
        assert!(Cli::try_parse_from(both).is_err(), "they contradict");
    }
}
