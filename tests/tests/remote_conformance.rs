//! `criu-remote.md`, sections 8 and 9: every defect of the original daemons as a test, and what a server must do.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::run::{check_one, read_all, restore, restore_remote, Snapshot};
use e2e_tests::fake::scenario::EarlyRestore;
use e2e_tests::fake::{
    Content, Dialect, DumpJob, ImageSet, Protocol, Remote, Spelling, DIALECTS, MISSING,
};

/// How long something that must not happen is watched. Too short could only hide a bug, never invent one.
const WATCH: Duration = Duration::from_millis(200);
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

#[test]
fn a_set_passes_in_every_dialect() {
    each(|pair, dump, restore| {
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        let job = DumpJob::new(&protocol, &pair.source, 5);
        job.run().expect("the dump");
        restore_remote(&restore, ID, &job.set()).expect("the restore");
    });
}

#[test]
fn a_set_passes_when_the_dialect_is_said() {
    for (dialect, spelling) in DIALECTS {
        let word = if dialect == Dialect::Pipe {
            "pipe"
        } else {
            "socket"
        };
        let pair = Options::default()
            .cache(&["--remote-dialect", word])
            .start();
        let protocol = Protocol::remote(dialect, spelling);
        let job = DumpJob::new(&protocol, &pair.source, 5);
        job.run().expect("the dump");
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
    }
}

/// Work dir and images dir are two directories, and the sockets are in both.
#[test]
fn images_dir_and_work_dir_may_differ() {
    let pair = Pair::new();
    let (images, work) = (pair.dir().join("i"), pair.dir().join("w"));
    for dir in [&images, &work] {
        std::fs::create_dir(dir).expect("fresh");
    }
    let mut args = Vec::new();
    for (flag, dir) in [("-D", &images), ("-W", &work)] {
        args.extend([flag.to_owned(), dir.to_str().expect("UTF-8").to_owned()]);
    }
    let _proxy = e2e_tests::daemons::start_proxy(pair.dir(), pair.port, &args);
    let protocol = Protocol::remote(Dialect::Pipe, Spelling::Empty);
    let mut job = DumpJob::new(&protocol, &images, 6).gated();
    job.work_dir = work;
    job.run().expect("the dump");
    protocol
        .restore(&pair.target, &job.set())
        .expect("the restore");
}

/// Defects 7 and 10: the image is complete at its own end, whatever its size, not when something follows.
#[test]
fn an_image_of_any_size_is_complete_at_its_end() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        for (index, len) in [0, 1, 4095, 4096, 8192, 65_536, 1 << 20]
            .into_iter()
            .enumerate()
        {
            let name = format!("pages-{index}.img");
            let content = Content::pattern(len, len);
            write(&dump, ID, &name, &content);
            check_one(&Snapshot(&restore, ID), &name, &content).expect("before anything follows");
        }
        close_set(&dump, ID);
    });
}

/// Defects 1, 2 and 3: a second write replaces the first, be it longer, shorter or as long.
#[test]
fn a_second_write_replaces_the_image() {
    each(|pair, dump, restore| {
        dump.push(ID).expect("push");
        for (index, (first, second)) in [(5000, 5000), (5000, 70), (70, 5000), (4096, 0), (0, 4096)]
            .into_iter()
            .enumerate()
        {
            let name = format!("core-{index}.img");
            write(&dump, ID, &name, &Content::pattern(1, first));
            let content = Content::pattern(2, second);
            write(&dump, ID, &name, &content);
        }
        let set = ImageSet::new(vec![("pstree.img", Content::pattern(3, 30))]);
        write(&dump, ID, "pstree.img", set.get("pstree.img"));
        close_set(&dump, ID);
        // What restore does first, and what waits for the dump's end.
        restore.list().expect("list");
        for (index, len) in [5000, 70, 5000, 0, 4096].into_iter().enumerate() {
            let name = format!("core-{index}.img");
            check_one(&Snapshot(&restore, ID), &name, &Content::pattern(2, len))
                .expect("the second");
        }
        check_one(&Snapshot(&restore, ID), "pstree.img", set.get("pstree.img"))
            .expect("undisturbed");
        drop(pair.cache.log());
    });
}

