//! Certificates for tests, made by `scripts/test-ca`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use tempfile::TempDir;

use crate::daemons::scratch;

/// An authority and its certificates.
pub struct Authority(TempDir);

impl Authority {
    pub fn new(names: &[&str]) -> Self {
        let authority = Authority(scratch());
        authority.certify(names, "365");
        authority
    }

    /// In a new directory below `dir`.
    ///
    /// # Errors
    /// If the certificates cannot be made.
    pub fn below(dir: &Path, names: &[&str]) -> Result<Self> {
        let authority = Authority(tempfile::Builder::new().prefix("ca").tempdir_in(dir)?);
        authority.try_run(names, "365")?;
        Ok(authority)
    }

    pub fn certify(&self, names: &[&str], days: &str) {
        self.run(names, days);
    }

    /// Makes the authority's revocation list, which has the certificates of these names; gives the option that names it.
    pub fn revoke(&self, names: &[&str], days: &str) -> [String; 2] {
        self.run(&[&["--crl"], names].concat(), days);
        let list = self.file("cacrl.pem");
        let list = list.to_str().expect("text").to_owned();
        ["--tls-cacrl".to_owned(), list]
    }

    fn run(&self, names: &[&str], days: &str) {
        let made = self.try_run(names, days);
        made.unwrap_or_else(|error| panic!("{error:#}"));
    }

    fn try_run(&self, names: &[&str], days: &str) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/test-ca");
        let made = Command::new(script)
            .arg(self.0.path())
            .args(names)
            .env("TEST_CA_DAYS", days)
            .output()
            .context("scripts/test-ca")?;
        let said = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "scripts/test-ca: {said}");
        Ok(())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The options of whoever has this certificate of ours and believes in `authority`.
    pub fn options(&self, name: &str, authority: &Authority) -> Vec<String> {
        let file = |path: PathBuf| path.to_str().expect("text").to_owned();
        let (ca, cert) = (
            authority.file("cacert.pem"),
            self.file(name).join("cert.pem"),
        );
        let key = self.file(name).join("key.pem");
        let mut options = vec!["--tls".to_owned()];
        for (option, path) in [
            ("--tls-cacert", ca),
            ("--tls-cert", cert),
            ("--tls-key", key),
        ] {
            options.extend([option.to_owned(), file(path)]);
        }
        options
    }

    pub fn of(&self, name: &str) -> Vec<String> {
        self.options(name, self)
    }
}
