//! A faulty link: a TCP relay between proxy and cache that delays, splits, stalls, truncates and resets, per direction
//! and at chosen bytes.
//!
//! One thread owns a connection's two sockets, because a reset (`SO_LINGER` 0, then close) needs the last handle.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::daemons::until;
use crate::fake::content::Random;

/// How often a connection looks whether the test wants something of it.
const TICK: Duration = Duration::from_millis(5);
/// How much may wait in the relay for its time to come; then the sender is left to feel back-pressure.
const QUEUE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Proxy to cache.
    Up,
    /// Cache to proxy.
    Down,
}

/// What happens when a direction has carried its chosen number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing moves this way any more, nothing is closed, until [`Link::release`].
    Stall,
    /// Both connections are closed in good order.
    Close,
    /// The receiver sees the end of the stream; the sender's bytes vanish, and the other direction works on.
    Truncate,
    /// Both connections are reset.
    Reset,
    /// One bit of the next byte is another one.
    Flip,
}

/// What one direction does to its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Segments of 1 to this many bytes (0: as they come).
    pub segment: u64,
    /// Each segment waits up to this long.
    pub delay: Duration,
    /// The way is so long; nothing is held back for it.
    pub latency: Duration,
    pub at: Option<(u64, Fault)>,
}

/// What the link does. Segments and delays hold for every connection; faults strike the first one that gets there,
/// so that a retry meets a good link.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub up: Plan,
    pub down: Plan,
    pub seed: u64,
    /// Only this connection is struck, counted from 1 in the order in which they come.
    pub only: Option<usize>,
}

impl Faults {
    pub fn at(direction: Direction, byte: u64, fault: Fault) -> Self {
        let plan = Plan {
            at: Some((byte, fault)),
            ..Plan::default()
        };
        match direction {
            Direction::Up => Faults {
                up: plan,
                ..Faults::default()
            },
            Direction::Down => Faults {
                down: plan,
                ..Faults::default()
            },
        }
    }

    /// Strikes only the connection with this number.
    pub fn only(mut self, number: usize) -> Self {
        self.only = Some(number);
        self
    }

    /// Slow and in shreds, but sound. Delays add up: they are short where the segments are.
    pub fn shredded(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut plan = || {
            let (segment, micros) = [(1, 0), (7, 20), (100, 200), (5000, 2000)]
                [usize::try_from(random.next() % 4).expect("small")];
            Plan {
                segment,
                delay: Duration::from_micros(micros),
                ..Plan::default()
            }
        };
        Faults {
            up: plan(),
            down: plan(),
            seed,
            only: None,
        }
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    released: AtomicBool,
    /// A fault for every present connection, at once.
    now: Mutex<Option<(Fault, usize)>>,
    struck: AtomicBool,
    stalled: AtomicBool,
    frozen: AtomicBool,
    /// Nobody gets through: new connections end at once.
    barred: AtomicBool,
    /// Nothing of what comes this way, on connections up to this one, gets any further.
    swallows: Mutex<Option<(Direction, usize)>>,
    /// One bit of what comes next is to be another one, by direction.
    flip_up: AtomicBool,
    flip_down: AtomicBool,
    connections: AtomicUsize,
    open: AtomicUsize,
    up: AtomicU64,
    down: AtomicU64,
}

impl Shared {
    fn flip(&self, direction: Direction) -> &AtomicBool {
        match direction {
            Direction::Up => &self.flip_up,
            Direction::Down => &self.flip_down,
        }
    }
}

/// The relay. Dropping it cuts everything.
pub struct Link {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Link {
    /// Relays to `127.0.0.1:upstream`.
    pub fn start(upstream: u16, faults: Faults) -> Self {
        Link::start_in(None, (Ipv4Addr::LOCALHOST, upstream).into(), faults)
    }

