#![no_main]
image_fuzz::fuzz_target!(link_codec);
