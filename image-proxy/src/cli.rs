//! The command line.

use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use image_common::admission::quota::PortArgs;
use image_common::control::show::StatusArgs;
use image_common::control::trust::ControlArgs;
use image_common::daemon::DaemonArgs;
use image_common::image::SessionName;
use image_common::link::MAX_CONNECTIONS;
use image_common::net::tls::TlsArgs;
use image_common::net::ListenAddress;
use image_common::units::{parse_duration, parse_size, parse_some, parse_some_time};

/// Takes CRIU's images as it dumps and sends them to image-cache on the target host.
///
/// Start it on the source host. criu dump and pre-dump find it by the sockets in their images
/// directory: img-proxy.sock (--remote) and streamer-capture.sock (--stream).
///
/// Started without arguments by CRIU it is the action script that makes the dump safe: CRIU
/// kills the process only after image-cache has said that it has every image.
///
///     criu dump --stream --action-script "$(command -v image-proxy)" ...
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "\
AS ACTION SCRIPT: the daemon is found through IMAGE_PROXY_CONTROL (path of its control
socket), else image-proxy-control.sock in CRIU's images directory, else in its work directory.

EXIT STATUS: 0 stopped cleanly, 1 fatal error, 2 wrong usage, 3 stopped by a signal and a
session was aborted, or the target has not heard what became of a process. As action script:
0 go on, 1 do not (the reason is on standard error).")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// Host on which image-cache listens: IPv4, IPv6 or a name
    #[arg(long, value_name = "HOST", required = true, value_parser = parse_some::<String>)]
    pub address: Option<String>,

    /// TLS on the link
    #[command(flatten)]
    pub tls: TlsArgs,

    /// Do not compare the name in image-cache's certificate with --address
    #[arg(long, requires = "tls")]
    pub tls_no_cn_verify: bool,

    /// Its TCP port
    #[arg(short = 'p', long, value_name = "PORT", required = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,

    /// TCP connections per session, 1 to 16: a large image goes over all of them. For networks
    /// that limit each connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CONNECTIONS)))]
    pub connections: u16,

    /// Name of the sessions of this proxy; the target's sockets are in DIR/sessions/NAME/ [default: a
    /// new unique name each]
    #[arg(long, value_name = "NAME")]
    pub session: Option<SessionName>,

    /// Also be the page server of pre-dump and dump: `[ADDR:]PORT` to listen on, loopback without
    /// ADDR. Their --page-server --address and --port name it. With --tls CRIU may use its own
    /// --tls there, and must where ADDR is not loopback
    #[arg(long, value_name = "[ADDR:]PORT")]
    pub page_server: Option<ListenAddress>,

    /// Take pages of any host in plaintext: --page-server with an ADDR that is not loopback,
    /// without --tls
    #[arg(long, conflicts_with = "tls")]
    pub insecure_listen: bool,

    /// Of --page-server
    #[command(flatten)]
    pub ports: PortArgs,

    /// When the process may be killed here. All three need the action script of the dump
    #[arg(long, value_enum, default_value_t = CommitOn::Auto)]
    pub commit_on: CommitOn,

    /// How long the commit may take while the process is frozen: with a trial also the restore on the target
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_some_time)]
    pub commit_timeout: Duration,

    /// How long connecting to image-cache may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_some_time)]
    pub connect_timeout: Duration,

    /// How long a dump waits, before its tasks are frozen, until image-cache has made memory ready for as much as
    /// they have: then that is not done while they are frozen. 0: do not ask for it
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub reserve_timeout: Duration,

    /// How long a link that broke may be away: image-proxy connects again, and the dump goes on
    /// where it was. 0: a dump fails with its link. image-cache has the same option
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub link_timeout: Duration,

    /// How much of what was sent, and is not acknowledged, is kept per session for that; pages
    /// only by reference. At least 4M per connection
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    pub retransmit_buffer: u64,

    /// Checksums on the link: CRC-32C of each frame and each image, compared before the commit
    #[arg(long)]
    pub checksum: bool,

    /// Whether --remote clients are told about parent snapshots
    #[arg(long, value_enum, default_value_t = Parents::Auto)]
    pub parents: Parents,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Give a session up: its process goes on here, and the target forgets the images
    ///
    /// A dump under way is made to fail, a session that waits for its next round is closed. A
    /// dump whose CRIU was told to kill is given up only when CRIU has ended and the process
    /// lives; the set on the target is dropped, or you are told how to drop it there.
    Abort(AbortArgs),
    /// Show the sessions under way or in doubt, their sets and rounds
    Status(StatusArgs),
}

#[derive(Debug, clap::Args)]
pub struct AbortArgs {
    /// Name of the session, or its id as `status` shows it (@...). Where several have the name, the
    /// id is wanted
    pub session: String,
    /// You have looked, and the process lives: wanted where image-proxy cannot know. Said of a
    /// dead process it loses it
    #[arg(long)]
    pub process_lives: bool,
    #[command(flatten)]
    pub daemon: ControlArgs,
}

/// What has to stand on the target before CRIU is told to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CommitOn {
    /// When it stands restored on the target and waits there, asleep. A restore that fails costs nothing: the dump
    /// fails, and the process goes on here. criu restore on the target needs image-cache as its action script
    Restored,
    /// When image-cache holds every image. Restored is later
    Held,
    /// Like restored if a criu restore waits on the target for this dump, with its action script; else like held
    Auto,
}

/// Which snapshot list a `--remote` dump gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Parents {
    /// The whole chain for clients that can dump with parents, else like never
    Auto,
    /// The whole chain; a CRIU with the pid-reuse check (July 2018 and later) fails its second dump
    Always,
    /// Only the client's own snapshot: every dump is a full one
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from([
            "image-proxy",
            "--address",
            "::1",
            "--port",
            "7",
            "--session",
            "web",
            "-vvv",
            "--commit-timeout",
            "2s",
        ])
        .unwrap();
        assert_eq!(cli.commit_on, CommitOn::Auto);
        assert_eq!(cli.commit_timeout, Duration::from_secs(2));
        assert_eq!(cli.session.map(|s| s.to_string()), Some("web".to_owned()));
        let with = |option, value| {
            let base = ["image-proxy", "--address", "x", "--port", "7"];
            Cli::try_parse_from(base.into_iter().chain([option, value]))
        };
        assert!(with("--session", "../x").is_err());
        assert_eq!(with("--connections", "16").unwrap().connections, 16);
        let on = |value| with("--commit-on", value).map(|cli| cli.commit_on);
        assert_eq!(on("restored").unwrap(), CommitOn::Restored);
        assert_eq!(on("held").unwrap(), CommitOn::Held);
        assert!(on("never").is_err());
        for bad in ["0", "17", "-1", "x"] {
            assert!(with("--connections", bad).is_err(), "{bad}");
        }
    }

    /// The daemon goes to its work directory before it reads them.
    #[test]
    fn relative_files_are_of_the_directory_of_the_start() {
        let line =
            "image-proxy --address x --port 7 --tls --tls-cert cert.pem --tls-cacrl ca/crl.pem";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(cli.tls.tls_cert, here.join("cert.pem"));
        assert_eq!(cli.tls.tls_cacrl, Some(here.join("ca/crl.pem")));
        assert!(cli.tls.tls_key.is_absolute());
    }
}
