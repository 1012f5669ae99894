//! What several tests do: a restore that is there before its dump, and the proof that a refused set is never served.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use super::content::ImageSet;
use super::job::{DumpError, DumpJob, Protocol};
use super::remote::Remote;
use super::run::{compare, fetch, Event, Fetched, Snapshot};
use super::stream::Serve;
use crate::bins::bin;
use crate::daemons::{until, wait_child, Daemon, Pair, SOON};

/// A restore in a thread of its own, started before there is anything to restore.
pub struct EarlyRestore(JoinHandle<Result<Fetched, String>>);

impl EarlyRestore {
    pub fn start(protocol: &Protocol, dir: &Path, set: &ImageSet) -> Self {
        let (protocol, dir, set) = (protocol.clone(), dir.to_path_buf(), set.clone());
        EarlyRestore(std::thread::spawn(move || {
            fetch_all(&protocol, &dir, &set.names())
        }))
    }

    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// What it got in the end.
    pub fn end(self) -> Result<Fetched, String> {
        self.0.join().expect("a restore does not panic")
    }

    pub fn expect(self, set: &ImageSet) {
        let result = self.end().and_then(|fetched| compare(&fetched, set));
        result.unwrap_or_else(|error| panic!("the early restore: {error}"));
    }
}

fn fetch_all(protocol: &Protocol, dir: &Path, names: &[&str]) -> Result<Fetched, String> {
    match protocol {
        Protocol::Stream => {
            let serve = Serve::connect(dir).map_err(|error| format!("connect: {error}"))?;
            fetch(&serve, names).map_err(|error| error.to_string())
        }
        Protocol::Remote {
            dialect,
            spelling,
            id,
        } => {
            let client = Remote::restore(dir, *dialect, *spelling);
            client.list().map_err(|error| format!("list: {error}"))?;
            let fetched =
                fetch(&Snapshot(&client, id), names).map_err(|error| error.to_string())?;
            client
                .restore_finish()
                .map_err(|error| format!("FINISH: {error}"))?;
            Ok(fetched)
        }
    }
}

/// How a dump over a bad link ended.
#[derive(Debug)]
pub enum Outcome {
    Committed,
    Refused(DumpError),
}

/// A gated dump with a restore waiting for it, while `watch` does its worst. Either the dump says OK and the restore
/// gets exactly its set, or the dump fails and nobody ever gets it: a retry through the same daemons, with other
/// bytes, succeeds, and its bytes are the only ones that any reader sees.
pub fn dump_or_retry(
    pair: &Pair,
    protocol: &Protocol,
    set: fn(u64) -> ImageSet,
    watch: &mut dyn FnMut(Event),
) -> Outcome {
    let (first, second) = (set(1), set(2));
    let early = EarlyRestore::start(protocol, &pair.target, &first);
    let result = DumpJob::new(protocol, &pair.source, 1)
        .gated()
        .run_with(&first, watch);
    match result {
        Ok(()) => {
            // The link may be cut between the cache's answer and the source's word that it has it: then the set is
            // held in doubt, and the operator, who sees that the dump said OK, resolves it.
            until("the restore ends, or the set is in doubt", || {
                early.is_finished() || doubtful(&pair.cache).is_some()
            });
            match early.end() {
                Ok(fetched) => compare(&fetched, &first).expect("what the early restore got"),
                // Whoever waited is told, and may come again when the doubt is over.
                Err(error) => {
                    until(&format!("a doubt that explains: {error}"), || {
                        doubtful(&pair.cache).is_some()
                    });
                    let session = doubtful(&pair.cache).expect("it was there");
                    release(pair, &session);
                    let again = protocol.restore(&pair.target, &first);
                    again.expect("the restore after the release");
                }
            }
            Outcome::Committed
        }
        Err(DumpError::Script(error)) => panic!("the script: {error}"),
        Err(error) => {
            retry(pair, protocol, early, &second, &error);
            Outcome::Refused(error)
        }
    }
}

/// The session that the cache holds in doubt, by its log.
fn doubtful(cache: &Daemon) -> Option<String> {
    let log = cache.log();
    let doubt = |line: &&str| line.contains("in doubt:") && line.contains("session=");
    let line = log.lines().find(doubt)?;
    let (_, rest) = line.split_once("session=")?;
    let name = rest.split([' ', '}']).next()?;
    Some(name.trim_matches('"').to_owned())
}

fn release(pair: &Pair, session: &str) {
    let mut command = Command::new(bin("image-cache"));
    let control = pair.target.join("image-cache-control.sock");
    command.args(["release", session, "--control"]).arg(control);
    let mut child = command.spawn().expect("it starts");
    let status = wait_child(&mut child, SOON).expect("our own child");
    if !status.expect("it ends").success() {
        // image-proxy has brought its decision in the meantime, by a connection of its own.
        let decided = || pair.cache.log().contains("not in doubt any more");
        until(&format!("the end of the doubt about {session}"), decided);
    }
}

fn retry(pair: &Pair, protocol: &Protocol, early: EarlyRestore, set: &ImageSet, why: &DumpError) {
    // It refuses connections until it has seen that the CRIU of the failed dump is gone.
    until("image-proxy accepts again", || {
        let sockets = ["img-proxy.sock", "streamer-capture.sock"];
        let accepts = |name: &&str| UnixStream::connect(pair.source.join(name)).is_ok();
        sockets.iter().all(accepts)
    });
    let retry = DumpJob::new(protocol, &pair.source, 2)
        .gated()
        .run_with(set, &mut |_| {});
    retry.unwrap_or_else(|error| panic!("the retry failed: {error:?}; the first try: {why:?}"));
    match early.end() {
        // It was not bound to the refused set, or was told to wait for the next.
        Ok(fetched) => compare(&fetched, set).unwrap_or_else(|error| {
            panic!("bytes of a refused set? {error}; it was refused: {why:?}")
        }),
        Err(_) => protocol
            .restore(&pair.target, set)
            .unwrap_or_else(|error| panic!("restore of the retry: {error}; first: {why:?}")),
    }
}