    /// Listens on loopback, and relays from there, in another network namespace than the test's.
    ///
    /// # Panics
    /// If it cannot get into that namespace.
    pub fn start_in(network: Option<OwnedFd>, upstream: SocketAddr, faults: Faults) -> Self {
        let shared = Arc::new(Shared::default());
        let for_acceptor = shared.clone();
        let (tell, told) = mpsc::sync_channel(1);
        let acceptor = std::thread::spawn(move || {
            // This thread alone moves, and with it those that it starts.
            if let Some(network) = network {
                let kind = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(network.as_fd(), Some(kind))
                    .expect("root, and a network namespace");
            }
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
            listener.set_nonblocking(true).expect("a socket");
            let port = listener.local_addr().expect("bound").port();
            tell.send(port).expect("somebody waits for it");
            accept(&listener, upstream, faults, &for_acceptor);
        });
        let port = told.recv().expect("the acceptor listens");
        Link {
            port,
            shared,
            acceptor: Some(acceptor),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many bytes were delivered this way, over all connections.
    pub fn carried(&self, direction: Direction) -> u64 {
        match direction {
            Direction::Up => self.shared.up.load(Ordering::SeqCst),
            Direction::Down => self.shared.down.load(Ordering::SeqCst),
        }
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Whether the planned fault happened.
    pub fn struck(&self) -> bool {
        self.shared.struck.load(Ordering::SeqCst)
    }

    pub fn is_stalled(&self) -> bool {
        self.shared.stalled.load(Ordering::SeqCst)
    }

    pub fn wait_stalled(&self) {
        until("the link stalls", || self.is_stalled());
    }

    /// Ends a stall or a freeze.
    pub fn release(&self) {
        self.shared.frozen.store(false, Ordering::SeqCst);
        self.shared.released.store(true, Ordering::SeqCst);
    }

    /// Cuts every connection that exists now, with [`Fault::Close`] or [`Fault::Reset`]; later ones are not touched.
    pub fn strike(&self, fault: Fault) {
        assert!(
            matches!(fault, Fault::Close | Fault::Reset),
            "{fault:?} is planned, not ordered"
        );
        *lock(&self.shared.now) = Some((fault, self.connections()));
        until("every connection is cut", || self.open() == 0);
    }

    /// The link is away, or (`false`) there again: connections that come meanwhile end at once.
    pub fn bar(&self, barred: bool) {
        self.shared.barred.store(barred, Ordering::SeqCst);
    }

    /// What comes this way on the connections that exist now gets nowhere, and nobody is told: as if the other end waited
    /// for the rest of something that is damaged.
    pub fn swallow(&self, direction: Direction) {
        *lock(&self.shared.swallows) = Some((direction, self.connections()));
    }

    /// One bit of the next bytes that come this way is another one.
    pub fn flip(&self, direction: Direction) {
        self.shared.flip(direction).store(true, Ordering::SeqCst);
    }

    /// Whether [`Link::flip`] is still to happen.
    pub fn flips(&self, direction: Direction) -> bool {
        self.shared.flip(direction).load(Ordering::SeqCst)
    }

    /// Nothing moves either way, nothing is closed, until [`Link::release`].
    pub fn freeze(&self) {
        self.shared.frozen.store(true, Ordering::SeqCst);
    }

    /// How many connections are open now.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            // A panic in there has been printed already.
            let _ = acceptor.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, upstream: SocketAddr, faults: Faults, shared: &Arc<Shared>) {
    let mut relays = Vec::new();
    while !shared.stop.load(Ordering::SeqCst) {
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(TICK);
            continue;
        };
        if shared.barred.load(Ordering::SeqCst) {
            continue;
        }
        // No cache: the proxy sees a connection that ends at once.
        let Ok(far) = TcpStream::connect(upstream) else {
            continue;
        };
        let number = shared.connections.fetch_add(1, Ordering::SeqCst) + 1;
        shared.open.fetch_add(1, Ordering::SeqCst);
        let shared = shared.clone();
        relays.push(std::thread::spawn(move || {
            let relay = Relay::new(near, far, faults, &shared, number);
            if let Err(error) = relay.and_then(Relay::run) {
                eprintln!("link: connection {number}: {error}");
            }
            shared.open.fetch_sub(1, Ordering::SeqCst);
        }));
    }
    for relay in relays {
        // A panic in there has been printed already.
        let _ = relay.join();
    }
}

/// One direction of one connection.
struct Flow {
    plan: Plan,
    random: Random,
    taken: u64,
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued: usize,
    /// The sender closed.
    ended: bool,
    /// The receiver was told, or is gone.
    closed: bool,
    /// Whatever comes is thrown away.
    swallow: bool,
    /// The planned byte is reached.
    at_fault: bool,
    flipped: bool,
}

impl Flow {
    fn new(plan: Plan, seed: u64) -> Self {
        Flow {
            plan,
            random: Random::new(seed),
            taken: 0,
            queue: VecDeque::new(),
            queued: 0,
            ended: false,
            closed: false,
            swallow: false,
            at_fault: false,
            flipped: false,
        }
    }

    fn wants_input(&self) -> bool {
        !self.ended && (self.swallow || (self.queued < QUEUE && !self.at_fault))
    }

    fn due(&self) -> bool {
        self.queue
            .front()
            .is_some_and(|(when, _)| *when <= Instant::now())
    }

    /// Takes what the sender has, up to the planned byte.
    fn take(&mut self, mut from: &TcpStream, flip: &AtomicBool) -> io::Result<()> {
        let mut buffer = [0; 64 * 1024];
        let room = match self.plan.at {
            Some((at, fault)) if !self.swallow && fault != Fault::Flip => {
                usize::try_from(at - self.taken).unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        let room = room.min(buffer.len());
        if room > 0 {
            match from.read(&mut buffer[..room]) {
                Ok(0) => self.ended = true,
                Ok(count) if !self.swallow => {
                    if flip.swap(false, Ordering::SeqCst) {
                        let bit = self.random.next();
                        let at = usize::try_from(bit >> 3).expect("64 bits") % count;
                        buffer[at] ^= 1 << (bit % 8);
                    }
                    self.enqueue(&buffer[..count]);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn enqueue(&mut self, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        if let Some((at, Fault::Flip)) = self.plan.at {
            let here = at
                .checked_sub(self.taken)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = here.and_then(|at| bytes.get_mut(at)) {
                *byte ^= 1 << (at % 8);
                self.flipped = true;
            }
        }
        self.taken += bytes.len() as u64;
        self.queued += bytes.len();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let count = match self.plan.segment {
                0 => rest.len(),
                most => usize::try_from(self.random.between(1, most))
                    .expect("small")
                    .min(rest.len()),
            };
            let micros = u64::try_from(self.plan.delay.as_micros()).expect("short");
            let delay = Duration::from_micros(self.random.between(0, micros));
            // Each segment waits after the one before it: a later one never overtakes.
            let after = self
                .queue
                .back()
                .map_or_else(Instant::now, |(when, _)| *when);
            self.queue.push_back((
                after.max(Instant::now() + self.plan.latency) + delay,
                rest[..count].to_vec(),
            ));
            rest = &rest[count..];
        }
    }

    /// Gives the receiver what is due.
    fn give(&mut self, mut to: &TcpStream, carried: &AtomicU64) -> io::Result<()> {
        while self.due() {
            let (_, bytes) = self.queue.front_mut().expect("it is due");
            match to.write(bytes) {
                Ok(count) => {
                    carried.fetch_add(count as u64, Ordering::SeqCst);
                    self.queued -= count;
                    bytes.drain(..count);
                    if bytes.is_empty() {
                        self.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.ended && self.queue.is_empty() && !self.closed {
            self.closed = true;
            // The receiver may be gone already.
            let _ = to.shutdown(std::net::Shutdown::Write);
        }
        Ok(())
    }
}

struct Relay<'a> {
    near: TcpStream,
    far: TcpStream,
    up: Flow,
    down: Flow,
    shared: &'a Shared,
    number: usize,
}

enum Next {
    Go,
    End,
}

impl<'a> Relay<'a> {
    fn new(
        near: TcpStream,
        far: TcpStream,
        mut faults: Faults,
        shared: &'a Shared,
        number: usize,
    ) -> io::Result<Self> {
        for socket in [&near, &far] {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
        }
        let spared = faults.only.is_some_and(|only| only != number);
        if spared || shared.struck.load(Ordering::SeqCst) {
            faults.up.at = None;
            faults.down.at = None;
        }
        let (up, down) = (
            Flow::new(faults.up, faults.seed),
            Flow::new(faults.down, faults.seed + 1),
        );
        Ok(Relay {
            near,
            far,
            up,
            down,
            shared,
            number,
        })
    }

    fn run(mut self) -> io::Result<()> {
        while !self.shared.stop.load(Ordering::SeqCst) {
            self.wait()?;
            // A peer that resets ends both directions, as a cut cable does; that is no error of the relay.
            let moved = self.move_bytes();
            if moved.is_err() {
                return self.end_in_place(Fault::Reset);
            }
            let ordered = *lock(&self.shared.now);
            if let Some((fault, _)) = ordered.filter(|(_, up_to)| self.number <= *up_to) {
                self.end_in_place(fault)?;
                drop(self);
                return Ok(());
            }
            for direction in [Direction::Up, Direction::Down] {
                if matches!(self.planned(direction), Next::End) {
                    return Ok(());
                }
            }
            if self.up.closed && self.down.closed {
                return Ok(());
            }
        }
        self.end_in_place(Fault::Close)
    }

    fn move_bytes(&mut self) -> io::Result<()> {
        if self.shared.frozen.load(Ordering::SeqCst) {
            return Ok(());
        }
        let swallowed = *lock(&self.shared.swallows);
        match swallowed.filter(|(_, up_to)| self.number <= *up_to) {
            Some((Direction::Up, _)) => self.up.swallow = true,
            Some((Direction::Down, _)) => self.down.swallow = true,
            None => {}
        }
        if self.up.wants_input() {
            self.up.take(&self.near, &self.shared.flip_up)?;
        }
        if self.down.wants_input() {
            self.down.take(&self.far, &self.shared.flip_down)?;
        }
        self.up.give(&self.far, &self.shared.up)?;
        self.down.give(&self.near, &self.shared.down)
    }

    /// Sleeps until something can be done, but no longer than a tick (or until the next segment is due).
    fn wait(&self) -> io::Result<()> {
        let frozen = self.shared.frozen.load(Ordering::SeqCst);
        let flags = |input: &Flow, output: &Flow| {
            let mut flags = PollFlags::empty();
            if frozen {
                return flags;
            }
            flags.set(PollFlags::IN, input.wants_input());
            flags.set(PollFlags::OUT, output.due());
            flags
        };
        let near = flags(&self.up, &self.down);
        let far = flags(&self.down, &self.up);
        let next = [&self.up, &self.down]
            .iter()
            .filter_map(|flow| flow.queue.front())
            .map(|(when, _)| *when)
            .min();
        let pause = next.map_or(TICK, |when| {
            when.saturating_duration_since(Instant::now()).min(TICK)
        });
        let pause = if frozen { TICK } else { pause };
        // A hung-up socket that we want nothing of would make `poll` spin; leave it out.
        let mut fds = Vec::new();
        for (socket, flags) in [(&self.near, near), (&self.far, far)] {
            if !flags.is_empty() {
                fds.push(PollFd::from_borrowed_fd(socket.as_fd(), flags));
            }
        }
        let timeout = Timespec::try_from(pause).expect("short");
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Does what the plan says once its byte has been delivered.
    fn planned(&mut self, direction: Direction) -> Next {
        let (flow, receiver) = match direction {
            Direction::Up => (&mut self.up, &self.far),
            Direction::Down => (&mut self.down, &self.near),
        };
        if flow.flipped {
            self.shared.struck.store(true, Ordering::SeqCst);
        }
        let planned = flow
            .plan
            .at
            .filter(|(at, fault)| flow.taken == *at && *fault != Fault::Flip);
        let Some((_, fault)) = planned else {
            return Next::Go;
        };
        flow.at_fault = true;
        if !flow.queue.is_empty() {
            return Next::Go;
        }
        self.shared.struck.store(true, Ordering::SeqCst);
        match fault {
            Fault::Stall => {
                self.shared.stalled.store(true, Ordering::SeqCst);
                if self.shared.released.load(Ordering::SeqCst) {
                    flow.plan.at = None;
                    flow.at_fault = false;
                }
                Next::Go
            }
            Fault::Truncate => {
                flow.plan.at = None;
                flow.swallow = true;
                flow.closed = true;
                // The receiver may be gone already.
                let _ = receiver.shutdown(std::net::Shutdown::Write);
                Next::Go
            }
            Fault::Flip => Next::Go,
            Fault::Close | Fault::Reset => {
                // Nothing to report: the sockets go away in any case.
                let _ = self.end_in_place(fault);
                Next::End
            }
        }
    }

    fn end_in_place(&self, fault: Fault) -> io::Result<()> {
        if fault == Fault::Reset {
            for socket in [&self.near, &self.far] {
                socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO))?;
            }
        } else {
            for socket in [&self.near, &self.far] {
                // Unread input would turn the close into a reset, so take it; the peer may be gone already.
                let _ = socket.shutdown(std::net::Shutdown::Write);
                let mut rest = [0; 64 * 1024];
                let mut socket = socket;
                while matches!(socket.read(&mut rest), Ok(count) if count > 0) {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An upstream that sends back what it gets.
    fn echo() -> (u16, JoinHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = socket.read(&mut buffer) {
                if socket.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
        });
        (port, thread)
    }

    fn dial(link: &Link) -> TcpStream {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, link.port())).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
    }

    #[test]
    fn shreds_lose_nothing() {
        let (port, thread) = echo();
        let link = Link::start(port, Faults::shredded(3));
        let mut socket = dial(&link);
        let sent: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let mut writer = socket.try_clone().unwrap();
        let bytes = sent.clone();
        let sender = std::thread::spawn(move || {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        socket.read_to_end(&mut got).unwrap();
        assert_eq!(got, sent);
        sender.join().unwrap();
        thread.join().unwrap();
        assert_eq!(
            (link.carried(Direction::Up), link.carried(Direction::Down)),
            (10_000, 10_000)
        );
    }

    #[test]
    fn closes_and_resets_at_the_byte() {
        for fault in [Fault::Close, Fault::Reset] {
            let (port, thread) = echo();
            let link = Link::start(port, Faults::at(Direction::Up, 100, fault));
            let mut socket = dial(&link);
            socket.write_all(&[7; 1000]).unwrap();
            let mut got = Vec::new();
            let end = socket.read_to_end(&mut got);
            assert_eq!(end.is_err(), fault == Fault::Reset, "{end:?}");
            assert!(got.len() <= 100);
            assert_eq!(link.carried(Direction::Up), 100);
            assert!(link.struck());
            thread.join().unwrap();
        }
    }

    #[test]
    fn stalls_until_released() {
        let (port, thread) = echo();
        let link = Link::start(port, Faults::at(Direction::Down, 5, Fault::Stall));
        let mut socket = dial(&link);
        socket.write_all(b"0123456789").unwrap();
        let mut got = [0; 10];
        socket.read_exact(&mut got[..5]).unwrap();
        link.wait_stalled();
        assert_eq!(link.carried(Direction::Down), 5);
        link.release();
        socket.read_exact(&mut got[5..]).unwrap();
        assert_eq!(&got, b"0123456789");
        drop(socket);
        thread.join().unwrap();
    }
}
