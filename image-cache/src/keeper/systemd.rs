//! systemd's descriptor store (`FileDescriptorStoreMax=` of a unit): descriptors that systemd holds for a service, and gives to
//! its next process. See sd_pid_notify_with_fds(3) and sd_listen_fds_with_names(3).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

use crate::keeper::fds::Descriptors;
use crate::store::journal::Journal;
use crate::store::memory::arena::Arena;

const ARENA: &str = "image-cache-arena";
const JOURNAL: &str = "image-cache-journal";

/// The first descriptor of those that systemd gives.
const FIRST: RawFd = 3;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether systemd has started this process as a service that says when it is ready.
pub fn is_there() -> bool {
    let there = variable("NOTIFY_SOCKET").is_some();
    // Set by systemd 254 and later, if the unit has a store.
    if there && variable("FDSTORE").is_none() {
        tracing::warn!(
            "--keep-through-restart: systemd does not say whether it keeps descriptors for this unit (it does so from version 254 on). \
             Without FileDescriptorStoreMax=2 in the unit nothing is kept"
        );
    }
    there
}

/// What was stored for an earlier process of the service. To be called once, before there is another thread.
pub fn stored() -> Option<Descriptors> {
    let own = std::process::id().to_string();
    if variable("LISTEN_PID").as_deref() != Some(&own) {
        return None;
    }
    let names = variable("LISTEN_FDNAMES")?;
    let count: usize = variable("LISTEN_FDS")?.parse().ok()?;
    let (mut arena, mut journal) = (None, None);
    for (fd, name) in (FIRST..).zip(names.split(':')).take(count.min(1024)) {
        let place = match name {
            ARENA => &mut arena,
            JOURNAL => &mut journal,
            _ => continue,
        };
        // SAFETY: systemd has opened it for this process, as LISTEN_PID says, and nothing else here takes it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        if rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).is_ok() {
            *place = Some(owned);
        } else {
            std::mem::forget(owned); // it is not open
        }
    }
    Some(Descriptors {
        arena: arena?.into(),
        journal: journal?.into(),
    })
}

pub fn store(arena: &Arena, journal: &Journal) -> io::Result<()> {
    for (name, fd) in [(ARENA, arena.descriptor()), (JOURNAL, journal.descriptor())] {
        // Of an earlier process, if it has left anything of no use.
        notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])?;
        notify(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &[fd])?;
    }
    Ok(())
}

pub fn forget() {
    for name in [ARENA, JOURNAL] {
        if let Err(e) = notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]) {
            tracing::warn!("systemd does not forget {name}: {e}");
        }
    }
}

fn notify(text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(path) = variable("NOTIFY_SOCKET") else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
        None => SocketAddrUnix::new(path.as_str())?,
    };
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let text = [IoSlice::new(text.as_bytes())];
    let sent =
        rustix::net::sendmsg_addr(&socket, &address, &text, &mut control, SendFlags::NOSIGNAL);
    Ok(sent.map(drop)?)
}
