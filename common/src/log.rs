//! The log. Writing a line never waits, never fails and never panics: a daemon holds processes, and whoever takes its log
//! (a pipe, a disk, a terminal) may stand still, be full or be gone.
//!
//! Lines are queued, and a thread of their own writes them. When the queue is full, or writing fails, the lines are lost and
//! counted; the next line that can be written says how many. At the end the queue is written out.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::MakeWriter;

use crate::tasks::text_of;
use crate::text::{escaped, escaped_but};

/// What may wait to be written. A reader that stands still costs so much memory, and no more.
const QUEUE_BYTES: usize = 1 << 20;

/// At the end: how long the log may take nothing until what is left is given up.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How long standard error may take nothing of what a command or a script says.
const SAID_WITHIN: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The log of this process, once it has one.
static LOG: OnceLock<Log> = OnceLock::new();

/// Where the lines go.
#[derive(Debug)]
enum Sink {
    Stderr,
    File { path: PathBuf, file: File },
}

#[derive(Debug, Clone)]
pub struct Log(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to do, or it is done.
    changed: Condvar,
    sink: Mutex<Written>,
    colours: bool,
    is_file: bool,
}

#[derive(Debug, Default)]
struct Queue {
    text: Vec<u8>,
    /// Lines that found no room.
    lost: u64,
    /// The file shall be opened again.
    reopen: bool,
    /// What was taken from here is being written.
    busy: bool,
    /// Bytes that were taken by the sink, or lost to it.
    done: u64,
    has_thread: bool,
}

#[derive(Debug)]
struct Written {
    to: Sink,
    /// Lines that were lost since the last one that was written, and why.
    lost: u64,
    why: String,
    /// A line was cut in its middle.
    cut: bool,
}

