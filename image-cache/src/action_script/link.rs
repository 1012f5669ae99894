//! The link's port while no image-cache runs: image-proxy brings the decision about the set that is held, and that alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use image_common::admission::quota::Host;
use image_common::admission::{Admission, Rules};
use image_common::control::hold::{Held, Hold, HoldTls};
use image_common::criu_io::allowed_uids::AllowedUids;
use image_common::error_chain::chain;
use image_common::link::handshake::{
    choose_version, Answer, HandshakeError, Hello, Place, Refusal,
};
use image_common::link::reader::{receive_hello, ReadError, ShakeError};
use image_common::link::{TRIAL_VERSION, VERSIONS};
use image_common::log::say;
use image_common::net;
use image_common::net::socket::Socket;
use image_common::net::tls::{Server, TlsArgs};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::action_script::state::{Decision, State};
use crate::limits::{Handshake, Handshakes};
use crate::receiver::decision::{hear, Word};
use crate::receiver::LinkFailure;

/// One proxy has one decision. The rest are strangers, or know that no image-cache runs.
const MAX_CONNECTIONS: usize = 32;
const MAX_HANDSHAKES: usize = 16;

/// How long a peer may take to say what it wants.
const SHAKES_WITHIN: Duration = Duration::from_secs(10);

/// Between two tries to have the port.
const PAUSE: Duration = Duration::from_millis(250);

const SOFTWARE: &str = concat!(
    "image-cache ",
    env!("CARGO_PKG_VERSION"),
    ", a restore that holds"
);

/// One text for all: a stranger learns nothing of what is held.
const NO_DAEMON: &str = "no image-cache runs here: a restore that it has served holds, and its script takes the decision about \
    that one set alone. Start image-cache again for everything else";

/// What is needed to listen, read while the files of the image-cache are there.
pub struct Link {
    held: Held,
    listen: SocketAddr,
    insecure: bool,
    allowed_uids: Arc<AllowedUids>,
    tls: Option<Arc<Server>>,
    answering: TaskTracker,
}

impl Link {
    /// `Err`: the link cannot be listened on, and why.
    pub fn prepare(hold: &Hold, daemon_uid: u32, answering: &TaskTracker) -> Result<Self, String> {
        let tls = match &hold.tls {
            None => None,
            Some(HoldTls {
                cert,
                key,
                cacert,
                cacrl,
                allow_peer,
            }) => {
                let args = TlsArgs {
                    tls: true,
                    tls_cacert: cacert.clone(),
                    tls_cacrl: cacrl.clone(),
                    tls_cert: cert.clone(),
                    tls_key: key.clone(),
                };
                Some(Server::start(&args, allow_peer).map_err(|e| chain(&e))?)
            }
        };
        let others = hold.allow_uid.iter().copied().chain([daemon_uid]);
        Ok(Self {
            held: hold.held.clone(),
            listen: hold.listen,
            insecure: hold.insecure_listen,
            allowed_uids: AllowedUids::new(&others.collect::<Vec<_>>()),
            tls,
            answering: answering.clone(),
        })
    }

