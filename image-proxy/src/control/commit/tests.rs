use std::process::{Child, Command, Stdio};

use image_common::criu::inventory::SetKind;
use image_common::daemon::shutdown::Shutdown;
use image_common::image::ImageName;
use image_common::link::codec::SetNumber;
use image_common::link::handshake::{Place, Refusal};
use image_common::link::VERSIONS;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::control::abort::abort;
use crate::dumps::Settings;
use crate::link::answers::SetAnswers;
use crate::link::testing::{listener, refuses, soon, Cache, KEY, SOON};
use crate::session::arrival_order::ArrivalOrder;
use crate::session::criu::Criu;

const WITHIN: Duration = Duration::from_secs(60);

/// A dump with a script, whose images the cache has; and the cache's end of its link.
async fn stored(version: u16) -> (Arc<Session>, Arc<Run>, Cache<TcpStream>) {
    let (listener, target) = listener().await;
    let session = Session::start("web".parse().unwrap(), target, async {});
    let run = session.begin_stream("/img".parse().unwrap(), true, Criu::default());
    let (stream, _) = soon(listener.accept()).await.unwrap();
    let mut cache = soon(Cache::welcomes(stream, version)).await;
    assert!(matches!(cache.hears().await, Some(Message::SetOpen { .. })));
    let inventory = ImageName::new("inventory.img").unwrap();
    drop(run.image_begins(&inventory));
    run.image_ended(&inventory, 100, None);
    run.asks_complete();
    run.image_acknowledged();
    run.stored(SetKind::Dump);
    (session, run, cache)
}

/// Asks for the verdict with this option; gives it, and what the cache was asked. It answers this.
async fn asked(
    version: u16,
    on: cli::CommitOn,
    answers: &[fn(SetNumber) -> Message],
) -> (Result<Arc<Link>, Failure>, Message, Arc<Run>) {
    let (session, run, mut cache) = stored(version).await;
    let deadline = tokio::time::Instant::now() + WITHIN;
    let answering = async {
        let question = cache.hears().await.unwrap();
        for answer in answers {
            cache.says(&answer(run.set)).await;
        }
        question
    };
    let verdict = verdict(&session, &run, None, on, (deadline, WITHIN));
    let (verdict, question) = soon(async { tokio::join!(verdict, answering) }).await;
    (verdict, question, run)
}

fn trial_on(question: &Message) -> CommitOn {
    match question {
        Message::PrepareTrial {
            images: 1,
            bytes: 100,
            on,
            ..
        } => *on,
        other => panic!("{other:?}"),
    }
}

fn prepared(set: SetNumber) -> Message {
    Message::Prepared { set }
}

fn tried(set: SetNumber) -> Message {
    Message::Trial { set }
}

fn holding(set: SetNumber) -> Message {
    Message::Holding { set }
}

fn failed(set: SetNumber) -> Message {
    let reason = "criu restore has failed: Error (criu/files-reg.c:2031): Can't open file /x";
    let reason = reason.to_owned();
    Message::TrialFailed { set, reason }
}

/// No restore waits there: the cache holds the set, which is enough.
#[tokio::test]
async fn without_a_restore_that_waits_the_set_is_held() {
    let (verdict, question, run) = asked(7, cli::CommitOn::Auto, &[prepared]).await;
    assert_eq!(trial_on(&question), CommitOn::Auto);
    verdict.unwrap();
    assert_eq!(run.state().phase, Phase::Prepared);
}

#[tokio::test]
async fn the_source_waits_until_a_restore_holds() {
    for on in [cli::CommitOn::Auto, cli::CommitOn::Restored] {
        let answers: [fn(SetNumber) -> Message; 3] = [tried, tried, holding];
        let (verdict, question, run) = asked(7, on, &answers).await;
        let restored = trial_on(&question) == CommitOn::Restored;
        assert_eq!(restored, on == cli::CommitOn::Restored);
        verdict.unwrap();
        assert_eq!(run.state().phase, Phase::Holding);
        run.tell(Told::default()).unwrap();
    }
}

