//! Connecting to a host that has several addresses, as RFC 8305 has it: while one is silent the next is tried, and
//! the first that takes the connection has it. So an address that swallows packets costs a quarter of a second.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::net::{configure_link, unbracket};

/// The next address is tried after so long, or when the one before has failed. RFC 8305 says 250 ms.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// With addresses that are known already: how long to wait for those that the name has now.
const NEW_ADDRESSES: Duration = Duration::from_millis(250);

/// The addresses of a name, later.
pub type Resolving = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Gives the addresses of a name, the best first.
pub trait Resolve: fmt::Debug + Send + Sync {
    fn resolve(&self, host: &str, port: u16) -> Resolving;
}

/// The resolver of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Resolve for System {
    fn resolve(&self, host: &str, port: u16) -> Resolving {
        let host = unbracket(host).to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// A host to connect to, perhaps more than once, and what is known of its addresses.
#[derive(Debug)]
pub struct Dial {
    host: String,
    port: u16,
    resolver: Arc<dyn Resolve>,
    names: Arc<watch::Sender<Names>>,
    seen: Mutex<Seen>,
}

/// What the resolver has said.
#[derive(Debug, Default)]
struct Names {
    asking: bool,
    /// Counts the answers.
    answers: u64,
    /// Of the last answer that had any.
    addresses: Vec<SocketAddr>,
    /// Why the last answer had none.
    error: Option<(io::ErrorKind, String)>,
}

/// What connecting has shown.
#[derive(Debug, Default)]
struct Seen {
    /// The last that was of use.
    good: Option<SocketAddr>,
    /// Those that were of no use when they were tried last, the latest at the end.
    behind: Vec<SocketAddr>,
}

/// Which address a connection leads to. Dropped without [`Tried::was_good`], the address comes after all others from
/// then on.
#[derive(Debug)]
pub struct Tried<'a> {
    dial: &'a Dial,
    pub address: SocketAddr,
    good: bool,
}

impl Dial {
    pub fn new(host: &str, port: u16, resolver: Arc<dyn Resolve>) -> Self {
        Self {
            host: host.to_owned(),
            port,
            resolver,
            names: Arc::default(),
            seen: Mutex::default(),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses to try: the last that was of use, then as the resolver has them, with the families in turn, then
    /// those that were of no use. The resolver is asked each time. If it is silent, what it said before is taken.
    pub async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let mut names = self.names.subscribe();
        let before = names.borrow().answers;
        let known = !names.borrow().addresses.is_empty();
        self.ask();
        // The sender is ours, so it cannot be gone.
        let answered = names.wait_for(|names| names.answers > before);
        match known {
            true => drop(tokio::time::timeout(NEW_ADDRESSES, answered).await),
            false => drop(answered.await),
        }
        let names = self.names.borrow();
        if names.addresses.is_empty() {
            let (kind, why) = names.error.clone().unwrap_or_else(|| {
                let none = "the host name has no address".to_owned();
                (io::ErrorKind::NotFound, none)
            });
            return Err(io::Error::new(kind, why));
        }
        let mut addresses = families_in_turn(&names.addresses);
        let seen = self.seen();
        addresses.sort_by_key(
            |address| match seen.behind.iter().position(|b| b == address) {
                Some(place) => 2 + place,
                None => usize::from(seen.good != Some(*address)),
            },
        );
        Ok(addresses)
    }

    /// Asks the resolver, unless it has been asked and has not answered. It may take longer than a try to connect, so
    /// what it says is for the next one, too.
    fn ask(&self) {
        let mut asks = false;
        self.names.send_if_modified(|names| {
            asks = !std::mem::replace(&mut names.asking, true);
            false
        });
        if !asks {
            return;
        }
        let (resolving, names) = (
            self.resolver.resolve(&self.host, self.port),
            self.names.clone(),
        );
        tokio::spawn(async move {
            let answer = resolving.await;
            names.send_modify(|names| {
                names.asking = false;
                names.answers += 1;
                match answer {
                    Ok(none) if none.is_empty() => names.error = None,
                    Ok(some) => names.addresses = some,
                    Err(e) => names.error = Some((e.kind(), e.to_string())),
                }
            });
        });
    }

    /// The address that was of use last, also if it has been of none since.
    pub fn good(&self) -> Option<SocketAddr> {
        self.seen().good
    }

    /// Connects to the first of these addresses that takes it.
    pub async fn connect(&self, addresses: &[SocketAddr]) -> io::Result<(TcpStream, Tried<'_>)> {
        let (stream, address) = first_of(addresses).await?;
        configure_link(&stream)?;
        let tried = Tried {
            dial: self,
            address,
            good: false,
        };
        Ok((stream, tried))
    }

    /// For an error: the addresses of the name, if there are several.
    pub fn several(&self) -> String {
        let names = self.names.borrow();
        let texts: Vec<_> = names.addresses.iter().map(ToString::to_string).collect();
        match texts.len() {
            0 | 1 => String::new(),
            _ => format!(" (tried: {})", texts.join(", ")),
        }
    }
}

impl Tried<'_> {
    /// What was wanted is there.
    pub fn was_good(mut self) {
        self.good = true;
    }
}

