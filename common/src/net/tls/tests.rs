use std::fs;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::CertificateRevocationListDer;

use super::dates::{Dates, Name, Standing};
use super::files::{certificates, lists_path};
use super::validity::{newest_lists, LOOK_AGAIN};
use super::*;

const DAY: i64 = 86_400;

/// An authority of `scripts/test-ca`.
struct Authority(TempDir);

impl Authority {
    fn new(names: &[&str]) -> Self {
        let authority = Self(tempfile::tempdir().unwrap());
        authority.run("365", names);
        authority
    }

    fn run(&self, days: &str, words: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/test-ca");
        let mut command = Command::new(script);
        command.arg(self.0.path()).args(words);
        let made = command.env("TEST_CA_DAYS", days).output().unwrap();
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{said}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn list(&self) -> PathBuf {
        self.file("cacrl.pem")
    }

    fn dates(&self) -> Dates {
        let list = CertificateRevocationListDer::from_pem_file(self.list()).unwrap();
        Dates::of_list(&list).unwrap()
    }

    /// Of a peer that has this name, and goes by the authority's list.
    fn args(&self, name: &str) -> TlsArgs {
        TlsArgs {
            tls: true,
            tls_cacert: self.file("cacert.pem"),
            tls_cacrl: Some(self.list()),
            tls_cert: self.file(name).join("cert.pem"),
            tls_key: self.file(name).join("key.pem"),
        }
    }
}

/// A clock that is so many days ahead.
#[derive(Debug)]
struct Ahead(i64);

impl TimeProvider for Ahead {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = Date::now().0 + self.0 * DAY;
        let seconds = u64::try_from(seconds).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

fn client(args: &TlsArgs, ahead: i64) -> Client {
    let loaded = args.client(true, None, Arc::new(Ahead(ahead))).unwrap();
    Client {
        args: args.clone(),
        verify_name: true,
        loaded: RwLock::new(Arc::new(loaded)),
        encrypts: Handle::current(),
    }
}

fn server(args: &TlsArgs, ahead: i64) -> Server {
    let loaded = args.server(None, Arc::new(Ahead(ahead))).unwrap();
    Server {
        args: args.clone(),
        allowed: Vec::new(),
        loaded: RwLock::new(Arc::new(loaded)),
        encrypts: Handle::current(),
    }
}

type Ends = (Result<UnixStream, TlsError>, Result<UnixStream, TlsError>);

async fn greet(client: &Client, server: &Server) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap());
    let (stream, (accepted, _)) = (stream.await.unwrap(), listener.accept().await.unwrap());
    tokio::join!(client.connect(stream, "127.0.0.1"), server.accept(accepted))
}