impl Log {
    fn new(to: Sink, colours: bool) -> Self {
        let is_file = matches!(to, Sink::File { .. });
        Self(Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            sink: Mutex::new(Written {
                to,
                lost: 0,
                why: String::new(),
                cut: false,
            }),
            colours,
            is_file,
        }))
    }

    /// To `path`, behind what is there: what an earlier run said of sets in doubt is of use. Without a path to standard
    /// error.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        Ok(match path {
            None => {
                let plain = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
                Self::new(Sink::Stderr, io::stderr().is_terminal() && !plain)
            }
            Some(path) => {
                let file = append_to(path)?;
                let path = path.to_owned();
                Self::new(Sink::File { path, file }, false)
            }
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line, with its end.
    fn put(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let text = match self.0.colours {
            // Those of values are escaped before they come here (tracing-subscriber).
            true => escaped_but(text, |c| c == '\x1b'),
            false => escaped(text),
        };
        let mut queue = self.queue();
        if queue.text.len() + text.len() + 1 > QUEUE_BYTES {
            queue.lost += 1;
            return;
        }
        queue.text.extend_from_slice(text.as_bytes());
        queue.text.push(b'\n');
        drop(queue);
        self.0.changed.notify_all();
    }

    /// From here on a thread writes. Before, lines wait.
    fn start_thread(&self) -> io::Result<()> {
        let log = self.clone();
        let thread = std::thread::Builder::new().name("log".to_owned());
        thread.spawn(move || loop {
            // A panic here would be the end of the log, and what it says would go there.
            let _ = catch_unwind(AssertUnwindSafe(|| loop {
                log.write_next(true);
            }));
        })?;
        self.queue().has_thread = true;
        Ok(())
    }

    /// Writes what is queued; waits for something, if it `may_wait`.
    fn write_next(&self, may_wait: bool) {
        let mut queue = self.queue();
        queue.busy = false;
        while may_wait && queue.text.is_empty() && queue.lost == 0 && !queue.reopen {
            self.0.changed.notify_all();
            let waited = self.0.changed.wait(queue);
            queue = waited.unwrap_or_else(PoisonError::into_inner);
        }
        queue.busy = true;
        let text = std::mem::take(&mut queue.text);
        let lost = std::mem::take(&mut queue.lost);
        let reopen = std::mem::take(&mut queue.reopen);
        drop(queue);
        let mut sink = self.0.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let reopened = if reopen { sink.reopen() } else { Ok(()) };
        sink.write(&text, |bytes| self.queue().done += bytes as u64);
        if lost > 0 {
            sink.lose(lost, "whatever takes the log took nothing");
            sink.write(b"", |_| {});
        }
        if let Err(e) = reopened {
            sink.write(line("ERROR", &e).as_bytes(), |_| {});
        }
    }

    /// Writes out what is queued. Gives up what cannot be written.
    pub fn flush(&self) {
        if !self.queue().has_thread {
            self.write_next(false);
            self.queue().busy = false;
            return;
        }
        let mut queue = self.queue();
        while !queue.text.is_empty() || queue.busy || queue.lost > 0 || queue.reopen {
            let before = queue.done;
            let waited = self.0.changed.wait_timeout(queue, LAST_LINES);
            let timeout;
            (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && queue.done == before {
                return;
            }
        }
    }

    /// The file was moved away (logrotate): the next lines go to a new one of its name. Does not wait for it.
    fn reopen(&self) -> bool {
        if self.0.is_file {
            self.queue().reopen = true;
            self.0.changed.notify_all();
        }
        self.0.is_file
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

impl Written {
    fn reopen(&mut self) -> Result<(), String> {
        if let Sink::File { path, file } = &mut self.to {
            match append_to(path) {
                Ok(opened) => *file = opened,
                Err(e) => {
                    let path = path.display();
                    return Err(format!(
                        "cannot open the log {path} again: {e}; it goes on in the file that it had"
                    ));
                }
            }
        }
        Ok(())
    }

    fn lose(&mut self, lines: u64, why: &str) {
        self.lost += lines;
        why.clone_into(&mut self.why);
    }

    /// Writes whole lines, or counts them as lost.
    fn write(&mut self, text: &[u8], mut done: impl FnMut(usize)) {
        if self.lost > 0 {
            let cut = if self.cut { "\n" } else { "" };
            let said = format!("{} lines of the log were lost: {}", self.lost, self.why);
            let said = format!("{cut}{}", line("WARN", &said));
            if self.write_some(said.as_bytes(), &mut |_| {}).is_ok() {
                self.lost = 0;
                self.cut = false;
            }
        }
        if let Err((rest, why)) = self.write_some(text, &mut done) {
            let lines = rest.iter().filter(|&&b| b == b'\n').count() as u64;
            done(rest.len());
            self.lose(lines, &why);
        }
    }

    /// Gives what could not be written, and why.
    fn write_some<'a>(
        &mut self,
        mut text: &'a [u8],
        done: &mut impl FnMut(usize),
    ) -> Result<(), (&'a [u8], String)> {
        while !text.is_empty() {
            let written = match &self.to {
                Sink::Stderr => rustix::io::write(rustix::stdio::stderr(), text),
                Sink::File { file, .. } => rustix::io::write(file, text),
            };
            match written {
                Ok(0) => return Err((text, "it takes nothing".to_owned())),
                Ok(n) => {
                    self.cut = text[n - 1] != b'\n';
                    done(n);
                    text = &text[n..];
                }
                Err(rustix::io::Errno::INTR) => {}
                // Somebody else who has it open too made it so.
                Err(rustix::io::Errno::AGAIN) => self.wait(),
                Err(e) => return Err((text, io::Error::from(e).to_string())),
            }
        }
        Ok(())
    }

    fn wait(&self) {
        let stderr = rustix::stdio::stderr();
        let mut fds = match &self.to {
            Sink::Stderr => [PollFd::new(&stderr, PollFlags::OUT)],
            Sink::File { file, .. } => [PollFd::new(file, PollFlags::OUT)],
        };
        let _ = poll(&mut fds, None);
    }
}

/// A line as the others look.
fn line(level: &str, text: &str) -> String {
    let mut time = String::new();
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    format!("{time} {level:>5} {}\n", escaped(text))
}

/// Takes one line.
pub struct Line<'a>(&'a Log);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// The process logs to `log` from here on; lines wait until [`start`].
pub fn install(level: LevelFilter, log: Log) {
    let ansi = log.0.colours;
    if LOG.set(log.clone()).is_ok() {
        let builder = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_target(false)
            .with_ansi(ansi)
            .log_internal_errors(false)
            .with_writer(log);
        let _ = builder.try_init();
    }
}

/// Lines are written from here on. The thread that does has the rights that this one has now.
pub fn start() -> io::Result<()> {
    LOG.get().map_or(Ok(()), Log::start_thread)
}

/// Opens the log's file again, if it is one.
pub fn reopen() -> bool {
    LOG.get().is_some_and(Log::reopen)
}

/// Whether the log is a file, and not standard error.
pub fn is_file() -> bool {
    LOG.get().is_some_and(|log| log.0.is_file)
}

/// Before the process ends.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush();
    }
}

/// A line on standard error, of a command or a script. One that cannot be written is left out: a script that waits for
/// the reader of its errors would keep CRIU's tasks frozen.
pub fn say(text: &str) {
    let text = format!("{}\n", escaped(text));
    let mut rest = text.as_bytes();
    let stderr = rustix::stdio::stderr();
    while !rest.is_empty() {
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        match poll(&mut fds, Some(&SAID_WITHIN)) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // So much fits into a pipe that can be written.
        match rustix::io::write(stderr, &rest[..rest.len().min(4096)]) {
            Ok(n) if n > 0 => rest = &rest[n..],
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            _ => return,
        }
    }
}

