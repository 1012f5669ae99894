//! Which process the kernel kills when memory is short: not this one, if others can be killed.

use std::fs;

const FILE: &str = "/proc/self/oom_score_adj";

/// Lowers what the kernel adds to this process's score, if it may: that takes CAP_SYS_RESOURCE, or a value
/// that was as low before. Call it while the process is dumpable: later the file is root's. Gives what to
/// log.
pub fn lower_score(to: i32) -> String {
    let current = fs::read_to_string(FILE);
    let current = current
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    // An operator has said so.
    if let Some(current) = current.filter(|&current| current <= to) {
        return format!("oom_score_adj is {current}");
    }
    match fs::write(FILE, to.to_string()) {
        Ok(()) => format!("oom_score_adj is {to} now"),
        Err(e) => format!(
            "oom_score_adj stays {}, as lowering it to {to} failed: {e}; when memory is short the kernel may kill this process before others",
            current.unwrap_or(0)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What can always be done: nothing, and to say so.
    #[test]
    fn a_score_that_is_low_enough_stays() {
        let current = fs::read_to_string(FILE).unwrap();
        let current: i32 = current.trim().parse().unwrap();
        assert_eq!(lower_score(1000), format!("oom_score_adj is {current}"));
        assert_eq!(
            fs::read_to_string(FILE).unwrap().trim(),
            current.to_string()
        );
    }
}
