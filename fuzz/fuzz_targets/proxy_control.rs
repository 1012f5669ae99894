#![no_main]
image_fuzz::fuzz_target!(proxy_control);
