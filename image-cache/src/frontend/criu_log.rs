//! Why a restore failed, in CRIU's own words: the end of its log, which its action script has handed over.

use std::fs::File;
use std::os::unix::fs::FileExt;

use image_common::text::is_unseen;

/// So much of the end of a log is looked at.
const TAIL_BYTES: u64 = 64 << 10;

/// Longest line that is passed on.
const LINE_CHARS: usize = 400;

/// Lines that say that something failed, and not what: CRIU writes them behind the reason. The last one is of each restore
/// without CAP_SYS_RESOURCE, and CRIU goes on.
const CONSEQUENCES: [&str; 7] = [
    "Restoring FAILED",
    "exited, status",
    "killed by signal",
    "Killed by signal",
    "Unable to kill",
    "Unable to open fd=",
    "Can't setup RLIMIT_NOFILE",
];

/// The last line in which CRIU says what went wrong.
pub fn last_error(log: &File) -> Option<String> {
    let length = log.metadata().ok()?.len();
    let from = length.saturating_sub(TAIL_BYTES);
    // At most `TAIL_BYTES`.
    let mut tail = vec![0; usize::try_from(length - from).ok()?];
    let mut read = 0;
    while read < tail.len() {
        match log.read_at(&mut tail[read..], from + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    last_error_in(&String::from_utf8_lossy(&tail[..read]))
}

fn last_error_in(log: &str) -> Option<String> {
    let errors = log.lines().filter(|line| line.contains("Error ("));
    let is_reason = |line: &&str| !CONSEQUENCES.iter().any(|text| line.contains(text));
    let line = errors
        .clone()
        .rfind(is_reason)
        .or_else(|| errors.clone().next_back())?;
    // Without the time, and the number of the task.
    let line = line.find("Error (").map_or(line, |at| &line[at..]);
    let clean = |c: char| if is_unseen(c) { '?' } else { c };
    Some(
        line.trim_end()
            .chars()
            .take(LINE_CHARS)
            .map(clean)
            .collect(),
    )
}

/// What an operator can do if the reason is that both hosts share what cannot be there twice.
pub fn hint(line: &str) -> Option<&'static str> {
    let shared = [
        "File exists",
        "do not match expected",
        "in use",
        "posix lock",
        "flock",
        "OFD lock",
    ];
    shared.iter().any(|text| line.contains(text)).then_some(
        "what both hosts share (a pid, a file lock, an address) cannot be there twice: `image-proxy --commit-on held` kills the process \
         before it is restored",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_says_why() {
        let log = "(00.001) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
            (00.021418)     31: Error (criu/files-reg.c:2143): Can't open file tmp/x on restore: No such file or directory\n\
            (00.021500)     31: Error (criu/files.c:1221): Unable to open fd=3 id=0x2\n\
            (00.030000) Error (criu/cr-restore.c:1480): 31 exited, status=1\n\
            (00.031000) Error (criu/cr-restore.c:2547): Restoring FAILED.\n";
        let expected = "Error (criu/files-reg.c:2143): Can't open file tmp/x on restore: No such file or directory";
        assert_eq!(last_error_in(log).as_deref(), Some(expected));
        let failed = "(00.031000) Error (criu/cr-restore.c:2547): Restoring FAILED.\n";
        let only = "Error (criu/cr-restore.c:2547): Restoring FAILED.";
        assert_eq!(last_error_in(failed).as_deref(), Some(only));
        assert_eq!(last_error_in("(00.1) fine\n"), None);
        let taken = "Error (criu/cr-restore.c:1): Can't fork for 31: File exists";
        assert!(hint(taken).is_some() && hint(expected).is_none());
    }

    #[test]
    fn a_log_is_read_from_its_end_and_made_harmless() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("restore.log");
        let early = "Error (early): before\n".repeat(8 << 10);
        let text = format!("{early}Error (last): a\u{202e}b\u{7}c\n");
        std::fs::write(&path, &text).unwrap();
        let log = File::open(&path).unwrap();
        let expected = "Error (last): a?b?c";
        assert_eq!(last_error(&log).as_deref(), Some(expected));
    }
}
