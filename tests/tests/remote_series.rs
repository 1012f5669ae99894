//! The snapshot list and series of snapshots (`criu-remote.md`, sections 3 and 5).

use std::path::Path;
use std::time::Duration;

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::job::RestoreJob;
use e2e_tests::fake::run::{check_one, read_all, restore_remote, Snapshot};
use e2e_tests::fake::scenario::EarlyRestore;
use e2e_tests::fake::{Content, Dialect, DumpJob, ImageSet, Protocol, Remote, Spelling, DIALECTS};
use e2e_tests::link::{Faults, Plan};

const ID: &str = "/img/dump";

/// Both ends of one pair of daemons, for one dialect.
fn clients(pair: &Pair, (dialect, spelling): (Dialect, Spelling)) -> (Remote, Remote) {
    let dump = Remote::dump(&pair.source, dialect, spelling);
    (dump, Remote::restore(&pair.target, dialect, spelling))
}

fn write(client: &Remote, id: &str, name: &str, content: &Content) {
    let mut channel = client.create(id, name).expect(name);
    content.send(&mut channel).expect(name);
}

/// What closes a dump: inventory and FINISH.
fn close_set(client: &Remote, id: &str) {
    write(client, id, "inventory.img", &Content::dump_inventory(99));
    client.dump_finish().expect("FINISH");
}

fn each(test: impl Fn(&Pair, Remote, Remote)) {
    for dialect in DIALECTS {
        eprintln!("dialect {dialect:?}");
        let pair = Pair::new();
        let (dump, restore) = clients(&pair, dialect);
        test(&pair, dump, restore);
    }
}

/// Section 3.1 and defect 1: the list keeps every id, in the order of the pushes, and a read that follows a push sees it.
#[test]
fn the_list_holds_every_push_in_order() {
    let pair = Pair::new();
    let (dump, restore) = clients(&pair, (Dialect::Socket, Spelling::Words));
    let mut pushed = Vec::new();
    for number in 0..12 {
        let id = format!("/img/{number}");
        dump.push(&id).expect("push");
        pushed.push(id.clone());
        assert_eq!(dump.list().expect("list"), pushed);
        write(&dump, &id, "inventory.img", &Content::pre_dump_inventory());
    }
    dump.push(ID).expect("push");
    pushed.push(ID.into());
    assert_eq!(dump.list().expect("list"), pushed);
    close_set(&dump, ID);
    assert_eq!(restore.list().expect("list"), pushed);
}

/// Section 5: clients with empty ids fail on any parent, so they are told of none.
#[test]
fn clients_with_empty_ids_see_their_own_id_alone() {
    for dialect in [Dialect::Pipe, Dialect::Socket] {
        let pair = Pair::new();
        let (dump, restore) = clients(&pair, (dialect, Spelling::Empty));
        for id in ["/img/pre1", "/img/pre2", ID] {
            dump.push(id).expect("push");
            assert_eq!(dump.list().expect("list"), [id]);
            let pages = Content::pattern(id.len() as u64, 8192);
            write(&dump, id, "pagemap-7.img", &Content::pattern(1, 100));
            write(&dump, id, "pages-1.img", &pages);
            let inventory = match id {
                ID => Content::dump_inventory(1),
                _ => Content::pre_dump_inventory(),
            };
            write(&dump, id, "inventory.img", &inventory);
        }
        dump.dump_finish().expect("FINISH");
        let list = restore.list().expect("list");
        assert!(list.iter().any(|id| id == ID), "{list:?}");
        let pages = Content::pattern(ID.len() as u64, 8192);
        check_one(&Snapshot(&restore, ID), "pages-1.img", &pages).expect("the dump");
    }
}

#[test]
fn the_parents_flag_overrides() {
    for (flag, spelling, chain) in [
        ("never", Spelling::Words, false),
        ("always", Spelling::Empty, true),
        ("auto", Spelling::Words, true),
    ] {
        let pair = Options::default().proxy(&["--parents", flag]).start();
        let (dump, _) = clients(&pair, (Dialect::Socket, spelling));
        dump.push("/img/pre").expect("push");
        write(
            &dump,
            "/img/pre",
            "inventory.img",
            &Content::pre_dump_inventory(),
        );
        dump.push(ID).expect("push");
        let list = dump.list().expect("list");
        assert_eq!(
            list.len(),
            if chain { 2 } else { 1 },
            "--parents {flag}: {list:?}"
        );
        assert_eq!(list.last().map(String::as_str), Some(ID));
    }
}

/// Section 5: a client with `null` ids that has the pid-reuse check (v3.10 and later) would fail on a parent. What CRIU
/// prints when that check fails is in its executable, and so it is in ours. (Put together here, so that the test's own
/// executable does not contain it.)
#[test]
fn a_client_with_the_pid_reuse_check_sees_its_own_id_alone() {
    let pair = Pair::new();
    let text = ["Pid reuse%s", " detected", " for pid", " %d\n"];
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    let checking = pair.dir().join("checking");
    // By a shell: if we had the copy open for writing, a child that another test forks meanwhile would have it too,
    // and executing it would fail with ETXTBSY.
    let copy = std::process::Command::new("sh")
        .args([
            "-c",
            "cat \"$1\" > \"$2\" && printf %s \"$3\" >> \"$2\" && chmod 755 \"$2\"",
            "sh",
        ])
        .arg(fake)
        .arg(&checking)
        .arg(text.concat())
        .status();
    assert!(copy.expect("a shell").success());
    let protocol = |id: &str| Protocol::Remote {
        dialect: Dialect::Socket,
        spelling: Spelling::Words,
        id: id.into(),
    };
    let (dump, _) = clients(&pair, (Dialect::Socket, Spelling::Words));
    for (program, chain) in [
        (Path::new(fake), vec!["/img/pre", ID]),
        (&checking, vec![ID]),
    ] {
        dump.push("/img/pre").expect("push");
        write(
            &dump,
            "/img/pre",
            "inventory.img",
            &Content::pre_dump_inventory(),
        );
        let mut job = DumpJob::new(&protocol(ID), &pair.source, 8);
        job.expect_list = Some(chain.iter().map(ToString::to_string).collect());
        let (status, said) = job.spawn(program.to_str().expect("UTF-8")).wait();
        assert!(status.success(), "{}: {said}", program.display());
        protocol(ID)
            .restore(&pair.target, &job.set())
            .expect("the restore");
    }
}

