//! `--tls`: both ends show a certificate, and who has none gets nothing in. The certificates come from `scripts/test-ca`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use e2e_tests::authority::Authority;
use e2e_tests::daemons::{free_port, until, Daemon, Options, Pair, SOON};
use e2e_tests::fake::content::Random;
use e2e_tests::fake::{Dialect, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::hand::Hello;
use e2e_tests::link::{Direction, Fault, Faults};
use rustix::process::Signal;

fn pair(cache: Vec<String>, proxy: Vec<String>, link: Option<Faults>) -> Pair {
    Options {
        cache,
        proxy,
        link,
        ..Options::default()
    }
    .start()
}

fn and(mut options: Vec<String>, more: &[&str]) -> Vec<String> {
    options.extend(more.iter().map(ToString::to_string));
    options
}

fn migrate(pair: &Pair, protocol: &Protocol, set: &ImageSet) {
    let job = DumpJob::new(protocol, &pair.source, 1).gated();
    job.run_with(set, &mut |_| {}).expect("the dump");
    protocol.restore(&pair.target, set).expect("the restore");
}

/// The dump fails, and both logs say why.
fn refused(pair: &Pair, theirs: &str, ours: &str) {
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run_with(&ImageSet::sample(1), &mut |_| {})
        .expect_err("the dump");
    for (daemon, text) in [(&pair.cache, theirs), (&pair.proxy, ours)] {
        until(&format!("somebody says `{text}`"), || {
            daemon.log().contains(text)
        });
    }
    assert!(!pair.cache.log().contains("session begins"));
}

#[test]
fn dumps_pass_with_one_connection_and_with_several() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    for more in [
        &["--connections", "1"][..],
        &["--connections", "3", "--checksum"],
    ] {
        let (cache, proxy) = (authority.of("127.0.0.1"), authority.of("source"));
        let pair = pair(cache, and(proxy, more), Some(Faults::default()));
        for (n, protocol) in [
            Protocol::Stream,
            Protocol::remote(Dialect::Pipe, Spelling::Empty),
            Protocol::remote(Dialect::Socket, Spelling::Words),
        ]
        .iter()
        .enumerate()
        {
            migrate(&pair, protocol, &ImageSet::with_pages(n as u64, 20 << 20));
        }
    }
}

/// What travels is not what was dumped.
#[test]
fn the_link_carries_no_plaintext() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let dir = e2e_tests::daemons::scratch();
    let target = ["--address", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
    let _proxy = Daemon::start(
        "image-proxy",
        dir.path(),
        &[&target[..], &authority.of("source")].concat(),
    );
    let dump = {
        let job = DumpJob::new(&Protocol::Stream, dir.path(), 1).gated();
        std::thread::spawn(move || job.run_with(&ImageSet::sample(1), &mut |_| {}))
    };
    let (mut stream, _) = listener.accept().expect("the proxy connects");
    let mut first = [0; 6];
    stream.read_exact(&mut first).expect("its first bytes");
    assert_eq!(
        (first[0], first[5]),
        (0x16, 0x01),
        "a ClientHello: {first:?}"
    );
    drop(stream);
    dump.join().expect("no panic").expect_err("the dump");
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    let (ours, theirs) = (
        Authority::new(&["127.0.0.1", "source"]),
        Authority::new(&["source", "127.0.0.1"]),
    );
    let stranger = theirs.options("source", &ours);
    let lab = pair(ours.of("127.0.0.1"), stranger, None);
    refused(&lab, "refused: TLS handshake", "image-cache at");
    let imposter = theirs.options("127.0.0.1", &ours);
    let lab = pair(imposter, ours.of("source"), None);
    refused(
        &lab,
        "refused: TLS handshake",
        "invalid peer certificate: UnknownIssuer",
    );
}

#[test]
fn an_expired_certificate_is_refused() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    authority.certify(&["old"], "-1");
    let lab = pair(authority.of("127.0.0.1"), authority.of("old"), None);
    refused(
        &lab,
        "refused: TLS handshake: invalid peer certificate: Expired",
        "image-cache at",
    );
    let proxy = and(authority.of("source"), &["--tls-no-cn-verify"]);
    let lab = pair(authority.of("old"), proxy, None);
    refused(
        &lab,
        "refused: TLS handshake",
        "invalid peer certificate: Expired",
    );
    // Its owner need not wait for a peer to hear of it.
    let log = lab.cache.log();
    assert!(log.contains("our certificate CN=old in"), "{log}");
    assert!(log.contains("has expired on"), "{log}");
}

