//! How many TCP connections there may be to a port, and how many of one host: there are always
//! some left for the others.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Args;

use crate::units::{parse_count, parse_time_or_never};

/// What both daemons ask about the connections to their ports.
#[derive(Debug, Clone, Copy, Args)]
pub struct PortArgs {
    /// TCP connections at once to one port. Of these one host (of IPv6: one /64 network) has at most
    /// three quarters
    #[arg(long, value_name = "N", default_value_t = PortArgs::DEFAULT.max_connections, value_parser = parse_count::<usize>)]
    pub max_connections: usize,

    /// How long a page server connection may say nothing where it is its turn; and a restore take
    /// nothing of a set that has gone. 0: for ever
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_time_or_never)]
    pub idle_timeout: Duration,
}

impl PortArgs {
    /// What the options are when they are not given.
    pub const DEFAULT: Self = Self {
        max_connections: 1_024,
        idle_timeout: Duration::from_secs(600),
    };
}

/// What one host may have of `most`: the others find some left, also to resume what broke.
pub fn share(most: usize) -> usize {
    most - most / 4
}

/// What has a share: an address of IPv4, or a /64 network of IPv6, in which a host has as many
/// addresses as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Host(IpAddr);

impl Host {
    pub fn of(address: IpAddr) -> Self {
        const NETWORK: u128 = !0 << 64;
        Self(match address.to_canonical() {
            IpAddr::V6(ip) if !ip.is_loopback() => Ipv6Addr::from(u128::from(ip) & NETWORK).into(),
            ip => ip,
        })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(ip) if !ip.is_loopback() => write!(f, "{ip}/64"),
            ip => write!(f, "{ip}"),
        }
    }
}

/// The connections to a port, and how many of them each host has.
#[derive(Debug)]
pub struct Quota {
    most: usize,
    taken: Mutex<HashMap<Host, usize>>,
}

/// The right to one connection, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    quota: Arc<Quota>,
    host: Host,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("more than {0} connections (--max-connections)")]
    All(usize),
    #[error("more than {1} connections of {0} (--max-connections)")]
    Host(Host, usize),
}

impl Full {
    /// Whose share is used up, if not all are.
    pub fn host(&self) -> Option<Host> {
        match self {
            Self::All(_) => None,
            Self::Host(host, _) => Some(*host),
        }
    }
}

impl Quota {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Host, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn take(self: &Arc<Self>, host: Host) -> Result<Permit, Full> {
        let mut taken = self.taken();
        if taken.values().sum::<usize>() >= self.most {
            return Err(Full::All(self.most));
        }
        let theirs = taken.get(&host).copied().unwrap_or(0);
        if theirs >= share(self.most) {
            return Err(Full::Host(host, share(self.most)));
        }
        taken.insert(host, theirs + 1);
        drop(taken);
        Ok(Permit {
            quota: self.clone(),
            host,
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.quota.taken();
        match taken.get_mut(&self.host) {
            Some(theirs) if *theirs > 1 => *theirs -= 1,
            _ => drop(taken.remove(&self.host)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Host {
        Host::of(text.parse().unwrap())
    }

    #[test]
    fn who_is_one_host() {
        assert_eq!(host("2001:db8::1"), host("2001:db8::ffff:0:0:2"));
        assert_ne!(host("2001:db8::1"), host("2001:db8:0:1::1"));
        assert_eq!(host("::ffff:10.0.0.1"), host("10.0.0.1"));
        assert_ne!(host("10.0.0.2"), host("10.0.0.1"));
        assert_ne!(host("::1"), host("::2"), "loopback is no network");
        assert_eq!(host("2001:db8::1").to_string(), "2001:db8::/64");
        assert_eq!(host("10.0.0.1").to_string(), "10.0.0.1");
    }

    #[test]
    fn one_host_leaves_some_to_the_others() {
        let quota = Quota::new(8);
        let (one, other) = (host("10.0.0.1"), host("10.0.0.2"));
        let mut theirs: Vec<_> = (0..6).map(|_| quota.take(one).unwrap()).collect();
        assert_eq!(quota.take(one).unwrap_err(), Full::Host(one, 6));
        let others = [quota.take(other).unwrap(), quota.take(other).unwrap()];
        assert_eq!(quota.take(other).unwrap_err(), Full::All(8));
        theirs.pop();
        let again = quota.take(other).unwrap();
        drop((theirs, others, again));
        assert!(quota.taken().is_empty(), "hosts that are gone are not kept");
        assert!(Quota::new(1).take(one).is_ok() && Quota::new(0).take(one).is_err());
    }
}
