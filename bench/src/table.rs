//! The report: which rows there are, what they reached, and how that is printed.
//!
//! A scenario records samples under keys; a row is a view on one key: its unit, the raw limit it
//! stands beside, and the target. One key may have several rows (one per limit).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

/// The parts of the table, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    Limits,
    Dump,
    Restore,
    Small,
    Cpu,
    Memory,
    PageRounds,
    PageCpu,
    PageRestore,
    PageMemory,
    Connections,
    Link,
    Growth,
    Real,
    Peers,
}

impl Group {
    fn title(self) -> &'static str {
        match self {
            Group::Limits => "raw limits of this machine, 1 GiB of warm memory",
            Group::Dump => {
                "dump side, 1 GiB, until the action script says that all is acknowledged"
            }
            Group::Restore => "restore side, 1 GiB into warm memory",
            Group::Small => "small images, 10,000 of 4 KiB",
            Group::Cpu => "CPU (user+system)",
            Group::Memory => "peak memory (VmHWM)",
            Group::PageRounds => {
                "page server: pages of a round, from connect to the answer to CLOSE"
            }
            Group::PageCpu => "page server: CPU (user+system) per GiB of pages of a round",
            Group::PageRestore => "page server: after the rounds",
            Group::PageMemory => "page server: memory after 10 rounds",
            Group::Connections => "dump side over several connections",
            Group::Link => {
                "the link: what surviving breaks, checksums and TLS cost, and hostile peers"
            }
            Group::Growth => "cost growth: CPU (user+system) by number and size",
            Group::Real => "real CRIU: a process of 1 GiB between two hosts of namespaces",
            Group::Peers => "other ways, 1 GiB",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    GibPerSecond,
    PerSecond,
    PagesPerSecond,
    CpuSecondsPerGib,
    CpuMicrosPerImage,
    Milliseconds,
    Bytes,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Unit::GibPerSecond => format!("{value:.2} GiB/s"),
            Unit::PerSecond => format!("{value:.0} /s"),
            Unit::PagesPerSecond => format!("{:.0} k/s", value / 1e3),
            Unit::CpuSecondsPerGib => format!("{value:.2} s/GiB"),
            Unit::CpuMicrosPerImage => format!("{value:.0} us/image"),
            Unit::Milliseconds => format!("{value:.1} ms"),
            Unit::Bytes => format!("{:.1} MiB", value / (1 << 20) as f64),
        }
    }
}

/// What a row shall reach.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    RatioAtLeast(f64),
    RatioAtMost(f64),
    ValueAtMost(f64),
    ValueAtLeast(f64),
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Target {
    pub reach: Reach,
    /// A miss fails the bench. Never for times: those depend on what else the machine does.
    pub hard: bool,
}

#[derive(Clone, Debug)]
pub struct RowSpec {
    pub group: Group,
    pub title: String,
    pub key: String,
    pub unit: Unit,
    /// key of the raw limit, and its name in a few words
    pub limit: Option<(String, &'static str)>,
    pub target: Option<Target>,
}

impl RowSpec {
    pub fn new(group: Group, key: impl Into<String>, title: impl Into<String>, unit: Unit) -> Self {
        Self {
            group,
            title: title.into(),
            key: key.into(),
            unit,
            limit: None,
            target: None,
        }
    }

    pub fn beside(mut self, key: impl Into<String>, name: &'static str) -> Self {
        self.limit = Some((key.into(), name));
        self
    }

    pub fn target(mut self, reach: Reach, hard: bool) -> Self {
        self.target = Some(Target { reach, hard });
        self
    }
}

/// Everything that was measured. The warm-up is kept apart and in no median.
#[derive(Default)]
pub struct Samples {
    pub warm_up: bool,
    taken: BTreeMap<String, Vec<f64>>,
    warm: BTreeMap<String, Vec<f64>>,
    notes: BTreeMap<String, String>,
}

impl Samples {
    pub fn push(&mut self, key: impl Into<String>, value: f64) {
        let map = if self.warm_up {
            &mut self.warm
        } else {
            &mut self.taken
        };
        map.entry(key.into()).or_default().push(value);
    }

    /// Why a key has no value.
    pub fn note(&mut self, key: impl Into<String>, why: impl Into<String>) {
        self.notes.insert(key.into(), why.into());
    }

