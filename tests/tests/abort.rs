//! `image-proxy abort`: an operator on the source decides, and there is one process afterwards.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::run::Event;
use e2e_tests::fake::script;
use e2e_tests::fake::{Capture, DumpError, DumpJob, ImageSet, Protocol};
use e2e_tests::link::{Fault, Faults};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

fn web() -> Options {
    Options::default().proxy(&["--session", "web"])
}

fn ask(program: &str, dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(bin(program));
    command
        .args(arguments)
        .arg("--control")
        .arg(dir.join(format!("{program}-control.sock")));
    command.output().expect("it runs")
}

fn abort(pair: &Pair, more: &[&str]) -> Result<(), String> {
    let arguments: Vec<&str> = ["abort", "web"].iter().chain(more).copied().collect();
    let output = ask("image-proxy", &pair.source, &arguments);
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8(output.stderr).expect("UTF-8")),
    }
}

fn status(program: &str, dir: &Path) -> String {
    String::from_utf8(ask(program, dir, &["status"]).stdout).expect("UTF-8")
}

fn target_has_nothing(pair: &Pair) {
    until("the target has no session", || {
        status("image-cache", &pair.target).contains("no sessions")
    });
    assert!(status("image-proxy", &pair.source).contains("no sessions"));
}

fn run_script(action: &str, dir: &Path) -> bool {
    let result = script::run(&bin("image-proxy"), action, dir, dir, LIMIT);
    result.expect("the script ends").ok()
}

/// A dump up to its answered commit, by a CRIU that ends then and leaves `task` alone.
fn told(pair: &Pair, task: &script::Task, set: &ImageSet) {
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source));
    e2e_tests::fake::run::dump(&capture, set, &mut |_| {}).expect("the images");
    // The shell is the CRIU of this script.
    let mut criu = Command::new("sh");
    criu.args(["-c", "\"$1\"; exit $?", "sh"])
        .arg(bin("image-proxy"))
        .env("CRTOOLS_SCRIPT_ACTION", "post-dump")
        .env("CRTOOLS_IMAGE_DIR", &pair.source)
        .env("CRTOOLS_INIT_PID", task.pid().to_string())
        .env_remove("IMAGE_PROXY_CONTROL")
        .current_dir(&pair.source);
    assert!(criu.status().expect("a shell").success());
}

#[test]
fn a_dump_under_way_fails_and_the_next_one_succeeds() {
    for protocol in Protocol::all() {
        for moment in ["files.img", "the end"] {
            eprintln!("{protocol:?} {moment}");
            let pair = web().start();
            let job = DumpJob::new(&protocol, &pair.source, 1).gated();
            let result = job.run_with(&job.set(), &mut |event| {
                if event == Event::Half(moment) || moment == "the end" && event == Event::Written {
                    abort(&pair, &[]).expect("it is under way");
                }
            });
            let Err(DumpError::PostDump(_) | DumpError::Write(_)) = result else {
                panic!("{result:?}");
            };
            target_has_nothing(&pair);
            assert!(pair.proxy.log().contains("aborted by the operator"));
            let retry = DumpJob::new(&protocol, &pair.source, 2).gated();
            retry.run().expect("the retry");
            let restored = protocol.restore(&pair.target, &retry.set());
            restored.expect("the restore");
        }
    }
}

/// It was announced that it will be held back, and that stays true.
#[test]
fn an_announced_dump_fails() {
    let pair = web().start();
    assert!(run_script("pre-dump", &pair.source));
    abort(&pair, &[]).expect("it is announced");
    let set = ImageSet::sample(1);
    let capture = Capture::connect(&pair.source).expect("connect");
    // CRIU may be told at any image, or at the end.
    let dumped = e2e_tests::fake::run::dump(&capture, &set, &mut |_| {});
    assert!(!run_script("post-dump", &pair.source), "{dumped:?}");
    assert!(status("image-cache", &pair.target).contains("no sessions"));
    assert!(!pair.cache.log().contains("ready to be restored"));
}

/// A CRIU that lives on, or a shell that runs the script again and again, holds nothing of what is over.
#[test]
fn announcements_that_are_over_hold_no_descriptors() {
    let pair = web().start();
    let announce = || assert!(run_script("pre-dump", &pair.source));
    announce();
    let before = pair.proxy.fd_count();
    (0..8).for_each(|_| announce());
    until("the descriptors are back", || {
        pair.proxy.fd_count() <= before
    });
}

