//! Bad input on every socket costs its connection an error in the log, and nothing else: a dump and a restore beside
//! it are byte-exact, and no descriptor stays behind.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e_tests::daemons::{until, Pair, SOON};
use e2e_tests::fake::content::Random;
use e2e_tests::fake::wire::{self, framed, local_image_entry, one_string, pipe, send_fds};
use e2e_tests::fake::{Dialect, DumpJob, ImageSet, Protocol, Spelling};
use rustix::event::PollFlags;

/// A connection that was made to misbehave; kept open while the others work.
type Bad = OwnedFd;

/// A bad connection to the proxy may look like another dump in progress, which a restore by the common socket would
/// wait for until the connection ends. That is right, so a restore may be told to try again, but never get wrong bytes.
fn restore_in_the_end(pair: &Pair, protocol: &Protocol, set: &ImageSet) {
    let mut last = String::new();
    until("the restore beside succeeds", || {
        let Err(error) = protocol.restore(&pair.target, set) else {
            return true;
        };
        let wrong = [
            "differs",
            "ends after",
            "longer",
            "never dumped",
            "no such image",
        ];
        assert!(!wrong.iter().any(|text| error.contains(text)), "{error}");
        if error != last {
            eprintln!("the restore beside: {error}");
            last = error;
        }
        false
    });
}

/// Whether a bad connection is one to the proxy.
fn at_proxy(bad: &Bad) -> bool {
    // A TCP connection, which may have been reset already, is one to the cache.
    let address = socket2::SockRef::from(bad).peer_addr().ok();
    let path = address.and_then(|address| Some(address.as_pathname()?.display().to_string()));
    path.is_some_and(|path| PROXY_SOCKETS.iter().any(|name| path.contains(name)))
}

/// The normal life that goes on: one dump of each protocol, half done when the bad ones come, and its restore.
fn beside(pair: &mut Pair, protocol: &Protocol, seed: u64, attack: impl FnOnce(&Pair) -> Vec<Bad>) {
    let job = DumpJob::new(protocol, &pair.source, seed)
        .gated()
        .stop_in("pages-1.img");
    // In a process of its own: to the proxy the bad connections are somebody else's.
    let mut child = job.spawn(env!("CARGO_BIN_EXE_fake-criu"));
    child.wait_half();
    let mut bad = attack(pair);
    child.go_on();
    let (status, said) = child.wait();
    assert!(status.success(), "the dump beside: {status}; {said}");
    bad.retain(|bad| !at_proxy(bad));
    restore_in_the_end(pair, protocol, &job.set());
    drop(bad);
    assert!(pair.proxy.running(), "the proxy died");
    assert!(pair.cache.running(), "the cache died");
}

/// Runs the attack while normal life goes on, and looks at what is left behind.
fn survives(pair: &mut Pair, attack: impl Fn(&Pair) -> Vec<Bad>) {
    let protocols = [
        Protocol::Stream,
        Protocol::remote(Dialect::Pipe, Spelling::Empty),
    ];
    for protocol in &protocols {
        // What a first session leaves behind for good (a log file, a thread's eventfd) is not a leak.
        beside(pair, protocol, 1, |_| Vec::new());
    }
    let (proxy, cache) = (settled(&pair.proxy), settled(&pair.cache));
    for protocol in &protocols {
        beside(pair, protocol, 2, &attack);
    }
    if std::env::var_os("NOFD").is_none() {
        returns_to(&pair.proxy, proxy);
        returns_to(&pair.cache, cache);
    }
}

