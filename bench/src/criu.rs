//! Real `criu page-server`, in its Debian root with a tmpfs for its images.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use e2e_tests::daemons::free_port;
use e2e_tests::fake::fast::pagemap::{self, Mapped, PE_PARENT, PE_PRESENT};
use e2e_tests::fake::fast::pages::PID;
use e2e_tests::fake::wire::pipe;
use e2e_tests::memory::PAGE;
use e2e_tests::process::{start_daemon, Process};

const END: Duration = Duration::from_secs(20);

/// The path of a root that is there already.
const ROOT: &str = "BENCH_CRIU_ROOT";

/// The root that the tests run CRIU in too, below the target directory; it is made if it is not
/// there, which takes a minute. Or in words why there is none.
pub fn find_root() -> Result<PathBuf, String> {
    if let Some(root) = std::env::var_os(ROOT) {
        return Ok(root.into());
    }
    if !rustix::process::geteuid().is_root() {
        return Err("criu page-server needs root".to_owned());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/lib/criu-root");
    let mut command = Command::new(&script);
    // Beside `debug` and `release`.
    if let Some(target) = std::env::current_exe()
        .ok()
        .as_deref()
        .and_then(|me| me.parent()?.parent())
    {
        command.arg(target);
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            Ok(text.trim_end().into())
        }
        _ => Err("scripts/lib/criu-root failed".to_owned()),
    }
}

/// A root of its own, read-only but for a few tmpfs, in a mount namespace that ends with the
/// process: nothing is mounted outside of it.
const ANCHOR: &str = r#"
set -eu
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
cd "$0"
mount -t proc proc proc
mount -t tmpfs -o mode=755 dev dev
for device in null zero urandom; do
    : >"dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mount -t tmpfs tmp tmp
mount -t tmpfs run run
mkdir run/images
pivot_root . .
umount -l .
echo ready
exec sleep infinity
"#;

/// Where CRIU lives. Its images are in directories that are numbered by round.
pub struct CriuRoot {
    anchor: Process,
    logs: PathBuf,
}

/// A `criu page-server`, which serves one round.
pub struct Server {
    process: Process,
    pub port: u16,
    cpu_at_start: Duration,
}

impl CriuRoot {
    pub fn start(root: &Path, logs: &Path) -> Result<Self> {
        fs::create_dir_all(logs)?;
        let (said, output) = pipe()?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", ANCHOR])
            .arg(root)
            .stdout(output);
        let anchor = Process::spawn("CRIU's root", command)?;
        let mut ready = [0; 6];
        File::from(said)
            .read_exact(&mut ready)
            .context("CRIU's root did not come up (are mounts allowed?)")?;
        ensure!(ready == *b"ready\n", "CRIU's root said {ready:?}");
        Ok(Self {
            anchor,
            logs: logs.to_owned(),
        })
    }

    fn dir(&self, round: usize) -> PathBuf {
        self.images().join(round.to_string())
    }

    fn images(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/run/images", self.anchor.id()))
    }

    /// Starts the server of round `n`, whose parent is the round before; returns when it listens.
    pub fn serve(&self, n: usize, dedup: bool) -> Result<Server> {
        fs::create_dir(self.dir(n)).context("making an images directory")?;
        let port = free_port();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.anchor.id().to_string()])
            .args(["--mount", "--root", "--wd", "--", "criu", "page-server"])
            .args(["--images-dir", &format!("/run/images/{n}")])
            .args(["--address", "127.0.0.1", "--port", &port.to_string()])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if n > 0 {
            command.args(["--prev-images-dir", &format!("../{}", n - 1)]);
        }
        if dedup {
            command.arg("--auto-dedup");
        }
        let process = start_daemon("criu", command, &self.logs, &self.logs.join("criu.log"))?;
        let cpu_at_start = process.fine_cpu()?;
        Ok(Server {
            process,
            port,
            cpu_at_start,
        })
    }

    /// Removes all images.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(self.images())? {
            fs::remove_dir_all(entry?.path())?;
        }
        Ok(())
    }

    /// Memory of the tmpfs that all images take.
    pub fn image_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for dir in fs::read_dir(self.images())? {
            for file in fs::read_dir(dir?.path())? {
                bytes += fs::symlink_metadata(file?.path())?.blocks() * 512;
            }
        }
        Ok(bytes)
    }

    /// Reads the pages of round `n` as restore does, each from the round that has it, and gives
    /// how long that took, the pagemaps aside.
    pub fn read_back(&self, n: usize, into: &mut [u8]) -> Result<Duration> {
        let levels: Vec<Level> = (0..=n)
            .rev()
            .map(|n| Level::open(&self.dir(n)).with_context(|| format!("images of round {n}")))
            .collect::<Result<_>>()?;
        let mut parts = Vec::new();
        for (mapped, _) in &levels[0].entries {
            resolve(&levels, 0, mapped.vaddr, mapped.end(), &mut parts)?;
        }
        let bytes: usize = parts.iter().map(|part| part.len).sum();
        ensure!(bytes == into.len(), "the set has {bytes} bytes");
        let begin = Instant::now();
        let mut rest = into;
        for part in parts {
            let (now, later) = rest.split_at_mut(part.len);
            levels[part.level].pages.read_exact_at(now, part.offset)?;
            rest = later;
        }
        Ok(begin.elapsed())
    }
}

