//! The log. Writing a line never waits, never fails and never panics: a daemon holds processes, and the reader of its log
//! (a pipe, a disk, a terminal) may stand still, be full or be gone.
//!
//! The task that logs writes the line, as far as that cannot wait; what is left is queued for a thread. When the queue is full, or
//! writing fails, the lines are lost and counted; the next line that can be written says how many. At the end the queue is
//! written out.

pub mod limit;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::SendFlags;
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

/// Written at once by the thread; each shows that the log takes something.
const PIECE_BYTES: usize = 4096;

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
    /// A file, pipe or terminal of our own opening. Only a regular file can be waited for, and that takes what comes or
    /// fails.
    Own(File),
    /// Standard error, which is a regular file.
    Stderr,
    /// Standard error, which is a socket (the journal's).
    Socket,
    /// Standard error, of which we have nothing that does not wait: the thread alone writes.
    Aside,
    /// A daemon in the background has none.
    Nowhere,
}

/// Where the log goes; a thread of its own writes it.
#[derive(Debug, Clone)]
pub struct Log(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to do, or it is done.
    changed: Condvar,
    sink: Mutex<Written>,
    colours: bool,
    path: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Queue {
    text: Vec<u8>,
    /// Lines that found the queue full.
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
    fn new(to: Sink, path: Option<&Path>, colours: bool) -> Self {
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
            path: path.map(Path::to_owned),
        }))
    }

    /// To `path`, behind what is there: what an earlier run said of sets in doubt is of use. Without a path to standard
    /// error.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        Ok(match path {
            None => {
                let plain = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
                Self::new(stderr_sink(), None, io::stderr().is_terminal() && !plain)
            }
            Some(path) => Self::new(Sink::Own(append_to(path)?), Some(path), false),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line, with its end, or queues what would have to wait.
    fn put(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let text = match self.0.colours {
            // Those of values are escaped before they come here (tracing-subscriber).
            true => escaped_but(text, |c| c == '\x1b'),
            false => escaped(text),
        };
        let text = format!("{text}\n");
        let mut queue = self.queue();
        let mut rest = text.as_bytes();
        // Nothing is before it, and the thread has nothing to do with the sink.
        if queue.text.is_empty() && !queue.busy && queue.lost == 0 && !queue.reopen {
            let mut sink = self.0.sink.lock().unwrap_or_else(PoisonError::into_inner);
            rest = sink.write(rest, false);
            if rest.is_empty() {
                return;
            }
        }
        if queue.text.len() + rest.len() > QUEUE_BYTES {
            queue.lost += 1;
            return;
        }
        queue.text.extend_from_slice(rest);
        drop(queue);
        self.0.changed.notify_all();
    }

    /// From here on a thread writes what had to wait.
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
        let reopened = match &self.0.path {
            Some(path) if reopen => sink.reopen(path),
            _ => Ok(()),
        };
        for piece in text.chunks(PIECE_BYTES) {
            sink.write(piece, true);
            self.queue().done += piece.len() as u64;
        }
        if lost > 0 {
            sink.lose(lost, "whatever takes the log took nothing");
            sink.write(b"", true);
        }
        if let Err(e) = reopened {
            sink.write(line("ERROR", &e).as_bytes(), true);
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
        let is_file = self.0.path.is_some();
        if is_file {
            self.queue().reopen = true;
            self.0.changed.notify_all();
        }
        is_file
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    let file = File::options().append(true).create(true).open(path)?;
    if !file.metadata()?.is_file() {
        // A named pipe or a terminal. Only the thread waits for it.
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    }
    Ok(file)
}

/// Standard error, so that the task that logs does not wait for it. Its flags are not ours to change: others have it open, too.
fn stderr_sink() -> Sink {
    let stderr = rustix::stdio::stderr();
    let kind = rustix::fs::fstat(stderr).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::RegularFile) => Sink::Stderr,
        Ok(FileType::Socket) => Sink::Socket,
        Ok(FileType::Fifo | FileType::CharacterDevice) => {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let opened = rustix::fs::open("/proc/self/fd/2", flags, Mode::empty());
            opened.map_or(Sink::Aside, |own| Sink::Own(own.into()))
        }
        _ => Sink::Aside,
    }
}

impl Written {
    fn reopen(&mut self, path: &Path) -> Result<(), String> {
        match append_to(path) {
            Ok(opened) => self.to = Sink::Own(opened),
            Err(e) => {
                let path = path.display();
                return Err(format!(
                    "cannot open the log {path} again: {e}; it goes on in the file that it had"
                ));
            }
        }
        Ok(())
    }