/// Waits until a daemon has no more descriptors than that.
fn returns_to(daemon: &e2e_tests::daemons::Daemon, count: usize) {
    let deadline = std::time::Instant::now() + e2e_tests::daemons::SOON;
    while daemon.fd_count() > count {
        let open = daemon.fds();
        assert!(
            std::time::Instant::now() < deadline,
            "more than {count} are open: {open:#?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The descriptor count once it stays the same for a while.
fn settled(daemon: &e2e_tests::daemons::Daemon) -> usize {
    let (mut count, mut same) = (daemon.fd_count(), 0);
    until("the descriptor count settles", || {
        let now = daemon.fd_count();
        same = if now == count { same + 1 } else { 0 };
        count = now;
        same > 20
    });
    count
}

/// Without any bad input: what a session opens is closed when it is over.
#[test]
fn sessions_leave_no_descriptors() {
    let mut pair = Pair::new();
    let protocols = Protocol::all();
    for protocol in &protocols {
        beside(&mut pair, protocol, 1, |_| Vec::new());
    }
    let (proxy, cache) = (settled(&pair.proxy), settled(&pair.cache));
    for round in 0..2 {
        for protocol in &protocols {
            beside(&mut pair, protocol, round, |_| Vec::new());
        }
    }
    if std::env::var_os("NOFD").is_none() {
        returns_to(&pair.proxy, proxy);
        returns_to(&pair.cache, cache);
    }
}

const PROXY_SOCKETS: [&str; 3] = [
    "img-proxy.sock",
    "streamer-capture.sock",
    "image-proxy-control.sock",
];
const CACHE_SOCKETS: [&str; 3] = [
    "img-cache.sock",
    "streamer-serve.sock",
    "image-cache-control.sock",
];

fn sockets(pair: &Pair) -> Vec<PathBuf> {
    let join = |dir: &Path, names: [&str; 3]| names.map(|name| dir.join(name));
    [
        join(&pair.source, PROXY_SOCKETS),
        join(&pair.target, CACHE_SOCKETS),
    ]
    .concat()
}

/// Bytes that are no message of anybody's.
fn garbage() -> Vec<Vec<u8>> {
    let mut random = Random::new(11);
    let noise: Vec<u8> = (0..2000)
        .map(|_| u8::try_from(random.next() & 255).expect("a byte"))
        .collect();
    let mut all = vec![
        noise.clone(),
        noise[..100].to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        // Huge, large and zero lengths.
        b"\xff\xff\xff\xff".to_vec(),
        b"\xff\xff\xff\x7f\x0a\x01a".to_vec(),
        b"\x00\x00\x10\x00".to_vec(),
        b"\0\0\0\0".to_vec(),
        // Truncated: in the length, in the message.
        b"\x06".to_vec(),
        b"\x06\0\0".to_vec(),
        framed(&local_image_entry(b"core-1.img", b"/img/1", 1))[..9].to_vec(),
        // Wrong types: numbers for strings, a string for a number, groups, field 0, an endless varint.
        framed(b"\x08\x01\x10\x01\x18\x01"),
        framed(b"\x0a\x01a\x12\x01b\x1a\x01c"),
        framed(b"\x0b\x0c"),
        framed(b"\x02\x00"),
        framed(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        // A string longer than its message, and one that is not UTF-8.
        framed(b"\x0a\x7fabc"),
        framed(b"\x0a\xff\xff\xff\xff\x0fabc"),
        framed(&local_image_entry(b"\xff\xfe\x80", b"\xc3\x28", 1)),
        // Required fields that are not there.
        framed(b""),
        framed(b"\x0a\x01a"),
        framed(b"\x18\x01"),
    ];
    all.push([framed(b"\x0a\x01a"), noise].concat());
    all
}

/// Sends what it can; the daemon may close at any moment.
fn say(socket: &UnixStream, bytes: &[u8]) {
    socket
        .set_write_timeout(Some(Duration::from_secs(5)))
        .expect("a socket");
    let mut socket = socket;
    let _ = socket.write_all(bytes);
}

#[test]
fn garbage_on_every_unix_socket() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let mut bad = Vec::new();
        for path in sockets(pair) {
            for bytes in garbage() {
                // Once closed at once, once half-closed and held.
                say(&UnixStream::connect(&path).expect("connect"), &bytes);
                let socket = UnixStream::connect(&path).expect("connect");
                say(&socket, &bytes);
                let _ = socket.shutdown(Shutdown::Write);
                bad.push(socket.into());
            }
        }
        bad
    });
    assert!(pair.proxy.logged_errors() > 0, "nothing in the proxy's log");
    assert!(pair.cache.logged_errors() > 0, "nothing in the cache's log");
}

#[test]
fn connect_and_leave_on_every_socket() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        for path in sockets(pair) {
            for _ in 0..50 {
                drop(UnixStream::connect(&path).expect("connect"));
            }
        }
        for _ in 0..50 {
            drop(TcpStream::connect(("127.0.0.1", pair.port)).expect("connect"));
        }
        Vec::new()
    });
}

#[test]
fn silent_clients_on_every_socket() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let mut bad = Vec::new();
        for path in sockets(pair) {
            for bytes in 0..8 {
                let socket = UnixStream::connect(&path).expect("connect");
                say(&socket, &b"\x19\0\0\0\x0a\x0din"[..bytes]);
                bad.push(socket.into());
            }
        }
        for _ in 0..8 {
            let socket = TcpStream::connect(("127.0.0.1", pair.port)).expect("connect");
            bad.push(socket.into());
        }
        bad
    });
}