    pub fn median(&self, key: &str) -> Option<f64> {
        let mut values = self.taken.get(key)?.clone();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values.len() {
            0 => None,
            n if n % 2 == 1 => Some(values[middle]),
            _ => Some((values[middle - 1] + values[middle]) / 2.0),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Limit {
    key: String,
    name: &'static str,
    value: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct Row {
    group: Group,
    key: String,
    title: String,
    unit: Unit,
    /// median of `samples`
    value: Option<f64>,
    samples: Vec<f64>,
    warm_up: Vec<f64>,
    limit: Option<Limit>,
    /// `value` / value of `limit`
    ratio: Option<f64>,
    target: Option<Target>,
    met: Option<bool>,
    note: Option<String>,
}

impl Row {
    pub fn of(spec: &RowSpec, samples: &Samples) -> Self {
        let value = samples.median(&spec.key);
        let limit = spec.limit.clone().map(|(key, name)| Limit {
            value: samples.median(&key),
            key,
            name,
        });
        let ratio = value
            .zip(limit.as_ref().and_then(|limit| limit.value))
            .map(|(value, limit)| value / limit);
        let met = spec.target.and_then(|target| {
            Some(match target.reach {
                Reach::RatioAtLeast(reach) => ratio? >= reach,
                Reach::RatioAtMost(reach) => ratio? <= reach,
                Reach::ValueAtMost(reach) => value? <= reach,
                Reach::ValueAtLeast(reach) => value? >= reach,
            })
        });
        Self {
            group: spec.group,
            key: spec.key.clone(),
            title: spec.title.clone(),
            unit: spec.unit,
            value,
            samples: samples.taken.get(&spec.key).cloned().unwrap_or_default(),
            warm_up: samples.warm.get(&spec.key).cloned().unwrap_or_default(),
            limit,
            ratio,
            target: spec.target,
            met,
            note: samples.notes.get(&spec.key).cloned(),
        }
    }

    /// A hard target that was missed, in words.
    pub fn hard_miss(&self) -> Option<String> {
        let target = self
            .target
            .filter(|target| target.hard && self.met == Some(false))?;
        Some(format!(
            "{}: {} instead of {}",
            self.title,
            self.show_value(),
            self.show_target(target)
        ))
    }

    fn show_value(&self) -> String {
        self.value
            .map_or("-".to_owned(), |value| self.unit.show(value))
    }

    fn show_target(&self, target: Target) -> String {
        match target.reach {
            Reach::RatioAtLeast(reach) => format!(">= {reach:.2} x"),
            Reach::RatioAtMost(reach) => format!("<= {reach:.2} x"),
            Reach::ValueAtMost(reach) => format!("<= {}", self.unit.show(reach)),
            Reach::ValueAtLeast(reach) => format!(">= {}", self.unit.show(reach)),
        }
    }

    fn cells(&self) -> [String; 6] {
        let limit = self.limit.as_ref().map(|limit| match limit.value {
            Some(value) => format!("{} {}", self.unit.show(value), limit.name),
            None => limit.name.to_owned(),
        });
        [
            format!("  {}", self.title),
            self.show_value(),
            // Without a value, why there is none.
            if self.value.is_none() {
                self.note.clone()
            } else {
                limit
            }
            .unwrap_or_default(),
            self.ratio
                .map(|ratio| format!("{ratio:.2}"))
                .unwrap_or_default(),
            self.target
                .map(|target| self.show_target(target))
                .unwrap_or_default(),
            match (self.target, self.met) {
                (Some(_), Some(true)) => "met".to_owned(),
                (Some(_), Some(false)) => "MISSED".to_owned(),
                (Some(_), None) => "?".to_owned(),
                _ => String::new(),
            },
        ]
    }
}

/// All rows by group, otherwise in their order.
pub fn rows(specs: &[RowSpec], samples: &Samples) -> Vec<Row> {
    let mut rows: Vec<_> = specs.iter().map(|spec| Row::of(spec, samples)).collect();
    rows.sort_by_key(|row| row.group);
    rows
}

/// The table as text, with a line above each group.
pub fn print(rows: &[Row]) -> String {
    let head = ["", "value", "raw limit", "ratio", "target", "met"].map(str::to_owned);
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    let mut widths = [0; 6];
    for line in std::iter::once(&head).chain(&cells) {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |line: &[String; 6]| {
        let mut out = String::new();
        for (n, (cell, width)) in line.iter().zip(widths).enumerate() {
            // Numbers to the right, words to the left.
            let _ = match n {
                1 | 3 => write!(out, "{cell:>width$}   "),
                _ => write!(out, "{cell:<width$}   "),
            };
        }
        out.trim_end().to_owned() + "\n"
    };
    let mut out = line(&head);
    let mut group = None;
    for (row, cells) in rows.iter().zip(&cells) {
        if group != Some(row.group) {
            group = Some(row.group);
            out += &format!("{}\n", row.group.title());
        }
        out += &line(cells);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples {
            warm_up: true,
            ..Samples::default()
        };
        samples.push("dump", 99.0);
        samples.warm_up = false;
        for value in [3.0, 1.0, 2.0] {
            samples.push("dump", value);
        }
        for value in [4.0, 6.0] {
            samples.push("tcp", value);
        }
        samples
    }

    #[test]
    fn a_row_is_median_limit_and_ratio() {
        let spec = RowSpec::new(Group::Dump, "dump", "--stream", Unit::GibPerSecond)
            .beside("tcp", "loopback TCP")
            .target(Reach::RatioAtLeast(0.5), false);
        let row = Row::of(&spec, &samples());
        assert_eq!(
            (row.value, row.ratio, row.met),
            (Some(2.0), Some(0.4), Some(false))
        );
        assert_eq!(row.warm_up, [99.0]);
        assert!(row.hard_miss().is_none(), "time targets only print");
        let text = print(&[row]);
        let line = text.lines().nth(2).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "--stream 2.00 GiB/s 5.00 GiB/s loopback TCP 0.40 >= 0.50 x MISSED"
        );
    }

    #[test]
    fn a_hard_target_fails_only_when_missed() {
        let mut samples = samples();
        samples.push("hwm", (70 << 20) as f64);
        let row = |below: u32| {
            let reach = Reach::ValueAtMost(f64::from(below << 20));
            Row::of(
                &RowSpec::new(Group::Memory, "hwm", "VmHWM", Unit::Bytes).target(reach, true),
                &samples,
            )
        };
        assert_eq!(
            row(64).hard_miss().unwrap(),
            "VmHWM: 70.0 MiB instead of <= 64.0 MiB"
        );
        assert!(row(71).hard_miss().is_none());
    }

    #[test]
    fn a_row_without_samples_says_why() {
        let mut samples = Samples::default();
        samples.note("socat", "socat is not installed");
        let row = Row::of(
            &RowSpec::new(Group::Peers, "socat", "socat", Unit::GibPerSecond),
            &samples,
        );
        assert!(row.value.is_none());
        assert!(print(&[row]).contains("socat is not installed"));
    }
}
