//! What a dump pays even if it has nothing to send: the start of the action script, and the
//! commit of a set without pages. Both are part of every dump's time and are not subtracted.

use anyhow::{Context as _, Result};

use crate::runner::{Context, Scenario};
use crate::table::{Group, RowSpec, Samples, Unit};
use e2e_tests::daemons::Pair;
use e2e_tests::fake::fast::set::OneTask;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::memory::Body;

#[derive(Default)]
pub struct Commit {
    pair: Option<Pair>,
}

impl Scenario for Commit {
    fn name(&self) -> String {
        "commit".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row = |key, title| RowSpec::new(Group::Dump, key, title, Unit::Milliseconds);
        vec![
            row(
                "commit.script",
                "the script's own start and end (in every dump)",
            ),
            row(
                "commit.empty",
                "post-dump script for an empty set (in every dump)",
            ),
        ]
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.pair = Some(context.start_pair("commit", Dialect::Stream)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.pair.as_ref().context("not started")?;
        // An action that is none of the daemon's business.
        let script = pair.script("post-resume")?;

        let task = OneTask {
            body: Body::new(context.src.bytes(), 0),
        };
        let mut criu = Dump::begin(Dialect::Stream, &pair.source, "")?;
        pair.script("pre-dump")?;
        task.dump(&mut criu)?;
        let empty = pair.script("post-dump")?;
        criu.finish()?;
        let mut criu = Restore::begin(Dialect::Stream, &pair.target, "")?;
        task.restore(&mut criu, context.dst.bytes_mut())?;
        criu.finish()?;

        out.push("commit.script", script.as_secs_f64() * 1e3);
        out.push("commit.empty", empty.as_secs_f64() * 1e3);
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.pair.take().context("not started")?.stop()
    }
}
