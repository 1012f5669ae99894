//! The image-cache that a hold belongs to: what it says is heard. If it goes, the script looks for another one.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use image_common::control::hold::{Held, Hold};
use image_common::control::trust::ControlSocket;
use image_common::control::{self, Answer, ControlError, Request, CACHE_CONTROL_SOCKET};
use image_common::criu_io::fdpass::send_fd;
use image_common::error_chain::chain;
use image_common::log::say;
use tokio::io::{AsyncBufRead, AsyncReadExt, BufReader};
use tokio::net::UnixStream;

use crate::action_script::state::{Decision, State};

/// Between two looks for another image-cache.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// How long one that was found may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// What is needed to be heard by another image-cache.
pub struct Daemons {
    pub hold: Hold,
    /// The control socket of the first one.
    pub socket: PathBuf,
    /// Users whose image-cache is believed.
    pub believed: HashSet<u32>,
    /// A pidfd of CRIU.
    pub criu: OwnedFd,
}

/// Why an image-cache does not take the hold over.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the image-cache at {path} does not take this hold over: {reason}")]
    Refused { path: String, reason: String },
    #[error("the image-cache at {path} is not believed: it runs as uid {uid}")]
    Uid { path: String, uid: u32 },
}

impl Daemons {
    /// Hears the first image-cache, and those that come after it. Ends with a decision.
    pub async fn follow(self, state: State, stream: std::os::unix::net::UnixStream, read: Vec<u8>) {
        // From here on the decision reaches this script in any case: the source may be told.
        state.until(|hold| hold.socket.is_some()).await;
        let connected = async {
            let mut stream = tokio_stream(stream)?;
            control::request(&mut stream, &Request::Holds).await?;
            Ok::<_, ControlError>(io::Cursor::new(read).chain(stream))
        };
        match connected.await {
            Ok(stream) => self.hear(&state, BufReader::new(stream)).await,
            // It has gone already.
            Err(e) => say(&format!("image-cache: post-restore: {}", chain(&e))),
        }
        while state.now().decided.is_none() {
            state.change(|hold| hold.orphaned = true);
            say(&orphaned(&self.hold.held));
            let stream = self.another().await;
            state.change(|hold| hold.orphaned = false);
            say("image-cache: post-restore: another image-cache runs here and has taken the hold over: it gives the decision");
            self.hear(&state, stream).await;
        }
    }

    /// Until there is a decision, or the connection ends.
    async fn hear(&self, state: &State, mut stream: impl AsyncBufRead + Unpin) {
        loop {
            let decision = match control::next_answer(&mut stream).await {
                Ok(Answer::Done) => Decision::GoOn("image-cache"),
                Ok(Answer::Failed { reason }) => Decision::GiveUp(reason),
                // It was said before, and says no more.
                Ok(Answer::Accepted { .. } | Answer::Hold { .. } | Answer::Status { .. }) => {
                    continue
                }
                Err(e) => {
                    if !matches!(e, ControlError::Gone) {
                        say(&format!("image-cache: post-restore: {}", chain(&e)));
                    }
                    return;
                }
            };
            // What was decided before stays.
            if let Err(before) = state.decide(decision) {
                say(&format!(
                    "image-cache: post-restore: image-cache decides otherwise, too late: {before}"
                ));
            }
            return;
        }
    }

    /// Waits for another image-cache that takes the hold over.
    async fn another(&self) -> BufReader<UnixStream> {
        let mut pause = FIRST_PAUSE;
        let mut said = HashSet::new();
        let beside = self.hold.dir.join(CACHE_CONTROL_SOCKET);
        loop {
            for path in [&beside, &self.socket] {
                match self.taken_over(path.clone()).await {
                    Ok(stream) => return stream,
                    Err(NotTaken::Control(ControlError::Connect { .. } | ControlError::Gone)) => {}
                    Err(e) => {
                        let text = chain(&e);
                        if said.len() < 16 && said.insert(text.clone()) {
                            say(&format!("image-cache: post-restore: {text}"));
                        }
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = LAST_PAUSE.min(pause * 2);
        }
    }

    /// Hands the hold to the image-cache that listens there.
    async fn taken_over(&self, path: PathBuf) -> Result<BufReader<UnixStream>, NotTaken> {
        let socket = ControlSocket::found(path);
        let shown = socket.path.display().to_string();
        let connected = UnixStream::connect(&socket.path).await;
        let stream = connected.map_err(|source| ControlError::Connect {
            path: shown.clone(),
            source,
        })?;
        let uid = stream.peer_cred().map_err(ControlError::Io)?.uid();
        if !self.believed.contains(&uid) {
            return Err(NotTaken::Uid { path: shown, uid });
        }
        let asked = async {
            let mut stream = stream;
            let held = Box::new(self.hold.held.clone());
            control::request(&mut stream, &Request::Holding(held)).await?;
            send_fd(&stream, self.criu.as_fd())?;
            let mut stream = BufReader::new(stream);
            let answer = control::next_answer(&mut stream).await?;
            Ok::<_, ControlError>((stream, answer))
        };
        let asked = tokio::time::timeout(ANSWERS_WITHIN, asked).await;
        match asked.unwrap_or(Err(ControlError::Timeout))? {
            (stream, Answer::Accepted { .. } | Answer::Hold { .. }) => Ok(stream),
            // Before it has said yes that is no decision.
            (_, Answer::Failed { reason }) => Err(NotTaken::Refused {
                path: shown,
                reason,
            }),
            (_, Answer::Done | Answer::Status { .. }) => Err(ControlError::Gone.into()),
        }
    }
}

fn tokio_stream(stream: std::os::unix::net::UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// What an operator finds in CRIU's log.
fn orphaned(held: &Held) -> String {
    let Held {
        id, session, set, ..
    } = held;
    format!(
        "image-cache: post-restore: image-cache is gone, and this restore holds set {set} of session {session} ({id}): the tasks are \
         built, asleep and not lost. They wait for image-proxy, which brings the decision to the link's port; or for image-cache: start \
         it again with the same -D and port. Or decide: `image-cache release {id}` if the process is dead on the source, `image-cache \
         drop {id}` if it lives there (in the directory of image-cache, or with --control)"
    )
}
