use std::process::{Child, Command};
use std::time::Duration;

use image_common::criu::remote::IdSpelling;
use image_common::daemon::shutdown::Shutdown;

use super::*;
use crate::cli::{CommitOn, Parents};
use crate::dumps::Settings;
use crate::link::testing::{listener, welcome};
use crate::session::arrival_order::ArrivalOrder;

const SOON: Duration = Duration::from_secs(30);

/// A proxy, and a cache that welcomes each session and says nothing more.
async fn proxy() -> Arc<Proxy> {
    let (listener, target) = listener().await;
    tokio::spawn(async move {
        let mut links = Vec::new();
        while let Ok((mut link, _)) = listener.accept().await {
            welcome(&mut link, None).await;
            links.push(link);
        }
    });
    let settings = Settings {
        target,
        session: Some("moving".parse().unwrap()),
        parents: Parents::Never,
        commit_on: CommitOn::Auto,
        commit_timeout: SOON,
        reserve_timeout: Duration::ZERO,
    };
    Proxy::new(settings, ArrivalOrder::new(), Shutdown::default())
}

/// Stands for a CRIU.
fn criu() -> (Child, i32, Arc<Process>) {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    (child, pid, Arc::new(Process::open(pid).unwrap()))
}

fn kill(mut criu: Child) {
    criu.kill().unwrap();
    criu.wait().unwrap();
}

async fn soon(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("in time");
}

/// CRIU was killed while its script asked: what its script says then is about nobody, and a session for it would
/// be there for ever.
#[tokio::test]
async fn a_dump_whose_criu_has_died_is_not_announced() {
    let proxy = proxy().await;
    let (child, pid, process) = criu();
    kill(child);
    let announced = proxy
        .announce_unconnected((pid, Some(process)), unnamed(), Lineage::Unseen(None))
        .await;
    assert!(matches!(announced, Err(RunError::Died(died)) if died == pid));
    assert!(proxy.status().sessions.is_empty());
}

/// The same when it dies after that: by the process that was held when the script asked, also if its number is gone
/// or another one's by then.
#[tokio::test]
async fn an_announcement_ends_with_its_criu() {
    let proxy = proxy().await;
    let (child, pid, process) = criu();
    let (other, number, _) = criu();
    let announced = proxy
        .announce_unconnected((number, Some(process)), unnamed(), Lineage::Unseen(None))
        .await;
    assert!(announced.is_ok() && pid != number);
    assert_eq!(proxy.status().sessions.len(), 1);
    kill(child);
    soon(|| proxy.status().sessions.is_empty()).await;
    kill(other);
}

/// A run of files whose CRIU is dead when it begins, e.g. between its two scripts.
#[tokio::test]
async fn a_run_of_files_ends_with_its_criu() {
    let proxy = proxy().await;
    let (child, pid, process) = criu();
    let ahead = proxy.announce_unconnected((pid, Some(process)), unnamed(), Lineage::Unseen(None));
    ahead.await.unwrap().link().await.unwrap();
    let Active { run, .. } = proxy.run_of_files(pid).expect("it is announced");
    assert!(run.is_active() && run.criu().is_some());
    kill(child);
    soon(|| !run.is_active()).await;
}

/// It pushed its snapshot, and was dead when its connection was looked at.
#[tokio::test]
async fn a_remote_run_whose_criu_has_died_ends() {
    let proxy = proxy().await;
    let (child, pid, _) = criu();
    kill(child);
    let criu = Criu::of(Some(pid));
    assert!(
        criu.process.is_none(),
        "its number is not used again so soon"
    );
    let snapshot = SnapshotId::new("1").unwrap();
    let pushed = proxy.push(snapshot, IdSpelling::Null, criu).await;
    let Active { run, session } = pushed.expect("it runs");
    session.link().await.unwrap();
    let over = tokio::time::timeout(SOON, run.wait_for(|s| s.failure().is_some()));
    let state = over.await.expect("in time");
    let why = state.failure().unwrap();
    assert!(why.text().contains("CRIU ended without"), "{why:?}");
}
