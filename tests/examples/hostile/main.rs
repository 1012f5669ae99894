//! One hostile peer, by hand: what it does to a daemon, and how the daemon ended it.
//!
//!     cargo run -p e2e-tests --example hostile -- KIND ADDRESS:PORT
//!     cargo run -p e2e-tests --example hostile -- tls-stranger ADDRESS:PORT CERTIFICATE-DIR
//!     cargo run -p e2e-tests --example hostile -- deaf-restore DIRECTORY-OF-THE-SOCKETS IMAGE

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use e2e_tests::hostile::{
    client_hello, deaf_restore, foreign_commit, half_closed, header_bomb, name_bomb, plaintext,
    replayed_session, slow_sender, stream_flood, tls_stranger,
};

const KINDS: &str = "slow-sender, slow-pages, header-bomb, header-bomb-in-session, name-bomb, \
    name-bomb-in-session, stream-flood, half-closed, half-closed-in-session, replayed-session, \
    foreign-commit, plaintext, client-hello, tls-stranger, deaf-restore";

fn run(kind: &str, target: &str, more: Option<&str>) -> io::Result<String> {
    let wrong = |e| io::Error::other(format!("`{target}`: {e}"));
    let address = || target.parse::<SocketAddr>().map_err(wrong);
    let pace = Duration::from_millis(100);
    let ended = match kind {
        "slow-sender" => slow_sender::attack(address()?, &slow_sender::greeting(), pace),
        "slow-pages" => slow_sender::attack(address()?, &slow_sender::page_request(), pace),
        "header-bomb" => header_bomb::attack(address()?),
        "header-bomb-in-session" => header_bomb::attack_in_session(address()?),
        "name-bomb" => name_bomb::attack(address()?),
        "name-bomb-in-session" => name_bomb::attack_in_session(address()?),
        "stream-flood" => stream_flood::attack(address()?, u32::MAX),
        "half-closed" => half_closed::attack(address()?),
        "half-closed-in-session" => half_closed::attack_in_session(address()?),
        "replayed-session" => {
            replayed_session::attack(address()?, replayed_session::Way::Joins).map(|(_, end)| end)
        }
        "foreign-commit" => foreign_commit::attack(address()?, 1),
        "plaintext" => plaintext::attack(address()?),
        "client-hello" => client_hello::attack(address()?),
        "tls-stranger" => {
            let certificate = more.ok_or_else(|| io::Error::other("which certificate?"))?;
            return tls_stranger::attack(address()?, Path::new(certificate));
        }
        "deaf-restore" => {
            let image = more.unwrap_or("pages-1.img");
            let deaf = deaf_restore::Deaf::begin(Path::new(target), image)?;
            while !deaf.is_over_within(Duration::from_secs(60))? {}
            return Ok(format!(
                "the pipe was closed, {} bytes in it",
                deaf.unread()
            ));
        }
        _ => return Err(io::Error::other(format!("kinds: {KINDS}"))),
    };
    ended.map(|ended| format!("{:?} after {:?}: {}", ended.how, ended.after, ended.text()))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match &args[..] {
        [kind, target] => run(kind, target, None),
        [kind, target, more] => run(kind, target, Some(more)),
        _ => Err(io::Error::other(format!(
            "usage: hostile KIND TARGET; kinds: {KINDS}"
        ))),
    };
    match outcome {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("hostile: {e}");
            ExitCode::FAILURE
        }
    }
}