/// A list that nobody has renewed does not say who was revoked since.
#[test]
fn a_revocation_list_that_has_expired_stops_the_start() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let list = authority.revoke(&[], "-1");
    let dir = e2e_tests::daemons::scratch();
    let port = free_port().to_string();
    let expect = |words: &[&str]| {
        for (daemon, name) in [("image-cache", "127.0.0.1"), ("image-proxy", "source")] {
            let to = ["--address", "127.0.0.1", "--port", &port].map(str::to_owned);
            let args = [&to[..], &authority.of(name), &list].concat();
            let started = Daemon::try_start(daemon, dir.path(), &args);
            let (status, log) = started.err().expect("it refuses");
            assert_eq!(status.and_then(|s| s.code()), Some(1), "{log}");
            for word in words {
                assert!(log.contains(word), "no `{word}` in {log}");
            }
        }
    };
    expect(&["has expired on", "CN=image link test authority", &list[1]]);
    std::fs::write(&list[1], "").expect("writable");
    expect(&["there is no revocation list in it", &list[1]]);
    std::fs::remove_file(&list[1]).expect("it is there");
    expect(&["cannot read the revocation lists of", &list[1]]);
}

/// What a list says at SIGHUP counts for connections that are made from then on, and it counts on when its file is gone.
#[test]
fn a_revocation_list_that_vanishes_stays_in_use() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let list = authority.revoke(&[], "30");
    let with_list = |mut options: Vec<String>| {
        options.extend(list.iter().cloned());
        options
    };
    let lab = pair(
        with_list(authority.of("127.0.0.1")),
        with_list(authority.of("source")),
        None,
    );
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(1));
    let told = |what: &str, times| {
        lab.cache.signal(Signal::HUP);
        until(what, || lab.cache.log().matches(what).count() == times);
    };
    let refused = |times| {
        let job = DumpJob::new(&Protocol::Stream, &lab.source, 1).gated();
        let dumped = job.run_with(&ImageSet::sample(1), &mut |_| {});
        dumped.expect_err("the dump");
        let revoked = "invalid peer certificate: Revoked";
        until(revoked, || {
            lab.cache.log().matches(revoked).count() == times
        });
    };
    authority.revoke(&["source"], "30");
    told("certificates were read again", 1);
    refused(1);
    std::fs::remove_file(&list[1]).expect("it is there");
    told(
        "the certificates stay as they were, and the revocation lists",
        1,
    );
    assert!(lab
        .cache
        .log()
        .contains("cannot read the revocation lists of"));
    refused(2);
    // One that has expired is no better.
    authority.revoke(&[], "-1");
    told(
        "the certificates stay as they were, and the revocation lists",
        2,
    );
    refused(3);
}

#[test]
fn the_name_of_the_cache_counts_unless_told_otherwise() {
    let authority = Authority::new(&["elsewhere", "source"]);
    let lab = pair(authority.of("elsewhere"), authority.of("source"), None);
    refused(&lab, "refused: TLS handshake", "not valid for name");
    let proxy = and(authority.of("source"), &["--tls-no-cn-verify"]);
    let lab = pair(authority.of("elsewhere"), proxy, None);
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(1));
}

#[test]
fn only_allowed_names_may_connect() {
    let authority = Authority::new(&["127.0.0.1", "source", "other"]);
    let cache = || and(authority.of("127.0.0.1"), &["--allow-peer", "source"]);
    let lab = pair(cache(), authority.of("other"), None);
    refused(
        &lab,
        "has none of the names of --allow-peer",
        "image-cache at",
    );
    let lab = pair(cache(), authority.of("source"), None);
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(1));
}

#[test]
fn plaintext_to_a_tls_port_and_tls_to_a_plaintext_port() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let lab = pair(authority.of("127.0.0.1"), Vec::new(), None);
    refused(
        &lab,
        "refused: plaintext on a port that wants TLS",
        "image-cache at",
    );
    let lab = pair(Vec::new(), authority.of("source"), None);
    refused(
        &lab,
        "does not speak the image link protocol",
        "TLS handshake",
    );
    // A peer that says nothing at all has its time, and no more; meanwhile others pass.
    let lab = pair(authority.of("127.0.0.1"), authority.of("source"), None);
    let mut silent = TcpStream::connect(("127.0.0.1", lab.port)).expect("the cache listens");
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(1));
    silent.set_read_timeout(Some(SOON)).expect("a socket");
    assert!(matches!(silent.read(&mut [0; 1]), Ok(0) | Err(_)));
    until("it is logged", || {
        lab.cache.log().contains("nothing came within 10s")
    });
}