impl Drop for Tried<'_> {
    fn drop(&mut self) {
        let mut seen = self.dial.seen();
        seen.behind.retain(|address| *address != self.address);
        match self.good {
            true => seen.good = Some(self.address),
            false => seen.behind.push(self.address),
        }
    }
}

/// One of each family by turns, the family of the first one first.
fn families_in_turn(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let of_the_first = |address: &&SocketAddr| {
        Some(address.is_ipv6()) == addresses.first().map(SocketAddr::is_ipv6)
    };
    let (mut ours, mut others) = (
        addresses.iter().filter(of_the_first),
        addresses.iter().filter(|address| !of_the_first(address)),
    );
    let mut mixed: Vec<SocketAddr> = Vec::with_capacity(addresses.len());
    loop {
        let pair = [ours.next(), others.next()];
        if pair == [None, None] {
            return mixed;
        }
        for address in pair.into_iter().flatten() {
            if !mixed.contains(address) {
                mixed.push(*address);
            }
        }
    }
}

/// The first connection that is made. An error: there is none to be had, and of each address why.
async fn first_of(addresses: &[SocketAddr]) -> io::Result<(TcpStream, SocketAddr)> {
    let mut left = addresses.iter().copied();
    // What is still under way is given up when this is dropped.
    let mut trying = JoinSet::new();
    let mut failed = Vec::new();
    loop {
        if let Some(address) = left.next() {
            trying.spawn(async move { (address, TcpStream::connect(address).await) });
        }
        let waits = async {
            match left.len() {
                0 => std::future::pending().await,
                _ => tokio::time::sleep(NEXT_ADDRESS).await,
            }
        };
        let ended = tokio::select! {
            ended = trying.join_next() => ended,
            () = waits => continue,
        };
        match ended {
            Some(Ok((address, Ok(stream)))) => return Ok((stream, address)),
            Some(Ok((address, Err(e)))) => failed.push((address, e)),
            Some(Err(e)) => match e.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(e) => return Err(io::Error::other(e)),
            },
            None if left.len() > 0 => {}
            None => return Err(of_all(failed)),
        }
    }
}

fn of_all(mut failed: Vec<(SocketAddr, io::Error)>) -> io::Error {
    if failed.len() < 2 {
        let none = || io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
        return failed.pop().map_or_else(none, |(_, e)| e);
    }
    let kind = failed
        .last()
        .map_or(io::ErrorKind::Other, |(_, e)| e.kind());
    let texts: Vec<_> = failed.iter().map(|(a, e)| format!("{a}: {e}")).collect();
    io::Error::new(kind, texts.join("; "))
}

#[cfg(test)]
mod tests;
