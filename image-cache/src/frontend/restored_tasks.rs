//! The tasks that a restore builds: what the kernel says of them when CRIU says nothing.
//!
//! CRIU's restorer is code of no file. It is mapped into a task until CRIU takes it out, right before
//! it detaches from the task. Up to there each task waits in a futex for CRIU's word, and a CRIU that
//! has ended never gives that. CRIU's own executable is replaced in the task before.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use image_common::procfs::process::{sigkill_is_pending, threads_are_dying, Process};
use rustix::io::Errno;

/// How a task stands, CRIU having ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    Ended,
    /// It runs without CRIU.
    Runs,
    /// It waits for CRIU's word for ever.
    Waits,
    /// It is on its way to one of the others, or may not be looked at, or makes code itself.
    Unclear,
}

/// A task, told from a later one of the same number by when it began. (A descriptor for each would be
/// many for a large tree.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    pub pid: i32,
    began: u64,
}

impl Task {
    /// `None`: it has ended. An error: it cannot be looked at, so it may live.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        let stat = Stat::read(pid)?.filter(|stat| !stat.is_over());
        Ok(stat.map(|stat| Self {
            pid,
            began: stat.began,
        }))
    }

    /// How it stands. `criu`: CRIU's executable.
    pub fn look(&self, criu: Option<&Path>) -> Stand {
        let stand = self.look_once(criu);
        // What was seen is of this task only if it is still there.
        match self.has_ended() {
            true => Stand::Ended,
            false => stand,
        }
    }

    fn look_once(&self, criu: Option<&Path>) -> Stand {
        let text = |file| std::fs::read_to_string(format!("/proc/{}/{file}", self.pid)).ok();
        let known = || {
            let status = Status::of(&text("status")?)?;
            let executable = std::fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
            let maps = text("maps")?;
            Some((status, executable, maps))
        };
        let (Some((status, executable, maps)), Some(criu)) = (known(), criu) else {
            return Stand::Unclear;
        };
        if status.dies || status.traced {
            return Stand::Unclear;
        }
        if is_same_file(&executable, criu) {
            return Stand::Waits;
        }
        let mut nameless = nameless_code(&maps).peekable();
        if nameless.peek().is_none() {
            // A task that dies has no mappings in the end. The kernel takes SIGKILL away from what waits before it marks
            // the task, so what died while it was looked at is marked by now.
            let dies = maps.is_empty() || threads_are_dying(self.pid);
            return if dies { Stand::Unclear } else { Stand::Runs };
        }
        let waits_at = text("syscall").and_then(|syscall| futex_at(&syscall));
        match waits_at.is_some_and(|at| nameless.any(|code| code.contains(&at))) {
            true => Stand::Waits,
            false => Stand::Unclear,
        }
    }

    pub fn has_ended(&self) -> bool {
        // What cannot be looked at may live.
        let ended = |stat: Option<Stat>| stat.is_none_or(|s| s.began != self.began || s.is_over());
        Stat::read(self.pid).is_ok_and(ended)
    }

    /// Its number is still its own: it lives, or its parent has not waited for it.
    pub fn has_number(&self) -> bool {
        let own = |stat: Option<Stat>| stat.is_some_and(|stat| stat.began == self.began);
        Stat::read(self.pid).is_ok_and(own)
    }

    /// Resolves when it has ended.
    pub async fn ended(&self) {
        let process = Process::open(self.pid);
        // Another one may have its number by now.
        if let Some(process) = process.filter(|_| !self.has_ended()) {
            process.exited().await;
        }
    }
}

/// More than the fields of `/proc/PID/stat` up to the last that matters.
const STAT_BYTES: usize = 1024;

/// `/proc/PID/stat`, as far as it matters.
struct Stat {
    state: u8,
    threads: u64,
    began: u64,
}

impl Stat {
    /// `None`: there is no such process.
    fn read(pid: i32) -> io::Result<Option<Self>> {
        // One read gives all of it, and a name need not be UTF-8.
        let mut text = [0; STAT_BYTES];
        let read =
            File::open(format!("/proc/{pid}/stat")).and_then(|mut file| file.read(&mut text));
        match read {
            Ok(len) => Ok(Self::of(&String::from_utf8_lossy(&text[..len]))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn of(text: &str) -> Option<Self> {
        // "pid (comm) state ppid ...": comm may contain anything, so from its last bracket on.
        let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let threads = fields.nth(16)?.parse().ok()?; // the 20th of all
        let began = fields.nth(1)?.parse().ok()?; // the 22nd
        Some(Self {
            state,
            threads,
            began,
        })
    }

    fn is_over(&self) -> bool {
        // A first thread that has ended alone is a zombie, too.
        self.state == b'X' || (self.state == b'Z' && self.threads < 2)
    }
}

/// `/proc/PID/status`, as far as it matters.
struct Status {
    traced: bool,
    /// SIGKILL is on its way to it.
    dies: bool,
}

impl Status {
    fn of(text: &str) -> Option<Self> {
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name));
        Some(Self {
            traced: field("TracerPid:")?.trim() != "0",
            dies: sigkill_is_pending(text)?,
        })
    }
}

/// Whether a link of `/proc/PID/exe` is to that file, which may have been replaced since.
fn is_same_file(link: &Path, file: &Path) -> bool {
    let deleted = |path: &Path| {
        let bytes = path.as_os_str().as_bytes();
        bytes.strip_suffix(b" (deleted)").unwrap_or(bytes).to_vec()
    };
    deleted(link) == deleted(file)
}

/// Code that is of no file: of `/proc/PID/maps`, `START-END PERMISSIONS OFFSET DEVICE INODE [NAME]`.
fn nameless_code(maps: &str) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let executable = fields.next()?.contains('x');
        let number = |text| u64::from_str_radix(text, 16).ok();
        let nameless = executable && fields.nth(3).is_none();
        nameless.then_some(number(start)?..number(end)?)
    })
}

