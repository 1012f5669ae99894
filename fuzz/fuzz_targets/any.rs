//! All targets in one program: IMAGE_FUZZ_TARGET says which one it is.
#![no_main]

use image_fuzz::{targets, world};

libfuzzer_sys::fuzz_target!(init: world::init(), |bytes: &[u8]| targets::chosen()(bytes));
