//! One function per target, and which of them the program `any` runs: all targets in one program,
//! because building it is what a short run of the fuzzers costs.

use std::env;
use std::process::exit;
use std::sync::OnceLock;

pub mod cache_control;
pub mod cache_link;
pub mod cache_pages;
pub mod cache_remote;
pub mod cache_stream;
pub mod control_lines;
pub mod handshake;
pub mod images_dir;
pub mod inventory;
pub mod link_codec;
pub mod link_reader;
pub mod link_resume;
pub mod names;
pub mod page_server_requests;
pub mod pagemap;
pub mod proxy_control;
pub mod proxy_pages;
pub mod proxy_remote;
pub mod proxy_stream;
pub mod remote_messages;
pub mod stream_messages;
pub mod tls_greeting;

type Run = fn(&[u8]);

/// Has the name of the target that `any` runs.
const VARIABLE: &str = "IMAGE_FUZZ_TARGET";

const TARGETS: [(&str, Run); 22] = [
    ("cache_control", cache_control::run),
    ("cache_link", cache_link::run),
    ("cache_pages", cache_pages::run),
    ("cache_remote", cache_remote::run),
    ("cache_stream", cache_stream::run),
    ("control_lines", control_lines::run),
    ("handshake", handshake::run),
    ("images_dir", images_dir::run),
    ("inventory", inventory::run),
    ("link_codec", link_codec::run),
    ("link_reader", link_reader::run),
    ("link_resume", link_resume::run),
    ("names", names::run),
    ("page_server_requests", page_server_requests::run),
    ("pagemap", pagemap::run),
    ("proxy_control", proxy_control::run),
    ("proxy_pages", proxy_pages::run),
    ("proxy_remote", proxy_remote::run),
    ("proxy_stream", proxy_stream::run),
    ("remote_messages", remote_messages::run),
    ("stream_messages", stream_messages::run),
    ("tls_greeting", tls_greeting::run),
];

/// The program of one target, as cargo-fuzz wants it.
#[macro_export]
macro_rules! fuzz_target {
    ($target:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(init: $crate::world::init(), |bytes: &[u8]| {
            $crate::targets::$target::run(bytes)
        });
    };
}

/// The target that the environment names.
pub fn chosen() -> Run {
    static CHOSEN: OnceLock<Run> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let wanted = env::var(VARIABLE).unwrap_or_default();
        let found = TARGETS.iter().find(|(name, _)| *name == wanted);
        let Some((_, run)) = found else {
            let names = TARGETS.map(|(name, _)| name).join(", ");
            eprintln!("{VARIABLE} is {wanted:?}, and the targets are {names}");
            exit(2);
        };
        *run
    })
}