/// Defect 13: a restore that starts in the middle of a series gets a list with its own id in it.
#[test]
fn the_list_is_served_when_the_series_is_complete() {
    each(|pair, dump, restore| {
        dump.push("/img/pre").expect("push");
        write(
            &dump,
            "/img/pre",
            "inventory.img",
            &Content::pre_dump_inventory(),
        );
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        let job = DumpJob::new(&protocol, &pair.source, 4);
        let early = EarlyRestore::start(&protocol, &pair.target, &job.set());
        let list = {
            let restore = restore.clone();
            std::thread::spawn(move || restore.list())
        };
        job.run().expect("the dump");
        let list = list.join().expect("no panic").expect("a list");
        assert!(list.iter().any(|id| id == ID), "{list:?}");
        early.expect(&job.set());
    });
}

/// Section 9: a new push of a known id restarts that snapshot. The first CRIU died in the middle of it.
#[test]
fn a_new_push_restarts_the_snapshot() {
    each(|pair, dump, restore| {
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        let first = DumpJob::new(&protocol, &pair.source, 1).stop_in("pages-3.img");
        let mut child = first.spawn(env!("CARGO_BIN_EXE_fake-criu"));
        child.wait_half();
        child.kill();
        dump.push(ID).expect("push");
        assert_eq!(dump.list().expect("list"), [ID]);
        write(&dump, ID, "core-7.img", &Content::pattern(2, 2000));
        close_set(&dump, ID);
        let source = Snapshot(&restore, ID);
        assert_eq!(restore.list().expect("list"), [ID]);
        check_one(&source, "core-7.img", &Content::pattern(2, 2000)).expect("the new one");
        let old = read_all(&source, "pages-1.img").expect("an answer");
        assert_eq!(old, None, "from before the restart");
    });
}

/// A series as it really is: each run is a process of its own, and the next one starts as soon as the last has ended.
/// Its bytes may still be on their way to the cache then.
#[test]
fn a_series_of_processes_is_one_chain() {
    let plan = Plan {
        delay: Duration::from_millis(30),
        ..Plan::default()
    };
    let faults = Faults {
        up: plan,
        down: plan,
        seed: 1,
        only: None,
    };
    for (gated, link) in [
        (false, None),
        (true, None),
        (false, Some(faults)),
        (true, Some(faults)),
    ] {
        eprintln!("gated {gated}, link {link:?}");
        let pair = Pair::with(Options {
            link,
            ..Options::default()
        });
        let ids = ["/img/pre1", "/img/pre2", ID];
        for (seed, id) in ids.into_iter().enumerate() {
            let protocol = Protocol::Remote {
                dialect: Dialect::Socket,
                spelling: Spelling::Words,
                id: id.into(),
            };
            let mut job = DumpJob::new(&protocol, &pair.source, seed as u64);
            job.expect_list = Some(ids[..=seed].iter().map(ToString::to_string).collect());
            let job = if gated { job.gated() } else { job };
            let job = if id == ID { job } else { job.pre_dump() };
            let (status, said) = job.spawn(env!("CARGO_BIN_EXE_fake-criu")).wait();
            assert!(status.success(), "{id}: {status}: {said}");
        }
        let client = Remote::restore(&pair.target, Dialect::Socket, Spelling::Words);
        for (seed, id) in (0..).zip(&ids[..2]) {
            let content = ImageSet::pre_dump(seed).get("pages-1.img").clone();
            check_one(&Snapshot(&client, id), "pages-1.img", &content).expect("a parent");
        }
        restore_remote(&client, ID, &ImageSet::sample(2)).expect("the restore");
    }
}

/// A restore goes on with a set that is dropped meanwhile. When its CRIU has ended, the memory goes back, whether anything
/// else happens or not.
#[test]
fn a_restore_that_dies_lets_go_of_a_dropped_set() {
    let status = |pair: &Pair| {
        let (_, said) = pair.ask_cache(&["status", "--json"]);
        serde_json::from_str::<serde_json::Value>(&said).expect("JSON")
    };
    for (dialect, spelling) in DIALECTS {
        let pair = Options::default().proxy(&["--session", "one"]).start();
        let protocol = Protocol::remote(dialect, spelling);
        let dump = DumpJob::new(&protocol, &pair.source, 1).gated();
        dump.run().expect("the dump");
        let restore = RestoreJob {
            protocol,
            dir: pair.target.clone(),
            seed: 1,
        };
        let mut criu = restore.spawn(env!("CARGO_BIN_EXE_fake-criu"));
        criu.wait_half();
        let (done, said) = pair.ask_cache(&["drop", "one"]);
        assert!(done, "{said}");
        let held = status(&pair);
        assert_ne!(held["memory"]["used_bytes"], 0, "it may read on: {held}");
        criu.kill();
        until("the memory goes back", || {
            status(&pair)["memory"]["used_bytes"] == 0
        });
        until("its sockets go", || !pair.session_dir("one").exists());
    }
}