/// Where a task is that waits in `futex(2)`: of `/proc/PID/syscall`, `NUMBER ARGUMENTS... SP PC`.
fn futex_at(syscall: &str) -> Option<u64> {
    let mut fields = syscall.split_ascii_whitespace();
    let number: i64 = fields.next()?.parse().ok()?;
    let at = fields.nth(7)?.strip_prefix("0x")?;
    (number == libc::SYS_futex).then(|| u64::from_str_radix(at, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_no_file() {
        let program = "00401000-0047a000 r-xp 00001000 fe:00 10665998   /srv/writer\n\
                       004a9000-004ae000 rw-p 00000000 00:00 0 \n\
                       7f6bff899000-7f6bff89b000 r-xp 00000000 00:00 0  [vdso]\n";
        assert_eq!(nameless_code(program).count(), 0);
        let restorer = format!("00010000-0001d000 rwxp 00000000 00:00 0 \n{program}");
        assert_eq!(nameless_code(&restorer).next(), Some(0x10000..0x1d000));
    }

    /// A task may call itself what it likes.
    #[test]
    fn a_name_that_is_not_utf_8() {
        let named = std::thread::spawn(|| {
            rustix::thread::set_name(c"a\xff) Z 0 (").unwrap();
            Task::open(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
        });
        assert!(named.join().unwrap().is_some());
    }

    #[test]
    fn texts_of_the_kernel() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4228364 0 0 0 0 0 0 0 0 20 0 1 0 7733 1000 5";
        let stat = Stat::of(stat).unwrap();
        assert!(stat.began == 7733 && stat.threads == 1 && !stat.is_over());
        assert!(Stat::of("12 (a) Z 1").is_none() && Stat::of("").is_none());
        let status = |tracer, pending| {
            format!(
                "Name:\ta\nTracerPid:\t{tracer}\nSigPnd:\t{pending}\nShdPnd:\t0000000000000000\n"
            )
        };
        let killed = Status::of(&status(0, "0000000000000100")).unwrap();
        assert!(killed.dies && !killed.traced);
        let traced = Status::of(&status(7, "0000000000000000")).unwrap();
        assert!(!traced.dies && traced.traced);
        let futex = format!(
            "{} 0x1 0x80 0x0 0x0 0x0 0x0 0x7ffd 0x10a20",
            libc::SYS_futex
        );
        assert_eq!(futex_at(&futex), Some(0x10a20));
        assert_eq!(futex_at("running"), None);
        assert_eq!(futex_at("-1 0x7ffd 0x10a20"), None);
    }

    #[tokio::test]
    async fn a_task_by_its_life() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let task = Task::open(i32::try_from(child.id()).unwrap())
            .unwrap()
            .unwrap();
        let another = Task {
            began: task.began + 1,
            ..task
        };
        assert_eq!(another.look(Some(Path::new("/criu"))), Stand::Ended);
        let sleep = std::fs::read_link(format!("/proc/{}/exe", task.pid)).unwrap();
        // The child may still be on its way to its own program.
        while std::fs::read_link(format!("/proc/{}/exe", task.pid)).unwrap() != sleep
            || task.look(Some(Path::new("/criu"))) != Stand::Runs
        {
            tokio::task::yield_now().await;
        }
        let own = std::fs::read_link(format!("/proc/{}/exe", task.pid)).unwrap();
        assert_eq!(task.look(Some(&own)), Stand::Waits);
        assert_eq!(task.look(None), Stand::Unclear);
        child.kill().unwrap();
        task.ended().await;
        assert_eq!(task.look(Some(Path::new("/criu"))), Stand::Ended);
        assert!(task.has_number());
        child.wait().unwrap();
        assert!(!task.has_number());
        assert!(Task::open(task.pid).unwrap().is_none());
        task.ended().await;
    }
}