#[test]
fn a_series_between_two_rounds_is_closed() {
    let pair = web().start();
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).pre_dump();
    job.run().expect("the pre-dump");
    until("the series waits", || {
        status("image-proxy", &pair.source).contains("waits for the next run")
    });
    abort(&pair, &[]).expect("nothing runs");
    target_has_nothing(&pair);
    let again = abort(&pair, &[]).expect_err("it is gone");
    assert!(again.contains("there is no session web"), "{again}");
}

/// CRIU may have written all and be about to kill: only somebody who looked can tell.
#[test]
fn a_dump_without_script_is_aborted_only_on_the_operators_word() {
    let pair = web().start();
    let capture = Capture::connect(&pair.source).expect("connect");
    let mut image = capture.create("files.img").expect("an image");
    std::io::Write::write_all(&mut image, b"half").expect("bytes");
    until("the run has begun", || {
        status("image-proxy", &pair.source).contains("running")
    });
    let refused = abort(&pair, &[]).expect_err("nobody knows");
    assert!(refused.contains("--process-lives"), "{refused}");
    abort(&pair, &["--process-lives"]).expect("the operator knows");
    target_has_nothing(&pair);
}

/// `--leave-running`, or a CRIU that failed behind its script: one command, and the set is gone on the target.
#[test]
fn a_set_in_doubt_is_dropped_over_the_link_if_its_process_lives() {
    let pair = web().start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    told(&pair, &task, &set);
    // At once, too: it waits until CRIU cannot kill any more.
    abort(&pair, &[]).expect("it lives");
    assert!(pair.proxy.log().contains("in doubt"));
    target_has_nothing(&pair);
    assert!(!pair.cache.log().contains("ready to be restored"));
    assert_eq!(pair.cache.log().matches("WARN").count(), 1, "given up once");
}

#[test]
fn a_set_whose_process_is_dead_is_not_aborted() {
    let pair = web().start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    told(&pair, &task, &set);
    until("it is in doubt on both sides", || {
        let doubt = |text: String| text.contains("in doubt");
        doubt(status("image-proxy", &pair.source)) && doubt(status("image-cache", &pair.target))
    });
    drop(task);
    let refused: Vec<_> = [&[][..], &["--process-lives"]]
        .into_iter()
        .map(|more| abort(&pair, more).expect_err("it is dead"))
        .collect();
    assert!(pair.follow(&refused[0], "image-cache release").0);
    assert!(refused[1].contains("is dead here"), "{refused:?}");
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("the set is there");
}

/// The word to kill is out: giving the set up now could lose the process.
#[test]
fn nothing_is_aborted_while_criu_may_still_kill() {
    let pair = web().start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source));
    e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
    let dir = &pair.source;
    // This test is the CRIU of the script, and lives on.
    let result = script::run_of(&task, &bin("image-proxy"), "post-dump", dir, dir, LIMIT);
    assert!(result.expect("the script ends").ok());
    for more in [&[][..], &["--process-lives"]] {
        let refused = abort(&pair, more).expect_err("CRIU runs");
        assert!(refused.contains("end CRIU"), "{refused}");
    }
    drop(task);
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("it was killed, so it may be restored");
}

#[test]
fn without_a_link_the_operator_is_told_what_to_do_on_the_target() {
    let pair = web().link(Faults::default()).start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    told(&pair, &task, &set);
    // Nor can a connection be made for the decision alone.
    pair.link().bar(true);
    pair.link().strike(Fault::Reset);
    let refused = abort(&pair, &[]).expect_err("the target cannot be reached");
    assert!(refused.contains("the process lives"), "{refused}");
    until("the target is in doubt", || {
        status("image-cache", &pair.target).contains("in doubt")
    });
    assert!(Protocol::Stream.restore(&pair.target, &set).is_err());
    assert!(pair.follow(&refused, "image-cache drop").0);
    until("the target has no session", || {
        status("image-cache", &pair.target).contains("no sessions")
    });
}