/// A panic is a line of the log, or on standard error where there is no log.
pub fn hook_panics() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let thread = std::thread::current();
        let place = info.location().map_or_else(
            || "nowhere".to_owned(),
            |at| format!("{}:{}:{}", at.file(), at.line(), at.column()),
        );
        let text = format!(
            "panic in thread {} at {place}: {}",
            thread.name().unwrap_or("without a name"),
            text_of(info.payload())
        );
        match LOG.get() {
            Some(_) => tracing::error!("{text}"),
            None => say(&text),
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::time::Instant;

    fn to(fd: impl Into<OwnedFd>) -> Log {
        let (path, file) = (PathBuf::new(), File::from(fd.into()));
        Log::new(Sink::File { path, file }, false)
    }

    fn pipe() -> (File, Log) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let log = to(writer);
        log.start_thread().unwrap();
        (reader.into(), log)
    }

    #[test]
    fn lines_come_whole_and_in_order() {
        let (mut reader, log) = pipe();
        for n in 0..100 {
            log.put(format!("line {n}\n").as_bytes());
        }
        log.put("a\u{202e}b\nforged\n".as_bytes());
        log.flush();
        drop(log.0.sink.lock().map(|mut s| s.to = Sink::Stderr));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let mut lines = text.lines();
        for n in 0..100 {
            assert_eq!(lines.next(), Some(&*format!("line {n}")));
        }
        assert_eq!(lines.next(), Some("a\\u{202e}b\\nforged"));
        assert_eq!(lines.next(), None);
    }

    #[test]
    fn a_reader_that_stands_still_stops_nobody_and_learns_how_much_it_lost() {
        let (mut reader, log) = pipe();
        let long = "x".repeat(1000);
        let began = Instant::now();
        for n in 0..5000 {
            log.put(format!("{n:05} {long}\n").as_bytes());
        }
        assert!(began.elapsed() < Duration::from_secs(30), "nobody waits");
        log.flush(); // gives up
        assert!(log.queue().text.len() <= QUEUE_BYTES);
        // It reads on.
        let mut text = Vec::new();
        let mut piece = [0; 65536];
        while !String::from_utf8_lossy(&text).contains("were lost") {
            let n = reader.read(&mut piece).unwrap();
            text.extend_from_slice(&piece[..n]);
        }
        let text = String::from_utf8(text).unwrap();
        let (lines, said): (Vec<_>, Vec<_>) = text.lines().partition(|l| l.ends_with(&long));
        let lost = said[0].split_whitespace().nth(2).unwrap();
        assert_eq!(
            lines.len() + lost.parse::<usize>().unwrap(),
            5000,
            "{said:?}"
        );
    }

    #[test]
    fn a_reader_that_is_gone_costs_the_lines_alone() {
        let (reader, log) = pipe();
        drop(reader);
        log.put(b"lost\n");
        log.flush();
        log.put(b"lost, too\n");
        log.flush();
        let sink = log.0.sink.lock().unwrap();
        assert_eq!(sink.lost, 2);
        assert!(sink.why.contains("Broken pipe"), "{}", sink.why);
    }

    /// A full disk: what was lost is said when there is room again.
    #[test]
    fn a_full_disk_is_said_when_there_is_room_again() {
        let log = to(File::options().write(true).open("/dev/full").unwrap());
        log.start_thread().unwrap();
        log.put(b"lost\n");
        log.flush();
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("log");
        let file = append_to(&path).unwrap();
        log.0.sink.lock().unwrap().to = Sink::File {
            path: path.clone(),
            file,
        };
        log.put(b"kept\n");
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains("WARN 1 lines of the log were lost: No space left"));
        assert_eq!(lines[1], "kept");
    }

    #[test]
    fn a_log_is_appended_to_and_opened_again() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("log");
        std::fs::write(&path, "of the run before\n").unwrap();
        let log = Log::open(Some(&path)).unwrap();
        log.put(b"one\n");
        log.flush(); // without a thread
        log.start_thread().unwrap();
        let moved = temp.path().join("log.1");
        std::fs::rename(&path, &moved).unwrap();
        log.put(b"two\n");
        log.flush();
        assert!(log.reopen());
        log.put(b"three\n");
        log.flush();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!(read(&moved), "of the run before\none\ntwo\n");
        assert_eq!(read(&path), "three\n");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        log.reopen();
        log.put(b"four\n");
        log.flush();
        // It goes on, and nothing has ended.
        assert!(!log.queue().reopen);
    }
}