fn says(result: Result<impl Sized, TlsError>, words: &[&str]) {
    let Err(e) = result else {
        panic!("it passes; wanted: {words:?}")
    };
    let text = chain(&e);
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn a_list_that_expires_while_it_is_in_use_lets_no_peer_in() {
    let ca = Authority::new(&["127.0.0.1", "source"]);
    ca.run("2", &["--crl"]);
    let (cache, proxy) = (ca.args("127.0.0.1"), ca.args("source"));
    let (ours, theirs) = greet(&client(&proxy, 0), &server(&cache, 0)).await;
    ours.unwrap();
    theirs.unwrap();
    let until = ca.dates().until.to_string();
    let list = ca.list();
    let words = ["TLS handshake", "has expired on", &until, text(&list)];
    let (ours, theirs) = greet(&client(&proxy, 3), &server(&cache, 0)).await;
    says(ours, &words);
    theirs.unwrap_err();
    let (_, theirs) = greet(&client(&proxy, 0), &server(&cache, 3)).await;
    says(theirs, &words);
}

#[tokio::test]
async fn a_peer_that_was_revoked_is_refused() {
    let ca = Authority::new(&["127.0.0.1", "source", "other"]);
    ca.run("30", &["--crl", "source"]);
    let (cache, proxy) = (ca.args("127.0.0.1"), ca.args("source"));
    let (_, theirs) = greet(&client(&proxy, 0), &server(&cache, 0)).await;
    says(theirs, &["TLS handshake", "Revoked"]);
    let (ours, theirs) = greet(&client(&ca.args("other"), 0), &server(&cache, 0)).await;
    ours.unwrap();
    theirs.unwrap();
}

/// With lists what no list is about is not let in: a list that is missing must not mean that all is well.
#[tokio::test]
async fn a_peer_without_a_list_of_its_authority_is_refused() {
    let (ca, other) = (Authority::new(&["127.0.0.1"]), Authority::new(&["source"]));
    ca.run("30", &["--crl"]);
    let both = ca.file("both.pem");
    let read = |ca: &Authority| fs::read_to_string(ca.file("cacert.pem")).unwrap();
    fs::write(&both, read(&ca) + &read(&other)).unwrap();
    let cache = TlsArgs {
        tls_cacert: both.clone(),
        ..ca.args("127.0.0.1")
    };
    let proxy = TlsArgs {
        tls_cacert: both,
        tls_cacrl: Some(ca.list()),
        ..other.args("source")
    };
    let (_, theirs) = greet(&client(&proxy, 0), &server(&cache, 0)).await;
    says(
        theirs,
        &["no revocation list of the authority", text(&ca.list())],
    );
    // If no peer at all could be checked, it does not even start.
    let alone = TlsArgs {
        tls_cacert: other.file("cacert.pem"),
        ..proxy
    };
    says(
        alone.client(true, None, clock()),
        &["no peer can be checked", text(&ca.list())],
    );
}

#[test]
fn what_is_wrong_with_a_list_is_said_when_it_is_read() {
    let ca = Authority::new(&["127.0.0.1"]);
    let args = ca.args("127.0.0.1");
    let (list, load) = (ca.list(), || args.server(None, clock()));
    says(
        load(),
        &["cannot read the revocation lists of", text(&list)],
    );
    fs::write(&list, "").unwrap();
    says(load(), &["there is no revocation list in it", text(&list)]);
    ca.run("-1", &["--crl"]);
    let yesterday = ca.dates().until.to_string();
    let words = [
        "has expired on",
        &yesterday,
        text(&list),
        "CN=image link test",
    ];
    says(load(), &words);
    // An older one beside it does not matter, wherever it stands: the newest of an authority counts.
    let old = fs::read_to_string(&list).unwrap();
    ca.run("30", &["--crl"]);
    let new = fs::read_to_string(&list).unwrap();
    for both in [old.clone() + &new, new + &old] {
        fs::write(&list, both).unwrap();
        let loaded = load().unwrap();
        let lists = loaded.dated.iter().filter(|p| p.what == What::List);
        let until: Vec<_> = lists.map(|p| p.dates.until).collect();
        assert!(until.len() == 1 && until[0] > Date::now(), "{until:?}");
    }
}

#[tokio::test]
async fn the_newest_list_counts_in_a_handshake_too() {
    let ca = Authority::new(&["127.0.0.1", "source"]);
    ca.run("-1", &["--crl"]);
    let old = fs::read_to_string(ca.list()).unwrap();
    ca.run("30", &["--crl"]);
    let new = fs::read_to_string(ca.list()).unwrap();
    fs::write(ca.list(), old + &new).unwrap();
    let (cache, proxy) = (ca.args("127.0.0.1"), ca.args("source"));
    let (ours, theirs) = greet(&client(&proxy, 0), &server(&cache, 0)).await;
    ours.unwrap();
    theirs.unwrap();
}

#[test]
fn a_list_of_the_future_is_not_valid_yet() {
    let ca = Authority::new(&["127.0.0.1"]);
    ca.run("30", &["--crl"]);
    let list = ca.list();
    let read = || -> Vec<_> {
        let read = CertificateRevocationListDer::pem_file_iter(&list).unwrap();
        read.collect::<Result<_, _>>().unwrap()
    };
    let at = |seconds| newest_lists(read(), &list, Date(Date::now().0 + seconds));
    says(at(-DAY), &["is not valid before", text(&list)]);
    // Another host's clock may be a little ahead.
    assert_eq!(at(-60).unwrap().0.len(), 1);
    assert_eq!(at(0).unwrap().0.len(), 1);
}

/// The default file counts if it is there. One that was there and is gone is an error, not the end of all checks.
#[test]
fn a_default_list_that_vanishes_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let default = dir.path().join("cacrl.pem");
    assert_eq!(lists_path(None, None, &default).unwrap(), None);
    fs::write(&default, "").unwrap();
    let there = lists_path(None, None, &default).unwrap();
    assert_eq!(there, Some(default.clone()));
    fs::remove_file(&default).unwrap();
    let missed = lists_path(None, there.as_deref(), &default).unwrap();
    assert_eq!(missed, Some(default), "so it is read, and that fails");
    let other = Path::new("/other");
    let given = lists_path(Some(other), None, Path::new("/none")).unwrap();
    assert_eq!(given.as_deref(), Some(other));
    // It is not known whether it is there.
    let unknown = lists_path(None, None, Path::new("/dev/null/cacrl.pem"));
    says(
        unknown,
        &["cannot read the revocation lists of /dev/null/cacrl.pem"],
    );
}