/// A doubt of an earlier session has the name of a later one. Neither is taken for the other, and the id is that of the target.
#[test]
fn a_name_that_fits_two_sessions_aborts_neither() {
    let pair = web().link(Faults::default()).start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    told(&pair, &task, &set);
    pair.link().strike(Fault::Reset);
    let of_two = |text: String| text.matches("session web: ").count() == 2;
    until("both sides have the doubt", || {
        let doubt = |text: String| text.contains("in doubt");
        doubt(status("image-proxy", &pair.source)) && doubt(status("image-cache", &pair.target))
    });
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).pre_dump();
    job.run().expect("the pre-dump");
    until("another session waits for its next round", || {
        let text = status("image-proxy", &pair.source);
        text.contains("waits for the next run") && of_two(text)
    });
    let refused = abort(&pair, &[]).expect_err("which one?");
    assert!(refused.contains("image-proxy abort ID"), "{refused}");
    let id_of = |what: &str| {
        let line = refused.lines().find(|line| line.contains(what));
        let id = line.and_then(|line| line.split_whitespace().next());
        id.unwrap_or_else(|| panic!("{what} in {refused}"))
    };
    let there = status("image-cache", &pair.target);
    for what in ["waits for its next round", "in doubt"] {
        assert!(there.contains(id_of(what)), "{what} in {there}");
    }
    let by_id = ask("image-proxy", &pair.source, &["abort", id_of("waits")]);
    assert!(by_id.status.success(), "{by_id:?}");
    until("the doubt alone is left", || {
        let text = status("image-cache", &pair.target);
        text.contains("in doubt") && !of_two(text)
    });
    // The link of the other one is gone: the decision has a connection of its own.
    abort(&pair, &[]).expect("the target hears it");
    until("the target has no session", || {
        status("image-cache", &pair.target).contains("no sessions")
    });
}

/// Somebody who follows the process as a CRIU does, until it is dropped.
struct Tracer(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>);

impl Tracer {
    fn of(task: &script::Task) -> Self {
        let pid = libc::pid_t::try_from(task.pid()).expect("a pid");
        let (holds, held) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // SAFETY: no memory of this process is involved.
            let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
            holds.send(seized).expect("the test waits");
            // With the thread the kernel lets go of the process.
            let _ = ended.recv();
        });
        assert_eq!(held.recv(), Ok(0), "{}", std::io::Error::last_os_error());
        Tracer(end, thread)
    }

    fn end(self) {
        drop(self.0);
        self.1.join().expect("no panic");
    }
}

/// A CRIU that cannot be seen to have been told, e.g. behind a shell, has it stopped.
#[test]
fn nothing_is_aborted_while_the_process_is_held() {
    let pair = web().start();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    told(&pair, &task, &set);
    until("it is in doubt", || pair.proxy.log().contains("in doubt"));
    let criu = Tracer::of(&task);
    for more in [&[][..], &["--process-lives"]] {
        let refused = abort(&pair, more).expect_err("it may still be killed");
        assert!(refused.contains("is held by process"), "{refused}");
    }
    criu.end();
    abort(&pair, &[]).expect("it lives, and nobody kills it");
    target_has_nothing(&pair);
}

/// CRIU dies while its script asks. The script has another parent then, who lives on, and must not be
/// taken for the CRIU of the dump: the session would wait for that for ever, and a restore for the session.
#[test]
fn an_announcement_of_a_criu_that_has_died() {
    let pair = Pair::new();
    // It finds the question when all is over.
    pair.proxy.signal(Signal::STOP);
    let mut criu = Command::new("sh")
        .args(["-c", "\"$0\"; true"])
        .arg(bin("image-proxy"))
        .env("CRTOOLS_SCRIPT_ACTION", "pre-dump")
        .env("CRTOOLS_IMAGE_DIR", &pair.source)
        .current_dir(&pair.source)
        .spawn()
        .expect("a shell");
    let children = format!("/proc/{0}/task/{0}/children", criu.id());
    let script = || {
        let children = fs::read_to_string(&children).ok()?;
        children.split_whitespace().next().map(str::to_owned)
    };
    until("the script asks", || {
        // By then it has looked who its parent is.
        let fds = script().and_then(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok());
        let mut fds = fds.into_iter().flatten().flatten();
        fds.any(|fd| {
            fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
        })
    });
    let script = script().expect("it waits for an answer");
    criu.kill().expect("ours");
    criu.wait().expect("killed");
    pair.proxy.signal(Signal::CONT);
    until("it is refused", || {
        let log = pair.proxy.log();
        log.contains("action script: the CRIU that started this script has died")
    });
    until("the script has ended", || {
        // Who adopted it may not wait for it.
        let stat = fs::read_to_string(format!("/proc/{script}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    });
    assert!(!pair.cache.log().contains("session begins"));
    // It is not that nobody is served any more.
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    let restored = Protocol::Stream.restore(&pair.target, &job.set());
    restored.expect("the restore");
}