#[test]
fn garbage_on_the_tcp_port() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let mut bad = Vec::new();
        let mut all = garbage();
        let mut random = Random::new(12);
        for len in [1, 3, 4, 7, 8, 16, 31, 32, 33, 64, 1000, 100_000] {
            all.push(
                (0..len)
                    .map(|_| u8::try_from(random.next() & 255).expect("a byte"))
                    .collect(),
            );
        }
        for bytes in all {
            let mut socket = TcpStream::connect(("127.0.0.1", pair.port)).expect("connect");
            socket
                .set_write_timeout(Some(Duration::from_secs(5)))
                .expect("a socket");
            // The cache may close before it has read everything.
            let _ = socket.write_all(&bytes);
            let _ = socket.shutdown(Shutdown::Write);
            bad.push(socket.into());
        }
        bad
    });
    assert!(pair.cache.logged_errors() > 0, "nothing in the cache's log");
}

/// The first bytes of a real conversation, cut off or followed by noise.
#[test]
fn a_good_handshake_followed_by_noise() {
    let mut pair = Pair::new();
    let recorded = record_handshake();
    assert!(recorded.len() > 16, "recorded {} bytes", recorded.len());
    survives(&mut pair, |pair| {
        let mut random = Random::new(13);
        let mut bad = Vec::new();
        for cut in (1..recorded.len()).step_by(recorded.len() / 40 + 1) {
            let mut socket = TcpStream::connect(("127.0.0.1", pair.port)).expect("connect");
            let noise: Vec<u8> = (0..200)
                .map(|_| u8::try_from(random.next() & 255).expect("a byte"))
                .collect();
            // The cache may close before it has read everything.
            let _ = socket.write_all(&[&recorded[..cut], &noise].concat());
            bad.push(socket.into());
        }
        bad
    });
}

/// What a proxy says first, until it waits for an answer: recorded by a listener that never gives one.
fn record_handshake() -> Vec<u8> {
    let dir = e2e_tests::daemons::scratch();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let args = ["--connect-timeout".to_owned(), "3".to_owned()];
    let _proxy = e2e_tests::daemons::start_proxy(dir.path(), port, &args);
    let capture = e2e_tests::fake::Capture::connect(dir.path()).expect("connect");
    let _image = capture.create("core-1.img").expect("open");
    let dialled = wire::wait_for(listener.as_fd(), PollFlags::IN, SOON);
    assert!(dialled.expect("poll works"), "the proxy does not dial");
    let (mut socket, _) = listener.accept().expect("the proxy dials");
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a socket");
    let mut bytes = vec![0; 4096];
    let count = socket.read(&mut bytes).expect("it speaks first");
    bytes.truncate(count);
    bytes
}

/// Names and ids that a file system would trip over.
#[test]
fn names_that_are_no_names() {
    let long = vec![b'x'; 4096];
    let longer = vec![b'y'; 70_000];
    let names: Vec<&[u8]> = vec![
        b"",
        b".",
        b"..",
        b"a/b",
        b"/etc/passwd",
        b"../../etc/passwd",
        b"a\0b",
        b"\0",
        b"core-1.img\n",
        &long,
        &longer,
    ];
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let mut bad = Vec::new();
        for name in &names {
            for mode in [0, 1, 0x400] {
                for (dir, socket) in [
                    (&pair.source, "img-proxy.sock"),
                    (&pair.target, "img-cache.sock"),
                ] {
                    if name.is_empty() && mode != 0x400 {
                        // With an empty id that would be FINISH, which is no bad input.
                        continue;
                    }
                    let socket = UnixStream::connect(dir.join(socket)).expect("connect");
                    say(
                        &socket,
                        &framed(&local_image_entry(name, b"/img/evil", mode)),
                    );
                    say(&socket, b"some bytes");
                    let _ = socket.shutdown(Shutdown::Write);
                    bad.push(socket.into());
                }
            }
            // As a snapshot id, and pushed onto the list.
            let socket = UnixStream::connect(pair.source.join("img-proxy.sock")).expect("connect");
            if name.len() > 2 {
                say(&socket, &framed(&local_image_entry(b"core-1.img", name, 1)));
                bad.push(socket.into());
            }
            for (dir, socket) in [
                (&pair.source, "streamer-capture.sock"),
                (&pair.target, "streamer-serve.sock"),
            ] {
                let socket = UnixStream::connect(dir.join(socket)).expect("connect");
                say(&socket, &framed(&one_string(name)));
                if let Ok((read_end, _write_end)) = pipe() {
                    let _ = send_fds(&socket, &[read_end.as_fd()]);
                }
                bad.push(socket.into());
            }
        }
        bad
    });
    let escaped = ["b", "passwd", "x"]
        .iter()
        .any(|name| pair.dir().join(name).exists());
    assert!(!escaped, "a name left the house");
    assert!(pair.proxy.logged_errors() > 0, "nothing in the proxy's log");
}

