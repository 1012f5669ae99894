//! The control sockets: one request and its answers per connection, a line of JSON each.
//!
//! `image-proxy-control.sock` is how the action script finds its daemon, and
//! `image-cache-control.sock` how an operator reaches the cache.

pub mod hold;
pub mod script;
pub mod show;
pub mod status;
pub mod trust;

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::control::hold::{Held, Hold};
use crate::control::status::Status;
use crate::control::trust::{ControlSocket, Untrusted};

/// Name of image-proxy's control socket in its directories.
pub const PROXY_CONTROL_SOCKET: &str = "image-proxy-control.sock";
/// Name of image-cache's control socket in its directories.
pub const CACHE_CONTROL_SOCKET: &str = "image-cache-control.sock";

/// Longest line either way: a status of thousands of sets.
const MAX_LINE_BYTES: usize = 4 << 20;

/// How long a peer may take for a line once it connected, and a daemon to say "accepted".
const LINE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the action script, or an operator, wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// `pre-dump`: the tasks are about to be frozen. The set becomes gated.
    Announce(ScriptRun),
    /// `post-dump`: the tasks are frozen and wait for the verdict.
    Commit(ScriptRun),
    /// The script of a restore, on the target.
    Restoring(Restoring),
    /// The script of a restore, after `Answer::Hold`, on the same connection: it stands still, and can be reached when
    /// image-cache is gone.
    Holds,
    /// The script of a restore that holds, to an image-cache that was started after the one that it held for.
    Holding(Box<Held>),
    /// image-cache, to such a script: it starts on the port where the script listens.
    YieldPort,
    /// The operator knows that the source's process is dead: serve the set in doubt. `session`
    /// is a name or an id, here and below. `process_is_dead`: also one whose source may still say so
    /// itself.
    Release {
        session: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        process_is_dead: bool,
    },
    /// What is going on?
    Status,
    /// The operator has a dump's images as files on this host; a descriptor of their directory
    /// follows the line.
    Import {
        images_dir: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<String>,
    },
    /// The operator wants a session's memory back. `process_lives`: they have looked, where a
    /// CRIU may have killed it.
    Drop {
        session: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        process_lives: bool,
    },
    /// The operator wants no dump of this session: its process goes on here. `process_lives`:
    /// they have looked, where the daemon cannot see it.
    Abort {
        session: String,
        #[serde(default)]
        process_lives: bool,
    },
}

/// Which CRIU run a script speaks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScriptRun {
    /// CRIU's pid as the script sees it. The daemon trusts the pid that the kernel tells it
    /// more, and this one when it cannot see the other's namespace.
    pub criu_pid: i32,
    /// CRIU's images directory. image-proxy's script lets its descriptor follow the line: it
    /// shows which round was before this one, and at the commit the files in it belong to the
    /// dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images_dir: Option<String>,
    /// The root of the dumped tree, in the same numbers as `criu_pid`: CRTOOLS_INIT_PID, which
    /// CRIU gives its scripts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_pid: Option<i32>,
    /// About how many bytes of pages the dump will bring, as the script sees the tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_bytes: Option<u64>,
}

/// How far the CRIU has come that restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreStep {
    /// It has not connected yet.
    PreStream,
    /// It has read what the tree is, and nothing of it is built.
    PreRestore,
    /// Everything is built, and waits. Nothing runs before that.
    PostRestore,
    /// CRIU detaches from the tasks next, which may fail.
    PreResume,
    /// The tasks run without CRIU.
    PostResume,
}

/// What the script of a restore says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoring {
    pub step: RestoreStep,
    /// CRIU's pid as the script sees it.
    pub criu_pid: i32,
    /// A pidfd of CRIU follows the line.
    #[serde(default)]
    pub pidfd: bool,
    /// This script can hold the restore at `post-restore`, and does if it is told to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holds: bool,
    /// A descriptor of CRIU's log follows, open for reading.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub log: bool,
}

/// What a daemon answers: first `Accepted`, then `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The request is understood; the verdict comes within this time.
    Accepted {
        within_ms: u64,
    },
    Done,
    /// To a restore's script at `post-restore`: stand still until `Done` or `Failed` comes.
    Hold {
        hold: Box<Hold>,
    },
    Status {
        status: Box<Status>,
    },
    Failed {
        reason: String,
    },
}

