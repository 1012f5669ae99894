//! What becomes of a process is known on the source, and the link to the target is gone: image-proxy brings the decision
//! when the target can be reached again, and no operator is needed.

use std::time::Duration;

use e2e_tests::authority::Authority;
use e2e_tests::bins::bin;
use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::script::{self, Script, ScriptResult, Task};
use e2e_tests::fake::{Capture, ImageSet, Protocol};
use e2e_tests::link::{Fault, Faults};

const LIMIT: Duration = Duration::from_secs(30);

/// A link that is not made again when it breaks.
fn pair(cache: &[String], proxy: &[String]) -> Pair {
    let options = Options::default().cache(cache).proxy(proxy);
    let options = options.proxy(&["--session", "web", "--link-timeout", "0"]);
    options.link(Faults::default()).start()
}

/// The images are on the target; what is left is the commit. CRIU keeps its connection until then.
fn dumps(pair: &Pair, set: &ImageSet) -> Capture {
    let capture = Capture::connect(&pair.source).expect("connect");
    let script = script::run(
        &bin("image-proxy"),
        "pre-dump",
        &pair.source,
        &pair.source,
        LIMIT,
    );
    assert!(script.expect("the script ends").ok());
    e2e_tests::fake::run::dump(&capture, set, &mut |_| {}).expect("the images");
    capture
}

fn post_dump(pair: &Pair, task: &Task) -> ScriptResult {
    let program = bin("image-proxy");
    let script = Script::new(&program, "post-dump", &pair.source, LIMIT);
    script.run_of(task).expect("the script ends")
}

fn says(pair: &Pair, source: &str, target: &str) {
    until(&format!("{source:?} and {target:?}"), || {
        pair.ask_proxy(&["status"]).1.contains(source)
            && pair.ask_cache(&["status"]).1.contains(target)
    });
}

fn cut(pair: &Pair) {
    pair.link().bar(true);
    pair.link().strike(Fault::Reset);
}

/// The source kills when the link is gone. The set is restorable as soon as the target can hear that.
#[test]
fn a_kill_is_brought_to_the_target() {
    let authority = Authority::new(&["127.0.0.1", "source"]);
    let more = ["--connections", "3", "--checksum"].map(str::to_owned);
    let tls = [&authority.of("source")[..], &more].concat();
    for (cache, proxy) in [(vec![], vec![]), (authority.of("127.0.0.1"), tls)] {
        let pair = pair(&cache, &proxy);
        let (set, task) = (ImageSet::sample(1), Task::start().expect("a process"));
        let capture = dumps(&pair, &set);
        let told = post_dump(&pair, &task);
        assert!(told.ok(), "{told:?}");
        drop(capture);
        cut(&pair);
        says(&pair, "in doubt", "in doubt");
        drop(task);
        let dead = "in doubt: the process is dead here, the target does not know yet";
        says(&pair, dead, "in doubt");
        assert!(!pair.cache.log().contains("ready to be restored"));
        pair.link().bar(false);
        until("the target has heard", || {
            pair.ask_proxy(&["status"]).1.contains("no sessions")
        });
        assert!(pair.proxy.log().contains("not in doubt any more"));
        let restored = Protocol::Stream.restore(&pair.target, &set);
        restored.expect("it was killed");
    }
}

/// image-proxy is told to stop before that.
#[test]
fn an_image_proxy_that_stops_names_what_the_target_has_not_heard() {
    let mut pair = pair(&[], &[]);
    let (set, task) = (ImageSet::sample(1), Task::start().expect("a process"));
    let capture = dumps(&pair, &set);
    assert!(post_dump(&pair, &task).ok());
    drop(capture);
    cut(&pair);
    drop(task);
    says(&pair, "the process is dead here", "in doubt");
    assert_eq!(pair.proxy.terminate(), Some(3));
    let log = pair.proxy.log();
    assert!(log.contains("the target has not heard"), "{log}");
    // Without the link's end the target would not know of it.
    assert!(pair.follow(&log, "image-cache release").0);
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("the operator has looked");
}
