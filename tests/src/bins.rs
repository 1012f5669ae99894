//! The two daemons as binaries, built once per test run.
//!
//! The daemons are used as black boxes, so this crate does not depend on theirs; cargo therefore
//! would not build them for `cargo test -p e2e-tests`, and a stale binary would be tested.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

static BIN_DIR: OnceLock<PathBuf> = OnceLock::new();

/// The workspace's root directory.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace")
}

/// The path of a binary of this workspace (`image-proxy`, `image-cache`), built from the present
/// source in the profile and target directory of the running test.
///
/// # Panics
/// If cargo fails to build the daemons.
pub fn bin(name: &str) -> PathBuf {
    let path = BIN_DIR.get_or_init(build).join(name);
    assert!(path.is_file(), "cargo built no {}", path.display());
    path
}

/// Takes the binaries of a directory as they are: for programs that measure what was built with
/// them. To be called before anything asks for one.
pub fn use_built(dir: PathBuf) {
    // A second call names the same directory, or comes too late to matter.
    let _ = BIN_DIR.set(dir);
}

/// The same with those beside this program.
///
/// # Errors
/// If they are not there.
pub fn use_built_here() -> anyhow::Result<()> {
    let dir = profile_dir();
    for name in ["image-proxy", "image-cache", "fake-criu"] {
        let path = dir.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{} is missing: the script of this name in scripts/ builds it",
            path.display()
        );
    }
    use_built(dir);
    Ok(())
}

fn build() -> PathBuf {
    let profile_dir = profile_dir();
    let target_dir = profile_dir.parent().expect("the profile has a target dir");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet"]);
    match profile_dir.ends_with("release") {
        // As scripts/demo has them.
        true => command.args(["--release", "-p", "image-proxy", "-p", "image-cache"]),
        // As `cargo test --workspace` has them: another selection has other features of the
        // dependencies, and all would be built again, here and by who comes next.
        false => command.args(["--workspace", "--all-targets"]),
    };
    command
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(workspace());
    let output = command.output().expect("cargo can be started");
    assert!(
        output.status.success(),
        "cargo could not build the daemons: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    profile_dir
}

/// `target/debug` or `target/release`, wherever the target directory is: the running executable
/// is in it, or in its `deps/` if it is a test.
fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the running executable has a path");
    let dir = exe.parent().expect("an executable lies in a directory");
    match dir.file_name() {
        Some(name) if name == "deps" || name == "examples" => {
            dir.parent().expect("deps/ has a parent").to_path_buf()
        }
        _ => dir.to_path_buf(),
    }
}
