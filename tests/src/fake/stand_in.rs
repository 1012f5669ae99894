//! A process that stands for CRIU: the kernel names it as the one that has connected, and its end is CRIU's end. So a
//! test can write what CRIU writes, and CRIU exits when the test says so, as it does behind a dump.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use super::wire;

/// Ends with 0 when it is dropped; with the process that has made it, by SIGKILL.
#[derive(Debug)]
pub struct StandIn {
    pid: libc::pid_t,
    orders: OwnedFd,
    status: Mutex<u8>,
}

impl StandIn {
    /// A connection of the new process, to be used by this one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn connect(path: &Path) -> io::Result<(UnixStream, Self)> {
        Self::connect_for(path, 0)
    }

    /// The same of a process that has the task `seizes` in its hands, if that is not 0.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn connect_for(path: &Path, seizes: i32) -> io::Result<(UnixStream, Self)> {
        let (ours, theirs) = UnixStream::pair()?;
        let (orders, order) = wire::pipe()?;
        let address = address(path)?;
        let named = command_line()?;
        // Above the numbers that the child gives them.
        let high = |fd: &dyn AsRawFd| -> io::Result<OwnedFd> {
            // SAFETY: it copies a descriptor, and the copy is owned by what is returned.
            match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) } {
                -1 => Err(io::Error::last_os_error()),
                // SAFETY: the call has made this descriptor, and nothing else has it.
                copy => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
            }
        };
        let (theirs, orders) = (high(&theirs)?, high(&orders)?);
        // SAFETY: the child makes system calls alone, on its own stack: it takes no lock and allocates nothing.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => child(
                &address,
                seizes,
                &named,
                theirs.as_raw_fd(),
                orders.as_raw_fd(),
            ),
            pid => {
                drop((theirs, orders));
                let stand_in = Self {
                    pid,
                    orders: order,
                    status: Mutex::new(0),
                };
                Ok((wire::recv_fd(&ours)?.into(), stand_in))
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// It will end with this exit status.
    ///
    /// # Panics
    /// If another thread has panicked in here.
    pub fn ends_with(&self, status: u8) {
        *self.status.lock().expect("no panic") = status;
    }

    /// SIGKILL.
    pub fn kill(&self) {
        // SAFETY: a signal to a child that was not waited for yet.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let status = *self.status.lock().expect("no panic");
        let _ = rustix::io::write(&self.orders, &[status]);
        // SAFETY: our own child; the call writes nothing.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all zeros is a value of this plain C structure.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = u16::try_from(libc::AF_UNIX).expect("small");
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Ok(address)
}

/// What `/proc/PID/cmdline` is to say, and where the kernel reads that: the whole place, which a file name fills.
struct CommandLine {
    at: *mut u8,
    text: Vec<u8>,
}

/// `criu dump`, as much as there is space for.
fn command_line() -> io::Result<CommandLine> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    // `arg_start` and `arg_end`, the fields 48 and 49; state is the third.
    let mut fields = after.split_whitespace().skip(45);
    let mut field = || fields.next()?.parse::<usize>().ok();
    let (Some(start), Some(end)) = (field(), field()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    // One that a test has started with options of CRIU has said what it is.
    let own = std::fs::read("/proc/self/cmdline")?;
    if own
        .split(|&byte| byte == 0)
        .any(|word| word.ends_with(b"dump"))
    {
        return Ok(CommandLine {
            at: std::ptr::null_mut(),
            text: Vec::new(),
        });
    }
    let mut text = b"criu\0dump\0-o\0".to_vec();
    if end - start < text.len() + 2 {
        return Err(io::ErrorKind::StorageFull.into());
    }
    text.resize(end - start - 1, b'x');
    text.push(0);
    let at = std::ptr::with_exposed_provenance_mut(start);
    Ok(CommandLine { at, text })
}

fn child(
    address: &libc::sockaddr_un,
    seizes: i32,
    named: &CommandLine,
    out: i32,
    orders: i32,
) -> ! {
    // SAFETY: system calls on numbers and on memory of this stack; nothing of what is open in this process is used by
    // anybody else here.
    unsafe {
        // The kernel's own place for the arguments, of exactly this size; nothing of the child reads them.
        if !named.text.is_empty() {
            std::ptr::copy_nonoverlapping(named.text.as_ptr(), named.at, named.text.len());
        }
        libc::dup2(out, 3);
        libc::dup2(orders, 4);
        // Connections of other threads would be held open.
        libc::syscall(libc::SYS_close_range, 5, u32::MAX, 0);
        if seizes != 0 {
            libc::ptrace(libc::PTRACE_SEIZE, seizes, 0, 0);
        }
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
        let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
        let connected = libc::connect(socket, std::ptr::from_ref(address).cast(), size);
        let errno = *libc::__errno_location();
        let out = OwnedFd::from_raw_fd(3);
        if connected == 0 {
            let socket = OwnedFd::from_raw_fd(socket);
            let _ = wire::send_fds(&out, &[socket.as_fd()]);
        } else {
            let _ = rustix::io::write(&out, &[u8::try_from(errno).unwrap_or(1)]);
        }
        drop(out);
        let mut order = 0u8;
        match libc::read(4, std::ptr::from_mut(&mut order).cast(), 1) {
            1 => libc::_exit(order.into()),
            _ => {
                libc::kill(libc::getpid(), libc::SIGKILL);
                libc::_exit(1)
            }
        }
    }
}