/// A bit that changes on the way breaks TLS, and the link is resumed: it costs a reconnection, and no byte is wrong.
#[test]
fn flipped_bits_and_cuts_are_survived() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let mut random = Random::new(11);
    let set = ImageSet::with_pages(4, 2 << 20);
    for n in 0..10 {
        let (cache, proxy) = (authority.of("127.0.0.1"), authority.of("source"));
        let proxy = and(proxy, &["--link-timeout", "20"]);
        // Behind the handshake of TLS; in that a changed bit fails the dump, as it must.
        let byte = random.between(8_000, 2 << 20);
        let fault = [Fault::Flip, Fault::Reset, Fault::Truncate][n % 3];
        eprintln!("{fault:?} at byte {byte}");
        let lab = pair(cache, proxy, Some(Faults::at(Direction::Up, byte, fault)));
        migrate(&lab, &Protocol::Stream, &set);
        assert!(lab.link().struck() && lab.link().connections() > 1);
    }
}

#[test]
fn certificates_are_read_again_on_sighup() {
    let authority = Authority::new(&["127.0.0.1", "source", "other"]);
    let lab = pair(authority.of("127.0.0.1"), authority.of("source"), None);
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(1));
    // The proxy's files are replaced by expired ones: what runs goes on with what it has, until it is told.
    authority.certify(&["source"], "-1");
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(2));
    lab.proxy.signal(Signal::HUP);
    until("they are read", || {
        lab.proxy.log().contains("certificates were read again")
    });
    refused_after(&lab);
    // A file that is none changes nothing.
    authority.certify(&["source"], "365");
    lab.proxy.signal(Signal::HUP);
    until("again", || {
        lab.proxy
            .log()
            .matches("certificates were read again")
            .count()
            == 2
    });
    std::fs::write(authority.file("source").join("cert.pem"), "no certificate").expect("writable");
    lab.proxy.signal(Signal::HUP);
    until("it is refused", || {
        lab.proxy
            .log()
            .contains("the certificates stay as they were")
    });
    migrate(&lab, &Protocol::Stream, &ImageSet::sample(3));
}

fn refused_after(lab: &Pair) {
    let job = DumpJob::new(&Protocol::Stream, &lab.source, 1).gated();
    job.run_with(&ImageSet::sample(1), &mut |_| {})
        .expect_err("the dump");
    assert!(lab
        .cache
        .log()
        .contains("invalid peer certificate: Expired"));
}

/// Without `--tls` only this host can connect, unless it is said in so many words.
#[test]
fn plaintext_for_other_hosts_wants_to_be_said() {
    let dir = e2e_tests::daemons::scratch();
    let port = free_port().to_string();
    let start = |options: &[&str]| {
        let args: Vec<String> = [&["--port", &port], options]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect();
        Daemon::try_start("image-cache", dir.path(), &args)
    };
    let (status, log) = start(&["--address", "0.0.0.0"]).err().expect("it refuses");
    assert_eq!(status.and_then(|s| s.code()), Some(1), "{log}");
    assert!(log.contains("--insecure-listen"), "{log}");
    let (_, log) = start(&["--page-server", &format!("0.0.0.0:{}", free_port())])
        .err()
        .expect("it refuses");
    assert!(log.contains("--insecure-listen"), "{log}");
    let local = start(&[]).unwrap_or_else(|(_, log)| panic!("{log}"));
    assert!(
        local.log().contains("listening on 127.0.0.1:"),
        "{}",
        local.log()
    );
    drop(local);
    let open = start(&["--insecure-listen"]).unwrap_or_else(|(_, log)| panic!("{log}"));
    assert!(
        open.log().contains("listening on [::]:") || open.log().contains("listening on 0.0.0.0:")
    );
    drop(open);
    // A key that is not there is said so, with its name.
    let missing = start(&["--tls", "--tls-key", "/no/such/key.pem"]);
    let (status, log) = missing.err().expect("it refuses");
    assert_eq!(status.and_then(|s| s.code()), Some(1), "{log}");
    assert!(log.contains("cannot read /"), "{log}");
}

/// The page server takes plaintext from this host, with TLS as well as without; a client that sends neither is refused.
#[test]
fn hellos_in_plaintext_do_not_reach_the_link() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let lab = pair(authority.of("127.0.0.1"), authority.of("source"), None);
    let mut plain = TcpStream::connect(("127.0.0.1", lab.port)).expect("the cache listens");
    plain
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a socket");
    plain.write_all(&Hello::default().bytes()).expect("sent");
    // Nothing is answered: not even a refusal in the link's own words.
    assert!(matches!(plain.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(!lab.cache.log().contains("session begins"));
}