impl Server {
    /// After its client has gone: its CPU time since it was ready.
    pub fn finish(mut self) -> Result<Duration> {
        let (status, cpu) = self.process.wait_with_cpu(END)?;
        ensure!(status.success(), "criu page-server ended with {status}");
        Ok(cpu.saturating_sub(self.cpu_at_start))
    }
}

/// The images of one round.
struct Level {
    /// with where in the pages image each one's pages begin
    entries: Vec<(Mapped, u64)>,
    pages: File,
}

impl Level {
    fn open(dir: &Path) -> Result<Self> {
        let image = fs::read(dir.join(format!("pagemap-{PID}.img")))?;
        let (pages_id, entries) = pagemap::parse(&image)?;
        let mut offset = 0;
        let with_offset = |mapped: Mapped| {
            let at = offset;
            if mapped.flags & PE_PRESENT != 0 {
                offset += mapped.pages * PAGE as u64;
            }
            (mapped, at)
        };
        Ok(Self {
            entries: entries.into_iter().map(with_offset).collect(),
            pages: File::open(dir.join(format!("pages-{pages_id}.img")))?,
        })
    }
}

/// Bytes of one pages image.
struct Part {
    level: usize,
    offset: u64,
    len: usize,
}

/// Finds where `at..end` is: in the pages of `level`, or behind its holes in an older one.
fn resolve(
    levels: &[Level],
    level: usize,
    mut at: u64,
    end: u64,
    parts: &mut Vec<Part>,
) -> Result<()> {
    while at < end {
        let Some(Level { entries, .. }) = levels.get(level) else {
            bail!("no round has the page at {at:#x}");
        };
        let next = entries.partition_point(|(mapped, _)| mapped.vaddr <= at);
        let found = next.checked_sub(1).map(|n| entries[n]);
        let Some((mapped, offset)) = found.filter(|(mapped, _)| mapped.end() > at) else {
            bail!("no round has the page at {at:#x}");
        };
        let stop = end.min(mapped.end());
        if mapped.flags & PE_PRESENT != 0 {
            let offset = offset + (at - mapped.vaddr);
            let len = usize::try_from(stop - at)?;
            parts.push(Part { level, offset, len });
        } else {
            ensure!(mapped.flags & PE_PARENT != 0, "an entry without pages");
            resolve(levels, level + 1, at, stop, parts)?;
        }
        at = stop;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(entries: &[(u64, u64, u64)]) -> Level {
        let mut offset = 0;
        let of = |&(page, pages, flags): &(u64, u64, u64)| {
            let vaddr = page * PAGE as u64;
            let at = offset;
            if flags & PE_PRESENT != 0 {
                offset += pages * PAGE as u64;
            }
            let mapped = Mapped {
                vaddr,
                pages,
                flags,
            };
            (mapped, at)
        };
        Level {
            entries: entries.iter().map(of).collect(),
            pages: File::open("/dev/null").unwrap(),
        }
    }

    #[test]
    fn each_page_is_taken_from_the_newest_round_that_has_it() {
        let levels = [
            level(&[(10, 2, 1), (12, 1, 6), (13, 3, 1)]),
            level(&[(10, 1, 4), (11, 2, 1), (13, 2, 4), (15, 1, 1)]),
            level(&[(10, 6, 4)]),
        ];
        let mut parts = Vec::new();
        let page = PAGE as u64;
        resolve(&levels, 0, 10 * page, 16 * page, &mut parts).unwrap();
        let found: Vec<_> = parts
            .iter()
            .map(|p| (p.level, p.offset / page, p.len / PAGE))
            .collect();
        assert_eq!(
            found,
            [(1, 0, 1), (2, 1, 1), (0, 0, 1), (1, 1, 2), (2, 5, 1)]
        );
        assert!(resolve(&levels, 0, 16 * page, 17 * page, &mut parts).is_err());
        assert!(resolve(&levels[..2], 0, 11 * page, 12 * page, &mut parts).is_err());
    }
}