/// The script is told all that the target says of it.
#[tokio::test]
async fn a_restore_that_fails_fails_the_dump() {
    let (verdict, _, run) = asked(7, cli::CommitOn::Auto, &[tried, failed]).await;
    let why = verdict.map(drop).unwrap_err().text();
    let said = "Error (criu/files-reg.c:2031): Can't open file /x";
    assert!(why.ends_with(said), "{why}");
    assert!(run.tell(Told::default()).is_err());
}

/// A cache that has no answer to the question must not be taken for one that has restored.
#[tokio::test]
async fn prepared_is_not_restored() {
    let (verdict, ..) = asked(7, cli::CommitOn::Restored, &[prepared]).await;
    let why = verdict.map(drop).unwrap_err().text();
    assert!(why.contains("--commit-on restored"), "{why}");
}

#[tokio::test]
async fn held_is_the_order_of_before_and_so_is_auto_with_an_older_cache() {
    for (version, on) in [
        (*VERSIONS.end(), cli::CommitOn::Held),
        (6, cli::CommitOn::Held),
        (6, cli::CommitOn::Auto),
    ] {
        let (verdict, question, _) = asked(version, on, &[prepared]).await;
        assert!(matches!(question, Message::Prepare { .. }), "{question:?}");
        verdict.unwrap();
    }
}

