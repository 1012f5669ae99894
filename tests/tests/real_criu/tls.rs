//! Real CRIU with its own `--tls`, and the link with ours: one authority for all of them.

use std::fs;
use std::process::Command;

use anyhow::{ensure, Result};
use e2e_tests::bins::workspace;
use e2e_tests::real::{between_two_hosts, Host, Pair, Program, IMAGES};

use crate::page_server::{criu_dump, restored};

const FILES: [&str; 6] = [
    "--tls-cacert",
    "/run/tls/cacert.pem",
    "--tls-cert",
    "/run/tls/cert.pem",
    "--tls-key",
    "/run/tls/key.pem",
];

/// Gives each host a certificate of its name; the target's is its address.
fn certify(pair: &Pair) -> Result<()> {
    let authority = tempfile::tempdir()?;
    let hosts: [(&Host, &str); 2] = [
        (&pair.source, "source"),
        (&pair.target, pair.cache_address()),
    ];
    let made = Command::new(workspace().join("scripts/test-ca"))
        .arg(authority.path())
        .args(hosts.map(|(_, name)| name))
        .output()?;
    ensure!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    for (host, name) in hosts {
        fs::create_dir(host.path("/run/tls"))?;
        let own = authority.path().join(name);
        for (from, to) in [
            (authority.path().join("cacert.pem"), "cacert.pem"),
            (own.join("cert.pem"), "cert.pem"),
            (own.join("key.pem"), "key.pem"),
        ] {
            fs::copy(from, host.path(&format!("/run/tls/{to}")))?;
        }
    }
    Ok(())
}

/// CRIU sends its pages with TLS straight to image-cache, and image-proxy the rest.
#[test]
fn criu_s_own_tls_to_the_target() {
    between_two_hosts(|pair| {
        certify(pair)?;
        let pages = format!("{}:27", pair.cache_address());
        let tls = [&["--tls"], &FILES[..]].concat();
        let allow = ["--allow-peer", "source", "--page-server", &pages];
        let _cache = pair.cache(&[&tls[..], &allow].concat())?;
        let _proxy = pair.proxy(&[&tls[..], &["--checksum"]].concat())?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;

        let to = [
            "--page-server",
            "--address",
            pair.cache_address(),
            "--port",
            "27",
        ];
        let script = ["--action-script", "/opt/image-proxy"];
        criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &[&to[..], &tls, &script].concat(),
        )?;

        restored(pair, &program, &hash)
    });
}

/// In plaintext that port takes nothing from another host, and the process lives.
#[test]
fn criu_without_tls_is_refused_there() {
    between_two_hosts(|pair| {
        certify(pair)?;
        let pages = format!("{}:27", pair.cache_address());
        let tls = [&["--tls"], &FILES[..]].concat();
        let _cache = pair.cache(&[&tls[..], &["--page-server", &pages]].concat())?;
        let _proxy = pair.proxy(&tls)?;
        let program = Program::memory(&pair.source, 16, 2)?;

        let to = [
            "--page-server",
            "--address",
            pair.cache_address(),
            "--port",
            "27",
        ];
        let script = ["--action-script", "/opt/image-proxy"];
        let outcome = criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &[&to[..], &script].concat(),
        );

        ensure!(outcome.is_err(), "the dump succeeded without its pages");
        pair.unharmed_on_source(&program)
    });
}

/// The same through image-proxy's page server: CRIU on its own host may take TLS, and need not.
#[test]
fn criu_with_tls_and_without_to_image_proxy() {
    for criu in [true, false] {
        between_two_hosts(|pair| {
            certify(pair)?;
            let tls = [&["--tls"], &FILES[..]].concat();
            let _cache = pair.cache(&tls)?;
            let _proxy = pair.proxy(&[&tls[..], &["--page-server", "27"]].concat())?;
            let program = Program::memory(&pair.source, 64, 2)?;
            let hash = program.ask(&pair.source, "hash")?;

            let mut to = vec!["--page-server", "--address", "127.0.0.1", "--port", "27"];
            to.extend(["--action-script", "/opt/image-proxy"]);
            if criu {
                // image-proxy's certificate does not name 127.0.0.1.
                to.extend(&tls);
                to.push("--tls-no-cn-verify");
            }
            criu_dump(&pair.source, IMAGES, program.pid, &to)?;

            restored(pair, &program, &hash)
        });
    }
}