/// Why a request to a daemon got no answer, or the answer no.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot reach the daemon at {path}")]
    Connect {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the daemon at {path}")]
    Untrusted {
        path: String,
        #[source]
        source: Untrusted,
    },
    #[error("cannot talk to the daemon")]
    Io(#[from] io::Error),
    #[error("the daemon closed the connection before it answered: its log says why")]
    Gone,
    #[error("the daemon did not answer in time")]
    Timeout,
    #[error("a line on the control socket is not valid: do the daemon and this command have the same version?")]
    Json(#[from] serde_json::Error),
    #[error("a line is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    #[error("{0}")]
    Refused(String),
}

/// Asks a daemon and waits for its verdict. Blocking: for the script and the command line.
pub fn ask(socket: &ControlSocket, request: &Request) -> Result<(), ControlError> {
    ask_with(socket, request, None)
}

/// The same, handing over a descriptor behind the request.
pub fn ask_with(
    socket: &ControlSocket,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), ControlError> {
    converse(socket, request, fd).map(drop)
}

/// Asks a daemon what is going on.
pub fn status(socket: &ControlSocket) -> Result<Status, ControlError> {
    converse(socket, &Request::Status, None)?.ok_or(ControlError::Gone)
}

fn converse(
    socket: &ControlSocket,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<Option<Status>, ControlError> {
    let mut conversation = Conversation::begin(socket, request, fd.as_slice())?;
    loop {
        match conversation.answer()? {
            Answer::Accepted { .. } => {}
            Answer::Done => return Ok(None),
            // Only a script that said that it holds is told to.
            Answer::Hold { .. } => return Err(ControlError::Gone),
            Answer::Status { status } => return Ok(Some(*status)),
            Answer::Failed { reason } => return Err(ControlError::Refused(reason)),
        }
    }
}

/// A request, and the answers to it. Blocking, until it is taken apart.
pub struct Conversation {
    reader: BufReader<StdStream>,
}

impl Conversation {
    /// Asks a daemon that is to be believed, and hands over descriptors behind the request.
    pub fn begin(
        socket: &ControlSocket,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Self, ControlError> {
        let path = || socket.path.display().to_string();
        let connected = StdStream::connect(&socket.path);
        let mut stream = connected.map_err(|source| ControlError::Connect {
            path: path(),
            source,
        })?;
        // Before it is told anything, or handed a descriptor.
        socket
            .check(&stream)
            .map_err(|source| ControlError::Untrusted {
                path: path(),
                source,
            })?;
        stream.set_write_timeout(Some(LINE_TIMEOUT))?;
        stream.set_read_timeout(Some(LINE_TIMEOUT))?;
        stream.write_all(&line(request)?)?;
        for fd in fds {
            crate::criu_io::fdpass::send_fd(&stream, *fd)?;
        }
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// The next answer. The one behind `Accepted` has the time that this says.
    pub fn answer(&mut self) -> Result<Answer, ControlError> {
        let answer = read_line_blocking(&mut self.reader)?;
        if let Answer::Accepted { within_ms } = answer {
            let within = Duration::from_millis(within_ms) + LINE_TIMEOUT;
            self.reader.get_ref().set_read_timeout(Some(within))?;
        }
        Ok(answer)
    }

    /// The user of the daemon.
    pub fn peer_uid(&self) -> io::Result<u32> {
        trust::peer_uid(self.reader.get_ref())
    }

    /// The connection, for [`next_answer`], which waits for ever; and what was read of it and not looked at.
    pub fn into_parts(self) -> (StdStream, Vec<u8>) {
        let read = self.reader.buffer().to_vec();
        (self.reader.into_inner(), read)
    }
}

/// The next answer of a daemon, however long it takes. The end of the connection is an error.
///
/// Not cancel safe.
pub async fn next_answer(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<Answer, ControlError> {
    let mut line = Vec::new();
    let mut limited = reader.take(MAX_LINE_BYTES as u64);
    limited.read_until(b'\n', &mut line).await?;
    match line.last() {
        Some(b'\n') => Ok(serde_json::from_slice(&line)?),
        _ if line.len() >= MAX_LINE_BYTES => Err(ControlError::TooLong),
        _ => Err(ControlError::Gone),
    }
}

/// Sends a request.
pub async fn request(stream: &mut UnixStream, request: &Request) -> Result<(), ControlError> {
    stream.write_all(&line(request)?).await?;
    Ok(())
}

fn read_line_blocking<T: DeserializeOwned>(
    reader: &mut BufReader<StdStream>,
) -> Result<T, ControlError> {
    let mut text = String::new();
    let limited = &mut io::Read::take(&mut *reader, MAX_LINE_BYTES as u64);
    match limited.read_line(&mut text) {
        Ok(0) => Err(ControlError::Gone),
        Ok(_) if !text.ends_with('\n') => Err(ControlError::Gone),
        Ok(_) => Ok(serde_json::from_str(&text)?),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ) =>
        {
            Err(ControlError::Timeout)
        }
        Err(e) => Err(e.into()),
    }
}

/// Receives the request of a connection.
pub async fn receive(stream: &mut UnixStream) -> Result<Request, ControlError> {
    tokio::time::timeout(LINE_TIMEOUT, receive_in_time(stream))
        .await
        .unwrap_or(Err(ControlError::Timeout))
}

/// The same, however long that takes.
pub async fn receive_in_time(stream: &mut UnixStream) -> Result<Request, ControlError> {
    let mut buffer = Vec::new();
    // Byte by byte: a descriptor may come with the byte behind the line.
    while buffer.last() != Some(&b'\n') {
        if buffer.len() > MAX_LINE_BYTES {
            return Err(ControlError::TooLong);
        }
        match stream.read_u8().await {
            Ok(byte) => buffer.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ControlError::Gone);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(serde_json::from_slice(&buffer)?)
}

/// Sends one answer.
pub async fn reply(stream: &mut UnixStream, answer: &Answer) -> Result<(), ControlError> {
    stream.write_all(&line(answer)?).await?;
    Ok(())
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, ControlError> {
    let mut out = serde_json::to_vec(value)?;
    out.push(b'\n');
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_lines() {
        let run = || ScriptRun {
            criu_pid: 7,
            images_dir: None,
            root_pid: None,
            expected_bytes: None,
        };
        for (request, json) in [
            (
                Request::Announce(run()),
                r#"{"request":"announce","criu_pid":7}"#,
            ),
            (
                Request::Commit(run()),
                r#"{"request":"commit","criu_pid":7}"#,
            ),
            (
                Request::Restoring(Restoring {
                    step: RestoreStep::PreRestore,
                    criu_pid: 7,
                    pidfd: true,
                    holds: false,
                    log: false,
                }),
                r#"{"request":"restoring","step":"pre-restore","criu_pid":7,"pidfd":true}"#,
            ),
            (
                Request::Release {
                    session: "web".into(),
                    process_is_dead: false,
                },
                r#"{"request":"release","session":"web"}"#,
            ),
            (
                Request::Drop {
                    session: "@dc4a9c109090".into(),
                    process_lives: true,
                },
                r#"{"request":"drop","session":"@dc4a9c109090","process_lives":true}"#,
            ),
            (
                Request::Abort {
                    session: "web".into(),
                    process_lives: true,
                },
                r#"{"request":"abort","session":"web","process_lives":true}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<Request>(json).unwrap(), request);
        }
    }

    #[tokio::test]
    async fn ask_and_be_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let verdicts = [
            Some(Answer::Done),
            Some(Answer::Failed {
                reason: "no cache".into(),
            }),
            None,
        ];
        for verdict in verdicts {
            let path = path.clone();
            let asked = tokio::task::spawn_blocking(move || {
                ask(
                    &ControlSocket::found(path),
                    &Request::Commit(ScriptRun {
                        criu_pid: 1,
                        images_dir: None,
                        root_pid: None,
                        expected_bytes: None,
                    }),
                )
            });
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(matches!(receive(&mut stream).await, Ok(Request::Commit(_))));
            reply(&mut stream, &Answer::Accepted { within_ms: 1000 })
                .await
                .unwrap();
            if let Some(answer) = &verdict {
                reply(&mut stream, answer).await.unwrap();
            }
            drop(stream);
            match (asked.await.unwrap(), verdict) {
                (Ok(()), Some(Answer::Done)) | (Err(ControlError::Gone), None) => {}
                (Err(ControlError::Refused(r)), Some(_)) => assert_eq!(r, "no cache"),
                (other, _) => panic!("{other:?}"),
            }
        }
    }
}
