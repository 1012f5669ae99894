#![no_main]
image_fuzz::fuzz_target!(control_lines);