#[tokio::test]
async fn an_older_cache_is_not_asked_to_restore() {
    let (session, run, _cache) = stored(6).await;
    let deadline = tokio::time::Instant::now() + WITHIN;
    let on = cli::CommitOn::Restored;
    let verdict = verdict(&session, &run, None, on, (deadline, WITHIN));
    let why = soon(verdict).await.map(drop).unwrap_err().text();
    for part in ["version 6", "--commit-on restored", "--commit-on auto"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    assert_eq!(
        run.state().phase,
        Phase::Sending,
        "and was asked for nothing"
    );
}

/// A target that hangs in the trial fails the dump, and the reason says where it hung.
#[tokio::test]
async fn the_time_for_the_commit_covers_the_trial() {
    for (hangs_at, says) in [
        (None, "did not prepare"),
        (Some(tried as fn(SetNumber) -> Message), "did not stand"),
    ] {
        let (session, run, mut cache) = stored(7).await;
        let (over, deadline) = tokio::sync::oneshot::channel::<()>();
        let answering = async {
            cache.hears().await.unwrap();
            if let Some(answer) = hangs_at {
                cache.says(&answer(run.set)).await;
                run.wait_for(|s| s.phase == Phase::Trial).await;
            }
            over.send(()).unwrap();
        };
        let now = tokio::time::Instant::now;
        let holding = hold(&session, &run, None, cli::CommitOn::Auto);
        let waiting = async {
            tokio::select! {
                _ = holding => panic!("it hangs"),
                _ = deadline => {}
            }
        };
        soon(async { tokio::join!(waiting, answering) }).await;
        // As if all of the time had passed by now.
        let verdict = in_time(&run, (now(), WITHIN), std::future::pending());
        let why = verdict.await.map(drop).unwrap_err().text();
        assert!(
            why.contains(says) && why.contains("--commit-timeout"),
            "{why}"
        );
    }
}

// --- the decision when the link is gone ---------------------------------------------------

/// A dump with a script that stands restored and held on the target.
struct HeldThere {
    proxy: Arc<Proxy>,
    active: Active,
    link: Arc<Link>,
    listener: TcpListener,
    cache: Option<Cache<TcpStream>>,
}

impl HeldThere {
    async fn new() -> Self {
        let (listener, target) = listener().await;
        let settings = Settings {
            target,
            session: Some("web".parse().unwrap()),
            parents: cli::Parents::Never,
            commit_on: cli::CommitOn::Auto,
            commit_timeout: WITHIN,
            reserve_timeout: Duration::ZERO,
        };
        let proxy = Proxy::new(settings, ArrivalOrder::new(), Shutdown::default());
        let connection = proxy.stream_connected("/img".parse().unwrap(), Criu::default());
        let begun = async { proxy.stream_run(&connection).await.ok().unwrap() };
        let welcomed = async {
            let (stream, _) = listener.accept().await.unwrap();
            Cache::welcomes(stream, 7).await
        };
        let (active, mut cache) = soon(async { tokio::join!(begun, welcomed) }).await;
        let Active { run, session } = &active;
        run.gate();
        let inventory = ImageName::new("inventory.img").unwrap();
        drop(run.image_begins(&inventory));
        run.image_ended(&inventory, 100, None);
        run.image_acknowledged();
        let (set, kind) = (run.set, SetKind::Dump);
        let answering = async {
            while let Some(message) = cache.hears().await {
                match message {
                    Message::SetComplete { .. } => {
                        cache.says(&Message::SetStored { set, kind }).await;
                    }
                    Message::PrepareTrial { .. } => break,
                    _ => {}
                }
            }
            cache.says(&tried(set)).await;
            cache.says(&holding(set)).await;
        };
        let deadline = tokio::time::Instant::now() + WITHIN;
        let on = cli::CommitOn::Auto;
        let verdict = verdict(session, run, None, on, (deadline, WITHIN));
        let (verdict, ()) = soon(async { tokio::join!(verdict, answering) }).await;
        Self {
            link: verdict.unwrap(),
            proxy,
            active,
            listener,
            cache: Some(cache),
        }
    }

    /// What `status` says of its one session. `None`: there is none.
    fn state(&self) -> Option<String> {
        let status = self.proxy.status();
        status.sessions.first().map(|s| s.state.clone())
    }

    async fn until(&self, state: Option<&str>) {
        let wait = async {
            while self.state().as_deref() != state {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(SOON, wait).await.is_err() {
            panic!("{:?} instead of {state:?}", self.state());
        }
    }

    /// Refuses the decision once.
    async fn refuses(&self) {
        let (stream, _) = soon(self.listener.accept()).await.unwrap();
        let place = refuses(stream, Refusal::NoSession).await;
        let (key, set) = (KEY, self.active.run.set);
        assert_eq!(place, Place::Decides { key, set });
    }

    /// Takes the decision, and says so.
    async fn hears(&self) -> Message {
        let (stream, _) = soon(self.listener.accept()).await.unwrap();
        let mut cache = soon(Cache::welcomes(stream, 7)).await;
        let decision = cache.hears().await.unwrap();
        let reason = String::new();
        cache.says(&Message::Goodbye { reason }).await;
        decision
    }
}

/// A process to be killed, and one that stands for CRIU: it ends with this when its input does.
fn processes(status: u8) -> (Child, Child, Told) {
    let task = Command::new("sleep").arg("600").spawn().unwrap();
    let mut criu = Command::new("sh");
    criu.args(["-c", &format!("read nothing; exit {status}")]);
    let criu = criu.stdin(Stdio::piped()).spawn().unwrap();
    let pid = |child: &Child| i32::try_from(child.id()).unwrap();
    let told = Told {
        tree: Some(Arc::new(DumpedTree::watch(pid(&task)).unwrap())),
        criu: Some(Arc::new(Process::open(pid(&criu)).unwrap().with_status())),
    };
    (task, criu, told)
}

impl HeldThere {
    /// Tells the script, and then image-cache is gone.
    async fn loses_its_link_when_told(
        &mut self,
        told: Told,
    ) -> JoinHandle<Result<(), ControlError>> {
        let (mut daemon, mut script) = UnixStream::pair().unwrap();
        let concluding = Held {
            proxy: self.proxy.clone(),
            active: self.active.clone(),
            link: self.link.clone(),
            told,
        };
        let concluded = tokio::spawn(async move { concluding.conclude(&mut daemon).await });
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") {
            soon(script.read_buf(&mut answer)).await.unwrap();
        }
        assert!(String::from_utf8_lossy(&answer).contains("done"));
        drop(script);
        drop(self.cache.take());
        self.until(Some("in doubt")).await;
        concluded
    }
}

/// The link is lost when CRIU was told. What CRIU does then is seen all the same, and the target hears it as soon as
/// there is one that knows the session.
#[tokio::test]
async fn a_kill_behind_the_end_of_the_link_is_brought_to_the_target() {
    let mut held = HeldThere::new().await;
    let (mut task, mut criu, told) = processes(0);
    let concluded = held.loses_its_link_when_told(told).await;
    task.kill().unwrap();
    drop(criu.stdin.take());
    held.refuses().await;
    let dead = "in doubt: the process is dead here, the target does not know yet";
    held.until(Some(dead)).await;
    let aborted = abort(&held.proxy, "web", true).await;
    let why = aborted.unwrap_err().text();
    assert!(why.contains("the process is dead here"), "{why}");
    held.refuses().await;
    let set = held.active.run.set;
    assert_eq!(held.hears().await, Message::Commit { set });
    held.until(None).await;
    soon(concluded).await.unwrap().unwrap();
    task.wait().unwrap();
    criu.wait().unwrap();
    held.proxy.shutdown.requested.cancel();
    assert!(soon(held.proxy.wind_down()).await, "nothing is left");
}

/// A dump that fails when the target may hold the set, and cannot tell it: the process lives, and the target is to hear
/// that before it is asked what to do with what stands there.
#[tokio::test]
async fn a_dump_that_fails_behind_the_end_of_the_link_is_given_up_on_the_target() {
    let mut held = HeldThere::new().await;
    drop(held.cache.take());
    held.refuses().await;
    let lives = "in doubt: the process lives here, the target does not know yet";
    held.until(Some(lives)).await;
    held.refuses().await;
    assert!(held.active.run.tell(Told::default()).is_err());
    let aborted = abort(&held.proxy, "web", false).await;
    let why = aborted.unwrap_err().text();
    for part in [
        "the process lives here",
        "no such session",
        "image-cache drop @",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let heard = held.hears().await;
    assert!(matches!(heard, Message::SetAbort { .. }), "{heard:?}");
    held.until(None).await;
}

/// The end of image-proxy: one attempt more, and then the log and the exit status say that it was in vain.
#[tokio::test]
async fn an_image_proxy_that_stops_says_what_the_target_has_not_heard() {
    for heard in [true, false] {
        let mut held = HeldThere::new().await;
        drop(held.cache.take());
        held.refuses().await;
        held.proxy.shutdown.requested.cancel();
        let last = async {
            match heard {
                true => drop(held.hears().await),
                false => held.refuses().await,
            }
        };
        let (clean, ()) = soon(async { tokio::join!(held.proxy.wind_down(), last) }).await;
        assert_eq!(clean, heard);
        assert_eq!(held.state(), None);
    }
}

/// image-cache of before knows no such connections: what is in doubt is left to the operator.
#[tokio::test]
async fn an_older_cache_is_brought_nothing() {
    for (version, brought) in [(6, false), (7, true)] {
        let (session, _run, _cache) = stored(version).await;
        soon(session.link()).await.unwrap();
        assert_eq!(session.address().is_some(), brought);
    }
}

/// CRIU was told, and has not killed. Nothing is brought by itself; the operator's word is, also when the link is gone.
#[tokio::test]
async fn an_operator_decides_about_a_process_that_lives_behind_the_end_of_the_link() {
    let mut held = HeldThere::new().await;
    let (mut task, mut criu, told) = processes(1);
    let concluded = held.loses_its_link_when_told(told).await;
    drop(criu.stdin.take());
    soon(concluded).await.unwrap().unwrap();
    assert_eq!(held.state().as_deref(), Some("in doubt"));
    let refused = async { tokio::join!(abort(&held.proxy, "web", false), held.refuses()) };
    let why = soon(refused).await.0.unwrap_err().text();
    for part in ["no such session", "image-cache drop @"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let heard = async { tokio::join!(abort(&held.proxy, "web", false), held.hears()) };
    let (aborted, heard) = soon(heard).await;
    aborted.unwrap();
    assert!(matches!(heard, Message::SetAbort { .. }), "{heard:?}");
    assert_eq!(held.state(), None);
    task.kill().unwrap();
    task.wait().unwrap();
    criu.wait().unwrap();
}