/// Descriptors of every wrong kind.
fn wrong_descriptors(dir: &Path) -> Vec<(&'static str, OwnedFd)> {
    let path = dir.join("regular");
    std::fs::write(&path, b"text").expect("ours");
    let (one, two) = UnixStream::pair().expect("a pair");
    let (read_end, write_end) = pipe().expect("a pipe");
    // Its other end must outlive the test, or it would be a pipe at its end.
    std::mem::forget((two, write_end));
    let event =
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
    vec![
        ("a regular file", File::open(&path).expect("ours").into()),
        ("a directory", File::open(dir).expect("ours").into()),
        ("/dev/null", File::open("/dev/null").expect("there").into()),
        ("an eventfd", event),
        ("a socket", one.into()),
        ("a read end", read_end),
    ]
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let mut bad = Vec::new();
        for (what, fd) in wrong_descriptors(pair.dir()) {
            eprintln!("{what}");
            let header = framed(&local_image_entry(b"core-1.img", b"/img/evil", 1));
            let asking = framed(&local_image_entry(b"core-7.img", b"/img/dump", 0));
            for (dir, socket, header) in [
                (&pair.source, "img-proxy.sock", header),
                (
                    &pair.source,
                    "streamer-capture.sock",
                    framed(&one_string(b"core-1.img")),
                ),
                (&pair.target, "img-cache.sock", asking),
                (
                    &pair.target,
                    "streamer-serve.sock",
                    framed(&one_string(b"core-7.img")),
                ),
            ] {
                // A read end is what a capture expects.
                if what == "a read end" && dir == &pair.source {
                    continue;
                }
                let socket = UnixStream::connect(dir.join(socket)).expect("connect");
                say(&socket, &header);
                let _ = send_fds(&socket, &[fd.as_fd()]);
                bad.push(socket.into());
            }
        }
        bad
    });
    assert!(pair.proxy.logged_errors() > 0, "nothing in the proxy's log");
}

/// None where one belongs, two where one belongs, and one where none belongs.
#[test]
fn too_few_and_too_many_descriptors() {
    let mut pair = Pair::new();
    survives(&mut pair, |pair| {
        let (one, one_write) = pipe().expect("a pipe");
        let (two, two_write) = pipe().expect("a pipe");
        drop((one_write, two_write));
        let none: &[BorrowedFd] = &[];
        let both: &[BorrowedFd] = &[one.as_fd(), two.as_fd()];
        let eight = [one.as_fd(); 8];
        let mut bad = Vec::new();
        for fds in [none, both, &eight] {
            for (socket, header) in [
                (
                    "img-proxy.sock",
                    framed(&local_image_entry(b"core-1.img", b"/img/evil", 1)),
                ),
                ("streamer-capture.sock", framed(&one_string(b"core-1.img"))),
                // Before any header, and on sockets that take none at all.
                ("img-proxy.sock", Vec::new()),
                ("streamer-capture.sock", Vec::new()),
                ("image-proxy-control.sock", Vec::new()),
            ] {
                let socket = UnixStream::connect(pair.source.join(socket)).expect("connect");
                say(&socket, &header);
                let _ = send_fds(&socket, fds);
                let _ = send_fds(&socket, fds);
                bad.push(socket.into());
            }
            for (socket, header) in [
                (
                    "img-cache.sock",
                    framed(&local_image_entry(b"core-7.img", b"/img/dump", 0)),
                ),
                ("streamer-serve.sock", framed(&one_string(b"core-7.img"))),
                ("img-cache.sock", Vec::new()),
                ("streamer-serve.sock", Vec::new()),
                ("image-cache-control.sock", Vec::new()),
            ] {
                let socket = UnixStream::connect(pair.target.join(socket)).expect("connect");
                say(&socket, &header);
                let _ = send_fds(&socket, fds);
                bad.push(socket.into());
            }
        }
        bad
    });
    assert!(pair.proxy.logged_errors() > 0, "nothing in the proxy's log");
}

/// A client that sends a byte now and then is served like any other, and holds up nobody.
#[test]
fn a_slow_sender() {
    let pair = Pair::new();
    let content = e2e_tests::fake::Content::pattern(1, 20_000);
    let capture = UnixStream::connect(pair.source.join("streamer-capture.sock")).expect("connect");
    let (read_end, write_end) = pipe().expect("a pipe");
    let mut slow = &capture;
    for byte in framed(&one_string(b"core-7.img")) {
        slow.write_all(&[byte]).expect("it listens");
        std::thread::sleep(Duration::from_millis(5));
    }
    send_fds(&capture, &[read_end.as_fd()]).expect("it listens");
    drop(read_end);
    let mut channel = wire::Channel::new(write_end).expect("ours");
    content
        .send_range(&mut channel, 0, 20_000, 1000)
        .expect("it drains");
    drop(channel);
    let serve = e2e_tests::fake::Serve::connect(&pair.target).expect("connect");
    e2e_tests::fake::run::check_one(&serve, "core-7.img", &content).expect("whole");
}
