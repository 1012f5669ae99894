//! What came of it, by fault and phase.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use anyhow::{bail, Result};

use super::{named, Fault, Order, Outcome, Phase};

/// Counts of points.
#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Order, Fault, Phase), BTreeMap<Outcome, u32>>,
    failed: u32,
}

impl Table {
    /// One more point, that ended as documented.
    pub fn add(&mut self, order: Order, fault: Fault, phase: Phase, outcome: Outcome) {
        *self
            .cells
            .entry((order, fault, phase))
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
        for ((order, fault, phase), counts) in &self.cells {
            for (outcome, count) in counts {
                let _ = writeln!(text, "{count}\t{order}\t{fault}\t{phase}\t{outcome}");
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
            let [count, order, fault, phase, outcome] = fields[..] else {
                bail!("not a count: {line:?}");
            };
            let order = named(Order::ALL, order)?;
            let cell = (order, fault.parse()?, phase.parse()?);
            let counts = self.cells.entry(cell).or_default();
            *counts.entry(named(Outcome::ALL, outcome)?).or_default() += count.parse::<u32>()?;
        }
        Ok(())
    }

    fn good(&self) -> u32 {
        self.cells.values().flat_map(BTreeMap::values).sum()
    }

    fn cell(&self, order: Order, fault: Fault, phase: Phase) -> String {
        let mut text = String::new();
        for (outcome, count) in self.cells.get(&(order, fault, phase)).into_iter().flatten() {
            let space = if text.is_empty() { "" } else { " " };
            let _ = write!(text, "{space}{count}{}", outcome.letter());
        }
        text
    }

    fn total(&self, order: Order, outcome: Outcome) -> u32 {
        let of_order = self.cells.iter().filter(|((o, ..), _)| *o == order);
        of_order
            .filter_map(|(_, counts)| counts.get(&outcome))
            .sum()
    }

    /// The faults and phases of one order.
    fn show(&self, order: Order, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |phase: &Phase| (self.cells.keys()).any(|(o, _, p)| *o == order && p == phase);
        let phases: Vec<_> = Phase::ALL.into_iter().filter(of).collect();
        let width = |phase: &Phase| {
            let cells = Fault::ALL
                .into_iter()
                .map(|fault| self.cell(order, fault, *phase).len());
            cells.max().unwrap_or(0).max(phase.to_string().len())
        };
        let widths: Vec<_> = phases.iter().map(width).collect();
        write!(f, "{:22}", format!("{order}: fault \\ phase"))?;
        for (phase, width) in phases.iter().zip(&widths) {
            write!(f, "  {phase:width$}")?;
        }
        for fault in Fault::ALL {
            write!(f, "\n{fault:22}")?;
            for (phase, width) in phases.iter().zip(&widths) {
                write!(f, "  {:width$}", self.cell(order, fault, *phase))?;
            }
        }
        writeln!(f, "\n")
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for order in Order::ALL {
            if self.cells.keys().any(|(o, ..)| *o == order) {
                self.show(order, f)?;
            }
        }
        let [trial, held] = Order::ALL;
        writeln!(f, "{trial:>6} {held:>5}")?;
        for outcome in Outcome::ALL {
            let (tried, not) = (self.total(trial, outcome), self.total(held, outcome));
            writeln!(f, "{tried:6} {not:5} {}  {outcome}", outcome.letter())?;
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
        table.add(Order::Trial, Fault::Cut, Phase::Middle, Outcome::Lived);
        table.add(Order::Trial, Fault::Cut, Phase::Middle, Outcome::Lived);
        table.add(Order::Trial, Fault::Cut, Phase::Middle, Outcome::Moved);
        table.add(Order::Trial, Fault::Memory, Phase::End, Outcome::Lived);
        table.add(Order::Held, Fault::KillCache, Phase::Dead, Outcome::Lost);
        table.add_failure();
        let text = table.to_string();
        assert!(text.contains("2S 1T"), "{text}");
        assert!(text.contains("     0     1 L"), "{text}");
        assert!(text.ends_with("6 points, 5 as documented, 1 not"), "{text}");
        let mut twice = Table::default();
        for _ in 0..2 {
            twice.add_counts(&table.counts()).unwrap();
        }
        assert!(twice.to_string().contains("4S 2T"), "{twice}");
        twice.expect(14);
        assert_eq!((twice.good(), twice.failures()), (10, 4));
        assert!(twice
            .add_counts("1\ttrial\tcut the link\tmiddle\tmoving")
            .is_err());
    }
}