    /// Listens whenever no image-cache does, for as long as this future lives.
    pub async fn serve(self: Arc<Self>, state: State) {
        let mut said = None;
        loop {
            state.until(|hold| hold.wants_port()).await;
            match self.bind().await {
                Ok((listener, admission)) => {
                    said = None;
                    state.change(|hold| hold.port_open = true);
                    let port = self.listen;
                    say(&format!("image-cache: post-restore: listens on {port} for the decision of image-proxy"));
                    tokio::select! {
                        () = self.accept(listener, admission, &state) => {}
                        () = state.until(|hold| !hold.wants_port()) => {}
                    }
                    // The listener is closed.
                    state.change(|hold| hold.port_open = false);
                }
                Err(why) => {
                    let text = format!(
                        "image-cache: post-restore: cannot listen on {} for the decision of image-proxy: {why}; the script tries again and again",
                        self.listen
                    );
                    if said.as_ref() != Some(&text) {
                        say(&text);
                        said = Some(text);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn bind(&self) -> Result<(TcpListener, Admission), String> {
        let host = match self.listen.ip() {
            // Both families, as image-cache itself listens without an address.
            IpAddr::V6(ip) if ip.is_unspecified() => None,
            ip => Some(ip.to_string()),
        };
        // Several restores may hold. Each answers what is not about its own set with a refusal, and image-proxy comes again.
        let listener = net::listen_shared(host.as_deref(), self.listen.port()).await;
        let listener = listener.map_err(|e| e.to_string())?;
        let rules = Rules {
            tls: &TlsArgs::default(),
            allowed: &[],
            insecure: self.insecure,
            max_connections: MAX_CONNECTIONS,
            allowed_uids: &self.allowed_uids,
        };
        let admission = Admission::with(&listener, "link", &rules, self.tls.clone());
        Ok((listener, admission.map_err(|e| chain(&e))?))
    }

    async fn accept(self: &Arc<Self>, listener: TcpListener, admission: Admission, state: &State) {
        let handshakes = Arc::new(Handshakes::default());
        net::accept(listener, "link", std::future::pending(), |stream, peer| {
            let permit = match admission.permit(peer) {
                Ok(permit) => permit,
                Err(full) => {
                    handshakes.make_room(full.host());
                    return;
                }
            };
            let handshake = handshakes.begin(MAX_HANDSHAKES, Host::of(peer.ip()));
            let (link, admission, state) = (self.clone(), admission.clone(), state.clone());
            tokio::spawn(async move {
                // A stranger, or one that went: CRIU's log is not for them.
                let served = link.serve_one(stream, handshake, &admission, &state).await;
                if let Err(e) = served.as_ref().map_err(|e| chain(e)) {
                    tracing::debug!(%peer, "{e}");
                }
                drop(permit);
            });
        })
        .await;
    }

    async fn serve_one(
        &self,
        stream: TcpStream,
        handshake: Handshake,
        admission: &Admission,
        state: &State,
    ) -> Result<(), LinkFailure> {
        let _ = net::configure_link(&stream); // it works without
        let shaken = async {
            let let_in = admission.link(stream, SHAKES_WITHIN).await;
            let mut socket = let_in.map_err(|e| LinkFailure::Refused(chain(&e)))?;
            let hello = tokio::time::timeout(SHAKES_WITHIN, receive_hello(&mut socket)).await;
            let hello = hello.map_err(|_| LinkFailure::ShakeTimeout(SHAKES_WITHIN))?;
            Ok::<_, LinkFailure>((socket, hello))
        };
        let (mut socket, hello) = tokio::select! {
            shaken = shaken => shaken?,
            () = handshake.cut() => return Err(LinkFailure::ShakeCut),
        };
        drop(handshake);
        let (why, reason) = match hello {
            Ok(hello) if self.is_about(&hello) => return self.decided(socket, &hello, state).await,
            Err(ShakeError::Protocol(e @ HandshakeError::Version { .. })) => {
                (Refusal::Version, e.to_string())
            }
            Err(e) => return Err(e.into()),
            Ok(_) => (Refusal::NoSession, NO_DAEMON.to_owned()),
        };
        let refused = crate::receiver::refuse(&mut socket, why, reason.clone());
        let _ = tokio::time::timeout(SHAKES_WITHIN, refused).await;
        Err(LinkFailure::Refused(reason))
    }

    /// Whether it is a decision about the set that is held.
    fn is_about(&self, hello: &Hello) -> bool {
        let held = &self.held;
        let version = choose_version(&hello.versions, &VERSIONS);
        let Place::Decides { key, set } = hello.place else {
            return false;
        };
        version.is_ok_and(|version| version >= TRIAL_VERSION)
            && (key, set.0, hello.proxy) == (held.key, held.set, held.proxy)
            && hello.session.as_str() == held.session
    }

    async fn decided(
        &self,
        mut socket: Socket,
        hello: &Hello,
        state: &State,
    ) -> Result<(), LinkFailure> {
        let Place::Decides { key, set } = hello.place else {
            return Ok(());
        };
        let welcome = Answer::Welcome {
            version: choose_version(&hello.versions, &VERSIONS).unwrap_or(TRIAL_VERSION),
            key,
            received: 0,
            patience: Duration::ZERO,
            software: SOFTWARE.to_owned(),
        };
        let sent = socket.write_all(&welcome.encode()).await;
        sent.map_err(ReadError::Io)?;
        let mut answering = None;
        let heard = |word| {
            // The farewell is answered before the script ends.
            answering.get_or_insert_with(|| self.answering.token());
            match word {
                Word::Commit => state.decide(Decision::GoOn("the source")),
                Word::Abort(reason) => {
                    state.decide(Decision::GiveUp(format!("the source gave it up: {reason}")))
                }
                Word::Doubt(reason) => {
                    say(&format!(
                        "image-cache: post-restore: the source is in doubt ({reason}): the restore holds on"
                    ));
                    Ok(())
                }
            }
        };
        let done = std::future::ready(Ok(()));
        hear(socket, hello.frame_format, set, heard, done).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that holds for a source that is dead would keep the port from the others for ever.
    #[tokio::test]
    async fn several_scripts_listen_on_the_port_and_image_cache_alone() {
        let link = |listen| {
            let held = Held {
                id: "@000000000001".to_owned(),
                session: "web".to_owned(),
                snapshot: "/images".to_owned(),
                set: 1,
                key: 7,
                proxy: 9,
                peer: String::new(),
            };
            let hold = Hold {
                held,
                dir: Default::default(),
                listen,
                insecure_listen: false,
                allow_uid: Vec::new(),
                tls: None,
            };
            Link::prepare(&hold, 0, &TaskTracker::new()).unwrap()
        };
        let cache = net::listen(Some("127.0.0.1"), 0).await.unwrap();
        let listen = cache.local_addr().unwrap();
        assert!(link(listen).bind().await.is_err(), "image-cache has it");
        drop(cache);
        let first = link(listen).bind().await.map(|_| ());
        assert_eq!(first, Ok(()));
        let (first, second) = (link(listen).bind().await, link(listen).bind().await);
        assert!(first.is_ok() && second.is_ok(), "{:?}", second.err());
        assert!(net::listen(Some("127.0.0.1"), listen.port()).await.is_err());
    }
}
