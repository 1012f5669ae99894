//! How a process that is no child of ours has ended.
//!
//! The kernel tells that in three ways. Each is asked in turn, and none of them guesses:
//!
//! 1. `PIDFD_GET_INFO` with `PIDFD_INFO_EXIT` (Linux 6.15): once the process was reaped, for ever.
//! 2. `/proc/PID/stat` has the status as its last field while the process is a zombie. The kernel
//!    shows 0 there to a reader without the right to trace the process, so that right is checked.
//! 3. taskstats (`Documentation/accounting/taskstats.rst`) sends a record for each exit to a root of
//!    the initial namespaces. The record is queued before the process becomes a zombie
//!    (`do_exit` calls `taskstats_exit` before `exit_notify`). It is used where the first way is missing.

use std::collections::hash_map::{Entry, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::ioctl::{opcode, Updater};
use rustix::net::netlink::{SocketAddrNetlink, GENERIC};
use rustix::net::{
    bind, recv, sendto, socket_with, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
};
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio_util::task::AbortOnDropHandle;

/// How long a parent may leave a zombie whose status may not be looked at. Then its end stays unknown.
const REAPED_WITHIN: Duration = Duration::from_secs(5);

/// How a process ended, as `wait(2)` encodes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(i32);

impl ExitStatus {
    /// `main` has returned, or the process has called `exit`.
    pub fn code(self) -> Option<i32> {
        (self.0 & 0x7f == 0).then_some((self.0 >> 8) & 0xff)
    }

    /// A signal has ended the process.
    pub fn signal(self) -> Option<i32> {
        Some(self.0 & 0x7f).filter(|&signal| signal != 0)
    }

    /// The process has ended with exit status 0.
    pub fn is_success(self) -> bool {
        self.0 == 0
    }

    /// SIGKILL has ended the process. A process cannot send that to itself and go on.
    pub fn is_killed(self) -> bool {
        self.signal() == Some(rustix::process::Signal::KILL.as_raw())
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code(), self.signal()) {
            (Some(code), _) => write!(f, "exit status {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => write!(f, "wait status {:#x}", self.0),
        }
    }
}

/// Keeps the kernel's records of exits coming for one process, where a pidfd does not tell. Take it
/// while the process lives.
#[derive(Debug, Default)]
pub struct StatusWatch(Option<Watched>);

#[derive(Debug)]
struct Watched {
    records: Arc<Records>,
    pid: i32,
}

impl StatusWatch {
    /// Starts to watch the process, if its pidfd will not tell.
    pub fn of(pid: i32) -> Self {
        if pidfds_tell() {
            return Self(None);
        }
        Self::by_records(pid)
    }

    fn by_records(pid: i32) -> Self {
        let watched = Records::shared().map(|records| {
            {
                let mut expected = records.socket.expected();
                let one = expected.entry(pid).or_default();
                one.watches += 1;
                // Of an earlier process that had this number: this one lives.
                one.status = None;
            }
            Watched { records, pid }
        });
        Self(watched)
    }

    /// Whether the end of the process will be told, also when its parent has reaped it.
    pub(crate) fn tells(&self) -> bool {
        pidfds_tell() || self.0.is_some()
    }

    fn status(&self) -> Option<ExitStatus> {
        let watched = self.0.as_ref()?;
        watched.records.socket.status(watched.pid)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut expected = self.records.socket.expected();
        if let Entry::Occupied(mut one) = expected.entry(self.pid) {
            one.get_mut().watches -= 1;
            if one.get().watches == 0 {
                one.remove();
            }
        }
    }
}

/// How the process behind `pidfd` has ended; it has ended already. `None`: the kernel does not tell.
pub(crate) async fn exit_status(
    pid: i32,
    pidfd: BorrowedFd<'_>,
    watch: &StatusWatch,
) -> Option<ExitStatus> {
    if let Some(status) = told(pid, pidfd, watch) {
        return Some(status);
    }
    if !pidfds_tell() {
        return None;
    }
    // A zombie that may not be looked at: its pidfd tells when the parent has reaped it. A second
    // registration of its own, because readiness is taken away from it.
    let copy = rustix::io::fcntl_dupfd_cloexec(pidfd, 3).ok()?;
    // SAFETY: the AsyncFd owns the descriptor, which stays the same until the AsyncFd is dropped;
    // `OwnedFd` has no way to close or replace it in between.
    let copy = unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }.ok()?;
    let reaped = async {
        loop {
            let mut ready = copy.readable().await.ok()?;
            ready.clear_ready();
            if let Some(status) = told(pid, pidfd, watch) {
                return Some(status);
            }
        }
    };
    tokio::time::timeout(REAPED_WITHIN, reaped)
        .await
        .ok()
        .flatten()
}

/// The same without waiting for the parent to reap it.
pub(crate) fn exit_status_now(
    pid: i32,
    pidfd: BorrowedFd<'_>,
    watch: &StatusWatch,
) -> Option<ExitStatus> {
    told(pid, pidfd, watch)
}

fn told(pid: i32, pidfd: BorrowedFd<'_>, watch: &StatusWatch) -> Option<ExitStatus> {
    // The pidfd last once more: the process may be reaped between the two looks.
    by_pidfd(pidfd)
        .or_else(|| by_zombie(pid, pidfd))
        .or_else(|| watch.status())
        .or_else(|| by_pidfd(pidfd))
}

// --- the pidfd ------------------------------------------------------------------------------

/// `struct pidfd_info` of `linux/pidfd.h`, version 0 with the field that 6.15 has filled.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;
const PIDFD_GET_INFO: rustix::ioctl::Opcode = opcode::read_write::<PidfdInfo>(0xff, 11);

fn info(pidfd: BorrowedFd<'_>) -> Option<PidfdInfo> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the opcode carries the size of this very struct, which has C's layout, and the kernel
    // reads and writes no more than that. Each of its bit patterns is a value.
    let asked = unsafe {
        rustix::ioctl::ioctl(pidfd, Updater::<PIDFD_GET_INFO, PidfdInfo>::new(&mut info))
    };
    asked.ok().map(|()| info)
}

fn by_pidfd(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    let info = info(pidfd)?;
    (info.mask & PIDFD_INFO_EXIT != 0).then_some(ExitStatus(info.exit_code))
}

/// Whether a pidfd of this kernel tells how its process has ended. Kernels below 6.15 that have it
/// all the same are asked by records, which say the same.
pub(crate) fn pidfds_tell() -> bool {
    static TELL: OnceLock<bool> = OnceLock::new();
    *TELL.get_or_init(|| {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        version_of(&release).is_some_and(|version| version >= (6, 15))
    })
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

// --- the zombie -----------------------------------------------------------------------------

fn by_zombie(pid: i32, pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    // Needs the right that the kernel asks for before it shows the status, PTRACE_MODE_READ.
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = zombie_status(&stat)?;
    // The number is free for another process only when this one is reaped, and it is not yet.
    let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    is_of(&fdinfo, pid).then_some(status)
}

fn zombie_status(stat: &str) -> Option<ExitStatus> {
    // "pid (comm) state ppid ... exit_code": comm may contain anything.
    let after = stat[stat.rfind(')')? + 1..].trim();
    let status = after.rsplit(' ').next()?.parse().ok()?;
    after.starts_with('Z').then_some(ExitStatus(status))
}

/// Of `/proc/self/fdinfo/N` of a pidfd: "Pid: -1" once its process is reaped.
fn is_of(fdinfo: &str, pid: i32) -> bool {
    let mut lines = fdinfo.lines();
    let number = lines.find_map(|line| line.strip_prefix("Pid:"));
    number.is_some_and(|n| n.trim().parse() == Ok(pid))
}

// --- taskstats ------------------------------------------------------------------------------

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const TASKSTATS_CMD_GET: u8 = 1;
const TASKSTATS_CMD_ATTR_REGISTER_CPUMASK: u16 = 3;
const TASKSTATS_TYPE_PID: u16 = 1;
const TASKSTATS_TYPE_STATS: u16 = 3;
const TASKSTATS_TYPE_AGGR_PID: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;

/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADERS_BYTES: usize = 16 + 4;
/// `ac_exitcode` in `struct taskstats`, since its version 1.
const EXIT_CODE_AT: usize = 4;
/// A record has some 400 bytes; a process with many threads brings one for each.
const RECORD_SPACE: usize = 4 << 10;
/// Space in the socket for the exits of a busy host between two looks.
const QUEUE_BYTES: usize = 4 << 20;

/// The records of exits, as long as a process is watched.
#[derive(Debug)]
struct Records {
    socket: Arc<RecordSocket>,
    /// Reads as they come, so that the socket does not overflow.
    _reader: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct Expected {
    watches: usize,
    status: Option<ExitStatus>,
}

#[derive(Debug)]
struct RecordSocket {
    fd: AsyncFd<OwnedFd>,
    /// The watched processes by pid, and by how many; `None` as long as no record has come. The record is that of the
    /// first thread: where that has ended before the others, it tells of the thread alone.
    expected: Mutex<HashMap<i32, Expected>>,
}

impl Records {
    /// The one socket of this process, opened when the first watch wants it.
    fn shared() -> Option<Arc<Self>> {
        static SHARED: Mutex<Weak<Records>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(records) = shared.upgrade() {
            return Some(records);
        }
        let socket = match RecordSocket::open() {
            Ok(socket) => Arc::new(socket),
            Err(e) => {
                tracing::debug!("the kernel's records of exits (taskstats) do not come here: {e}");
                return None;
            }
        };
        let reading = socket.clone();
        let reader = tokio::spawn(async move {
            while let Ok(mut ready) = reading.fd.readable().await {
                ready.clear_ready();
                reading.take();
            }
        });
        let records = Arc::new(Self {
            socket,
            _reader: AbortOnDropHandle::new(reader),
        });
        *shared = Arc::downgrade(&records);
        Some(records)
    }
}

impl RecordSocket {
    fn open() -> io::Result<Self> {
        let (family, flags) = (
            AddressFamily::NETLINK,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        );
        let socket = socket_with(family, SocketType::DGRAM, flags, Some(GENERIC))?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        // Beyond the system's bound where the rights suffice.
        let forced = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, QUEUE_BYTES);
        if forced.is_err() {
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, QUEUE_BYTES)?;
        }
        let name = attribute(CTRL_ATTR_FAMILY_NAME, b"TASKSTATS\0");
        send(&socket, &message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name))?;
        let mut answer = [0; 2048];
        // The kernel has answered within `send`.
        let (n, _) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
        let id = attributes(payload(&answer[..n])?)
            .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)
            .and_then(|(_, value)| value.first_chunk().copied())
            .map(u16::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)?;
        let mut cpus = fs::read("/sys/devices/system/cpu/possible")?;
        cpus.truncate(cpus.trim_ascii_end().len());
        cpus.push(0);
        let cpus = attribute(TASKSTATS_CMD_ATTR_REGISTER_CPUMASK, &cpus);
        send(&socket, &message(id, TASKSTATS_CMD_GET, &cpus))?;
        match recv(&socket, &mut answer[..], RecvFlags::DONTWAIT) {
            Ok((n, _)) => payload(&answer[..n]).map(drop)?, // refused, or the first record
            Err(Errno::AGAIN) => {}
            Err(e) => return Err(e.into()),
        }
        // SAFETY: the AsyncFd owns the socket, which stays the same open descriptor until the AsyncFd
        // is dropped; `OwnedFd` has no way to close or replace it in between.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self {
            fd: socket,
            expected: Mutex::default(),
        })
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<i32, Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what has come. Records that the socket had no space for leave their process unknown.
    fn take(&self) {
        let mut expected = self.expected();
        let mut space = [0; RECORD_SPACE];
        loop {
            match recv(self.fd.get_ref(), &mut space[..], RecvFlags::DONTWAIT) {
                Ok((n, _)) => {
                    if let Some((pid, status)) = record(&space[..n]) {
                        if let Some(known) = expected.get_mut(&pid) {
                            known.status.get_or_insert(status);
                        }
                    }
                }
                Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn status(&self, pid: i32) -> Option<ExitStatus> {
        self.take();
        self.expected().get(&pid)?.status
    }
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, bytes, SendFlags::empty(), &kernel)?;
    Ok(())
}

fn message(kind: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADERS_BYTES + attributes.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(64);
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(NLM_F_REQUEST.to_ne_bytes());
    out.extend([0; 8]); // sequence and port
    out.extend([command, 1, 0, 0]);
    out.extend(attributes);
    out
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(64);
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// What is behind the headers. An error: the kernel's, or of a message that is none.
fn payload(message: &[u8]) -> io::Result<&[u8]> {
    let kind = message.get(4..6).and_then(|b| b.first_chunk().copied());
    if kind.map(u16::from_ne_bytes) == Some(NLMSG_ERROR) {
        let error = message.get(16..20).and_then(|b| b.first_chunk().copied());
        let error = error.map_or(0, i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(error.saturating_neg()));
    }
    let payload = message.get(HEADERS_BYTES..);
    payload.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Kind and value of each attribute, up to one that is cut.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The pid and the status of a record. Records of other threads than the first have none.
fn record(message: &[u8]) -> Option<(i32, ExitStatus)> {
    let (_, one) = attributes(payload(message).ok()?).find(|a| a.0 == TASKSTATS_TYPE_AGGR_PID)?;
    let field = |wanted| attributes(one).find(|a| a.0 == wanted).map(|a| a.1);
    let pid = *field(TASKSTATS_TYPE_PID)?.first_chunk()?;
    let stats = field(TASKSTATS_TYPE_STATS)?;
    let status = *stats.get(EXIT_CODE_AT..)?.first_chunk()?;
    Some((
        i32::from_ne_bytes(pid),
        ExitStatus(i32::from_ne_bytes(status)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::process::Process;
    use std::process::{Child, Command, Stdio};

    fn child(script: &str) -> (Child, Process) {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        (child, process)
    }

    #[tokio::test]
    async fn a_status_is_told_before_and_after_the_process_is_reaped() {
        for (script, code) in [("read x; exit 0", Some(0)), ("read x; exit 7", Some(7))] {
            let (mut child, process) = child(script);
            drop(child.stdin.take());
            process.exited().await;
            // A zombie.
            let status = process.exit_status().await.unwrap();
            assert_eq!((status.code(), status.signal()), (code, None));
            child.wait().unwrap();
            if pidfds_tell() {
                assert_eq!(process.exit_status().await, Some(status));
            }
        }
    }

    #[tokio::test]
    async fn a_killed_process_is_told_from_one_that_ends() {
        let (mut child, process) = child("read x");
        child.kill().unwrap();
        child.wait().unwrap();
        let (watched, _) = (process.exit_status().await, process);
        if pidfds_tell() {
            assert!(watched.unwrap().is_killed());
            assert_eq!(watched.unwrap().to_string(), "signal 9");
        }
        assert!(!ExitStatus(9 << 8).is_killed());
    }

    /// What kernels below 6.15 have. Wants root in the initial namespaces, as the suite has.
    #[tokio::test]
    async fn records_of_exits_tell_of_reaped_processes() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (mut one, process) = child("read x; exit 9");
        let watch = StatusWatch::by_records(process.pid());
        assert!(watch.0.is_some(), "taskstats is there");
        assert_eq!(watch.status(), None);
        drop(one.stdin.take());
        one.wait().unwrap();
        assert_eq!(watch.status().and_then(ExitStatus::code), Some(9));
        // One that two watch, of which one loses interest.
        let (mut two, process) = child("exec sleep 60");
        let watch = StatusWatch::by_records(process.pid());
        drop(StatusWatch::by_records(process.pid()));
        two.kill().unwrap();
        two.wait().unwrap();
        assert!(watch.status().unwrap().is_killed());
    }

    #[test]
    fn texts_of_the_kernel() {
        let zombie = "12 (a) b) Z 1 12 12 0 -1 4228364 0 0 0 9";
        assert_eq!(zombie_status(zombie), Some(ExitStatus(9)));
        assert_eq!(zombie_status("12 (a) S 1 12 0"), None);
        assert_eq!(zombie_status(""), None);
        assert!(is_of("pos:\t0\nPid:\t12\nNSpid:\t12\n", 12));
        assert!(!is_of("pos:\t0\nPid:\t-1\n", 12));
        assert_eq!(version_of("6.18.5-cloud"), Some((6, 18)));
        assert_eq!(version_of("6.1.0-44-amd64"), Some((6, 1)));
        assert_eq!(version_of("unknown"), None);
    }

    #[test]
    fn cut_records_are_none() {
        let mut stats = vec![0; 64];
        stats[EXIT_CODE_AT..][..4].copy_from_slice(&1792_i32.to_ne_bytes());
        let mut one = attribute(TASKSTATS_TYPE_PID, &77_i32.to_ne_bytes());
        one.extend(attribute(TASKSTATS_TYPE_STATS, &stats));
        let whole = message(31, 2, &attribute(TASKSTATS_TYPE_AGGR_PID, &one));
        assert_eq!(record(&whole), Some((77, ExitStatus(1792))));
        for cut in 0..whole.len() {
            assert_eq!(record(&whole[..cut]), None, "at {cut}");
        }
    }
}
