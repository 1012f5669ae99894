//! What came of it, by fault and phase.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use anyhow::{bail, Result};

use super::{named, Fault, Outcome, Phase};

/// Counts of points.
#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Fault, Phase), BTreeMap<Outcome, u32>>,
    failed: u32,
}

impl Table {
    /// One more point, that ended as documented.
    pub fn add(&mut self, fault: Fault, phase: Phase, outcome: Outcome) {
        *self
            .cells
            .entry((fault, phase))
            .or_default()
            .entry(outcome)
            .or_default() += 1;
    }

    /// One that did not.
    pub fn add_failure(&mut self) {
        self.failed += 1;
    }

    /// How many did not.
    pub fn failures(&self) -> u32 {
        self.failed
    }

    /// So many points there were in all: those of which nothing is known did not.
    pub fn expect(&mut self, points: u32) {
        let known = self.good() + self.failed;
        self.failed += points.saturating_sub(known);
    }

    /// For [`Table::add_counts`]: a line for each count.
    pub fn counts(&self) -> String {
        let mut text = format!("failed {}\n", self.failed);
        for ((fault, phase), counts) in &self.cells {
            for (outcome, count) in counts {
                let _ = writeln!(text, "{count}\t{fault}\t{phase}\t{outcome}");
            }
        }
        text
    }

    /// Adds what another table counted.
    ///
    /// # Errors
    /// If that is no such text.
    pub fn add_counts(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            if let Some(failed) = line.strip_prefix("failed ") {
                self.failed += failed.parse::<u32>()?;
                continue;
            }
            let fields: Vec<_> = line.split('\t').collect();
            let [count, fault, phase, outcome] = fields[..] else {
                bail!("not a count: {line:?}");
            };
            let cell = (fault.parse()?, phase.parse()?);
            let counts = self.cells.entry(cell).or_default();
            *counts.entry(named(Outcome::ALL, outcome)?).or_default() += count.parse::<u32>()?;
        }
        Ok(())
    }

    fn good(&self) -> u32 {
        self.cells.values().flat_map(BTreeMap::values).sum()
    }

    fn cell(&self, fault: Fault, phase: Phase) -> String {
        let mut text = String::new();
        for (outcome, count) in self.cells.get(&(fault, phase)).into_iter().flatten() {
            let space = if text.is_empty() { "" } else { " " };
            let _ = write!(text, "{space}{count}{}", outcome.letter());
        }
        text
    }

    fn total(&self, outcome: Outcome) -> u32 {
        self.cells
            .values()
            .filter_map(|counts| counts.get(&outcome))
            .sum()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |phase: &Phase| self.cells.keys().any(|(_, p)| p == phase);
        let phases: Vec<_> = Phase::ALL.into_iter().filter(of).collect();
        let width = |phase: &Phase| {
            let cells = Fault::ALL
                .into_iter()
                .map(|fault| self.cell(fault, *phase).len());
            cells.max().unwrap_or(0).max(phase.to_string().len())
        };
        let widths: Vec<_> = phases.iter().map(width).collect();
        write!(f, "{:22}", "fault \\ phase")?;
        for (phase, width) in phases.iter().zip(&widths) {
            write!(f, "  {phase:width$}")?;
        }
        for fault in Fault::ALL {
            write!(f, "\n{fault:22}")?;
            for (phase, width) in phases.iter().zip(&widths) {
                write!(f, "  {:width$}", self.cell(fault, *phase))?;
            }
        }
        writeln!(f, "\n")?;
        for outcome in Outcome::ALL {
            writeln!(
                f,
                "{:6} {}  {outcome}",
                self.total(outcome),
                outcome.letter()
            )?;
        }
        let (good, failed) = (self.good(), self.failed);
        write!(
            f,
            "{} points, {good} as documented, {failed} not",
            good + failed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_fault_and_phase() {
        let mut table = Table::default();
        table.add(Fault::Cut, Phase::Middle, Outcome::Lived);
        table.add(Fault::Cut, Phase::Middle, Outcome::Lived);
        table.add(Fault::Cut, Phase::Middle, Outcome::Moved);
        table.add(Fault::Memory, Phase::End, Outcome::Lived);
        table.add_failure();
        let text = table.to_string();
        assert!(text.contains("2S 1T"), "{text}");
        assert!(text.ends_with("5 points, 4 as documented, 1 not"), "{text}");
        let mut twice = Table::default();
        for _ in 0..2 {
            twice.add_counts(&table.counts()).unwrap();
        }
        assert!(twice.to_string().contains("4S 2T"), "{twice}");
        twice.expect(12);
        assert_eq!((twice.good(), twice.failures()), (8, 4));
        assert!(twice.add_counts("1\tcut the link\tmiddle\tmoving").is_err());
    }
}
