//! One process with one large pages image, dumped, committed, restored and released.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{gib_per_second, measure, peak_rows, record_peaks, IMAGE};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::fast::set::OneTask;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::memory::{Body, GIB};

pub struct Large {
    name: &'static str,
    dialect: Dialect,
    /// The target makes memory ready before the freeze.
    ahead: bool,
    pair: Option<Pair>,
}

impl Large {
    pub fn new(name: &'static str, dialect: Dialect) -> Self {
        Self {
            name,
            dialect,
            ahead: true,
            pair: None,
        }
    }

    /// A `--stream` dump that nothing is made ready for, as one without a script.
    pub fn not_ahead() -> Self {
        Self {
            ahead: false,
            ..Self::new("unprepared", Dialect::Stream)
        }
    }

    fn key(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn title(&self) -> &'static str {
        match self.dialect {
            Dialect::Stream if !self.ahead => "--stream, --reserve-timeout 0",
            Dialect::Stream => "--stream",
            Dialect::RemotePipe => "--remote, pipes",
            Dialect::RemoteSocket => "--remote, sockets",
        }
    }
}

impl Scenario for Large {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let title = self.title();
        let dump = || RowSpec::new(Group::Dump, self.key("dump"), title, Unit::GibPerSecond);
        let restore = RowSpec::new(
            Group::Restore,
            self.key("restore"),
            title,
            Unit::GibPerSecond,
        );
        if !self.ahead {
            // Both find their memory untouched.
            return vec![
                dump().beside("raw.pipe-splice-tcp", "splice into TCP"),
                dump().beside("raw.pipe-splice-tcp-fresh", "into new memory"),
            ];
        }
        let mut rows = vec![dump()
            .beside("raw.tcp", "loopback TCP")
            .target(Reach::RatioAtLeast(0.5), false)];
        if self.dialect == Dialect::RemoteSocket {
            // Its data are write()n at both ends: no pages are moved by reference.
            rows.push(restore.beside("raw.unix", "unix socket"));
        } else {
            rows.push(
                dump()
                    .beside("raw.pipe-splice-tcp", "splice into TCP")
                    .target(Reach::RatioAtLeast(0.85), false),
            );
            let reach = Reach::RatioAtLeast(0.85);
            for (limit, name) in [
                ("raw.pipe-vmsplice", "vmsplice pipe"),
                ("raw.pipe-vmsplice-huge", "from huge pages"),
            ] {
                rows.push(restore.clone().beside(limit, name).target(reach, false));
            }
        }
        rows.push(RowSpec::new(
            Group::Dump,
            self.key("ahead"),
            format!("{title}: pre-dump script, until memory is ready"),
            Unit::Milliseconds,
        ));
        let tail = format!("{title}: of that, after the last write");
        rows.push(RowSpec::new(
            Group::Dump,
            self.key("tail"),
            tail,
            Unit::Milliseconds,
        ));
        for (what, who) in [
            ("dump.proxy.cpu", "image-proxy, dump"),
            (
                "ahead.cache.cpu",
                "image-cache, before the freeze: memory for",
            ),
            ("dump.cache.cpu", "image-cache, dump"),
            ("restore.cache.cpu", "image-cache, restore"),
        ] {
            let title = format!("{who} 1 GiB, {title}");
            let row = RowSpec::new(Group::Cpu, self.key(what), title, Unit::CpuSecondsPerGib);
            // By reference; on a socket it is a copy.
            let by_reference = self.dialect != Dialect::RemoteSocket;
            rows.push(match what {
                "restore.cache.cpu" if by_reference => row.target(Reach::ValueAtMost(0.1), false),
                "dump.proxy.cpu" => {
                    let row = row.target(Reach::ValueAtMost(0.25), false);
                    match by_reference {
                        true => row.beside("raw.splice.cpu", "a thread that only splices"),
                        false => row,
                    }
                }
                "dump.cache.cpu" => row.target(Reach::ValueAtMost(0.7), false),
                _ => row,
            });
        }
        rows.extend(peak_rows(self.name, &format!("sets of 1 GiB, {title}")));
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let never = ["--reserve-timeout", "0"];
        let options = Options::as_installed().dialect(self.dialect);
        let options = options.proxy(if self.ahead { &[] } else { &never });
        let dir = context.dir.join(self.name);
        self.pair = Some(options.start_in(&dir)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.pair.as_ref().context("not started")?;
        let id = format!("/bench/{}", context.next_stamp());
        let task = OneTask {
            body: Body::new(context.src.bytes(), IMAGE),
        };

        // Before the freeze: none of it is frozen time.
        let mut criu = Dump::begin(self.dialect, &pair.source, &id)?;
        let mut before = Duration::ZERO;
        let ahead = measure(pair, || {
            before = pair.announce(IMAGE)?;
            Ok(())
        })?;
        // Frozen: from the first image to the successful exit of the action script.
        let mut tail = Duration::ZERO;
        let dump = measure(pair, || {
            task.dump(&mut criu)?;
            tail = pair.script("post-dump")?;
            Ok(())
        })
        .context("dump")?;
        criu.finish().context("the end of the dump")?;

        let mut criu = Restore::begin(self.dialect, &pair.target, &id)?;
        let into = context.dst.bytes_mut();
        let restore = measure(pair, || task.restore(&mut criu, into)).context("restore")?;
        criu.finish().context("the end of the restore")?;
        task.check_last(into)?;
        pair.wait_released(IMAGE)?;

        let per_gib = |cpu: Duration| cpu.as_secs_f64() * GIB as f64 / IMAGE as f64;
        out.push(self.key("dump"), gib_per_second(IMAGE, dump.wall));
        out.push(self.key("ahead"), before.as_secs_f64() * 1e3);
        out.push(self.key("ahead.cache.cpu"), per_gib(ahead.cache_cpu));
        out.push(self.key("tail"), tail.as_secs_f64() * 1e3);
        out.push(self.key("dump.proxy.cpu"), per_gib(dump.proxy_cpu));
        out.push(self.key("dump.cache.cpu"), per_gib(dump.cache_cpu));
        out.push(self.key("restore"), gib_per_second(IMAGE, restore.wall));
        out.push(self.key("restore.cache.cpu"), per_gib(restore.cache_cpu));
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        let pair = self.pair.take().context("not started")?;
        record_peaks(self.name, &pair, IMAGE, out)?;
        pair.stop()
    }
}