/// Until the new write ends, whoever asks does not get half of it.
#[test]
fn a_rewrite_takes_effect_at_its_end() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        write(&dump, ID, "core-1.img", &Content::pattern(1, 9000));
        let second = Content::pattern(2, 9000);
        let mut channel = dump.create(ID, "core-1.img").expect("open");
        second
            .send_range(&mut channel, 0, 4500, 4500)
            .expect("half");
        // Old or new is right, a mixture is not; the answer may also wait for the end.
        let early = restore.ask(ID, "core-1.img").expect("ask");
        second
            .send_range(&mut channel, 4500, 9000, 4500)
            .expect("the rest");
        drop(channel);
        close_set(&dump, ID);
        restore.list().expect("list");
        let mut bytes = Vec::new();
        early
            .answer()
            .expect("an answer")
            .expect("it exists")
            .read_to_end(&mut bytes)
            .expect("bytes");
        let first = Content::pattern(1, 9000).to_vec();
        assert!(
            bytes == second.to_vec() || bytes == first,
            "a mixture of {} bytes",
            bytes.len()
        );
        check_one(&Snapshot(&restore, ID), "core-1.img", &second).expect("the second");
    });
}

#[test]
fn an_append_appends() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        let content = Content::pattern(4, 10_000);
        for (from, to, mode) in [(0, 4000, 1), (4000, 4001, 0x400), (4001, 10_000, 0x401)] {
            let mut channel = dump.create_with_mode(ID, "files.img", mode).expect("open");
            content
                .send_range(&mut channel, from, to, 4096)
                .expect("bytes");
        }
        let mut channel = dump.create_with_mode(ID, "fresh.img", 0x400).expect("open");
        content.send(&mut channel).expect("bytes");
        drop(channel);
        close_set(&dump, ID);
        restore.list().expect("list");
        let source = Snapshot(&restore, ID);
        check_one(&source, "files.img", &content).expect("all three");
        check_one(&source, "fresh.img", &content).expect("an append to nothing is a write");
    });
}

#[test]
fn unknown_open_modes_are_writes() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        let modes = [2, 0x241, 0x8001, 0x7fff_fbff];
        for mode in modes {
            let mut channel = dump
                .create_with_mode(ID, &format!("mode-{mode}.img"), mode)
                .expect("open");
            Content::pattern(mode.into(), 5000)
                .send(&mut channel)
                .expect("bytes");
        }
        close_set(&dump, ID);
        for mode in modes {
            let content = Content::pattern(mode.into(), 5000);
            check_one(
                &Snapshot(&restore, ID),
                &format!("mode-{mode}.img"),
                &content,
            )
            .expect("written");
        }
    });
}

/// Defect 4: FINISH overtakes data that is still in pipes, and images that are still open.
#[test]
fn finish_waits_for_data_in_flight() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        let contents: Vec<Content> = (0..12)
            .map(|index| Content::pattern(index, 30_000 + index))
            .collect();
        let mut channels: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(index, content)| {
                let mut channel = dump.create(ID, &format!("core-{index}.img")).expect("open");
                content
                    .send_range(&mut channel, 0, 20_000, 4096)
                    .expect("half");
                channel
            })
            .collect();
        write(&dump, ID, "inventory.img", &Content::dump_inventory(99));
        dump.dump_finish().expect("FINISH");
        let missing = restore.ask(ID, "nothing.img").expect("ask");
        assert!(
            !missing.answered_within(WATCH).expect("poll"),
            "ENOENT while images are open"
        );
        for (content, channel) in contents.iter().zip(&mut channels) {
            content
                .send_range(channel, 20_000, content.len(), 4096)
                .expect("the rest");
        }
        drop(channels);
        assert_eq!(missing.answer().expect("an answer").err(), Some(2));
        for (index, content) in contents.iter().enumerate() {
            check_one(
                &Snapshot(&restore, ID),
                &format!("core-{index}.img"),
                content,
            )
            .expect("all of it");
        }
    });
}

