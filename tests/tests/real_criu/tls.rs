//! Real CRIU with its own `--tls`, and the link with ours: one authority for all of them.

use anyhow::ensure;
use e2e_tests::real::pair::TLS;
use e2e_tests::real::{between_two_hosts, Program, IMAGES};

use crate::page_server::{criu_dump, restored};

/// CRIU sends its pages with TLS straight to image-cache, and image-proxy the rest.
#[test]
fn criu_s_own_tls_to_the_target() {
    between_two_hosts(|pair| {
        pair.certify(pair.cache_address())?;
        let pages = format!("{}:27", pair.cache_address());
        let tls = TLS;
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
        pair.certify(pair.cache_address())?;
        let pages = format!("{}:27", pair.cache_address());
        let tls = TLS;
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
            pair.certify(pair.cache_address())?;
            let tls = TLS;
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