/// What SIGHUP does with a list that is gone, or older than the one in use: nothing.
#[test]
fn a_worse_list_does_not_take_the_place_of_a_better_one() {
    let ca = Authority::new(&["127.0.0.1"]);
    let args = ca.args("127.0.0.1");
    ca.run("-10", &["--crl"]);
    let dates = ca.dates();
    ca.run("30", &["--crl"]);
    let loaded = RwLock::new(Arc::new(args.server(None, clock()).unwrap()));
    // As if it had not expired.
    let mut older = args.server(None, clock()).unwrap();
    older.dated = vec![DatedFile::new(What::List, &ca.list(), dates)];
    says(replace(&loaded, older), &["older than the one in use"]);
    assert!(replace(&loaded, args.server(None, clock()).unwrap()).is_ok());
    fs::remove_file(ca.list()).unwrap();
    let before = current(&loaded);
    let args = TlsArgs {
        tls_cacrl: None,
        ..args
    };
    let reread = args.server(before.lists.as_deref(), clock());
    says(
        reread,
        &["cannot read the revocation lists of", text(&ca.list())],
    );
}

#[test]
fn dates_and_names_are_those_of_the_files() {
    let ca = Authority::new(&["127.0.0.1"]);
    ca.run("30", &["--crl"]);
    let dated = ca.args("127.0.0.1").server(None, clock()).unwrap().dated;
    let about = |what| {
        let mut found = dated.iter().filter(|file| file.what == what);
        let file = found.next().unwrap();
        assert_eq!(found.next(), None);
        (file.dates.name.to_string(), file.dates.clone())
    };
    let days = |dates: &Dates| (dates.until.0 - dates.from.0) / DAY;
    let (authority, dates) = about(What::Authority);
    assert!(
        authority.starts_with("CN=image link test authority "),
        "{authority}"
    );
    assert_eq!(days(&dates), 3650);
    let (own, dates) = about(What::Own);
    assert_eq!((own.as_str(), days(&dates)), ("CN=127.0.0.1", 365));
    let (issuer, dates) = about(What::List);
    assert_eq!((issuer, days(&dates)), (authority, 30));
}

#[test]
fn what_expires_is_announced_once() {
    let dates = |from, until| Dates {
        name: papers_name(),
        from: Date(from),
        until: Date(until),
    };
    let dated = [
        DatedFile::new(What::Own, Path::new("cert"), dates(0, 10_000)),
        DatedFile::new(What::List, Path::new("list"), dates(1000, 2000)),
    ];
    let mut said = Vec::new();
    let mut at = |now| announce(&dated, &mut said, Date(now));
    assert_eq!(at(1000), Duration::from_secs(900));
    assert_eq!(at(1900), Duration::from_secs(100));
    assert_eq!(at(2000), LOOK_AGAIN, "never longer, since clocks are set");
    assert_eq!(at(8999), Duration::from_secs(1));
    assert_eq!(at(10_000), LOOK_AGAIN);
    assert_eq!(said, [Standing::Expired, Standing::Expired]);
}

fn papers_name() -> Name {
    let ca = Authority::new(&["127.0.0.1"]);
    let cert = certificates(&ca.file("cacert.pem")).unwrap();
    Dates::of_certificate(&cert[0]).unwrap().name
}
