//! Many proxies at one cache: sets never mix, even with equal snapshot ids.

use std::path::PathBuf;

use e2e_tests::daemons::{start_proxy, until, Daemon, Options, Pair};
use e2e_tests::fake::run::{check_one, restore_stream, Snapshot};
use e2e_tests::fake::{DumpJob, ImageSet, Protocol, Remote};

/// Another proxy at the same cache.
fn second_proxy(pair: &Pair, name: &str) -> (Daemon, PathBuf) {
    let dir = pair.dir().join(name);
    std::fs::create_dir(&dir).expect("fresh");
    let proxy = start_proxy(&dir, pair.port, &["--session".to_owned(), name.to_owned()]);
    (proxy, dir)
}

#[test]
fn two_proxies_with_equal_ids_at_the_same_time() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let pair = Options::default().proxy(&["--session", "alpha"]).start();
        let (_beta, beta_dir) = second_proxy(&pair, "beta");
        let fake = env!("CARGO_BIN_EXE_fake-criu");
        let mut children = [(1, &pair.source), (2, &beta_dir)].map(|(seed, dir)| {
            DumpJob::new(&protocol, dir, seed)
                .gated()
                .stop_in("pages-1.img")
                .spawn(fake)
        });
        for child in &mut children {
            child.wait_half();
        }
        for child in &mut children {
            child.go_on();
        }
        for child in children {
            let (status, said) = child.wait();
            assert!(status.success(), "{status}: {said}");
        }
        for (name, seed) in [("alpha", 1), ("beta", 2)] {
            let dir = pair.session_dir(name);
            protocol
                .restore(&dir, &ImageSet::sample(seed))
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

/// DIR serves the newest, DIR/sessions/NAME that one.
#[test]
fn the_newest_session_is_served_in_the_directory_itself() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let pair = Options::default()
            .cache(&["--keep"])
            .proxy(&["--session", "alpha"])
            .start();
        let (_beta, beta_dir) = second_proxy(&pair, "beta");
        DumpJob::new(&protocol, &pair.source, 1)
            .gated()
            .run()
            .expect("alpha");
        protocol
            .restore(&pair.target, &ImageSet::sample(1))
            .expect("alpha alone");
        DumpJob::new(&protocol, &beta_dir, 2)
            .gated()
            .run()
            .expect("beta");
        protocol
            .restore(&pair.target, &ImageSet::sample(2))
            .expect("beta is newer");
        protocol
            .restore(&pair.session_dir("alpha"), &ImageSet::sample(1))
            .expect("by name");
        protocol
            .restore(&pair.session_dir("beta"), &ImageSet::sample(2))
            .expect("by name");
    }
}

/// A `--remote` reader in DIR gets the newest session that has its snapshot id.
#[test]
fn a_remote_reader_finds_the_session_with_its_id() {
    let pair = Options::default()
        .cache(&["--keep"])
        .proxy(&["--session", "alpha"])
        .start();
    let (_beta, beta_dir) = second_proxy(&pair, "beta");
    let (dialect, spelling) = e2e_tests::fake::DIALECTS[2];
    let with_id = |id: &str| Protocol::Remote {
        dialect,
        spelling,
        id: id.into(),
    };
    DumpJob::new(&with_id("/img/one"), &pair.source, 1)
        .run()
        .expect("alpha");
    DumpJob::new(&with_id("/img/two"), &beta_dir, 2)
        .run()
        .expect("beta");
    let client = Remote::restore(&pair.target, dialect, spelling);
    for (id, seed) in [("/img/one", 1), ("/img/two", 2)] {
        let content = ImageSet::sample(seed).get("pages-1.img").clone();
        check_one(&Snapshot(&client, id), "pages-1.img", &content).expect(id);
    }
}

/// The newest session is one that fails: readers go on getting the one before it.
#[test]
fn an_aborted_session_is_not_the_newest() {
    let pair = Options::default()
        .cache(&["--keep"])
        .proxy(&["--session", "alpha"])
        .start();
    let (mut beta, beta_dir) = second_proxy(&pair, "beta");
    DumpJob::new(&Protocol::Stream, &pair.source, 1)
        .gated()
        .run()
        .expect("alpha");
    let mut child = DumpJob::new(&Protocol::Stream, &beta_dir, 2)
        .gated()
        .stop_in("pages-1.img")
        .spawn(env!("CARGO_BIN_EXE_fake-criu"));
    child.wait_half();
    until("beta is there", || pair.session_dir("beta").exists());
    beta.kill();
    until("beta is gone", || !pair.session_dir("beta").exists());
    restore_stream(&pair.target, &ImageSet::sample(1)).expect("alpha");
    child.kill();
}

/// One proxy's dump fails; the other's, in the same cache at the same time, does not notice.
#[test]
fn a_failing_neighbour_disturbs_nobody() {
    let pair = Options::default().proxy(&["--session", "alpha"]).start();
    let (mut beta, beta_dir) = second_proxy(&pair, "beta");
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1)
        .gated()
        .stop_in("pages-1.img");
    let mut good = job.spawn(fake);
    good.wait_half();
    let mut bad = DumpJob::new(&Protocol::Stream, &beta_dir, 2)
        .gated()
        .stop_in("pages-1.img")
        .spawn(fake);
    bad.wait_half();
    beta.kill();
    good.go_on();
    let (status, said) = good.wait();
    assert!(status.success(), "{status}: {said}");
    restore_stream(&pair.target, &job.set()).expect("the restore");
    bad.kill();
}

/// Ten proxies at once through one cache.
#[test]
fn ten_proxies_at_once() {
    let pair = Pair::new();
    let proxies: Vec<_> = (0..10)
        .map(|number| second_proxy(&pair, &format!("p{number}")))
        .collect();
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    let children: Vec<_> = proxies
        .iter()
        .zip(1..)
        .map(|((_, dir), seed)| {
            DumpJob::new(&Protocol::Stream, dir, seed)
                .gated()
                .spawn(fake)
        })
        .collect();
    for child in children {
        let (status, said) = child.wait();
        assert!(status.success(), "{status}: {said}");
    }
    for number in 0..10 {
        let dir = pair.session_dir(&format!("p{number}"));
        restore_stream(&dir, &ImageSet::sample(number + 1)).expect("its own set");
    }
}

/// A session name in use: refused, or kept apart; never mixed.
#[test]
fn two_proxies_with_the_same_session_name_do_not_mix() {
    let pair = Options::default().proxy(&["--session", "same"]).start();
    let dir = pair.dir().join("other");
    std::fs::create_dir(&dir).expect("fresh");
    let _other = start_proxy(
        &dir,
        pair.port,
        &["--session".to_owned(), "same".to_owned()],
    );
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    let mut first = DumpJob::new(&Protocol::Stream, &pair.source, 1)
        .gated()
        .stop_in("pages-1.img")
        .spawn(fake);
    first.wait_half();
    let second = DumpJob::new(&Protocol::Stream, &dir, 2).gated().run();
    assert!(second.is_err(), "the name is in use");
    first.go_on();
    let (status, said) = first.wait();
    assert!(status.success(), "{status}: {said}");
    restore_stream(&pair.target, &ImageSet::sample(1)).expect("the first");
}