/// Defect 11: everybody who waits is woken; ENOENT comes after FINISH and not before.
#[test]
fn all_waiters_are_woken() {
    each(|pair, dump, restore| {
        dump.push(ID).expect("push");
        let ask = |name: &str| -> Vec<_> {
            (0..5)
                .map(|_| restore.ask(ID, name).expect("ask"))
                .collect()
        };
        let (present, absent) = (ask("core-1.img"), ask("absent.img"));
        let content = Content::pattern(1, 50_000);
        write(&dump, ID, "core-1.img", &content);
        for question in present {
            let mut channel = question.answer().expect("an answer").expect("it exists");
            content.check(&mut channel).expect("each gets it");
        }
        write(&dump, ID, "inventory.img", &Content::dump_inventory(99));
        for question in &absent {
            assert!(
                !question.answered_within(WATCH / 5).expect("poll"),
                "ENOENT before FINISH"
            );
        }
        dump.dump_finish().expect("FINISH");
        for question in absent {
            assert_eq!(question.answer().expect("an answer").err(), Some(2));
        }
        drop(pair.proxy.log());
    });
}

/// Defect 12: a reader that does not read holds up nobody.
#[test]
fn a_slow_reader_blocks_nobody() {
    each(|pair, dump, restore| {
        let set = ImageSet::with_pages(3, 4 << 20);
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        DumpJob::new(&protocol, &pair.source, 0)
            .run_with(&set, &mut |_| {})
            .expect("the dump");
        let slow: Vec<_> = (0..3)
            .map(|_| {
                restore
                    .open_read(ID, "pages-1.img")
                    .expect("an answer")
                    .expect("it exists")
            })
            .collect();
        e2e_tests::fake::restore(&Snapshot(&restore, ID), &set).expect("beside the slow ones");
        for mut channel in slow {
            set.get("pages-1.img")
                .check(&mut channel)
                .expect("slow, but whole");
        }
    });
}

#[test]
fn a_reader_may_leave_early() {
    each(|pair, dump, restore| {
        let set = ImageSet::with_pages(3, 4 << 20);
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        DumpJob::new(&protocol, &pair.source, 0)
            .run_with(&set, &mut |_| {})
            .expect("the dump");
        for bytes in [0, 1, 4096, 1 << 20] {
            let mut channel = restore
                .open_read(ID, "pages-1.img")
                .expect("an answer")
                .expect("it exists");
            let mut head = vec![0; bytes];
            channel.read_exact(&mut head).expect("the head");
        }
        restore_remote(&restore, ID, &set).expect("everything is still there");
    });
}

#[test]
fn a_restore_may_come_first() {
    each(|pair, dump, _| {
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        let job = DumpJob::new(&protocol, &pair.source, 4);
        let early = EarlyRestore::start(&protocol, &pair.target, &job.set());
        job.run().expect("the dump");
        early.expect(&job.set());
    });
}

/// What a dump reads back: ENOENT for what the parent does not have, and that ends CRIU's chain.
#[test]
fn a_parent_without_the_pagemap_is_said_so() {
    let pair = Pair::new();
    let (dump, _) = clients(&pair, (Dialect::Socket, Spelling::Words));
    dump.push("/img/pre").expect("push");
    let pagemap = Content::pattern(1, 100_000);
    write(&dump, "/img/pre", "pagemap-7.img", &pagemap);
    write(
        &dump,
        "/img/pre",
        "pages-1.img",
        &Content::pattern(2, 3 << 20),
    );
    write(
        &dump,
        "/img/pre",
        "inventory.img",
        &Content::pre_dump_inventory(),
    );
    dump.push(ID).expect("push");
    let parent = Snapshot(&dump, "/img/pre");
    assert_eq!(read_all(&parent, "pagemap-8.img").expect("an answer"), None);
    check_one(&parent, "pagemap-7.img", &pagemap).expect("a parent's pagemap");
    check_one(&parent, "pages-1.img", &Content::Zeros(3 << 20)).expect("as long, and zero");
    // The same while a new image of ours is half written.
    let mut open = dump.create(ID, "pages-1.img").expect("open");
    open.write_all(&[1; 5000]).expect("some");
    check_one(&parent, "pages-1.img", &Content::Zeros(3 << 20)).expect("as long, and zero");
    drop(open);
    close_set(&dump, ID);
}

