#![no_main]
image_fuzz::fuzz_target!(images_dir);
