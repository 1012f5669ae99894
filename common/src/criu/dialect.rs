//! CRIU's ways to write a dump into sockets, as a table: how a set ends, how a dump is stopped, and so on. Everything
//! else asks for a property instead of naming a dialect, so that a new one is a row in here.

/// Which of CRIU's protocols a set came in by. The cache needs it to answer the readers of the same CRIU: in the socket
/// dialect they wait for data, in the pipe dialect they send a descriptor first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Stream,
    /// `--remote`; its first image has not come yet.
    RemoteUnknown,
    RemoteSocket,
    RemotePipe,
    /// Pages through the page server, the other images from CRIU's images directory.
    PageServer,
}

/// What ends a dump's set, when no script asks for a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetEnd {
    /// The inventory is the last image: the set could be served from its completion on.
    Inventory,
    /// CRIU says FINISH after its last image.
    Finish,
    /// Nothing: the images lie in CRIU's images directory until the script of the dump has them sent.
    Script,
}

/// What carries the bytes of an image between CRIU and a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// A pipe whose descriptor CRIU sends.
    Pipe,
    /// The socket of the request.
    Socket,
    /// Not known yet, or no image has a connection of its own.
    Unknown,
}

/// Which page server rounds a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageRounds {
    No,
    /// Some pages come in rounds, the images in the dialect's own way.
    BesideImages,
    /// All pages come in rounds, and the images come from CRIU's images directory at the commit.
    InsteadOfImages,
}

/// How the CRIU of a failed run is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its writes fail once the reading end is closed.
    FailedWrite,
    /// It does not look at failed writes: its next connection must be refused.
    RefusedConnection,
}

/// Which sets of a session the list of snapshots names, for `--remote` restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    All,
    /// Rounds are no snapshots, the dump that they lead to is one.
    FinalDump,
    No,
}

/// One row of the table.
#[derive(Debug)]
struct Properties {
    /// In `status`.
    name: &'static str,
    /// See [`Dialect::number`].
    number: u8,
    end: SetEnd,
    carrier: Carrier,
    rounds: PageRounds,
    stop: Stop,
    /// A dump may refer to pages of the run before it.
    has_parents: bool,
    listing: Listing,
    /// Written by a CRIU with `--remote`, which is of 2016 to 2020: its images differ from those of today.
    old_images: bool,
}

const REMOTE: Properties = Properties {
    name: "--remote",
    number: 2,
    end: SetEnd::Finish,
    carrier: Carrier::Unknown,
    rounds: PageRounds::No,
    stop: Stop::RefusedConnection,
    has_parents: true,
    listing: Listing::All,
    old_images: true,
};

impl Dialect {
    pub const ALL: [Self; 5] = [
        Self::Stream,
        Self::PageServer,
        Self::RemotePipe,
        Self::RemoteSocket,
        Self::RemoteUnknown,
    ];

    const fn properties(self) -> &'static Properties {
        match self {
            Self::Stream => &Properties {
                name: "--stream",
                number: 1,
                end: SetEnd::Inventory,
                carrier: Carrier::Unknown,
                rounds: PageRounds::BesideImages,
                stop: Stop::FailedWrite,
                has_parents: false,
                listing: Listing::No,
                old_images: false,
            },
            Self::RemoteUnknown => &REMOTE,
            Self::RemoteSocket => &Properties {
                name: "--remote on sockets",
                number: 3,
                carrier: Carrier::Socket,
                ..REMOTE
            },
            Self::RemotePipe => &Properties {
                name: "--remote on pipes",
                number: 4,
                carrier: Carrier::Pipe,
                stop: Stop::FailedWrite,
                ..REMOTE
            },
            Self::PageServer => &Properties {
                name: "--page-server",
                number: 5,
                end: SetEnd::Script,
                carrier: Carrier::Unknown,
                rounds: PageRounds::InsteadOfImages,
                stop: Stop::FailedWrite,
                has_parents: true,
                listing: Listing::FinalDump,
                old_images: false,
            },
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        self.properties().name
    }

    /// On the link, and in image-cache's journal: a number never gets another meaning.
    pub fn number(self) -> u8 {
        self.properties().number
    }

    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.number() == number)
    }

    pub fn end(self) -> SetEnd {
        self.properties().end
    }

    /// Whether CRIU says FINISH after its last image.
    pub fn says_finish(self) -> bool {
        self.end() == SetEnd::Finish
    }

    pub fn carrier(self) -> Carrier {
        self.properties().carrier
    }

    pub fn page_rounds(self) -> PageRounds {
        self.properties().rounds
    }

    /// Whether page server rounds are all that such a run sends before its commit.
    pub fn is_rounds_alone(self) -> bool {
        self.page_rounds() == PageRounds::InsteadOfImages
    }

    pub fn stop(self) -> Stop {
        self.properties().stop
    }

    /// Whether a dump may refer to pages of the run before it.
    pub fn has_parents(self) -> bool {
        self.properties().has_parents
    }

    pub fn listing(self) -> Listing {
        self.properties().listing
    }

    /// Whether a CRIU with `--remote` wrote it, which is of 2016 to 2020.
    pub fn is_remote(self) -> bool {
        self.properties().old_images
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as `docs/criu-protocols.md` describes the protocols, a line each.
    #[test]
    fn the_table() {
        let line = |d: Dialect| {
            let (end, carrier, rounds) = (d.end(), d.carrier(), d.page_rounds());
            let (stop, listing) = (d.stop(), d.listing());
            let flags = [d.has_parents(), d.is_remote(), d.says_finish()];
            format!(
                "{}: {end:?} {carrier:?} {rounds:?} {stop:?} {listing:?} {flags:?}",
                d.name()
            )
        };
        assert_eq!(
            Dialect::ALL.map(line),
            [
                "--stream: Inventory Unknown BesideImages FailedWrite No [false, false, false]",
                "--page-server: Script Unknown InsteadOfImages FailedWrite FinalDump [true, false, false]",
                "--remote on pipes: Finish Pipe No FailedWrite All [true, true, true]",
                "--remote on sockets: Finish Socket No RefusedConnection All [true, true, true]",
                "--remote: Finish Unknown No RefusedConnection All [true, true, true]",
            ]
        );
    }

    /// Another image-cache, or an earlier one, has written them.
    #[test]
    fn numbers_never_change() {
        use Dialect as D;
        let expected = [
            None,
            Some(D::Stream),
            Some(D::RemoteUnknown),
            Some(D::RemoteSocket),
            Some(D::RemotePipe),
            Some(D::PageServer),
            None,
        ];
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(Dialect::of_number), expected);
    }
}