/// Defect 14: whoever connects and says nothing, or half a header, or leaves, is nobody's problem.
#[test]
fn stalled_clients_and_probes_hold_up_nobody() {
    each(|pair, dump, _| {
        let mut stalled = Vec::new();
        for dir in [&pair.source, &pair.target] {
            let name = if dir == &pair.source {
                "img-proxy.sock"
            } else {
                "img-cache.sock"
            };
            for bytes in 0..20 {
                let mut socket =
                    std::os::unix::net::UnixStream::connect(dir.join(name)).expect("connect");
                socket
                    .write_all(&b"\x19\0\0\0\x0a\x0dinventory.img"[..bytes])
                    .expect("some bytes");
                if bytes % 2 == 0 {
                    stalled.push(socket);
                }
            }
        }
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        let job = DumpJob::new(&protocol, &pair.source, 7).gated();
        // In a process of its own: to the proxy the stalled ones are somebody else's.
        let begin = Instant::now();
        let (status, said) = job.spawn(env!("CARGO_BIN_EXE_fake-criu")).wait();
        assert!(status.success(), "{status}: {said}");
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(5), "held up for {took:?}");
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
    });
}

/// Defects 6 and 16: the same daemons take a dump after a dump, and a failed one (FINISH, but no inventory) is never
/// served.
#[test]
fn a_failed_dump_is_not_served_and_the_next_is() {
    each(|pair, dump, restore| {
        let protocol = Protocol::remote(dump.dialect, dump.spelling);
        for round in 0..3 {
            dump.push(ID).expect("push");
            let early = EarlyRestore::start(&protocol, &pair.target, &ImageSet::sample(round));
            write(&dump, ID, "core-7.img", &Content::pattern(77, 1813));
            dump.dump_finish().expect("FINISH");
            let job = DumpJob::new(&protocol, &pair.source, round);
            job.run().expect("the dump");
            match early.end() {
                Ok(fetched) => {
                    e2e_tests::fake::run::compare(&fetched, &job.set()).expect("the whole one")
                }
                Err(_) => restore_remote(&restore, ID, &job.set()).expect("the restore"),
            }
        }
    });
}

/// A restore that finished releases its set: the session's own directory goes.
#[test]
fn finish_of_a_restore_releases_the_set() {
    for (dialect, spelling) in DIALECTS {
        let pair = Options::default().proxy(&["--session", "one"]).start();
        let protocol = Protocol::remote(dialect, spelling);
        let job = DumpJob::new(&protocol, &pair.source, 4);
        job.run().expect("the dump");
        let of_session = Remote::restore(&pair.session_dir("one"), dialect, spelling);
        restore(&Snapshot(&of_session, ID), &job.set()).expect("by its own socket");
        assert!(pair.session_dir("one").exists(), "released before FINISH");
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
        until("the session is gone", || !pair.session_dir("one").exists());
    }
}

/// Images that a restore asks for and nobody wrote: ENOENT, for each reader, before and after the others.
#[test]
fn missing_images_are_missing_for_everybody() {
    each(|_, dump, restore| {
        dump.push(ID).expect("push");
        write(&dump, ID, "core-1.img", &Content::pattern(1, 10));
        close_set(&dump, ID);
        for _ in 0..3 {
            for name in MISSING {
                assert_eq!(
                    restore.open_read(ID, name).expect("an answer").err(),
                    Some(2),
                    "{name}"
                );
            }
        }
    });
}