    fn lose(&mut self, lines: u64, why: &str) {
        self.lost += lines;
        why.clone_into(&mut self.why);
    }

    /// Writes, or counts as lost what cannot be written. Gives what would have to wait; nothing of it if it `may_wait`.
    fn write<'a>(&mut self, text: &'a [u8], may_wait: bool) -> &'a [u8] {
        if self.lost > 0 {
            let cut = if self.cut { "\n" } else { "" };
            let said = format!("{} lines of the log were lost: {}", self.lost, self.why);
            let said = format!("{cut}{}", line("WARN", &said));
            match self.write_some(said.as_bytes(), may_wait) {
                Ok(()) => self.lost = 0,
                // Of a pipe: all of it or nothing.
                Err((_, None)) => return text,
                Err((_, Some(_))) => {}
            }
        }
        match self.write_some(text, may_wait) {
            Ok(()) => &[],
            Err((rest, None)) => rest,
            Err((rest, Some(why))) => {
                let lines = rest.iter().filter(|&&b| b == b'\n').count() as u64;
                self.lose(lines, &why);
                &[]
            }
        }
    }

    /// Gives what was not written, and the error; without one it would have to wait.
    fn write_some<'a>(
        &mut self,
        mut text: &'a [u8],
        may_wait: bool,
    ) -> Result<(), (&'a [u8], Option<String>)> {
        let stderr = rustix::stdio::stderr();
        while !text.is_empty() {
            let written = match &self.to {
                Sink::Own(file) => rustix::io::write(file, text),
                Sink::Stderr => rustix::io::write(stderr, text),
                Sink::Socket => {
                    rustix::net::send(stderr, text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                }
                Sink::Aside if may_wait => rustix::io::write(stderr, text),
                Sink::Aside => return Err((text, None)),
                Sink::Nowhere => return Ok(()),
            };
            match written {
                Ok(0) => return Err((text, Some("it takes nothing".to_owned()))),
                Ok(n) => {
                    self.cut = text[n - 1] != b'\n';
                    text = &text[n..];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if may_wait => self.wait(),
                Err(rustix::io::Errno::AGAIN) => return Err((text, None)),
                Err(e) => return Err((text, Some(io::Error::from(e).to_string()))),
            }
        }
        Ok(())
    }

    fn wait(&self) {
        let stderr = rustix::stdio::stderr();
        let mut fds = match &self.to {
            Sink::Own(file) => [PollFd::new(file, PollFlags::OUT)],
            _ => [PollFd::new(&stderr, PollFlags::OUT)],
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

/// The process logs to `log` from here on; what has to wait waits until [`start`].
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

/// From here on a thread writes what had to wait. It has the rights that this one has now.
pub fn start() -> io::Result<()> {
    LOG.get().map_or(Ok(()), Log::start_thread)
}

/// Opens the log's file again, if it is one.
pub fn reopen() -> bool {
    LOG.get().is_some_and(Log::reopen)
}

/// Whether the log is a file, and not standard error.
pub fn is_file() -> bool {
    LOG.get().is_some_and(|log| log.0.path.is_some())
}

/// A daemon in the background has no standard error, and holds no terminal or pipe open.
pub fn detach() {
    let Some(log) = LOG.get().filter(|_| !is_file()) else {
        return;
    };
    log.flush();
    // Not if the thread waits for a reader that stands still: then it ends when that goes.
    if let Ok(mut sink) = log.0.sink.try_lock() {
        sink.to = Sink::Nowhere;
    }
}

/// Before the process ends.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush();
    }
}

/// A line on standard error, of a command or a script; a list has several, and no peer's name has an end of line. One that cannot be written is left out: a script that waits for
/// the reader of its errors would keep CRIU's tasks frozen.
pub fn say(text: &str) {
    let text = format!("{}\n", escaped_but(text, |c| c == '\n'));
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
        let fd = fd.into();
        rustix::io::ioctl_fionbio(&fd, true).unwrap();
        Log::new(Sink::Own(fd.into()), None, false)
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
        log.0.sink.lock().unwrap().to = Sink::Nowhere;
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

    /// A full disk: the log says how many lines were lost when there is space again.
    #[test]
    fn a_full_disk_is_said_when_there_is_room_again() {
        let log = to(File::options().write(true).open("/dev/full").unwrap());
        log.start_thread().unwrap();
        log.put(b"lost\n");
        log.flush();
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("log");
        log.0.sink.lock().unwrap().to = Sink::Own(append_to(&path).unwrap());
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
