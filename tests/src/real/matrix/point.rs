//! One point: a migration, its fault, and the judgement.

use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{bail, Result};

use super::super::Pair;
use super::plan::Plan;
use super::stage::{lock, Stage};
use super::{Fault, Outcome, Phase};

/// What a point came to.
#[derive(Debug)]
pub struct Record {
    /// Where the migration was when the fault struck.
    pub phase: Phase,
    /// Where the process is.
    pub outcome: Outcome,
}

/// What happened at a point, with the time since its beginning.
#[derive(Debug)]
pub struct Notes {
    began: Instant,
    lines: Mutex<Vec<String>>,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            lines: Mutex::default(),
        }
    }
}

impl Notes {
    pub(super) fn add(&self, text: &str) {
        let at = self.began.elapsed().as_secs_f64();
        lock(&self.lines).push(format!("{at:7.3} s  {text}"));
    }
}

impl std::fmt::Display for Notes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&lock(&self.lines).join("\n"))
    }
}

/// Runs one point between two fresh hosts.
///
/// # Errors
/// If what holds in the end is not what the documentation says.
pub fn run(pair: &Pair, plan: &Plan, notes: &Notes) -> Result<Record> {
    let stage = Stage::set(pair, plan, notes)?;
    let struck = std::thread::scope(|scope| {
        let saboteur = scope.spawn(|| stage.sabotage());
        let migrated = stage.migrate();
        stage.over.store(true, Ordering::SeqCst);
        let struck = saboteur.join();
        migrated?;
        struck.unwrap_or_else(|_| bail!("the saboteur panicked"))
    })?;
    let failed_in = *lock(&stage.failed_in);
    let phase = match plan.fault {
        Fault::LeaveStopped => Phase::Committed,
        fault if fault.fails_restore() => failed_in.unwrap_or(Phase::Restoring),
        fault if fault.is_built_in() => failed_in.unwrap_or(Phase::Restored),
        _ => struck,
    };
    stage.note(format!("struck: {phase}"));
    let outcome = stage.judge(phase)?;
    Ok(Record { phase, outcome })
}
